"""From the checkout to an sdist, from that to wheels, from those to fresh environments where an op runs."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns, which

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".*", "build", "dist", "tests", "plugins", "*.so", "*.egg-info", "__pycache__")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
CODE = """
import json
import torch
import layerzoo
from layerzoo import _native
from layerzoo.nn import Mamba

loss = Mamba(16)(torch.randn(2, 40, 16)).square().mean()
loss.backward()
print(json.dumps({
    "file": layerzoo.__file__,
    "layers": layerzoo.list_layers("ssm/*"),
    "loaded": _native.status().loaded,
    "calls": _native.calls("selective_scan_backward"),
    "loss": loss.item(),
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LAYERZOO_", "PYTHON"))}
    env |= {"PATH": PATH, "LAYERZOO_CUDA": "0", **environment}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = tmp_path_factory.mktemp("checkout") / "layerzoo"
    copytree(ROOT, checkout, ignore=ignore_patterns(*LEFT_OUT))
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    return archive


def wheel(sdist: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel built from `sdist`, and what the build said."""
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation")
    said = run(*pip, sdist, "-w", folder, cwd=folder, **environment)
    (built,) = folder.glob("*.whl")
    return built, said.stdout + said.stderr


def installed(wheel: Path, folder: Path) -> tuple[Path, dict[str, object], str]:
    """An environment with `wheel` (torch and the rest are ours, by a .pth file); what CODE prints there, and warns."""
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    done = run(python, "-c", CODE, cwd=folder)
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(environment)
    assert "ssm/mamba" in found["layers"]
    assert found["loss"] > 0
    return environment, found, done.stderr


def test_the_sdist_holds_every_source_and_no_binary(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {path.suffix for path in map(Path, sources)} >= {".h", ".cpp", ".cu", ".cuh"}
    data = {
        "layerzoo/py.typed",
        "layerzoo/layerzoo.toml",
        "layerzoo/demo/page.html.jinja",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    assert sources | data <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)
def test_a_wheel_with_kernels(sdist: Path, tmp_path: Path) -> None:
    built, _ = wheel(sdist, tmp_path)
    assert f"-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl" in built.name
    names = zipfile.ZipFile(built).namelist()
    assert {"layerzoo/_ops.so", "layerzoo/_cpu_default.so", "layerzoo/layerzoo.toml", "layerzoo/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc")) or name.endswith((".cpp", ".h"))]
    environment, found, warnings = installed(built, tmp_path)
    assert (found["loaded"], found["calls"], warnings) == (True, 1, "")
    assert "ssm/mamba" in run(environment / "bin" / "layerzoo", "list", cwd=tmp_path).stdout


def test_a_wheel_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    built, said = wheel(sdist, tmp_path, CXX="/nonexistent/c++")
    assert "layerzoo: installing in pure Python, without kernels: no C++ compiler (/nonexistent/c++)" in said
    assert built.name.endswith("-py3-none-any.whl")
    _, found, warnings = installed(built, tmp_path)
    assert (found["loaded"], found["calls"]) == (False, 0)
    assert "selective_scan runs in plain PyTorch, which is slow: _ops.so was not built" in warnings
