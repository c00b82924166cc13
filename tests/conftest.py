"""Hypothesis profiles, and Python in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from layerzoo import _native

# HYPOTHESIS_PROFILE=ci (the default: always the same examples), dev (others each time) or long (many of them).
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("ci", COMMON, max_examples=60, derandomize=True)
settings.register_profile("dev", COMMON, max_examples=60)
settings.register_profile("long", COMMON, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native: promised of the native kernels only")
    config.addinivalue_line("markers", "slow: takes seconds, and no other result with other kernels")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("native") and not (found := _native.status()).loaded:
        pytest.skip(f"native kernels: {found.reason}")


@pytest.fixture
def python() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs `python *arguments` away from the checkout, with no LAYERZOO_* variables but those given."""

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        env = {key: value for key, value in os.environ.items() if not key.startswith("LAYERZOO_")}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=env | environment, cwd="/", timeout=900
        )

    return run


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
