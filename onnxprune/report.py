"""What a run came to, for people (a table) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.cost import Cost
from onnxprune.errors import printable
from onnxprune.validation.equivalence import Equivalence

COLUMNS = ("channels", "params", "macs", "bytes")
TITLES = {"channels": "channels", "params": "parameters", "macs": "MACs", "bytes": "weight bytes"}


class PlainConsole(Console):
    """A console that takes every string literally: names in a model may look like markup, or hold
    control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)


@dataclass(frozen=True, slots=True)
class Change:
    """Units of some groups: how many groups, and their units before and after."""

    groups: int = 0
    before: int = 0
    after: int = 0

    def __add__(self, other: Change) -> Change:
        return Change(self.groups + other.groups, self.before + other.before, self.after + other.after)


@dataclass(frozen=True)
class Report:
    """Before and after, the proof, and where it came from.

    before, after   predicted from the cost polynomials, exact for what is counted
    changes         what goes, by role (heads, neurons, ...; `layers` counts residual blocks)
    skipped         groups left alone, by reason
    pinned          weight axes that cannot be cut, by reason
    """

    model: str
    before: Cost
    after: Cost
    changes: Mapping[str, Change]
    groups: int
    cut: int
    equivalence: Equivalence | None
    skipped: Mapping[str, int] = field(default_factory=dict)
    pinned: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, float]:
        """After as shares of before."""
        return self.after.ratio(self.before)

    def as_dict(self) -> dict[str, Any]:
        costs = {
            name: {column: getattr(cost, column) for column in COLUMNS}
            for name, cost in (("before", self.before), ("after", self.after))
        }
        return {
            "model": self.model,
            **costs,
            "kept": {name: round(value, 6) for name, value in self.kept.items()},
            "changes": {role: asdict(change) for role, change in self.changes.items()},
            "groups": self.groups,
            "groups_cut": self.cut,
            "skipped": dict(self.skipped),
            "pinned": dict(self.pinned),
            "equivalence": self.equivalence.as_dict() if self.equivalence else None,
            "notes": list(self.notes),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "provenance": dict(self.provenance),
        }

    def print(self, console: Console) -> None:
        """The before/after table and the verdict."""
        console.print(self.model, soft_wrap=True)
        table = Table()
        for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("kept", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for column in COLUMNS:
            before, after = getattr(self.before, column), getattr(self.after, column)
            table.add_row(TITLES[column], f"{before:,}", f"{after:,}", f"{self.kept[column]:.1%}")
        console.print(table)
        for role, change in self.changes.items():
            console.print(_changed(role, change))
        console.print(f"{self.cut} of {self.groups} groups cut{_counted(self.skipped, '; left alone')}")
        if self.equivalence is not None:
            for line in verdict(self.equivalence).splitlines():
                console.print(line)
        for note in self.notes:
            console.print(f"note: {note}")


def verdict(equivalence: Equivalence) -> str:
    """The equivalence check in a sentence."""
    word = "equals" if equivalence.passed else "DIFFERS FROM"
    lines = [
        f"{word} the masked original: error {equivalence.error:.1e} of the output's scale "
        f"(limit {equivalence.tolerance:g}), {len(equivalence.sizes)} runs, {len(equivalence.outputs)} outputs"
    ]
    lines += [f"note: {note}" for note in equivalence.notes]
    return "\n".join(lines)


def _changed(role: str, change: Change) -> str:
    if role == "layers":
        return f"layers: {change.before - change.after} of {change.before} residual blocks removed"
    where = "group" if change.groups == 1 else "groups"
    return f"{role}: {change.before:,} -> {change.after:,} in {change.groups} {where}"


def _counted(reasons: Mapping[str, int], title: str) -> str:
    if not reasons:
        return ""
    return f"{title}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
