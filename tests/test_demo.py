"""The demo at its smallest."""

import re
import sys

import pytest
import torch

demo = pytest.importorskip("layerzoo.demo", reason="the extra [bench] is not installed", exc_type=ImportError)
HOSTS = ("transformers", "timm", "diffusers", "sklearn")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_quick_demo_learns_accelerates_and_writes_a_page(tmp_path, capsys):
    for host in HOSTS:
        pytest.importorskip(host, reason="all hosts have to be installed")
    demo.run_demo(tmp_path / "new", quick=True)
    page = (tmp_path / "new" / "report.html").read_text()
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL)]
    table = {row[0]: row[1:] for row in rows if row}
    before, after, _ = table["bits per byte, held-out"]
    assert float(after) <= 4.0 < 7.0 < float(before)
    before, after, _ = table["right answers, held-out"]
    assert float(before.rstrip("%")) < 30 < 50 <= float(after.rstrip("%"))
    before, after, _ = table["squared error of the noise, held-out"]
    assert float(after) <= 0.6 < 0.9 < float(before)
    noise, made, real = table["distance to the nearest digit"]
    assert 0 < float(real.removeprefix("held-out digits: ")) < float(made) < 0.6 * float(noise)
    assert float(table["largest difference of logits"][1]) < 1e-4
    assert re.fullmatch(r"[0-9.]+x", table["prefill of 32 tokens"][2])
    assert page.count("<svg") == page.count("</svg>") == 6
    for words in (
        "training batch",
        "% of the host",
        "real, held-out",
        "experts in use",
        "data:image/png;base64",
    ):  # in the plots
        assert words in page
    assert "<pre>The " in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.replace('xlink:href="#', ""))
    assert "layerzoo demo" in capsys.readouterr().out


def test_without_hosts_the_demo_goes_on_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for host in HOSTS:
        monkeypatch.setitem(sys.modules, host, None)
    demo.run_demo(tmp_path, quick=True)
    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert "bits per byte, held-out" in out
    for host in ("transformers", "timm", "diffusers"):
        assert len(re.findall(rf"^.+: Not run: import of {host} halted", out, re.MULTILINE)) == 1
        assert f"<p>Not run: import of {host} halted" in page


def test_a_fault_of_our_own_is_no_missing_host(tmp_path, monkeypatch):
    def part(quick, progress):
        from layerzoo.hosts import nothing  # noqa: F401

    monkeypatch.setattr(demo, "PARTS", {"A part": part})
    with pytest.raises(ImportError, match="nothing"):
        demo.run_demo(tmp_path, quick=True)


def test_a_model_that_does_not_learn_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(RuntimeError, match=r"bits per byte: .+ after 40 steps, the goal is 4\.00"):
        demo.run_demo(tmp_path, quick=True)
    assert not (tmp_path / "report.html").exists()
