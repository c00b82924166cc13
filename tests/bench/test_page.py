"""The page of a report: what it says, that it is sound HTML, and how Chromium shows it."""

import importlib
import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from shutil import which
from typing import get_args

import pytest

from layerzoo.bench.case import Cost, Target
from layerzoo.bench.report import Report, Result, Row, Status, machine

REASON = "the extra [bench] is not installed"
page = pytest.importorskip("layerzoo.bench.page", reason=REASON, exc_type=ImportError)

RATES = {
    "read_bandwidth": 22e9,
    "copy_bandwidth": 19e9,
    "gather_bandwidth": 6e9,
    "cache_bandwidth": 150e9,
    "fma_peak": 230e9,
    "gemm_rate": 190e9,
    "exp_rate": 5e9,
}
HOSTILE = "<script>alert('$x_1$ \"&')</script>"
VOID = {"meta", "br", "wbr"}


def times(median: float, count: int = 9) -> list[float]:
    return [median * (1 + 0.01 * (i - count // 2)) for i in range(count)]


def row(name: str, median: float, memory: float | None = 3e6) -> Row:
    return Row(name, "ok", f"agrees to 1e-07 ({name})", times(median), memory)


def result(*rows: Row, name: str = "toy.double", **changes) -> Result:
    fields = {"variant": "flat", "direction": "forward", "shape": {"n": 50}, "elements": 50}
    return Result(name, rows=list(rows), **fields | changes)


def every_status() -> Result:
    return result(
        row("layerzoo", 1e-3),
        row("quick", 0.5e-3),
        row("alike", 1e-3),
        row("slow", 3e-3),
        Row("slowest", "once", "agrees exactly", [6.5]),
        Row("off", "wrong", "output differs by 2.0e-02"),
        Row("broken", "failed", "RuntimeError: shapes"),
        Row("elsewhere", "absent", "No module named 'elsewhere'"),
        Row("patient", "skipped", "takes minutes"),
        cost=Cost(read=4e6, flops=1e6, exps=1e6),
        limit=0.5e-3,
        bound="memory",
        inputs=10**6,
        targets=[Target("ns/element", at_most=1e6), Target("x slow", at_least=4), Target("x patient", at_least=2)],
    )


def swept(n: int) -> Result:
    late = Row("peer", "skipped", "would take about 90 s") if n > 100 else row("peer", 1e-4 * n, 1e5 * n)
    missing = Row("nowhere", "absent", "No module named 'nowhere'")
    return result(row("layerzoo", 1e-5 * n, 1e4 * n), late, missing, shape={"n": n, "m": 3}, swept="n", threads=2)


def everything() -> Report:
    unsafe = result(
        row("layerzoo", 1e-3),
        row(HOSTILE, 2e-3),
        Row("other", "failed", HOSTILE),
        name="toy.<b>",
        variant="$a_{",
        tokens=50,
        elements=None,
        dtype="bfloat16",
    )
    found = [every_status(), unsafe, result(Row("layerzoo", "ok", "agrees exactly"), name="toy.smoke")]
    found += [swept(n) for n in (10, 100, 1000)]
    return Report(machine(), found, interrupted=True, problems=[f"plugin {HOSTILE}"])


def written(tmp_path: Path, report: Report, rates: dict[str, float] | None = RATES) -> str:
    page.write_page(report, tmp_path / "page.html", rates)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


class Structure(HTMLParser):
    """Fails for a tag that is not closed where it should be; collects what is asked about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"line {self.getpos()[0]}: </{tag}>"

    def handle_data(self, data):
        if "svg" not in self.open and "style" not in self.open:
            self.words.append(data)


def line_of(text: str, name: str) -> str:
    """The words of the first row of a case's table that begins with a name."""
    table = text[text.index("<h2>toy") :]
    cells = re.search(rf'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', table, re.DOTALL)
    assert cells, name
    return " ".join(unescape(re.sub("<[^>]+>", " ", cells[1])).split())


def test_every_status_is_shown_and_only_times_win(tmp_path):
    text = written(tmp_path, Report(machine(), [every_status()]))
    assert {candidate.status for candidate in every_status().rows} == set(get_args(Status))
    assert line_of(text, "layerzoo") == "1 ms 970 µs - 1.03 ms 20,000 ns/element 3 MB 9 agrees to 1e-07 (layerzoo)"
    assert "▼ 0.5x, slower 0.5 to 0.5 3 MB 9" in line_of(text, "quick")
    assert "≈ 1x, within the noise" in line_of(text, "alike")
    assert "▲ 3x faster" in line_of(text, "slow")
    assert "◇ 6,500x, run once" in line_of(text, "slowest")
    assert line_of(text, "slowest").endswith("once agrees exactly")
    assert line_of(text, "off") == "○ wrong : output differs by 2.0e-02"
    assert line_of(text, "broken") == "○ failed : RuntimeError: shapes"
    assert line_of(text, "elsewhere") == "○ absent : No module named 'elsewhere'"
    assert line_of(text, "patient") == "○ skipped : takes minutes"
    counted = "1 faster, 1 within the noise, 1 slower, 1 run once, 1 wrong, 1 failed, 1 absent, 1 skipped."
    assert counted in text
    assert "50 %" in text  # of the limit


def test_few_runs_are_no_verdict(tmp_path):
    few = Row("peer", "ok", "", [1.0, 1.1])
    text = written(tmp_path, Report(machine(), [result(Row("layerzoo", "ok", "", [0.1, 0.1]), few)]))
    assert "◇ 10.5x, too few runs" in line_of(text, "peer")
    assert "10.5x too few runs" in text  # beside the bar


def test_targets_are_met_missed_or_not_measured(tmp_path):
    text = written(tmp_path, Report(machine(), [every_status()]))
    rows = re.findall(r"<td>(ns/element|x \w+)</td>(.*?)</tr>", text, re.DOTALL)
    verdicts = {metric: " ".join(re.sub("<[^>]+>", " ", rest).split()) for metric, rest in rows}
    assert verdicts["ns/element"].endswith("✓ met")
    assert verdicts["x slow"] == "3 &gt;= 4 ✗ missed"
    assert verdicts["x patient"] == "&gt;= 2 not measured"


def test_machine_rates_interruption_and_problems(tmp_path):
    report = everything()
    text = unescape(written(tmp_path, report))
    for value in report.machine.values():
        facts = value.values() if isinstance(value, dict) else [value]
        assert all(f"<td>{'none' if fact is None else fact}</td>" in text for fact in facts)
    for words in ("22 GB/s", "230 G/s", "5 G/s", "The run was interrupted", f"Not measured: plugin {HOSTILE}"):
        assert words in text


def test_curves_for_sweeps_alone_and_bars_for_the_rest(tmp_path):
    text = written(tmp_path, Report(machine(), [swept(10), swept(100), swept(1000)]), None)
    assert text.count("<svg") == 2
    for words in ("Time by n: toy.double/flat/forward, float32, 2 threads, m3", "Memory by n", "peer (skipped)"):
        assert words in text
    assert "nowhere (absent)" in text
    assert text.count("Slope: over the last 3 sizes; 1 is linear growth.") == 4  # two captions, two labels
    assert text.count("layerzoo, slope 1.00") == 2
    text = written(tmp_path, Report(machine(), [result(row("layerzoo", 1e-3), row("peer", 2e-3))]), RATES)
    assert text.count("<svg") == 1
    assert "time of the peer / time of ours" in text


def test_slopes_are_those_of_the_last_sizes():
    slope = importlib.import_module("layerzoo.bench.plots").slope
    points = [(1, 5.0), (4, 5.0), (16, 6.0), (64, 24.0), (256, 96.0)]
    assert slope(points) == pytest.approx(1)
    assert slope([(size, 7 * size**2) for size, _ in points]) == pytest.approx(2)
    assert slope(points[:2]) == pytest.approx(0)
    assert slope(points[:1]) is slope([(4, 1.0), (4, 2.0)]) is slope([]) is None


@pytest.mark.parametrize("rates", [None, {}, {"exp_rate": 5e9}, {"read_bandwidth": 2e10}, RATES])
def test_roofline_where_there_are_rates_and_a_cost(tmp_path, rates):
    costly = result(row("layerzoo", 1e-3), cost=Cost(read=1e6, products=1e7))
    assert ("operations / byte" in written(tmp_path, Report(machine(), [costly]), rates)) == bool(rates)
    for cost in (None, Cost(), Cost(read=1e6), Cost(flops=1e6)):
        assert "<svg" not in written(tmp_path, Report(machine(), [result(row("layerzoo", 1e-3), cost=cost)]), rates)


def test_sections_without_content_are_left_out(tmp_path):
    text = written(tmp_path, Report(machine()), None)
    assert "<h2" not in text and "<svg" not in text and 'class="notice"' not in text
    text = written(tmp_path, Report(machine(), [result(Row("layerzoo", "ok", "agrees exactly"))]), None)
    assert re.findall("<h2>(.*?)</h2>", text) == ["Overview", "toy.double"]
    assert "checked, not timed" in text
    assert "layerzoo against its peers" not in text


def test_markup_in_names_and_reasons_is_text(tmp_path):
    text = written(tmp_path, everything())
    found = Structure(text)
    assert not {"script", "b", "link", "img", "iframe"} & set(found.seen)
    words = "".join(found.words)
    for shown in (f"plugin {HOSTILE}", f"failed: {HOSTILE}", "toy.<b>/$a_{/forward"):
        assert shown in words
    assert "$a_{" in text[text.index("<svg") :]  # drawn as it is, not read as a formula


def test_structure_is_sound_and_nothing_is_loaded(tmp_path):
    text = written(tmp_path, everything())
    found = Structure(text)
    assert text.lstrip().startswith("<!doctype html>")
    assert len(found.ids) == len(set(found.ids))
    assert found.links and all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in found.ids}
    assert "@import" not in text
    assert "http" not in re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)


def test_saved_and_loaded_it_is_the_same_page(tmp_path):
    report = everything()
    report.save(tmp_path / "report.json")
    assert written(tmp_path, Report.load(tmp_path / "report.json")) == written(tmp_path, report)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_the_import_says_so(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("page", "plots"):
        monkeypatch.delitem(sys.modules, f"layerzoo.bench.{name}")
    with pytest.raises(ImportError, match=r"the page needs the extra \[bench\]: pip install 'layerzoo\[bench\]'"):
        importlib.import_module("layerzoo.bench.page")


# ---- Chromium ----

CHROMIUM = which("chromium")
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
# No window is narrower than 500 pixels, so the page stands in a frame, and tells its measures to the outside.
MEASURE = """<script>
addEventListener("load", () => parent.postMessage({
  inner: innerWidth,
  scroll: document.documentElement.scrollWidth,
  svgs: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height]),
  outside: [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll > *, svg *") && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map(e => e.tagName),
}, "*"));
</script>"""
FRAME = """<!doctype html><body><script>
addEventListener("message", event => { document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = "measured " + JSON.stringify(event.data) + " end"; });
</script><iframe src="inside.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe></body>"""


def shown(folder: Path, text: str, width: int) -> tuple[dict, str]:
    """What the page measures at a width, and what Chromium wrote to its console."""
    (folder / "inside.html").write_text(text.replace("</head>", f"{MEASURE}</head>"), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *options, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search("measured (.*) end", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), done.stderr


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_chromium_shows_it_without_overflow(tmp_path, width):
    text = written(tmp_path, everything()).replace("<details>", "<details open>")
    measured, console = shown(tmp_path, text, width)
    assert measured["inner"] == width
    assert measured["scroll"] <= width
    assert measured["outside"] == []
    assert len(measured["svgs"]) == text.count("<svg") == 5
    assert all(min(size) > 50 for size in measured["svgs"])
    assert ":CONSOLE" not in console


@browser
def test_the_browser_test_sees_faults(tmp_path):
    text = '<!doctype html><html><head></head><body><p style="width: 900px">wide</p><svg width="0"></svg>'
    measured, console = shown(tmp_path, text + "<script>console.error('boo')</script></body></html>", 390)
    assert measured["scroll"] > 390
    assert measured["outside"] == ["P"]
    assert measured["svgs"][0][0] == 0
    assert ":CONSOLE" in console
