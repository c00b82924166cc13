"""The emulator catches what it promises: each planted fault of faults.cpp under every schedule, and nothing else."""

import re
import subprocess

import pytest
from emulation import COMPILER, HERE, compile_kernels, program

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++ on Linux")

SHADOW = {  # what -DFAULT=n does, and what must be said of it
    1: ("global index too far", r"out of bounds: .* reads 4 bytes at in\[192\] of 192"),
    2: ("halo not filled", r"undefined: .* reads 4 bytes at tile\[0\] of 65 before it is written"),
    3: ("barrier in half of the threads", r"barrier not met by all: 32 threads, .*faults.cpp:\d+; 32 threads, "),
    4: ("missing barrier after the fill", r"(undefined|race): .* reads 4 bytes at tile\["),
    5: ("shared index too far", r"out of bounds: .* writes 4 bytes at lanes\[64\] of 64"),
    6: ("two blocks write the same", r"race: .* writes 4 bytes at out\[\d+\] of 192, which another block wrote"),
    7: ("missing barrier on reuse", r"race: .* at tile\[\d+\] of 65, which thread .* with no barrier between"),
    8: ("missing __syncwarp", r"(undefined|race): .* reads 4 bytes at lanes\["),
    9: ("shuffle from a lane outside the mask", r"shuffle: thread \(1,0,0\) reads lane 16, which takes no part"),
    10: ("sum without an atomic", r"race: .* reads 4 bytes at total\[0\] of 1, which thread .* wrote"),
    11: ("row overflow", r"runtime error: index 33 out of bounds for type 'float \[33\]'"),
    12: ("input written", r"read-only: .* writes 4 bytes at in\[0\] of 192"),
    13: ("misaligned vector", r"runtime error: .* misaligned address .* 'const struct Four', which requires 16 byte"),
    14: ("output not written", r"copy\[60\] was never written"),
}
ADDRESS = {  # the other build sees bounds, and wrong results by NaN or by the schedule
    1: r"heap-buffer-overflow",
    2: r"wrong value",
    5: r"use-after-poison",
}
SEEDS = ["0", "1", "2", "3", "4"]


def run(build: str, fault: int, *seeds: str) -> tuple[int, str]:
    kernels = compile_kernels(HERE / "faults.cpp", build, f"fault{fault}.{build}", f"-DFAULT={fault}")
    done = [subprocess.run([program(kernels, build), s], capture_output=True, text=True, timeout=30) for s in seeds]
    return sum(d.returncode != 0 for d in done), "\n".join(d.stderr for d in done)


@pytest.mark.parametrize("build", ["hooks+ubsan", "asan"])
def test_right_kernel_raises_no_alarm(build: str) -> None:
    seeds = [str(s) for s in range(20)]
    assert run(build, 0, *seeds) == (0, "\n" * (len(seeds) - 1))


@pytest.mark.parametrize("fault", SHADOW, ids=lambda n: SHADOW[n][0])
def test_shadow_catches(fault: int) -> None:
    failures, messages = run("hooks+ubsan", fault, *SEEDS)
    assert failures == len(SEEDS)
    from_each = [line for line in messages.splitlines() if re.search(SHADOW[fault][1], line)]
    assert len(from_each) == len(SEEDS), messages


@pytest.mark.parametrize("fault", ADDRESS, ids=lambda n: SHADOW[n][0])
def test_address_sanitizer_catches(fault: int) -> None:
    failures, messages = run("asan", fault, "0")
    assert failures == 1 and re.search(ADDRESS[fault], messages), messages
