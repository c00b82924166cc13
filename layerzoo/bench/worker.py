"""What runs in a process that measures one tree of layerzoo; `process.Worker` starts it, and is its other end.

It may be the tree of an old commit: only the benchmarks, and their cases, are those of the tree that this file is in.
"""

import gc
import importlib.util
import json
import math
import os
import pickle
import sys
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerzoo.bench.case import Case
    from layerzoo.bench.settings import Setting


class Nowhere(MetaPathFinder):
    """An editable install would find in this tree what the other one does not have."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Called for what was not found on the path."""
        if name.partition(".")[0] == "layerzoo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def use(tree: Path) -> None:
    """Makes `import layerzoo` find the one in `tree`, with the benchmarks beside this file in the place of its own."""
    sys.path.insert(0, str(tree))
    sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Nowhere())
    import layerzoo

    if Path(layerzoo.__file__).parents[1].resolve() != tree.resolve():
        raise ImportError(f"the layerzoo of {tree} was to be measured, and {layerzoo.__file__} is what is imported")
    here = Path(__file__).parent
    spec = importlib.util.spec_from_file_location(
        "layerzoo.bench", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layerzoo.bench"] = module
    spec.loader.exec_module(module)


class Measured:
    """The case at hand. Every method is a command; what it returns is the answer."""

    def __init__(self) -> None:
        self._call: Callable[[], object] | None = None
        self._repeats = 1

    def check(self, packed: str) -> dict[str, Any]:
        """Takes a case and its setting (a pickle), and holds the result at the small shape to the reference."""
        import torch

        from layerzoo.bench.runner import run_case

        self._call = None
        gc.collect()  # the tensors of the case before
        try:
            self._case, self._setting = unpacked(packed)
        except Exception as error:  # its module may want something that an old tree does not have
            status = "absent" if isinstance(error, ImportError | AttributeError) else "failed"
            return {"status": status, "reason": _in_words(error)}
        torch.set_num_threads(self._setting.threads)
        row = run_case(self._case, self._setting, peers=False, smoke=True).ours
        return {"status": row.status, "reason": row.reason}

    def prepare(self) -> dict[str, Any]:
        """Builds the work at full size, runs it once, and returns the seconds of the call after that."""
        from layerzoo.bench.runner import SAMPLE, finished, inputs_of, time_of

        case, setting = self._case, self._setting
        try:
            work = case.ours.start(inputs_of(case, setting.shape, setting))
            call = partial(finished, work, case.direction, setting.device)
            call()
            elapsed = time_of(call, 1)
        except Exception as error:
            return {"status": "failed", "reason": _in_words(error)}
        self._call, self._repeats = call, max(1, math.ceil(SAMPLE / elapsed))
        return {"status": "ok", "seconds": elapsed}

    def sample(self) -> dict[str, Any]:
        """Seconds per call."""
        from layerzoo.bench.runner import time_of

        assert self._call is not None
        gc.disable()
        try:
            return {"seconds": time_of(self._call, self._repeats)}
        finally:
            gc.enable()


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def unpacked(packed: str) -> "tuple[Case, Setting]":
    """The inverse of `process.packed`; a case is pickled by the names of its functions, so this imports its module."""
    case, setting = pickle.loads(b64decode(packed))
    return case, setting


def main() -> None:
    """`worker.py TREE PATH COMMANDS ANSWERS`.

    PATH is that of the other end, as JSON; the others are file descriptors, which nothing that a case prints disturbs.
    """
    tree, path, *descriptors = sys.argv[1:]
    for descriptor in descriptors:
        os.set_inheritable(int(descriptor), False)
    commands = os.fdopen(int(descriptors[0]), "r", encoding="utf-8")
    answers = os.fdopen(int(descriptors[1]), "w", encoding="utf-8")
    sys.path[:] = json.loads(path)
    use(Path(tree))
    from layerzoo import _native
    from layerzoo.bench.memory import capped

    measured = Measured()
    found = _native.status()
    answer: dict[str, Any] = {"isa": found.isa, "why": found.reason}
    with capped():
        while True:
            print(json.dumps(answer), file=answers, flush=True)
            line = commands.readline()
            if not line:  # the other end is done, or gone
                return
            command, *arguments = json.loads(line)
            answer = getattr(measured, command)(*arguments)


if __name__ == "__main__":
    main()
