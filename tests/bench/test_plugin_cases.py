"""Cases that plugins bring, and the command line of the benchmarks."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerzoo.bench import cases
from layerzoo.cli import app
from layerzoo.zoo.plugins import PluginInfo

SOURCE = """
import torch
from layerzoo.bench import Candidate, Case, Work

def numbers(shape):
    return torch.arange(1.0, shape["n"] + 1)

def double(x):
    return Work(lambda: x * 2)

def half(x):
    return Work(lambda: x / 2)

def exact(x):
    return Work(lambda: x.double() * 2)

CASES = [
    Case("{name}", "", "forward", {{"n": 9}}, {{"n": 3}}, numbers, Candidate("mine", {ours}), Candidate("exact", exact))
]
"""


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Adds a plugin called mine, whose module of cases has the given source, to those installed: none."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(source: str, module: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.setattr(cases, "plugins", lambda: [PluginInfo("mine", "ok", bench=module)])

    return install


def test_cases_of_a_plugin_are_run(plugin, tmp_path):
    plugin(SOURCE.format(name="mine:double", ours="double"), "fake_cases_right")
    path = tmp_path / "records.json"
    result = run("mine:*", "--threads", "1", "--json", path)
    assert result.exit_code == 0, result.output
    [record] = json.loads(path.read_text())["results"]
    assert (record["name"], record["shape"], record["rows"][0]["status"]) == ("mine:double", {"n": 9}, "ok")
    assert record["rows"][0]["median"] > 0


def test_a_wrong_case_of_a_plugin_fails_the_run(plugin):
    plugin(SOURCE.format(name="mine:double", ours="half"), "fake_cases_wrong")
    result = run("mine:*", "--smoke")
    assert result.exit_code == 1
    assert "mine: wrong, output differs by 7.5e-01, allowed 3e-05" in result.output


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("", "AttributeError: module 'fake_cases_{}' has no attribute 'CASES'"),
        ("CASES = [3]", "TypeError: fake_cases_{}.CASES must hold cases, got 3"),
        (SOURCE.format(name="ssm.selective_scan", ours="double"), "must be called mine:something"),
        (SOURCE.format(name="mine:x", ours="double") + "CASES *= 2", "two cases are called mine:x/forward"),
    ],
)
def test_a_broken_plugin_keeps_nobody_from_running(plugin, source, problem, request):
    number = request.node.callspec.indices["source"]
    plugin(source, f"fake_cases_{number}")
    result = run("linear.skinny_linear/M1", "--smoke")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "layerzoo: ok, agrees to" in text
    assert "the cases of plugin mine: " in text
    assert problem.format(number) in text
    assert run("mine:*").exit_code == 2
    assert problem.format(number) in " ".join(run("mine:*").output.split())


def test_the_list_names_sizes_types_and_peers():
    result = run("ssm.selective_scan/time-last", "--list")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for word in ("ssm.selective_scan", "D=1536", "bfloat16", "mambapy"):
        assert word in text


def test_files_are_not_overwritten_unasked(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text("precious")
    result = run("linear.skinny_linear/M1", "--smoke", "--json", path)
    assert result.exit_code == 2
    assert f"bench: {path} exists; --force writes over it" in result.output.replace("\n", "")
    assert path.read_text() == "precious"
    assert run("linear.skinny_linear/M1", "--smoke", "--json", path, "--force").exit_code == 0
    assert json.loads(path.read_text())["results"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "pattern must match a case, got 'nothing'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--threads", "many"], "threads must be numbers such as 1,2, got 'many'"),
        (["--dtype", "int8"], "dtype must be one of float64, float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["--sweep", "L=9:1:x2"], "sweep must have 1 to 24 values"),
        (["ssm.*", "--sweep", "Q=1,2"], "no case of 'ssm.*' has a size Q"),
        (["--json", "no/such/folder.json"], "must be in a folder that exists"),
        (["--compare", "a.json", "b.json"], "a.json"),
        (["--compare", "a.json", "b.json", "--against", "HEAD"], "cannot be used together"),
    ],
)
def test_wrong_words_are_messages(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
