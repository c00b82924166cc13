"""The demo at its smallest."""

import re

import pytest
import torch

demo = pytest.importorskip("layerzoo.demo", reason="the extra [bench] is not installed", exc_type=ImportError)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_quick_demo_learns_accelerates_and_writes_a_page(tmp_path, capsys):
    pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    demo.run_demo(tmp_path / "new", quick=True)
    page = (tmp_path / "new" / "report.html").read_text()
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL)]
    table = {row[0]: row[1:] for row in rows if row}
    before, after, _ = table["bits per byte, held-out"]
    assert float(after) <= 4.0 < 7.0 < float(before)
    assert float(table["largest difference of logits"][1]) < 1e-4
    assert re.fullmatch(r"[0-9.]+x", table["prefill of 32 tokens"][2])
    assert page.count("<svg") == page.count("</svg>") == 2
    for words in ("training batch", "held-out text", "% of the host"):  # in the two plots
        assert words in page
    assert "<pre>The " in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.replace('xlink:href="#', ""))
    assert "layerzoo demo" in capsys.readouterr().out


def test_a_model_that_does_not_learn_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(RuntimeError, match=r"bits per byte after 100 steps, the goal is 4\.0"):
        demo.run_demo(tmp_path, quick=True)
    assert not (tmp_path / "report.html").exists()
