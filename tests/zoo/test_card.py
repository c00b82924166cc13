import json
from dataclasses import replace

import pytest

from layerzoo.zoo import LayerCard, ManifestError, Option, card, list_layers
from layerzoo.zoo.card import parse_manifest

GOOD = """
api = 1

[layers.memory]
target = "package.module:Memory"
domain = "language"
family = "memory"
summary = "A memory."
licence = "Apache-2.0"
paper = { title = "Large Memory", year = 2019, catalogue = 7 }
dtypes = ["float32"]

[layers.memory.config]
dim = { type = "int" }
heads = { type = "int", default = 4 }
mode = { type = "str", default = "fast", choices = ["fast", "exact"] }
rank = { type = "int|str", default = "auto" }
scale = { type = "float|none" }

[layers.memory.inputs]
x = ["batch", "dim", "3"]

[layers.memory.outputs]
y = ["batch", "dim"]

[layers.memory.sample]
config = { dim = 8 }
dims = { batch = 2 }
"""


def test_a_manifest_becomes_cards() -> None:
    (memory,) = parse_manifest(GOOD, "mine").cards
    assert memory.name == "mine:memory"
    assert memory.paper is not None
    assert memory.paper.catalogue == 7
    assert memory.config["dim"].required
    assert not memory.config["scale"].required
    assert memory.config["scale"].default is None
    assert memory.inputs == {"x": ("batch", "dim", "3")}
    assert memory.sizes({"dim": 8}) == {"batch": 2, "dim": 8, "heads": 4}
    assert parse_manifest(GOOD, None).cards[0].name == "memory/memory"


def test_a_card_is_jsonable() -> None:
    data = json.loads(json.dumps(parse_manifest(GOOD, "mine").cards[0].to_dict()))
    assert data["config"]["dim"] == {"type": "int", "choices": [], "summary": "", "required": True}
    assert data["config"]["heads"]["default"] == 4
    assert data["outputs"] == {"y": ["batch", "dim"]}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("api = 1", "api = 2", "speaks api 2, this layerzoo reads api 1: upgrade layerzoo"),
        ("api = 1", "api = 0", "upgrade the plugin"),
        ("api = 1", "api = true", "api must be an integer, got True"),
        ("api = 1", "", "api must be an integer, got None"),
        ("api = 1", "api = ", "not TOML"),
        ("api = 1", "api = 1\nx = " + "[" * 100_000, "not TOML"),
        ("api = 1", "api = 1\nbench = '../evil'", "manifest.bench must be a module like package.bench, got '../evil'"),
        ("api = 1", "api = 1\nlayer = 3", "manifest has an unknown key 'layer'; did you mean 'layers'"),
        ("dtypes =", "dtype =", "layers.memory has an unknown key 'dtype'; did you mean 'dtypes'"),
        ('dtypes = ["float32"]', 'dtypes = "float32"', "layers.memory.dtypes must be a list of texts, got 'float32'"),
        ('["float32"]', '["float8"]', "mine:memory: dtypes must be among float64, float32.*got 'float8'"),
        ('domain = "language"', "", "layers.memory lacks domain"),
        ('domain = "language"', "domain = 3", "layers.memory.domain must be text, got 3"),
        ('domain = "language"', 'domain = "Two Words"', "domain must be a lower-case word"),
        ('summary = "A memory."', 'summary = "\\u001b[2J"', "layers.memory.summary must be text"),
        ("layers.memory]", 'layers."ssm/mamba"]', "a layer's name must be a lower-case word, got 'ssm/mamba'"),
        ("layers.memory]", 'layers."other:x"]', "a layer's name must be a lower-case word, got 'other:x'"),
        ("package.module:Memory", "../../evil.py:Memory", "target must be package.module:Class, got '../../evil.py"),
        ("package.module:Memory", "/etc/passwd", "target must be package.module:Class"),
        ("package.module:Memory", "package.module", "target must be package.module:Class"),
        ("year = 2019", 'year = "2019"', "layers.memory.paper.year must be an integer, got '2019'"),
        ('dim = { type = "int" }', "dim = 3", "layers.memory.config.dim must be a table, got 3"),
        ('dim = { type = "int" }', 'dim = { type = "integer" }', r"config.dim.type must be int\|float"),
        ("default = 4", "default = 4.5", "config.heads must be int, got 4.5"),
        ('default = "fast"', 'default = "slow"', "config.mode must be one of 'fast', 'exact', got 'slow'"),
        ('"dim", "3"]', '"width"]', "inputs.x must be dimensions found in config or in sample.dims, got 'width'"),
        ('["batch", "dim", "3"]', "3", "layers.memory.inputs.x must be a list of texts, got 3"),
        ("config = { dim = 8 }", "config = { }", "sample: mine:memory needs dim"),
        ("batch = 2", "batch = 0", "layers.memory.sample.dims.batch must be a positive integer, got 0"),
    ],
)
def test_a_wrong_manifest_is_named(old: str, new: str, message: str) -> None:
    broken = GOOD.replace(
        f"[{old}" if old.startswith("layers") else old, f"[{new}" if old.startswith("layers") else new
    )
    assert broken != GOOD
    with pytest.raises(ValueError, match=message):
        parse_manifest(broken, "mine")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"dim": 8, "head": 2}, ValueError, "create: mine:memory has no option 'head'; did you mean 'heads'"),
        ({"dim": 8, "zzz": 2}, ValueError, "has no option 'zzz'; there is dim, heads, mode, rank, scale"),
        ({}, ValueError, "create: mine:memory needs dim"),
        ({"dim": "8"}, TypeError, "mine:memory: dim must be int, got '8'"),
        ({"dim": True}, TypeError, "dim must be int, got True"),
        ({"dim": None}, TypeError, "dim must be int, got None"),
        ({"dim": 8, "rank": 2.5}, TypeError, "rank must be int or str, got 2.5"),
        ({"dim": 8, "mode": "slow"}, ValueError, "mode must be one of 'fast', 'exact', got 'slow'"),
    ],
)
def test_a_wrong_configuration_is_named(config: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_manifest(GOOD, "mine").cards[0].check_config(config)


def test_right_configurations_pass() -> None:
    memory = parse_manifest(GOOD, "mine").cards[0]
    for config in ({"rank": 3}, {"rank": "auto"}, {"scale": 1}, {"scale": None}, {"mode": "exact"}, {"dtype": "any"}):
        memory.check_config({"dim": 8, **config})


def test_a_card_made_in_python_is_checked_too() -> None:
    good = LayerCard(
        name="memory/mine",
        domain="general",
        family="memory",
        summary="Mine.",
        licence="MIT",
        inputs={"x": ("dim",)},
        outputs={"x": ("dim",)},
        config={"dim": Option("int", 4)},
    )
    with pytest.raises(ManifestError, match="name must be family/name or plugin:name in lower case, got 'Mine'"):
        replace(good, name="Mine")
    with pytest.raises(ManifestError, match="inputs must be at least one tensor"):
        replace(good, inputs={})


@pytest.mark.parametrize("name", list_layers())
def test_examples_on_cards_run(name: str) -> None:
    example = card(name).example
    assert example, "a card in this repository shows an example"
    exec(compile(example, name, "exec"), {})
