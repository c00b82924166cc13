"""What the probes say of this machine, and what `limits` makes of it: seconds, what binds, and what is kept."""

import json
import os
import runpy
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import layerzoo
from layerzoo import _native
from layerzoo.bench import limits
from layerzoo.bench.case import Cost

PACKAGE = Path(layerzoo.__file__).parent


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the figures, which is not there yet, for a process that knows none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "_known", {})
    return tmp_path / "layerzoo" / "limits.json"


@pytest.fixture
def probes() -> Any:
    return import_module("layerzoo._C")


class Machine:
    """Probes of a machine that is easy to reckon with; `asked` is what was measured."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def _answer(self, rate: float, *asked: Any) -> float:
        self.asked.append(asked)
        return rate

    def read_bandwidth(self, megabytes: float, threads: int) -> float:
        return self._answer(100.0, "read", megabytes, threads)

    def copy_bandwidth(self, megabytes: float, threads: int) -> float:
        return self._answer(50.0, "copy", megabytes, threads)

    def gather_bandwidth(self, megabytes: float, threads: int) -> float:
        return self._answer(10.0, "gather", megabytes, threads)

    def fma_peak(self, isa: str, threads: int) -> dict[str, float]:
        return {"float32": self._answer(40.0, "fma", threads), "float64": 20.0}

    def exp_rate(self, isa: str, threads: int) -> dict[str, float]:
        return {"float32": self._answer(8.0, "exp", threads), "float64": 2.0}

    def product_seconds(self, dtype: torch.dtype, threads: int) -> float:
        rate = {torch.float32: 30.0, torch.float64: 15.0, torch.bfloat16: 60.0, torch.float16: 0.3}[dtype]
        return 2 * limits.SIDE**3 / self._answer(rate, "gemm", dtype, threads)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(limits, "_probes", lambda: made)
    monkeypatch.setattr(limits, "_product_seconds", made.product_seconds)
    return made


def restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process went on."""
    monkeypatch.setattr(limits, "_known", {})


