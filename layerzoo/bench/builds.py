"""Builds of other commits of this checkout, kept in the user's cache. The repository itself is only read."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

import layerzoo
from layerzoo import env

TREE = Path(layerzoo.__file__).parents[1]  # the one that this process runs
LAST = 20  # lines of a failed build that are shown


def commit_of(ref: str, tree: Path = TREE) -> str:
    """The commit that `ref` names in the checkout `tree`.

    Raises ValueError where git does not know it, where `tree` is no checkout, and where there is no git.
    """
    if not (tree / ".git").exists():
        raise ValueError(f"bench: against needs a checkout of layerzoo's repository, and {tree} is none")
    if shutil.which("git") is None:
        raise ValueError("bench: against needs git, which is not on the PATH")
    command = ["git", "-C", str(tree), "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        why = _tail(found.stderr.splitlines(), 1)
        raise ValueError(f"bench: against must name a commit of {tree}, got {ref!r}: {why}")
    return found.stdout.strip()


def build(commit: str, *, native: bool, note: Callable[[str], None] = lambda what: None, tree: Path = TREE) -> Path:
    """The folder with the files of a commit, built with or without native libraries; built before, it is only found.

    Raises ValueError with the last lines of what was printed where the build fails, or leaves no native library.
    """
    cache = env.cache() / "builds"
    kind = "" if native else "-pure"
    target = cache / f"{commit}-{sys.implementation.cache_tag}-{torch.__version__}{kind}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Only a finished build gets its name: one that is cut off leaves at most a folder that nobody looks for.
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache, ignore_cleanup_errors=True) as folder:
        unfinished = Path(folder) / "tree"
        unfinished.mkdir()
        _extract(commit, tree, unfinished)
        _compile(commit, unfinished, native, note)
        try:
            os.replace(unfinished, target)
        except OSError:  # somebody else was faster
            if not target.exists():
                raise
    return target


def _extract(commit: str, tree: Path, target: Path) -> None:
    archive = subprocess.run(["git", "-C", str(tree), "archive", "--format=tar", commit], capture_output=True)
    if archive.returncode:
        why = _tail(archive.stderr.decode(errors="replace").splitlines())
        raise ValueError(f"bench: against could not read {commit}:\n{why}")
    subprocess.run(["tar", "-x", "-C", str(target)], input=archive.stdout, check=True)


def _compile(commit: str, folder: Path, native: bool, note: Callable[[str], None]) -> None:
    """With the setup.py of that commit; of the devices only the CPU, since nothing else is measured."""
    short = commit[:12]
    note(f"building {short}")
    environment = os.environ | {"LAYERZOO_NATIVE": "auto" if native else "0", "LAYERZOO_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    lines: deque[str] = deque(maxlen=LAST)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if step := re.match(r"\[\d+/\d+\]", line):  # as ninja counts the files of each library
                note(f"building {short} {step[0]}")
    if process.returncode:
        raise ValueError(f"bench: against could not build {short}:\n{_tail(lines)}")
    if native and not (folder / "layerzoo" / "_ops.so").exists():
        # it would be measured without kernels, against ours that has them
        raise ValueError(f"bench: against could not build the native libraries of {short}:\n{_tail(lines)}")
    shutil.rmtree(folder / "build", ignore_errors=True)


def _tail(lines: "deque[str] | list[str]", count: int = LAST) -> str:
    return "\n".join(line.rstrip() for line in list(lines)[-count:])
