"""Two trees in turn, in real processes: this one, and copies of it that were spoilt on purpose."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerzoo.bench import against as against_module
from layerzoo.bench import builds
from layerzoo.bench.against import Measured, changed, in_turn
from layerzoo.bench.case import Candidate
from layerzoo.bench.cases import select
from layerzoo.bench.process import Worker
from layerzoo.bench.report import Row
from layerzoo.bench.settings import Setting

SPOILT = """
import os, sys, time
from layerzoo.ops import linear, ssm

right = ssm.selective_scan, ssm.causal_conv1d
def slow(*arguments, **options):
    time.sleep(0.02)
    return right[0](*arguments, **options)
def wrong(*arguments, **options):
    return right[1](*arguments, **options) * 1.5
def deadly(*arguments, **options):
    print("these are the last words", flush=True)
    os._exit(3)
ssm.selective_scan, ssm.causal_conv1d, linear.skinny_linear = slow, wrong, deadly
"""


SCAN, CONV = "ssm.selective_scan/time-last/forward", "ssm.causal_conv1d/time-last/forward"
LINEAR, CALL = "linear.skinny_linear/M1/decode", "core.call/eager/forward"
GIT = ("git", "-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "init.defaultBranch=main")


def tree(folder: Path, spoilt: str = "") -> Path:
    """This tree without its benchmarks, so that nothing works unless those of this tree are taken."""
    ignored = shutil.ignore_patterns("bench", "__pycache__")
    shutil.copytree(builds.TREE / "layerzoo", folder / "layerzoo", ignore=ignored)
    file = folder / "layerzoo" / "ops" / "__init__.py"
    docstring, _, rest = file.read_text().partition("\n")
    file.write_text(docstring + spoilt + rest)
    return folder


def plan(*patterns: str):
    """At the small shape of the check: everything else is as for the large one."""
    cases = [case for pattern in patterns for case in select(pattern)[0]]
    return [(case, Setting(case.check, case.dtypes[0])) for case in cases if case.id in patterns]


def verdicts(measured: list[Measured]) -> dict[str, str]:
    return {each.key.split(" ")[0]: changed(each).verdict for each in measured}


@pytest.fixture
def once(monkeypatch):
    """A single launch, for what does not need bounds."""
    monkeypatch.setattr(against_module, "LAUNCHES", 1)


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """As before there were layers; the cases of the core import them."""
    folder = tree(tmp_path_factory.mktemp("old"))
    shutil.rmtree(folder / "layerzoo" / "nn")
    return folder


def test_the_same_code_is_measured_in_pairs_and_a_case_that_was_not_there_is_new(old, once):
    measured: list[Measured] = []
    notes: list[tuple[str, int]] = []
    in_turn(plan(SCAN, CALL), old, builds.TREE, measured, lambda *note: notes.append(note), seconds=0)
    scan, call = measured
    assert (scan.before.status, scan.after.status) == ("ok", "ok")
    assert scan.before.reason.startswith("agrees")
    assert len(scan.before.samples) == len(scan.after.samples) == 2
    assert len(scan.gains) == 1
    assert 0.3 < scan.gains[0] < 3  # the machine may be busy
    assert scan.key == "ssm.selective_scan/time-last/forward B2 D24 L70 N16 float32 cpu 1 threads"
    new = changed(call)
    assert (new.verdict, new.before) == ("new", None)
    assert "layerzoo.nn" in new.reason
    assert notes == [("starting two processes", 0), (f"{SCAN}: launch 1 of 1", 0), (f"{CALL}: launch 1 of 1", 1)]


def test_what_is_slow_wrong_or_deadly_is_found(tmp_path):
    measured: list[Measured] = []
    in_turn(plan(LINEAR, CONV, SCAN), builds.TREE, tree(tmp_path, SPOILT), measured, seconds=0)
    assert verdicts(measured) == {LINEAR: "worse", CONV: "worse", SCAN: "slower"}
    linear, conv, scan = measured
    assert linear.after.status == "failed"
    assert linear.after.reason == "the process ended with exit code 3: these are the last words"
    assert conv.after.reason == "output differs by 5.0e-01, allowed 3e-05"
    assert scan.after.median > 0.02 > scan.before.median  # in a process that was started after the other one had died
    assert len(scan.gains) == against_module.LAUNCHES


def test_each_pair_of_processes_is_one_observation():
    rows = [Row("layerzoo", samples=[seconds] * 12) for seconds in (1.0, 1.4)]
    assert changed(Measured("case", *rows, [0.7, 0.72, 0.71, 0.7, 0.69, 1.01])).verdict == "within the noise"
    assert changed(Measured("case", *rows, [0.7, 0.72, 0.71, 0.7, 0.69, 0.94])).verdict == "slower"
    assert changed(Measured("case", *rows, [0.96] * 6)).verdict == "within the noise"  # under the floor
    assert changed(Measured("case", *rows, [0.7] * 5)).verdict == "too few samples"


def test_a_tree_that_cannot_be_used_is_named_with_the_last_words(tmp_path):
    folder = tree(tmp_path)
    (folder / "layerzoo" / "zoo" / "plugins.py").write_text("raise ZeroDivisionError('of old')\n")
    with pytest.raises(ValueError, match=r"(?s)cannot use one of the two trees: .* exit code 1: .*: of old$"):
        in_turn(plan(SCAN), folder, builds.TREE, [])


class Idle(Worker):
    """Without a process."""

    def restart(self) -> None:
        self.isa = "avx2" if self.tree == builds.TREE else "none"
        self.state = f"{self.tree.name} has {self.isa}"


def test_what_takes_minutes_and_what_cannot_be_sent_is_shown(monkeypatch):
    monkeypatch.setattr(against_module, "Worker", Idle)
    (case, setting), *_ = plan(SCAN)
    minutes = replace(case, ours=replace(case.ours, full=True))
    local = replace(case, ours=Candidate("ours", lambda inputs: None))
    measured: list[Measured] = []
    in_turn([(minutes, setting), (local, setting)], builds.TREE, builds.TREE, measured)
    assert [row.status for each in measured for row in (each.before, each.after)] == [
        "skipped",
        "skipped",
        "failed",
        "failed",
    ]
    assert "cannot be sent to another process" in measured[1].after.reason
    assert {changed(each).verdict for each in measured} == {"not timed"}


def test_kernels_on_one_side_only_are_no_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(against_module, "Worker", Idle)
    in_turn([], builds.TREE, builds.TREE, [])
    in_turn([], tmp_path, tmp_path, [])
    with pytest.raises(
        ValueError, match=rf"needs kernels in both trees or none: {tmp_path.name} has none; .* has avx2"
    ):
        in_turn([], tmp_path, builds.TREE, [])


def test_ctrl_c_ends_both_processes_and_keeps_what_there_is(old, once, monkeypatch):
    started, asked = [], []

    class Interrupted(Worker):
        def restart(self) -> None:
            super().restart()
            started.append(self._process)

        def ask(self, command: str, *arguments: str):
            asked.append(command)
            if asked.count("sample") == 3:  # of the first four
                raise KeyboardInterrupt
            return super().ask(command, *arguments)

    monkeypatch.setattr(against_module, "Worker", Interrupted)
    monkeypatch.setattr(against_module, "planned", lambda *_: (plan(SCAN, CONV), ["a problem"]))
    monkeypatch.setattr(builds, "commit_of", lambda ref: "0123456789abcdef")
    monkeypatch.setattr(builds, "build", lambda commit, **_: old)
    comparison = against_module.against("main")
    assert comparison.interrupted
    assert comparison.title.startswith("this tree against main (0123456789ab)")
    change, missing = comparison.rows
    assert (change.verdict, missing.verdict) == ("too few samples", "not timed")
    assert change.before is not None
    assert len(change.before.samples) == 1
    assert comparison.problems == ["a problem"]
    assert [process.poll() is not None for process in started] == [True, True]


def test_a_process_that_a_case_starts_finds_the_same_tree(old, monkeypatch, tmp_path):
    monkeypatch.chdir(builds.TREE)  # where it would find this tree
    with Worker(old) as worker:
        worker.ready()  # before it runs, what the system says of it is that of its parent
        environment = Path(f"/proc/{worker._process.pid}/environ").read_text().split("\0")
        assert f"PYTHONPATH={old}" in [entry.split(os.pathsep)[0] for entry in environment]
        assert Path(f"/proc/{worker._process.pid}/cwd").resolve() == old.resolve()


# ---- builds ----


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Commits a `setup.py`, and returns the folder: `commit(text)`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "repository"
    folder.mkdir()
    subprocess.run([*GIT, "init", "-q"], cwd=folder, check=True)

    def commit(setup: str) -> Path:
        (folder / "setup.py").write_text(setup)
        subprocess.run([*GIT, "add", "."], cwd=folder, check=True)
        subprocess.run([*GIT, "commit", "-q", "-m", "setup"], cwd=folder, check=True)
        return folder

    return commit


BUILDS = """
import os, pathlib
print("[1/2] c++ first")
pathlib.Path("layerzoo").mkdir()
pathlib.Path("build").mkdir()
pathlib.Path("layerzoo/_ops.so").write_text(os.environ["LAYERZOO_NATIVE"] + os.environ["LAYERZOO_CUDA"])
"""


def cached(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "cache" / "layerzoo" / "builds")


def test_a_commit_is_built_once_for_each_kind(repository, tmp_path, monkeypatch):
    folder = repository(BUILDS)
    monkeypatch.setenv("LAYERZOO_CUDA", "1")
    commit = builds.commit_of("HEAD", folder)
    notes: list[str] = []
    native = builds.build(commit, native=True, note=notes.append, tree=folder)
    assert notes == [f"building {commit[:12]}", f"building {commit[:12]} [1/2]"]
    assert (native / "layerzoo" / "_ops.so").read_text() == "auto0"
    assert not (native / "build").exists()
    (native / "mark").touch()
    assert builds.build(commit, native=True, tree=folder) == native
    assert (native / "mark").exists()
    pure = builds.build(commit, native=False, tree=folder)
    assert (pure / "layerzoo" / "_ops.so").read_text() == "00"
    assert sorted(cached(tmp_path)) == sorted([native.name, pure.name])
    assert native.name == f"{commit}-{sys.implementation.cache_tag}-{torch.__version__}"
    assert subprocess.run([*GIT, "status", "--short"], cwd=folder, capture_output=True).stdout == b""


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (
            "print('first'); raise SystemExit('no compiler here')",
            r"(?s)could not build [0-9a-f]{12}:\n.*no compiler here",
        ),
        (
            "print('pure Python: no c++')",
            r"could not build the native libraries of [0-9a-f]{12}:\npure Python: no c\+\+",
        ),
    ],
)
def test_a_build_that_fails_is_told_with_its_last_lines_and_leaves_nothing(repository, tmp_path, setup, message):
    folder = repository(setup)
    with pytest.raises(ValueError, match=message):
        builds.build(builds.commit_of("HEAD", folder), native=True, tree=folder)
    assert cached(tmp_path) == []


def test_a_build_that_is_cut_off_is_not_taken_for_a_finished_one(repository, tmp_path):
    folder = repository(BUILDS)
    commit = builds.commit_of("HEAD", folder)

    def cut_off(what: str) -> None:
        if "[1/2]" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builds.build(commit, native=True, note=cut_off, tree=folder)
    assert cached(tmp_path) == []
    assert builds.build(commit, native=True, tree=folder).name in cached(tmp_path)


def test_somebody_else_may_finish_the_same_build_first(repository, tmp_path):
    folder = repository(BUILDS)
    commit = builds.commit_of("HEAD", folder)

    def overtaken(what: str) -> None:
        if "[1/2]" in what:
            builds.build(commit, native=True, tree=folder)

    assert builds.build(commit, native=True, note=overtaken, tree=folder).exists()
    assert len(cached(tmp_path)) == 1


def test_a_commit_that_there_is_not_is_refused(repository, tmp_path, monkeypatch):
    folder = repository(BUILDS)
    for ref in ("no-such-branch", "--help", "HEAD:setup.py", ""):
        with pytest.raises(ValueError, match=f"against must name a commit of .*, got '{ref}': fatal: "):
            builds.commit_of(ref, folder)
    with pytest.raises(ValueError, match=r"against needs a checkout of layerzoo's repository, and .* is none"):
        builds.commit_of("HEAD", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="against needs git, which is not on the PATH"):
        builds.commit_of("HEAD", folder)


@pytest.mark.slow
@pytest.mark.skipif(not (builds.TREE / ".git").exists(), reason="no checkout, so no commit to build")
def test_this_tree_against_its_last_commit_without_kernels(python, tmp_path):
    script = f"""
from layerzoo.bench import against
against.LAUNCHES = 1
comparison = against.against("HEAD", {CALL!r}, threads=(1,), seconds=0)
print(comparison.rows[0].verdict, comparison.rows[0].before.status, comparison.rows[0].after.status)
"""
    done = python("-c", script, LAYERZOO_NATIVE="0", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "too few samples ok ok"
    (built,) = (tmp_path / "layerzoo" / "builds").iterdir()
    assert built.name.endswith("-pure")
    assert (built / "layerzoo" / "__init__.py").exists()
