"""`make hosts` says equal where it is, not equal where it is not, and fails then."""

import importlib.util
from pathlib import Path

import pytest

from layerzoo.hosts.recipe import MIXERS

pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h", reason="no transformers, or an older one")


@pytest.fixture
def table():
    path = Path(__file__).parents[2] / "tools" / "hosts_table.py"
    spec = importlib.util.spec_from_file_location("hosts_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PREFILL, module.DECODE, module.TRAIN = 9, 2, 9
    return module


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row(table, capsys):
    assert table.main(["mamba"], seconds=0) == 0
    head, _, row, *_ = map(cells, capsys.readouterr().out.splitlines())
    assert tuple(head) == table.COLUMNS
    assert row[:2] == ["mamba", "MambaMixer"]
    assert [cell.partition(" (")[0] for cell in row[2:6]] == ["equal"] * 4
    assert all(float(cell.removesuffix("x")) > 0 for cell in row[6:])


def test_what_differs_is_not_equal(table, capsys, monkeypatch):
    def another(model, **options):
        table.accelerate_as_it_is(model, **options)
        model.lm_head.weight.data.mul_(1.1)

    table.accelerate_as_it_is = table.accelerate
    monkeypatch.setattr(table, "accelerate", another)
    assert table.main(["mamba"], seconds=0) == 1
    row = cells(capsys.readouterr().out.splitlines()[2])
    assert row[2].startswith("not equal (1e-01")


@pytest.mark.parametrize(("family", "served"), [("mixtral", "accelerated (2)"), ("inkling2", "by name, as grouped_mm")])
def test_a_row_of_experts(table, capsys, family, served):
    assert table.main([family], seconds=0) == 0
    head, _, row, *_ = map(cells, capsys.readouterr().out.splitlines())
    assert tuple(head) == table.EXPERTS_COLUMNS
    assert (row[0], row[3]) == (family, served)
    assert [cell.partition(" (")[0] for cell in row[4:]] == ["equal"] * 3


def test_experts_that_differ_are_not_equal(table, capsys, monkeypatch):
    def another(model, **options):
        table.accelerate_as_it_is(model, **options)
        model.model.layers[0].mlp.experts.down_proj.data.mul_(1.1)

    table.accelerate_as_it_is = table.accelerate
    monkeypatch.setattr(table, "accelerate", another)
    assert table.main(["mixtral"], seconds=0) == 1
    row = cells(capsys.readouterr().out.splitlines()[2])
    assert row[4].startswith("not equal (")


def test_there_is_a_model_of_every_family(table):
    assert table.OPTIONS.keys() == MIXERS.keys()


def test_a_family_that_is_not_there_is_said_to_be_absent(table, monkeypatch):
    monkeypatch.setitem(table.MIXERS, "mamba9", "Mamba9Mixer")
    row = table.row_of("mamba9", 0)
    assert row[:2] == ("mamba9", "Mamba9Mixer")
    assert row[2].startswith("not in transformers ")
    assert len(row) == len(table.COLUMNS)
