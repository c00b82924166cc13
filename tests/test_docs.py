"""The words: every Python block runs, and every command, file, argument and variable that the documents name exists."""

import ast
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from layerzoo import ops
from layerzoo.cli import app
from layerzoo.hosts.compat import PACKAGES

ROOT = Path(__file__).parents[1]
PAGES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", *PAGES)}
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def blocks(language: str) -> Iterator[tuple[str, int, str]]:
    """(document, line, text) of every fenced block."""
    for name, text in TEXTS.items():
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield name, text.count("\n", 0, found.start(1)) + 1, found[1]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(document:line, words) of every command that is shown, in a block or inline."""
    lines = [(name, first + i, line) for name, first, text in blocks("sh") for i, line in enumerate(text.splitlines())]
    for name, text in TEXTS.items():
        for found in re.finditer(r"(?<!`)`((?:make|layerzoo) [^`]+)`", text):
            lines.append((name, text.count("\n", 0, found.start()) + 1, found[1]))
    for name, number, line in lines:
        for part in line.split("&&"):
            yield f"{name}:{number}", shlex.split(part, comments=True)


BLOCKS = [pytest.param(*block, id=f"{block[0]}:{block[1]}") for block in blocks("python")]
COMMANDS = list(commands())


def test_there_are_blocks_and_commands() -> None:
    assert {block.values[0] for block in BLOCKS} == set(TEXTS)
    assert {"make", "layerzoo", "pip", "pytest"} <= {words[0] for _, words in COMMANDS}


@pytest.mark.parametrize(("name", "line", "code"), BLOCKS)
@pytest.mark.filterwarnings("ignore:layerzoo.*plain PyTorch:RuntimeWarning")
def test_python_block_runs(name: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse("\n" * (line - 1) + code)
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            package = module.partition(".")[0]
            stood_in = package in PACKAGES and "layerzoo.compat(" in code
            if (importlib.util.find_spec(package) is None) != stood_in:
                pytest.skip(f"{package} is installed" if stood_in else f"needs {module}")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(tree, name, "exec"), {"__name__": "__main__"})


def test_examples_of_the_readme_are_short() -> None:
    for name, line, code in blocks("python"):
        assert name != "README.md" or len(code.splitlines()) <= 10, f"{name}:{line}"


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{where} {' '.join(words)}" for where, words in COMMANDS])
def test_command_exists(where: str, words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        assert set(arguments[:1]) <= TARGETS, f"{where}: Makefile has no such target"
    elif program == "layerzoo":
        group = typer.main.get_command(app)
        known = group.commands  # type: ignore[attr-defined]
        assert arguments[0] in known, f"{where}: there is {', '.join(known)}"
        known[arguments[0]].make_context(arguments[0], arguments[1:])  # raises for an unknown option or argument
    else:
        assert program.rpartition("/")[2] in ("pip", "pre-commit", "pytest")


def test_the_two_commands_of_the_readme() -> None:
    shown = [words[1] for where, words in COMMANDS if where.startswith("README.md") and words[0] == "make"]
    assert shown[:2] == ["demo", "test"]
    assert {"demo", "test"} <= TARGETS


def test_there_is_a_place_for_measured_figures() -> None:
    lines = TEXTS["README.md"].splitlines()
    assert lines.count("<!-- measured:begin -->") == lines.count("<!-- measured:end -->") == 1
    assert lines.index("<!-- measured:begin -->") < lines.index("<!-- measured:end -->")


def test_every_environment_variable_is_in_the_readme() -> None:
    code = "".join((ROOT / path).read_text(encoding="utf-8") for path in ("layerzoo/env.py", "setup.py"))
    rows = re.findall(r"^\| `(LAYERZOO_\w+)` \|", TEXTS["README.md"], re.MULTILINE)
    assert sorted(rows) == sorted(set(re.findall(r"LAYERZOO_[A-Z]+", code)))


@pytest.mark.parametrize("op", ops.__all__)
def test_every_argument_is_on_the_page_of_the_family(op: str) -> None:
    page = TEXTS[f"docs/{getattr(ops, op).__module__.split('.')[2]}.md"]
    assert f"\n### `{op}`\n" in page
    section = re.split(r"\n##+ ", page.partition(f"\n### `{op}`\n")[2])[0]
    rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    described = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(described) == sorted(inspect.signature(getattr(ops, op)).parameters)


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_paths_exist(name: str) -> None:
    text = TEXTS[name]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in filter(None, links):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:layerzoo|csrc|tests|docs|plugins)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_hooks_are_the_tools_of_make_lint() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe
    linted = re.findall(r"\$\(BIN\)/([\w-]+)", recipe[1])
    hooks = re.findall(r"entry: \.venv/bin/([\w-]+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks == linted
