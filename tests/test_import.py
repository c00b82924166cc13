"""`import layerzoo` costs nothing, and pulls in nothing."""

import statistics
from typing import Any

TIMED = "import torch, time; begin = time.perf_counter(); import layerzoo; print(time.perf_counter() - begin)"
HEAVY = ("torch", "numpy", "transformers", "timm", "diffusers", "matplotlib", "rich", "typer")
LISTED = f"""
import sys
import layerzoo
print([name for name in {HEAVY} if name in sys.modules])
dir(layerzoo), layerzoo.__version__
print([name for name in {HEAVY} if name in sys.modules])
import layerzoo.ops, layerzoo.nn
print([name for name in {HEAVY[2:]} if name in sys.modules])
"""


def test_import_adds_less_than_50_ms_to_torch(python: Any) -> None:
    seconds = [float(python("-c", TIMED).stdout) for _ in range(3)]
    assert statistics.median(seconds) < 0.05, seconds


def test_import_pulls_in_nothing(python: Any) -> None:
    done = python("-c", LISTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["[]"] * 3
