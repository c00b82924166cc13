"""Fake installed distributions: a .dist-info folder and a package in a temporary folder on sys.path."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MANIFEST = """
api = 1

[layers.scale]
target = "{package}:Scale"
domain = "general"
family = "norm"
summary = "Multiplies by a number."
licence = "Apache-2.0"
dtypes = ["float64", "float32"]

[layers.scale.config]
factor = {{ type = "float", default = 2.0 }}

[layers.scale.inputs]
x = ["batch", "dim"]

[layers.scale.outputs]
y = ["batch", "dim"]

[layers.scale.sample]
dims = {{ batch = 2, dim = 3 }}
"""

SOURCE = """
from torch import nn

class Scale(nn.Module):
    def __init__(self, factor=2.0, device=None, dtype=None):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a fake plugin and return its package; what is not said is that of a plugin that works."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def install(
        name: str,
        *,
        distribution: str | None = None,
        preamble: str = "",
        source: str = SOURCE,
        manifest: str | bytes | None = None,
        entry_points: str | None = None,
        metadata: str | None = None,
    ) -> str:
        distribution = distribution or f"fake-{name}"
        package = distribution.replace("-", "_")
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text(f"{preamble}\n{source}")
        text = MANIFEST.format(package=package) if manifest is None else manifest
        (tmp_path / package / "layerzoo.toml").write_bytes(text.encode() if isinstance(text, str) else text)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n" if metadata is None else metadata
        )
        info.joinpath("entry_points.txt").write_text(entry_points or f"[layerzoo.plugins]\n{name} = {package}\n")
        importlib.invalidate_caches()
        return package

    yield install
    for module in set(sys.modules) - before:
        if module.startswith("fake"):
            del sys.modules[module]
