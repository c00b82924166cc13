"""A plugin is found by reading, never by importing; a broken one breaks only itself."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerzoo.zoo import LayerImportError, card, create, layer_class, list_layers
from layerzoo.zoo.plugins import PluginInfo, plugins, probe

Install = Callable[..., str]


def info(name: str) -> PluginInfo:
    (found,) = [plugin for plugin in plugins() if plugin.name == name]
    return found


def assert_others_work() -> None:
    assert "ssm/mamba" in list_layers()
    assert list_layers("good:*") == ["good:scale"]
    assert create("good:scale", factor=3)(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]


def test_a_plugin_is_listed_without_being_imported(install: Install) -> None:
    package = install("good", source="raise RuntimeError('imported')")
    assert info("good").state == "ok"
    assert info("good").distribution == "fake-good"
    assert list_layers("good:*") == ["good:scale"]
    assert card("good:scale").config["factor"].default == 2.0
    assert package not in sys.modules


def test_a_dotted_package_is_not_imported_either(install: Install, tmp_path: Path) -> None:
    package = install("good", source="raise RuntimeError('imported')")
    inner = tmp_path / package / "inner"
    inner.mkdir()
    (tmp_path / package / "layerzoo.toml").rename(inner / "layerzoo.toml")
    (tmp_path / f"{package}-1.0.dist-info" / "entry_points.txt").write_text(
        f"[layerzoo.plugins]\ngood = {package}.inner\n"
    )
    assert list_layers("good:*") == ["good:scale"]
    assert package not in sys.modules


RAISES = {
    "an exception": ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
    "an exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "a missing dependency": ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    "a syntax error": ("def (", "SyntaxError: "),
    "a lie about the target": ("", "AttributeError: module 'fake_bad' has no attribute 'Scale'"),
    "a target that is no class": ("Scale = 3", "must be a subclass of torch.nn.Module, got 3"),
    "a target that is no module": ("class Scale: pass", "must be a subclass of torch.nn.Module, got <class"),
}


@pytest.mark.parametrize(("source", "message"), RAISES.values(), ids=RAISES.keys())
def test_a_plugin_that_fails_on_import_fails_alone(install: Install, source: str, message: str) -> None:
    install("good")
    install("bad", source=source)
    assert card("bad:scale").summary == "Multiplies by a number."
    with pytest.raises(LayerImportError, match="bad:scale") as caught:
        create("bad:scale")
    assert message in str(caught.value)
    assert_others_work()
    probed = probe(info("bad"))
    assert probed.state == "broken"
    assert message in probed.error


def test_a_plugin_that_hangs_on_import_is_reported_and_hurts_nobody(install: Install) -> None:
    install("good")
    install("bad", source="import time\nprint('never mind')\ntime.sleep(600)")
    assert info("bad").state == "ok"  # it says so itself; only an import could tell
    assert_others_work()
    probed = probe(info("bad"), timeout=8)
    assert probed.state == "broken"
    assert probed.error == "still importing after 8 s"


def test_a_plugin_that_prints_or_leaves_early_does_not_fool_the_probe(install: Install) -> None:
    install("good", preamble="print('x' * 100_000)")
    assert probe(info("good")).state == "ok"
    install("bad", source="import os; os._exit(0)")
    assert probe(info("bad")).error == "no message (exit status 0)"


BROKEN = {
    "no TOML": ("api = ", "not TOML"),
    "not UTF-8": (b"\xff\xfe\x00", "UnicodeDecodeError"),
    "newer api": ("api = 99\n[something.new]", "speaks api 99, this layerzoo reads api 1: upgrade layerzoo"),
    "wrong type": ("api = 1\nlayers = 3", "manifest.layers must be a table, got 3"),
    "unknown key": ("api = 1\n[layer.x]", "unknown key 'layer'; did you mean 'layers'"),
    "another's name": ('api = 1\n[layers."ssm/mamba"]', "must be a lower-case word, got 'ssm/mamba'"),
    "too long": (b"#" * (1 << 20) + b"\n", "at most 1048576 are read"),
}


@pytest.mark.parametrize(("manifest", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_manifest_breaks_its_plugin_only(
    install: Install, caplog: pytest.LogCaptureFixture, manifest: str | bytes, message: str
) -> None:
    install("good")
    install("bad", manifest=manifest)
    assert info("bad").state == "broken"
    assert message in info("bad").error
    with caplog.at_level(logging.WARNING, "layerzoo"):
        assert_others_work()
    with pytest.raises(ValueError, match="card: 'bad:scale' is not available, its plugin is broken: "):
        card("bad:scale")
    # The failure is not remembered: the mended plugin works at once.
    install("bad")
    assert info("bad").state == "ok"
    assert list_layers("bad:*") == ["bad:scale"]


def test_a_broken_plugin_is_logged_once(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("bad", manifest="api = 1\nlayers = 'logged once'")
    with caplog.at_level(logging.WARNING, "layerzoo"):
        list_layers()
        list_layers()
    assert [record.getMessage() for record in caplog.records] == [
        "plugin bad is broken: manifest.layers must be a table, got 'logged once' (see `layerzoo doctor`)"
    ]


@pytest.mark.parametrize(
    ("entry_points", "name", "message"),
    [
        ("[layerzoo.plugins]\nbad = ../../etc\n", "bad", "the entry point must name a package, got '../../etc'"),
        ("[layerzoo.plugins]\nbad = /etc/passwd\n", "bad", "must name a package, got '/etc/passwd'"),
        ("[layerzoo.plugins]\nbad = no_such_package\n", "bad", "the package no_such_package has no layerzoo.toml"),
        ("[layerzoo.plugins]\nbad = json\n", "bad", "the package json has no layerzoo.toml"),
        ("[layerzoo.plugins]\nbad = sys\n", "bad", "the package sys has no layerzoo.toml"),
        ("[layerzoo.plugins]\nBad/x = fake_bad\n", "Bad/x", "a plugin's name must be a lower-case word, got 'Bad/x'"),
        ("[layerzoo.plugins]\nbad\n", "fake-bad", "unreadable entry_points.txt"),
    ],
)
def test_a_broken_entry_point_breaks_its_plugin_only(
    install: Install, entry_points: str, name: str, message: str
) -> None:
    install("good")
    install("bad", entry_points=entry_points)
    assert info(name).state == "broken"
    assert message in info(name).error
    assert_others_work()


def test_broken_metadata_breaks_nothing(install: Install) -> None:
    install("good")
    install("bad", metadata="")
    install("worse", metadata="Name")
    assert_others_work()
    for name in ("bad", "worse"):
        assert (info(name).state, info(name).distribution, info(name).version) == ("ok", "unknown", "unknown")


def test_two_plugins_of_one_name_are_both_refused_and_named(install: Install) -> None:
    install("good")
    install("twin", distribution="fake-first")
    install("twin", distribution="fake-second")
    twins = [plugin for plugin in plugins() if plugin.name == "twin"]
    assert [twin.state for twin in twins] == ["broken", "broken"]
    for twin in twins:
        assert "'twin' is claimed more than once" in twin.error
        assert "fake-first" in twin.error
        assert "fake-second" in twin.error
    assert list_layers("twin:*") == []
    assert_others_work()


def test_a_plugin_that_registers_twice_is_refused(install: Install) -> None:
    install("good")
    install("twice", entry_points="[layerzoo.plugins]\ntwice = fake_twice\ntwice = fake_other\n")
    states = {(plugin.state, "fake_twice" in plugin.error) for plugin in plugins() if plugin.name == "twice"}
    assert states == {("broken", True)}
    assert_others_work()


@pytest.mark.parametrize(
    ("value", "states"),
    [
        ("", {"good": "ok", "bad": "ok"}),
        ("none", {"good": "denied", "bad": "denied"}),
        ("good", {"good": "ok", "bad": "denied"}),
        ("good, bad", {"good": "ok", "bad": "ok"}),
        ("deny:bad", {"good": "ok", "bad": "denied"}),
        ("good,absent", {"good": "ok", "bad": "denied", "absent": "missing"}),
    ],
)
def test_the_environment_allows_and_denies(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str, states: dict[str, str]
) -> None:
    install("good")
    install("bad")
    monkeypatch.setenv("LAYERZOO_PLUGINS", value)
    assert {plugin.name: plugin.state for plugin in plugins() if plugin.name in ("good", "bad", "absent")} == states
    assert ("bad:scale" in list_layers()) == (states["bad"] == "ok")
    if states["bad"] == "denied":
        with pytest.raises(ValueError, match="its plugin is denied: LAYERZOO_PLUGINS does not allow it"):
            create("bad:scale")


@pytest.mark.parametrize("value", ["deny:", "a,,b", "Good", "deny:a;b", "all plugins"])
def test_a_malformed_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LAYERZOO_PLUGINS", value)
    with pytest.raises(ValueError, match="LAYERZOO_PLUGINS must be none, a list a,b of plugin names, or deny:a,b"):
        list_layers()


def test_a_failed_import_is_tried_again(install: Install) -> None:
    package = install("bad", source="raise RuntimeError('not yet')")
    with pytest.raises(LayerImportError, match="not yet"):
        layer_class("bad:scale")
    install("bad", preamble="# mended")
    assert layer_class("bad:scale").__module__ == package


def test_no_plugin_can_take_a_core_name(install: Install) -> None:
    install("ssm")  # the prefix is all it gets: its layers are ssm:..., never ssm/...
    names = list_layers("ssm[:/]*")
    assert names == [*list_layers("ssm/*"), "ssm:scale"]
    assert "ssm/mamba" in names
    assert card("ssm/mamba").target == "layerzoo.nn:Mamba"
