import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from layerzoo import cli, doctor
from layerzoo.zoo import list_layers
from layerzoo.zoo.plugins import PluginInfo


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_list_prints_names_and_summaries() -> None:
    result = run("list")
    assert result.exit_code == 0
    assert "ssm/mamba" in result.stdout
    assert "Selective state-space block" in result.stdout


def test_list_filters_and_prints_json() -> None:
    cards = json.loads(run("list", "ssm/*", "--family", "ssm", "--domain", "language", "--json").stdout)
    names = [card["name"] for card in cards]
    assert names == list_layers("ssm/*", family="ssm", domain="language")
    assert "ssm/mamba" in names and "ssm/vision_mamba" not in names
    assert cards[0]["config"]["d_model"]["required"] is True


def test_an_empty_list_is_no_error() -> None:
    result = run("list", "nothing*")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no layer matches 'nothing*'" in result.stderr
    assert json.loads(run("list", "nothing*", "--json").stdout) == []


def test_card_shows_what_the_card_says() -> None:
    result = run("card", "ssm/mamba")
    assert result.exit_code == 0
    for words in ("layerzoo.nn:Mamba", "(2023)", "(batch, length, d_model)", "d_state: int = 16", "import torch"):
        assert words in result.stdout
    assert json.loads(run("card", "ssm/mamba", "--json").stdout)["target"] == "layerzoo.nn:Mamba"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["card", "mamba"], "layerzoo: card: no layer is named 'mamba'; did you mean 'ssm/mamba' or 'ssm/mamba2'?"),
        (["list", "--family", "smm"], "layerzoo: list_layers: family must be one of"),
        (["list", "--domain", "nowhere"], "layerzoo: list_layers: domain must be one of"),
        (["new-plugin", "My-Plugin"], "NAME must be a lower-case word"),
        (["new-plugin", "mine", "--out", __file__], "exists and is not an empty folder"),
        (["bench", "--threads", "0"], "threads must be at least 1"),
        (["card"], "Missing argument"),
        (["no-such-command"], "No such command"),
    ],
)
def test_user_errors_are_messages(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_malformed_environment_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZOO_PLUGINS", "deny:")
    result = run("list")
    assert result.exit_code == 2
    assert "LAYERZOO_PLUGINS must be" in result.stderr


@pytest.mark.parametrize("command", ["list", "card ssm/mamba", "--help"])
def test_light_commands_import_nothing_heavy(command: str) -> None:
    code = f"""
import sys
from layerzoo.cli import app
app({command.split()}, standalone_mode=False)
heavy = {{"torch", "transformers", "numpy", "layerzoo_language"}} & sys.modules.keys()
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


PLUGINS = [
    PluginInfo("good", "ok", "", "fake-good", "1.0"),
    PluginInfo("bad", "broken", "still importing after 60 s \x1b[31m[bold]", "fake-bad", "2.0"),
]


@pytest.fixture
def fake_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "plugins", lambda: PLUGINS)
    monkeypatch.setattr(doctor, "probe", lambda info, timeout: info)


@pytest.mark.usefixtures("fake_plugins")
def test_doctor_says_what_is_there_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setitem(doctor.HOSTS, "no_such_host", "extra")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for words in (
        torch.__version__,
        "native library",
        "instruction set",
        "CUDA",
        "LAYERZOO_NATIVE",
        "LAYERZOO_CPU",
        "LAYERZOO_PLUGINS",
        "LAYERZOO_CHECK",
        "not installed: pip install 'layerzoo[extra]'",
        "good (fake-good 1.0)",
        "broken: still importing after 60 s ?[31m[bold]",  # neither markup nor control characters pass
    ):
        assert words in result.stdout
    assert "\x1b[31m" not in result.stdout


@pytest.mark.usefixtures("fake_plugins")
def test_doctor_prints_json() -> None:
    report = json.loads(run("doctor", "--json").stdout)
    assert report["ok"] is True
    assert report["plugins"][1]["state"] == "broken"
    assert set(report["native"]) == {"loaded", "reason", "library", "isa", "available", "cuda"}


@pytest.mark.usefixtures("fake_plugins")
@pytest.mark.parametrize(("asked", "code"), [("require", 1), ("auto", 0), ("0", 0)])
def test_doctor_fails_only_where_the_native_library_is_required(
    monkeypatch: pytest.MonkeyPatch, asked: str, code: int
) -> None:
    missing = {"loaded": False, "reason": "no compiler", "library": None, "isa": "none", "available": [], "cuda": ""}
    monkeypatch.setattr(doctor, "_native", lambda: missing)
    monkeypatch.setenv("LAYERZOO_NATIVE", asked)
    result = run("doctor")
    assert result.exit_code == code
    assert "not loaded: no compiler" in result.stdout


def test_doctor_reports_a_malformed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZOO_PLUGINS", "deny:")
    monkeypatch.setenv("LAYERZOO_NATIVE", "perhaps")
    result = run("doctor")
    assert result.exit_code == 0
    assert "problem: LAYERZOO_PLUGINS must be" in result.stdout
    assert "LAYERZOO_NATIVE must be" in result.stdout


def test_a_new_plugin_installs_is_found_and_conforms(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    result = run("new-plugin", "mine", "--out", str(folder))
    assert result.exit_code == 0, result.output
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {
        "README.md",
        "pyproject.toml",
        "layerzoo_mine/__init__.py",
        "layerzoo_mine/bench.py",
        "layerzoo_mine/layer_scale.py",
        "layerzoo_mine/layerzoo.toml",
        "layerzoo_mine/py.typed",
        "tests/test_conformance.py",
    }
    assert not any("{{" in (folder / name).read_text() for name in written)

    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(folder)], check=True)
    paths = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    listed = subprocess.run(
        [sys.executable, "-m", "layerzoo.cli", "list", "mine:*", "--json"],
        env=environment, capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert [card["name"] for card in json.loads(listed.stdout)] == ["mine:layer_scale"]
    measured = subprocess.run(
        [sys.executable, "-m", "layerzoo.cli", "bench", "mine:*", "--threads", "1", "--sweep", "L=1,3"],
        env=environment, capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert measured.stdout.count("mine:layer_scale/forward") == 2
    assert "mine: failed" not in measured.stdout
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout
    assert "15 passed" in tests.stdout