# ---- probes ----


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds in one of five trials: on a busy machine a figure may be half of what it should be."""
    return any(holds() for _ in range(5))


@pytest.mark.native
@pytest.mark.parametrize("name", ["read_bandwidth", "copy_bandwidth", "gather_bandwidth"])
def test_two_threads_read_no_slower_than_one(name: str, probes: Any) -> None:
    probe = getattr(probes, name)
    assert eventually(lambda: 1e8 < 0.7 * probe(0.25, 1) < probe(0.25, 2) < 1e13)


@pytest.mark.native
@pytest.mark.parametrize("name", ["fma_peak", "exp_rate"])
def test_two_threads_compute_no_slower_than_one(name: str, probes: Any) -> None:
    probe, isa = getattr(probes, name), _native.status().isa
    one = probe(isa, 1)
    assert one.keys() == {"float32", "float64"}
    assert 1e7 < one["float64"] < one["float32"] < 1e12
    assert eventually(lambda: probe(isa, 2)["float32"] > 0.7 * probe(isa, 1)["float32"])


@pytest.mark.native
def test_more_threads_than_cores(probes: Any) -> None:
    assert probes.read_bandwidth(0.0625, (os.cpu_count() or 1) + 3) > 0


@pytest.mark.native
def test_wider_vectors_compute_more(probes: Any) -> None:
    if "avx2" not in _native.status().available:
        pytest.skip("this machine or build has no avx2")
    for probe in (probes.fma_peak, probes.exp_rate):
        for dtype in ("float32", "float64"):
            assert eventually(lambda probe=probe, dtype=dtype: probe("avx2")[dtype] > 1.2 * probe("default")[dtype])


@pytest.mark.native
def test_an_exponential_is_more_than_one_multiply_add(probes: Any) -> None:
    isa = _native.status().isa
    assert eventually(lambda: probes.exp_rate(isa)["float32"] < probes.fma_peak(isa)["float32"] / 2)


@pytest.mark.native
@pytest.mark.parametrize("row_bytes", [64, 256, 4096])
def test_rows_from_random_places_come_no_faster_than_in_order(row_bytes: int, probes: Any) -> None:
    assert eventually(lambda: 1e8 < probes.gather_bandwidth(16, 1, row_bytes) < 1.5 * probes.read_bandwidth(16, 1))


@pytest.mark.native
@pytest.mark.parametrize("isa", _native.SETS)
def test_the_probes_have_the_sets_that_the_ops_have(isa: str, probes: Any) -> None:
    if isa in _native.status().available:
        assert probes.fma_peak(isa)["float32"] > 0
        return
    with pytest.raises((ValueError, RuntimeError), match=rf"fma_peak: (isa must be .*, got '{isa}'|no kernels: )"):
        probes.fma_peak(isa)


BAD = [
    ("read_bandwidth", {"megabytes": 0}, "megabytes must be from 0.0625 to 16384, got 0"),
    ("read_bandwidth", {"megabytes": 1e9}, "megabytes must be from 0.0625 to 16384, got 1e+09"),
    ("copy_bandwidth", {"megabytes": float("nan")}, "megabytes must be from 0.0625 to 16384, got nan"),
    ("copy_bandwidth", {"threads": 0}, "threads must be from 1 to 1024, got 0"),
    ("gather_bandwidth", {"threads": 1025}, "threads must be from 1 to 1024, got 1025"),
    ("gather_bandwidth", {"row_bytes": 0}, "row_bytes must be a multiple of 64 from 64 to 65536, got 0"),
    ("gather_bandwidth", {"row_bytes": 100}, "row_bytes must be a multiple of 64 from 64 to 65536, got 100"),
    ("fma_peak", {"isa": "default", "threads": -1}, "threads must be from 1 to 1024, got -1"),
    ("fma_peak", {"isa": "sse9"}, "isa must be one that this processor has (default"),
    ("exp_rate", {"isa": "../avx2"}, "got '../avx2'"),
    ("exp_rate", {"isa": ""}, "got ''"),
]


@pytest.mark.native
@pytest.mark.parametrize(("name", "arguments", "message"), BAD)
def test_a_probe_refuses(name: str, arguments: dict[str, Any], message: str, probes: Any) -> None:
    with pytest.raises(ValueError) as error:
        getattr(probes, name)(**arguments)
    assert str(error.value).startswith(f"{name}: ")
    assert message in str(error.value)


@pytest.mark.native
def test_probes_without_kernels_beside_them(python: Any, tmp_path: Path) -> None:
    (module,) = PACKAGE.glob("_C.*.so")
    shutil.copy(module, tmp_path)
    code = "import _C; assert _C.read_bandwidth(0.0625) > 0; _C.fma_peak('default')"
    done = python("-c", code, PYTHONPATH=str(tmp_path))
    assert "RuntimeError: fma_peak: no kernels: " in done.stderr
    assert "_cpu_default.so" in done.stderr


# ---- seconds ----


@pytest.mark.parametrize(
    ("cost", "dtype", "seconds", "bound"),
    [
        (Cost(read=200), "float32", 200 / 100, "memory"),
        (Cost(read=200, written=200), "float32", 400 / 50, "memory"),
        (Cost(written=200), "float32", 200 / 50, "memory"),
        # what is read beyond what is written does not come at the rate of a copy
        (Cost(read=200, written=50), "float32", 100 / 50 + 150 / 100, "memory"),
        (Cost(read=100, gathered=30), "float32", 100 / 100 + 30 / 10, "memory"),
        (Cost(products=60), "float32", 60 / 30, "arithmetic"),
        (Cost(products=60), "float64", 60 / 15, "arithmetic"),
        (Cost(flops=80, exps=16), "float32", 80 / 40 + 16 / 8, "arithmetic"),
        (Cost(flops=80, exps=16), "float64", 80 / 20 + 16 / 2, "arithmetic"),
        (Cost(products=60, flops=80, exps=16), "bfloat16", 60 / 60 + 80 / 40 + 16 / 8, "arithmetic"),
        (Cost(products=60), "float16", 60 / 30, "arithmetic"),  # torch's own is slower than a cast and float32
        (Cost(read=300, flops=80), "float32", 3, "memory"),
        (Cost(read=100, flops=80), "float32", 2, "arithmetic"),
        (Cost(), "float32", 0, "memory"),
    ],
)
def test_seconds(cost: Cost, dtype: str, seconds: float, bound: str, machine: Machine) -> None:
    assert limits.limits(cost, dtype, 2) == (pytest.approx(seconds), bound)


MB = 1 << 20


@pytest.mark.parametrize(
    ("cost", "threads", "asked"),
    [
        (Cost(read=1), 1, [("read", 1, 1)]),
        (Cost(read=MB), 1, [("read", 1, 1)]),
        (Cost(read=MB + 1), 2, [("read", 1, 2)]),  # 2 MB in two threads
        (Cost(read=3 * MB), 1, [("read", 4, 1)]),
        (Cost(read=2 * MB, written=2 * MB), 1, [("copy", 2, 1)]),  # two buffers of 2 MB
        (Cost(read=2 * MB, gathered=6 * MB), 2, [("read", 4, 2), ("gather", 4, 2)]),
        (Cost(gathered=1e12), 1, [("gather", 512, 1)]),
        (Cost(read=1), 64, [("read", 0.0625, 64)]),  # the smallest that a probe takes
    ],
)
def test_buffers_are_as_large_as_the_working_set(
    cost: Cost, threads: int, asked: list[tuple[Any, ...]], machine: Machine
) -> None:
    limits.limits(cost, "float32", threads)
    assert machine.asked == asked


def test_machine_rates(machine: Machine) -> None:
    assert limits.machine_rates(2) == pytest.approx(
        {
            "read_bandwidth": 100,
            "copy_bandwidth": 50,
            "gather_bandwidth": 10,
            "cache_bandwidth": 100,
            "fma_peak": 40,
            "exp_rate": 8,
            "gemm_rate": 30,
        }
    )
    memory = [("read", 128, 2), ("copy", 64, 2), ("gather", 128, 2), ("read", 1, 2)]
    assert machine.asked == [*memory, ("fma", 2), ("exp", 2), ("gemm", torch.float32, 2)]


@pytest.mark.native
def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIDE", 128)
    monkeypatch.setattr(limits, "DRAM", 2)
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    rates = limits.machine_rates(1)
    assert all(rate > 1e7 for rate in rates.values())
    for dtype in ("float32", "float64", "bfloat16"):
        found = limits.limits(Cost(read=4e5, written=4e5, products=1e9, flops=1e6, exps=1e5), dtype, 1)
        assert found is not None
        assert 1e-5 < found[0] < 1e2
        assert found[1] == "arithmetic"
    assert torch.get_num_threads() == before
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("missing", ["kernels", "_C"])
def test_without_the_native_library_there_are_no_limits(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = _native.NativeStatus(missing != "kernels", "a test")
    monkeypatch.setattr(limits._native, "status", lambda: status)

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(limits, "import_module", absent)
    assert limits.limits(Cost(read=1), "float32", 1) is None
    assert limits.machine_rates(1) == {}


@pytest.mark.parametrize(
    ("dtype", "threads", "message"),
    [
        ("int8", 1, "limits: dtype must be one of float64, float32, bfloat16, float16, got 'int8'"),
        ("float32", 0, "limits: threads must be from 1 to 1024, got 0"),
        ("float32", 2000, "limits: threads must be from 1 to 1024, got 2000"),
    ],
)
def test_limits_refuses(dtype: str, threads: int, message: str, machine: Machine) -> None:
    with pytest.raises(ValueError) as error:
        limits.limits(Cost(read=1), dtype, threads)
    assert str(error.value) == message
    assert not machine.asked


def test_machine_rates_refuses(machine: Machine) -> None:
    with pytest.raises(ValueError, match="machine_rates: threads must be from 1 to 1024, got -1"):
        limits.machine_rates(-1)


# ---- what is kept ----

READ = Cost(read=200)


def test_a_figure_is_measured_once(machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = limits.limits(READ, "float32", 1)
    assert file.exists()
    assert limits.limits(READ, "float32", 1) == first
    restarted(monkeypatch)
    assert limits.limits(READ, "float32", 1) == first
    assert machine.asked == [("read", 1, 1)]
    limits.limits(READ, "float32", 2)
    limits.limits(Cost(flops=1), "float32", 1)
    limits.limits(Cost(flops=1), "float64", 1)  # both types were measured at once
    assert machine.asked[1:] == [("read", 0.5, 2), ("fma", 1)]
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(("hours", "asked"), [(23, 1), (25, 2), (-1, 2)])
def test_a_figure_lasts_a_day(
    hours: float, asked: int, machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits.limits(READ, "float32", 1)
    ((name, figures),) = json.loads(file.read_text()).items()
    older = {figure: (rate, when - hours * 3600) for figure, (rate, when) in figures.items()}
    file.write_text(json.dumps({name: older}))
    limits.limits(READ, "float32", 1)  # this process knows it
    restarted(monkeypatch)
    limits.limits(READ, "float32", 1)
    assert len(machine.asked) == asked


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"machine": 3}',
        b'{"machine": {"figure": 1}}',
        b'{"machine": {"figure": ["x", "y"]}}',
    ],
)
def test_a_damaged_file_is_written_anew(content: bytes, machine: Machine, file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    assert limits.limits(READ, "float32", 1) == (2, "memory")
    assert list(json.loads(file.read_text())) == [limits._machine()]


@pytest.mark.parametrize("rate", ["0", "-1", "NaN", "Infinity"])
def test_a_figure_that_cannot_be_is_measured(rate: str, machine: Machine, file: Path, monkeypatch: Any) -> None:
    limits.limits(READ, "float32", 1)
    file.write_text(file.read_text().replace("100.0", rate))
    restarted(monkeypatch)
    assert limits.limits(READ, "float32", 1) == (2, "memory")


def test_a_folder_that_cannot_be_written(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a file where the folder should be: root could write to any folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    for _ in range(2):
        assert limits.limits(READ, "float32", 1) == (2, "memory")
    assert len(machine.asked) == 1
    limits.forget()


def test_a_file_that_cannot_be_replaced(machine: Machine, file: Path) -> None:
    file.mkdir(parents=True)
    assert limits.limits(READ, "float32", 1) == (2, "memory")
    assert os.listdir(file.parent) == [file.name]  # and nothing is left behind


def test_another_machine_has_its_own_figures(machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits.limits(READ, "float32", 1)
    this = limits._machine()
    with monkeypatch.context() as patch:
        patch.setattr(limits, "_machine", lambda: "another")
        restarted(patch)
        limits.limits(READ, "float32", 1)
        assert len(machine.asked) == 2
        assert sorted(json.loads(file.read_text())) == sorted([this, "another"])
        limits.forget()
    assert list(json.loads(file.read_text())) == [this]
    restarted(monkeypatch)
    limits.limits(READ, "float32", 1)
    assert len(machine.asked) == 2


def test_forget(machine: Machine, file: Path) -> None:
    limits.forget()
    assert not file.exists()
    limits.limits(READ, "float32", 1)
    limits.limits(READ, "float32", 2)
    limits.forget()
    limits.limits(READ, "float32", 1)
    assert len(machine.asked) == 3


def test_the_key_names_what_figures_depend_on() -> None:
    facts = json.loads(limits._machine())
    assert facts.keys() == {"cpu", "cores", "isa", "torch", "torch_isa", "caps", "layerzoo"}
    assert facts["isa"] == _native.status().isa
    assert facts["torch"] == torch.__version__


def test_the_home_folder_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert limits._path() == tmp_path / ".cache" / "layerzoo" / "limits.json"


def test_importing_loads_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_early(*arguments: Any) -> Any:
        raise AssertionError("asked for while the module is imported")

    monkeypatch.setattr("importlib.import_module", too_early)
    monkeypatch.setattr(_native, "status", too_early)
    assert "machine_rates" in runpy.run_path(limits.__file__)
