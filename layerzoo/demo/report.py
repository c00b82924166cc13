"""What the parts of the demo show, as a table in the terminal and as a page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from layerzoo.bench.report import describe, machine

Row = tuple[str, str, str, str]  # what, before, after, gain


@dataclass
class Section:
    """What a part shows; without rows, `words` say why. Plots are SVG, the sample is text."""

    words: str
    rows: list[Row] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    sample: str = ""


Part = Callable[[bool, Progress], Section]


def write_report(sections: Mapping[str, Section], took: float, path: Path) -> None:
    """Prints the rows of all sections, by their titles, and writes the page; `took` is in seconds."""
    host = f"{describe(machine())}; {took:.0f} s in all"
    table = Table(title="layerzoo demo", caption=host, caption_justify="left")
    for column in ("", "before", "after", "gain"):
        table.add_column(column, justify="right" if column else "left")
    for section in sections.values():
        for row in section.rows:
            table.add_row(*row, end_section=row is section.rows[-1])
    console = Console()
    console.print(table)
    for title, section in sections.items():
        if not section.rows:
            console.print(f"{title}: {section.words}", highlight=False)
    template = files("layerzoo.demo").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(sections=sections, host=host)
    path.write_text(page, encoding="utf-8")
    console.print(f"{path} is written", highlight=False)
