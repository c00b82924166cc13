"""What is installed, what was loaded, and why anything is missing, as JSON-able data."""

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module, metadata
from typing import Any

import layerzoo
from layerzoo import env
from layerzoo.zoo.plugins import PluginInfo, plugins, probe

# package -> the extra that installs it
HOSTS = {"transformers": "transformers", "timm": "vision", "diffusers": "diffusion"}


def diagnose(timeout: float = 60.0) -> dict[str, Any]:
    """Look at the installation; each plugin is imported in a process of its own, for ``timeout`` seconds at most.

    ``ok`` is False only where LAYERZOO_NATIVE=require asks for a native library that did not load.
    """
    environment, problems = _environment()
    native = _native()
    found: list[PluginInfo] = []
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            found = list(pool.map(lambda info: probe(info, timeout), plugins()))
    except ValueError as error:
        problems.append(str(error))
    return {
        "layerzoo": layerzoo.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": _torch(),
        "native": native,
        "environment": environment,
        "hosts": {package: _host(package, extra) for package, extra in HOSTS.items()},
        "plugins": [{**asdict(info), "cards": [card.name for card in info.cards]} for info in found],
        "problems": problems,
        "ok": environment["LAYERZOO_NATIVE"] != "require" or native["loaded"],
    }


def _environment() -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems = []
    for name in ("NATIVE", "CPU", "PLUGINS", "CHECK"):
        try:
            values[f"LAYERZOO_{name}"] = getattr(env, name.lower())()
        except ValueError as error:
            values[f"LAYERZOO_{name}"] = None
            problems.append(str(error))
    return values, problems


def _torch() -> str:
    try:
        return str(import_module("torch").__version__)
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        return f"cannot be imported: {error}"


def _native() -> dict[str, Any]:
    found = {"loaded": False, "reason": "", "library": None, "isa": "none", "available": (), "cuda": "not loaded"}
    try:
        status = import_module("layerzoo._native").status()
    except Exception as error:  # LAYERZOO_NATIVE=require and a malformed LAYERZOO_CPU raise; a doctor reports
        return found | {"reason": str(error)}
    return {key: getattr(status, key) for key in found}


def _host(package: str, extra: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed: pip install 'layerzoo[{extra}]'"
