"""The command ``layerzoo``. Nothing heavy is imported before a command needs it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    help="Layers to install instead of to write.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> None:
    """Entry point of the console script."""
    app()


@contextmanager
def _user_errors() -> Iterator[None]:
    """A wrong argument is answered with its message and exit code 2, not with a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        typer.echo(f"layerzoo: {error}", err=True)
        raise typer.Exit(2) from error


def _text(value: Any) -> Text:
    """Foreign text, as it is: no markup, no control characters."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "?" for c in str(value)))


def _pairs(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(_text(key), _text(value))
    return table


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Glob over names.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only this domain.")] = None,
    as_json: Json = False,
) -> None:
    """List layers, of the core and of plugins; imports none of them."""
    from layerzoo.zoo.registry import all_cards, list_layers

    with _user_errors():
        names = list_layers(pattern, domain=domain, family=family)
        cards = [card for name, card in all_cards().items() if name in names]
    cards.sort(key=lambda card: card.name)
    if as_json:
        typer.echo(json.dumps([card.to_dict() for card in cards], indent=2))
        return
    if not cards:
        typer.echo(f"no layer matches {pattern!r}", err=True)
        return
    table = Table(box=None)
    table.add_column("name", no_wrap=True)
    for heading in ("domain", "family", "summary"):
        table.add_column(heading)
    for card in cards:
        table.add_row(*map(_text, (card.name, card.domain, card.family, card.summary)))
    Console().print(table)


@app.command("card")
def card_command(
    name: Annotated[str, typer.Argument(help="family/name or plugin:name.")], as_json: Json = False
) -> None:
    """Show what a layer says about itself."""
    from layerzoo.zoo.registry import card

    with _user_errors():
        found = card(name)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    paper = found.paper
    number = f", catalogue {paper.catalogue}" if paper and paper.catalogue else ""
    rows = {
        "summary": found.summary,
        "paper": f"{paper.title} ({paper.year}){number}" if paper else "",
        "differs": found.differs.strip(),
        "class": found.target,
        "domain": f"{found.domain}, family {found.family}",
        **{f"input {tensor}": f"({', '.join(dims)})" for tensor, dims in found.inputs.items()},
        **{f"output {tensor}": f"({', '.join(dims)})" for tensor, dims in found.outputs.items()},
        "dtypes": ", ".join(found.dtypes),
        "devices": ", ".join(found.devices),
        "kernels": ", ".join(found.kernels),
        "licence": found.licence,
    }
    console = Console()
    console.print(_pairs(found.name, {key: value for key, value in rows.items() if value}))
    options = {
        f"{key}: {option.type}" + ("" if option.required else f" = {option.default!r}"): option.summary
        for key, option in found.config.items()
    }
    console.print(_pairs("\noptions", options))
    if found.example:
        console.print(_text(f"\nexample\n{found.example.rstrip()}"), soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is loaded and why anything is missing; fails only if LAYERZOO_NATIVE=require is not met."""
    from layerzoo.doctor import diagnose

    with Console(stderr=True).status("importing torch, and each plugin in a process of its own"):
        report = diagnose()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        native = report["native"]
        rows = {key: report[key] for key in ("layerzoo", "python", "platform", "torch")}
        rows["native library"] = native["library"] if native["loaded"] else f"not loaded: {native['reason']}"
        sets = f" (this machine can run {', '.join(native['available'])})" if native["loaded"] else ""
        rows["instruction set"] = native["isa"] + sets
        rows["CUDA"] = native["cuda"]
        console = Console()
        console.print(_pairs("layerzoo doctor", rows))
        console.print(_pairs("\nenvironment", {k: "" if v is None else v for k, v in report["environment"].items()}))
        console.print(_pairs("\nhosts", report["hosts"]))
        states = {
            f"{p['name']} ({p['distribution']} {p['version']})": p["state"] + (f": {p['error']}" if p["error"] else "")
            for p in report["plugins"]
        }
        console.print(_pairs("\nplugins", states or {"none installed": ""}))
        for problem in report["problems"]:
            console.print(_text(f"\nproblem: {problem}"))
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and shorter.")] = False,
) -> None:
    """Train on text and images, sample both, accelerate a transformers model, and write a report."""
    with _user_errors():
        from layerzoo.demo import run_demo
    run_demo(out, quick)


