"""The near end of a process that measures one tree of layerzoo; `worker` is what runs in it. POSIX only."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from base64 import b64encode
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from layerzoo.bench import worker
from layerzoo.bench.case import Case
from layerzoo.bench.settings import Setting

LAST = 2000  # characters of what a process printed that are kept as its last words
PATIENCE = 10.0  # seconds to end by itself


class WorkerDied(RuntimeError):
    """The process ended, or was ended, before it answered."""


class Worker:
    """Started on entering; until it is `ready` it takes seconds, so start all before waiting for the first."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._files = ExitStack()
        self.isa = self.state = ""  # the kernels that it has, and the same in words

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def restart(self) -> None:
        """Ends the process, if there is one, and begins with another."""
        self._end()
        self.isa = self.state = ""
        self._printed = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        far_commands, commands = os.pipe()
        answers, far_answers = os.pipe()
        far_ends = (far_commands, far_answers)
        self._commands = self._files.enter_context(os.fdopen(commands, "w", encoding="utf-8"))
        self._answers = self._files.enter_context(os.fdopen(answers, "r", encoding="utf-8"))
        # a case may start Python again: that has to find the tree too, whether it looks on the path or where it stands
        path = filter(None, (str(self.tree), os.environ.get("PYTHONPATH")))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        here = json.dumps([os.path.abspath(folder) for folder in sys.path])
        arguments = [worker.__file__, str(self.tree), here, *map(str, far_ends)]
        try:
            self._process = subprocess.Popen(
                # -P: beside the script lie modules with everyday names; faulthandler: the last words of a crash
                [sys.executable, "-P", "-X", "faulthandler", *arguments],
                cwd=self.tree,
                env=environment,
                pass_fds=far_ends,
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this end, which then ends the other
            )
        finally:
            for end in far_ends:
                os.close(end)

    def ready(self) -> None:
        """Waits until it can be asked. Raises WorkerDied where the tree cannot be used."""
        if not self.isa:
            answer = self._answer()
            self.isa, self.state = answer["isa"], f"{self.tree} has {answer['isa']} {answer['why']}".rstrip()

    def ask(self, command: str, *arguments: str) -> dict[str, Any]:
        """What the method of that name of `worker.Measured` returns. Raises WorkerDied where it ends before."""
        self.ready()
        with suppress(BrokenPipeError):  # there will be no answer
            print(json.dumps([command, *arguments]), file=self._commands, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise WorkerDied(self._last_words())
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # it closed its end, and lives on
            return "the process gives no answers any more"
        self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, self._printed.tell() - LAST))
        words = self._printed.read().decode(errors="replace").strip()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process ended with {how}" + (f": {words}" if words else "")

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            # it has nothing to tidy up, and may be in the middle of a long call, or of a process of its own
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with suppress(BrokenPipeError):  # a command that it never read
            self._files.close()


def packed(case: Case, setting: Setting) -> str:
    """For `Measured.check`."""
    return b64encode(pickle.dumps((case, setting))).decode()
