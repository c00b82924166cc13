import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from layerzoo.zoo import LayerCard, Option, card, create, layer_class, list_layers, register, registry


class Shift(nn.Module):
    def __init__(self, by: float = 1.0, device: object = None, dtype: object = None) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


class Other(Shift):
    pass


SHIFT = LayerCard(
    name="testing/shift",
    domain="general",
    family="testing",
    summary="Adds a number.",
    licence="MIT",
    inputs={"x": ("4",)},
    outputs={"x": ("4",)},
    config={"by": Option("float", 1.0)},
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    registry._registered.clear()


def test_the_core_has_mamba() -> None:
    assert "ssm/mamba" in list_layers()
    mamba = card("ssm/mamba")
    assert mamba.target == "layerzoo.nn:Mamba"
    assert mamba.paper is not None
    assert mamba.paper.year == 2023


def test_create_builds_the_core_layer() -> None:
    from layerzoo.nn import Mamba

    layer = create("ssm/mamba", d_model=8, d_state=4, dtype=torch.float64)
    assert type(layer) is Mamba is layer_class("ssm/mamba")
    assert layer.in_proj.weight.dtype == torch.float64


def test_lists_are_sorted_and_filtered() -> None:
    register(Shift, SHIFT)
    register(Other, replace(SHIFT, name="testing/aside"))
    assert list_layers() == sorted(list_layers())
    assert list_layers("testing/*") == ["testing/aside", "testing/shift"]
    assert list_layers("*/sh?ft") == ["testing/shift"]
    assert list_layers(family="ssm") == list_layers("ssm/*") != []
    assert list_layers("ssm/*", domain="general") == []
    assert list_layers("nothing*") == []


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"family": "smm"}, "list_layers: family must be one of .*ssm.*, got 'smm'"),
        ({"domain": "nowhere"}, "list_layers: domain must be one of .*language.*, got 'nowhere'"),
    ],
)
def test_an_unknown_filter_says_what_exists(filters: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_layers(**filters)


@pytest.mark.parametrize("name", ["mamba", "ssm/mambo", "ssm:mamba", "SSM/mamba"])
def test_an_unknown_name_gets_close_matches(name: str) -> None:
    with pytest.raises(ValueError, match=f"card: no layer is named '{name}'; did you mean .*'ssm/mamba'"):
        card(name)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"d_modle": 8}, ValueError, "create: ssm/mamba has no option 'd_modle'; did you mean 'd_model'"),
        ({"d_model": 8.0}, TypeError, "ssm/mamba: d_model must be int, got 8.0"),
        ({}, ValueError, "create: ssm/mamba needs d_model"),
    ],
)
def test_create_checks_before_it_imports(
    config: dict[str, object], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "layer_class", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(error, match=message):
        create("ssm/mamba", **config)


def test_a_notebook_registers_its_class() -> None:
    register(Shift, SHIFT)
    assert card("testing/shift").target == f"{Shift.__module__}:Shift"
    assert create("testing/shift", by=2.0)(torch.zeros(4)).tolist() == [2.0] * 4
    register(Shift, replace(SHIFT, summary="A rerun cell."))
    assert card("testing/shift").summary == "A rerun cell."


def test_a_clash_names_both() -> None:
    register(Shift, SHIFT)
    with pytest.raises(
        ValueError, match=r"register: 'testing/shift' is taken by .*:Shift, .*:Other needs another name"
    ):
        register(Other, SHIFT)
    mamba = replace(SHIFT, name="ssm/mamba", family="ssm")
    with pytest.raises(ValueError, match=r"'ssm/mamba' is taken by layerzoo.nn:Mamba, .*:Shift needs another name"):
        register(Shift, mamba)
    assert layer_class("testing/shift") is Shift
    assert card("ssm/mamba").target == "layerzoo.nn:Mamba"


def test_register_refuses_what_is_no_layer() -> None:
    with pytest.raises(TypeError, match=r"register: cls must be a subclass of torch.nn.Module, got <class 'int'>"):
        register(int, SHIFT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="register: the name must be testing/name, got 'plugin:shift'"):
        register(Shift, replace(SHIFT, name="plugin:shift"))


def test_listing_imports_no_layer_and_no_torch() -> None:
    code = """
import sys
from layerzoo.zoo import card, list_layers
assert "ssm/mamba" in list_layers()
card("ssm/mamba")
heavy = {"torch", "layerzoo.nn", "layerzoo_language", "transformers"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