@app.command()
def bench(
    pattern: Annotated[str, typer.Argument(help="Globs over cases, with commas between.")] = "*",
    listed: Annotated[
        bool, typer.Option("--list", help="Only say which cases, sizes, types and peers there are.")
    ] = False,
    peers: Annotated[bool, typer.Option(help="Also run the peers that are installed.")] = True,
    threads: Annotated[str, typer.Option(help="Threads of torch, such as 1,2: each in turn.")] = "",
    dtype: Annotated[str, typer.Option(help="Types, such as float32,bfloat16: each in turn.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    sweep: Annotated[str, typer.Option(help="One size in several values: L=256:65536:x4 or L=1,7,512.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the records here.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a page with plots here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over files that exist.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Only check each case at a tiny size, without times.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Also what takes minutes.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Measure the machine's limits anew.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Measure nothing; compare two records.")
    ] = None,
    against: Annotated[str, typer.Option(metavar="REF", help="Compare with a git commit, built and run in turn.")] = "",
) -> None:
    """Measure ops and layers against peers and the machine's limits; exit code 1 for a wrong result or a regression."""
    with _user_errors():
        for path in filter(None, (json_path, html_path)):
            _check_output(path, force)
        if listed:
            _list_cases(pattern)
        elif compare is not None or against:
            _compare(pattern, compare, against, threads, dtype, sweep, json_path)
        else:
            _bench(pattern, peers, threads, dtype, device, sweep, json_path, html_path, smoke, full, probe)


def _bench(
    pattern: str,
    peers: bool,
    threads: str,
    dtype: str,
    device: str,
    sweep: str,
    json_path: Path | None,
    html_path: Path | None,
    smoke: bool,
    full: bool,
    probe: bool,
) -> None:
    from layerzoo.bench import limits
    from layerzoo.bench.runner import run
    from layerzoo.bench.settings import Sweep
    from layerzoo.bench.tables import tables

    if html_path is not None:
        from layerzoo.bench.page import write_page  # before the run, since it may lack the extra [bench]
    if probe:
        limits.forget()
    report = run(
        pattern,
        peers=peers,
        threads=_numbers("threads", threads),
        dtypes=_words(dtype),
        device=device,
        sweep=Sweep.parse(sweep) if sweep else None,
        smoke=smoke,
        full=full,
    )
    Console().print(tables(report))
    if json_path is not None:
        report.save(json_path)
    if html_path is not None:
        write_page(report, html_path, limits.machine_rates(max((r.threads for r in report.results), default=1)))
    if not report.ok:
        raise typer.Exit(1)


def _compare(
    pattern: str,
    files: tuple[Path, Path] | None,
    ref: str,
    threads: str,
    dtype: str,
    sweep: str,
    json_path: Path | None,
) -> None:
    from layerzoo.bench.settings import Sweep

    if files is not None and ref:
        raise ValueError("bench: --compare and --against cannot be used together")
    if files is not None:
        from layerzoo.bench.compare import compare
        from layerzoo.bench.report import Report

        found = compare(*map(Report.load, files))
    else:
        from layerzoo.bench.against import against

        found = against(
            ref,
            pattern,
            threads=_numbers("threads", threads),
            dtypes=_words(dtype),
            sweep=Sweep.parse(sweep) if sweep else None,
        )
    Console().print(found)
    if json_path is not None:
        json_path.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if not found.ok:
        raise typer.Exit(1)


def _list_cases(pattern: str) -> None:
    from layerzoo.bench.case import imported
    from layerzoo.bench.cases import select

    cases, problems = select(pattern)
    table = Table(box=None)
    for heading in ("case", "sizes", "types", "peers"):
        table.add_column(heading, overflow="fold")
    for case in cases:
        shown = []
        for peer in case.peers:
            try:
                imported(peer.needs) if peer.needs else None
                shown.append(peer.name)
            except ImportError as error:
                shown.append(f"{peer.name} (absent: {error})")
        sizes = " ".join(f"{size}={value}" for size, value in case.shape.items())
        table.add_row(*map(_text, (case.id, sizes, ", ".join(case.dtypes), ", ".join(shown))))
    Console().print(table)
    for problem in problems:
        typer.echo(f"layerzoo: {problem}", err=True)


def _check_output(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"bench: {path} must be in a folder that exists")
    if path.exists() and not force:
        raise ValueError(f"bench: {path} exists; --force writes over it")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(name: str, text: str) -> list[int]:
    if any(not word.isdecimal() for word in _words(text)):
        raise ValueError(f"bench: {name} must be numbers such as 1,2, got {text!r}")
    return [int(word) for word in _words(text)]


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="A lower-case word; the layers will be called name:layer.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; the default is ./layerzoo-NAME.")] = None,
) -> None:
    """Write a plugin with one layer, its card and its conformance test, ready to pip install."""
    folder = out or Path(f"layerzoo-{name}")
    with _user_errors():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name, re.ASCII):
            raise ValueError(f"new-plugin: NAME must be a lower-case word of letters, digits and _, got {name!r}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"new-plugin: {folder} exists and is not an empty folder")
        _render(files("layerzoo").joinpath("plugin_template"), folder, {"name": name, "package": f"layerzoo_{name}"})
    typer.echo(f"{folder} is written; next: pip install {folder} && pytest {folder}")


def _render(source: Traversable, target: Path, values: dict[str, str]) -> None:
    """Copy a template, filling in ``{{name}}`` and ``{{package}}``, in paths too, and dropping the suffix .jinja."""

    def fill(text: str) -> str:
        return re.sub(r"\{\{ ?(\w+) ?\}\}", lambda match: values[match[1]], text)

    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        path = target / fill(entry.name).removesuffix(".jinja")
        if entry.is_dir():
            _render(entry, path, values)
        else:
            path.write_text(fill(entry.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
