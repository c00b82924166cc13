"""What surgery did to a model, place by place."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Action = Literal["accelerated", "swapped", "restored", "already", "skipped", "refused"]
CHANGES: tuple[Action, ...] = ("accelerated", "swapped", "restored")
STYLES = {"already": "cyan", "skipped": "yellow", "refused": "red"}


@dataclass(frozen=True)
class Entry:
    """One place of the model: its dotted name, the class before and after, what was done and why (not).

    `copied`, `fresh` and `dropped` name parameters and buffers: moved from the old module, new, left in the old one.
    """

    name: str
    old: str
    new: str
    action: Action
    reason: str = ""
    copied: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def weights(self) -> str:
        """`copied`, `fresh` and `dropped` in words."""
        kinds = {"copied": self.copied, "fresh": self.fresh, "dropped": self.dropped}
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)


@dataclass(frozen=True)
class Report:
    """The answer of `swap`, `accelerate` and `restore`: one `Entry` for each place that was looked at.

    True where something changed, or would have changed under `dry_run`. `str(report)` and `rich.print(report)` give
    a table, `to_dict()` plain data.
    """

    verb: str
    entries: tuple[Entry, ...]
    dry_run: bool = False

    def __bool__(self) -> bool:
        return any(entry.action in CHANGES for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and booleans, ready for JSON."""
        return {"verb": self.verb, "dry_run": self.dry_run, "changed": bool(self), "entries": list(map(asdict, self))}

    def rows(self) -> dict[tuple[str, str, str, Action, str], list[str]]:
        """What reads the same but for the numbers in the name, with the names: one row of the table each."""
        rows: dict[tuple[str, str, str, Action, str], list[str]] = {}
        for entry in self:
            why = "; ".join(filter(None, (entry.reason, entry.weights)))
            glob = re.sub(r"\b\d+\b", "*", entry.name)
            rows.setdefault((glob, _short(entry.old), _short(entry.new), entry.action, why), []).append(entry.name)
        return rows

    def __rich__(self) -> Table:
        counts = {action: sum(entry.action == action for entry in self) for action in (*CHANGES, *STYLES)}
        summary = ", ".join(f"{count} {action}" for action, count in counts.items() if count) or "nothing to do"
        table = Table(title=f"{self.verb}: {summary}{' (dry run, nothing was touched)' if self.dry_run else ''}")
        for column in ("name", "old", "new", "action", "reason"):
            table.add_column(column, overflow="fold")
        for (glob, old, new, action, why), names in self.rows().items():
            name = names[0] if len(names) == 1 else f"{glob} ({len(names)} times)"
            # Text, since names and reasons may hold brackets, which rich would read as markup
            table.add_row(*map(Text, (name, old, new)), Text(action, style=STYLES.get(action, "green")), Text(why))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip("\n")


def _short(name: str) -> str:
    """Package and class: what stands between is in `to_dict`."""
    package, _, rest = name.partition(".")
    return f"{package}.{rest.rpartition('.')[2]}"
