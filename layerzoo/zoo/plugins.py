"""Finding plugins: distributions whose entry point in the group ``layerzoo.plugins`` names a package with a manifest.

Discovery reads metadata and TOML and imports nothing of a plugin, so a plugin that raises or hangs on import costs
nobody else anything. Failures are never cached: a mended plugin works at the next call.
"""

import functools
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from layerzoo import env
from layerzoo.zoo.card import LayerCard, Manifest, ManifestError, parse_manifest

GROUP = "layerzoo.plugins"
MANIFEST = "layerzoo.toml"

_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MAX_BYTES = 1 << 20  # a manifest is a page of text; more is a mistake or an attack
_IMPORTED = 7  # exit status of a probe that reached its end; a plugin that calls sys.exit(0) cannot fake it by accident
_PROBE = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from layerzoo.zoo.registry import layer_class
for name in sys.argv[2:]:
    layer_class(name)
sys.exit({_IMPORTED})
"""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One plugin: ``state`` is ok, denied (by LAYERZOO_PLUGINS), missing (allowed but not installed) or broken."""

    name: str
    state: str
    error: str = ""
    distribution: str = ""
    version: str = ""
    manifest: str = ""
    cards: tuple[LayerCard, ...] = ()
    bench: str = ""  # the module of its benchmark cases


def plugins() -> list[PluginInfo]:
    """Every installed plugin with its state, sorted by name; imports nothing of any plugin.

    Raises:
        ValueError: LAYERZOO_PLUGINS is malformed.
    """
    allowed, wanted = _policy(env.plugins())
    by_name = defaultdict(list)
    for entry, owner in _entries():
        by_name[entry.name].append((entry, owner))
    absent = wanted - by_name.keys()
    found = [PluginInfo(name, "missing", "named by LAYERZOO_PLUGINS, not installed") for name in absent]
    for name, claims in by_name.items():
        for entry, owner in claims:
            if not allowed(name):
                info = replace(owner, name=name, state="denied", error="LAYERZOO_PLUGINS does not allow it")
            elif len(claims) > 1:
                both = " and ".join(f"{claim.value} of {other.distribution}" for claim, other in claims)
                info = replace(owner, name=name, error=f"the name {name!r} is claimed more than once: {both}")
            else:
                info = owner if owner.error else _read(entry, replace(owner, name=name))
            found.append(info)
    return sorted(found, key=lambda info: (info.name, info.distribution))


def probe(info: PluginInfo, timeout: float = 60.0) -> PluginInfo:
    """Import a plugin's layers in a fresh interpreter, killed after ``timeout`` seconds; says whether that worked."""
    if info.state != "ok":
        return info
    command = [sys.executable, "-c", _PROBE, json.dumps(sys.path), *(card.name for card in info.cards)]
    # A file, not a pipe: a process that the plugin left behind could hold a pipe open for ever.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output)
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return replace(info, state="broken", error=f"still importing after {timeout:g} s")
        if status == _IMPORTED:
            return info
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    reason = lines[-1].removeprefix("layerzoo.zoo.registry.LayerImportError: ") if lines else "no message"
    return replace(info, state="broken", error=f"{reason} (exit status {status})")


def _policy(value: str) -> tuple[Callable[[str], bool], set[str]]:
    """LAYERZOO_PLUGINS as a predicate over names, and the names that it asks for."""
    value = value.strip()
    deny = value.startswith("deny:")
    names = {name.strip() for name in value.removeprefix("deny:").split(",")} if value not in ("", "none") else set()
    if any(not _NAME.fullmatch(name) for name in names):
        raise ValueError(f"LAYERZOO_PLUGINS must be none, a list a,b of plugin names, or deny:a,b, got {value!r}")
    if not value:
        return lambda name: True, set()
    if deny:
        return lambda name: name not in names, set()
    return lambda name: name in names, names


def _entries() -> Iterator[tuple[metadata.EntryPoint, PluginInfo]]:
    """Entry points of the group, each with a broken PluginInfo that carries its distribution."""
    seen: set[str] = set()
    for dist in metadata.distributions():
        try:
            text = dist.read_text("entry_points.txt") or ""
        except (OSError, UnicodeDecodeError):
            continue  # cannot be told from a distribution that is no plugin
        if GROUP not in text:
            continue
        name, version = _identity(dist)
        if name in seen:  # another copy, later on sys.path: Python would not import it either
            continue
        seen |= {name} - {"unknown"}
        owner = PluginInfo(name, "broken", distribution=name, version=version)
        try:
            entries = list(dist.entry_points.select(group=GROUP))
        except Exception as error:  # importlib.metadata lets any parsing error through
            owner = replace(owner, error=f"unreadable entry_points.txt: {error}")
            entries = [metadata.EntryPoint(name, "unknown", GROUP)]
        for entry in entries:
            yield entry, owner


def _identity(dist: metadata.Distribution) -> tuple[str, str]:
    try:
        return dist.metadata["Name"] or "unknown", dist.metadata["Version"] or "unknown"
    except Exception:  # broken metadata of whatever kind: the plugin is still listed
        return "unknown", "unknown"


def _read(entry: metadata.EntryPoint, info: PluginInfo) -> PluginInfo:
    try:
        if not _NAME.fullmatch(entry.name):
            raise ManifestError(f"a plugin's name must be a lower-case word, got {entry.name!r}")
        path = _locate(entry.value)
        info = replace(info, manifest=str(path))
        stat = path.stat()
        if stat.st_size > _MAX_BYTES:
            raise ManifestError(f"the manifest has {stat.st_size} bytes, at most {_MAX_BYTES} are read")
        found = _parse(str(path), stat.st_mtime_ns, stat.st_size, entry.name)
        return replace(info, state="ok", cards=found.cards, bench=found.bench)
    except ManifestError as error:
        return replace(info, error=str(error))
    except Exception as error:  # isolation: whatever is wrong with one plugin stays with it
        return replace(info, error=f"{type(error).__name__}: {error}")


def _locate(package: str) -> Path:
    if not _PACKAGE.fullmatch(package):
        raise ManifestError(f"the entry point must name a package, got {package!r}")
    top, *inner = package.split(".")
    spec = importlib.util.find_spec(top)  # of a top-level name: imports nothing
    for location in (spec.submodule_search_locations if spec else None) or ():
        path = Path(location, *inner, MANIFEST)
        if path.is_file():
            return path
    raise ManifestError(f"the package {package} has no {MANIFEST}")


@functools.lru_cache(maxsize=256)
def _parse(path: str, mtime_ns: int, size: int, plugin: str) -> Manifest:
    """Successes are cached by the file's state; lru_cache keeps no exceptions."""
    return parse_manifest(Path(path).read_text(encoding="utf-8"), plugin)
