"""What a run came to, for people (a table) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune import comparison
from onnxprune.comparison import OnTarget
from onnxprune.cost import Cost
from onnxprune.errors import printable
from onnxprune.repair import Repaired
from onnxprune.validation.equivalence import Equivalence

COLUMNS = ("channels", "params", "macs", "bytes")
LOST = 0.01  # of the MACs: less is not worth a note
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


@dataclass(frozen=True, slots=True)
class Part:
    """A group of the graph, or a residual block that was removed (1 -> 0): its units before and after.

    name   in plans
    label  for people (`naming`)
    """

    name: str
    label: str
    role: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Padding:
    """What is lost to kernels that compute whole blocks of channels.

    blocks  in words
    padded  the share of the MACs that is kept where every count is filled up to whole blocks, or counts as much as what
            its slower kernels cost (`Alignment.filled`)
    asked   the share that the given ratios keep where counts are not rounded; none where they are not what was given
    """

    blocks: str
    padded: float
    asked: float | None

    def notes(self, kept: float) -> list[str]:
        """What is worth saying beside the share of the MACs that is really kept."""
        found = []
        if self.asked is not None and kept - self.asked > LOST:
            found.append(
                f"rounding keeps {kept:.1%} of the MACs where {self.asked:.1%} were asked for; a smaller --align comes "
                "nearer, in shapes that kernels do not fill"
            )
        if self.padded - kept > LOST:
            found.append(
                f"kernels that fill blocks of {self.blocks} channels still do {self.padded:.1%} of the work, for {kept:.1%} "
                "of the MACs"
            )
        return found


@dataclass(frozen=True)
class Candidates:
    """Models that a search has looked at, by what they cost and what they are worth.

    cost, value  their names; costs are shares of the original's
    better       whether the `higher` value is the better one, or the `lower`
    original     the value of the original
    limit        of the value that was asked for, where there is one
    points       (cost, value, whether it was chosen)
    """

    cost: str
    value: str
    better: str
    original: float
    limit: float | None
    points: tuple[tuple[float, float, bool], ...]

    def as_dict(self) -> dict[str, Any]:
        keys = ("cost", "value", "chosen")
        return {**asdict(self), "points": [dict(zip(keys, point, strict=True)) for point in self.points]}


@dataclass(frozen=True, slots=True)
class Mended:
    """What repair came to.

    chosen  the stage that was kept
    errors  noise over signal of the outputs on calibration data, by stage that was tried
    layers  of the stage that was kept: the share of each layer's output that is wrong, before and after
    """

    chosen: str
    errors: Mapping[str, float]
    layers: tuple[Repaired, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "errors": {name: float(f"{error:.6g}") for name, error in self.errors.items()},
            "layers": [asdict(layer) for layer in self.layers],
        }

    def on(self, where: str) -> str:
        """In a sentence; `where` says what the errors were measured on."""
        error = self.errors[self.chosen]
        if not any(self.errors.values()):
            return f"repair: none kept, since no output that holds floats has changed, on {where}"
        if len(set(self.errors.values())) == 1:
            return (
                "repair: no layer could be changed (weights that are quantised, shared or inside a body are not); "
                f"error of the outputs {error:.2g} of their energy, on {where}"
            )
        if self.chosen == "none":
            tried = ", ".join(name for name in self.errors if name != "none")
            return (
                f"repair: none kept, since {tried} brought the outputs no closer to the original's "
                f"(error {error:.2g} of their energy, on {where})"
            )
        changed = len({layer.node for layer in self.layers if not layer.method.startswith("none")})
        return (
            f"repair: {self.chosen}, {counted(changed, 'layer')} changed; error of the outputs {self.errors['none']:.2g} -> {error:.2g} "
            f"of their energy, on {where}"
        )


@dataclass(frozen=True, slots=True)
class Quality:
    """A metric on data, of the original and of the result; `provenance` says what that data was."""

    metric: str
    data: str
    before: float
    after: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.metric} on {self.data}: {self.before:.4g} -> {self.after:.4g}"


@dataclass(frozen=True)
class Report:
    """Before and after, the proof, and where it came from.

    before, after   predicted from the cost polynomials, exact for what is counted; with the biases that repair added
    changes         what goes, by role (heads, neurons, ...; `layers` counts residual blocks)
    skipped         groups left alone, by reason
    pinned          weight axes that cannot be cut, by reason
    repair          what repair came to, where it was asked for and could be done
    quality         a metric before and after, where one was asked for
    data            what was scored and repaired with: kind, samples, SHA-256, preprocessing, and whether it was
                    `measured` or made up
    targets         both models on every target that was named
    parts           every group in the order of the graph, and every removed block
    padding         what is lost to kernels that compute whole blocks of channels
    candidates      what a search has looked at, where there was one
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
    repair: Mended | None = None
    quality: Quality | None = None
    data: Mapping[str, Any] | None = None
    targets: tuple[OnTarget, ...] = ()
    parts: tuple[Part, ...] = ()
    padding: Padding | None = None
    candidates: Candidates | None = None

    @property
    def kept(self) -> dict[str, float]:
        """After as shares of before."""
        return self.after.ratio(self.before)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "kept": {name: round(value, 6) for name, value in self.kept.items()},
            "changes": {role: asdict(change) for role, change in self.changes.items()},
            "groups": self.groups,
            "groups_cut": self.cut,
            "skipped": dict(self.skipped),
            "pinned": dict(self.pinned),
            "equivalence": self.equivalence.as_dict() if self.equivalence else None,
            "repair": self.repair.as_dict() if self.repair else None,
            "quality": asdict(self.quality) if self.quality else None,
            "data": None if self.data is None else dict(self.data),
            "targets": [one.as_dict() for one in self.targets],
            "parts": [asdict(part) for part in self.parts],
            "padding": asdict(self.padding) if self.padding else None,
            "candidates": self.candidates.as_dict() if self.candidates else None,
            "notes": list(self.notes),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "provenance": dict(self.provenance),
        }

    def print(self, console: Console) -> None:
        """The before/after table and the verdict; first of all what is not faster."""
        for one in self.targets:
            if one.slower:
                console.print(f"NOT FASTER on {one.target}: written all the same", soft_wrap=True)
        console.print(self.model, soft_wrap=True)
        table = Table()
        for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("kept", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for column in COLUMNS:
            before, after = getattr(self.before, column), getattr(self.after, column)
            table.add_row(TITLES[column], f"{before:,}", f"{after:,}", f"{self.kept[column]:.1%}")
        console.print(table)
        comparison.show(self.targets, console)
        for role, change in self.changes.items():
            console.print(_changed(role, change), soft_wrap=True)
        console.print(
            f"{self.cut} of {self.groups} groups cut{_counted(self.skipped, '; left alone')}", soft_wrap=True
        )
        if self.equivalence is not None:
            for line in verdict(self.equivalence).splitlines():
                console.print(line, soft_wrap=True)
        if self.repair is not None:
            measured = self.data is not None and self.data["measured"]
            where = str(self.data["source"]) if measured and self.data is not None else "made-up inputs"
            console.print(self.repair.on(where), soft_wrap=True)
        if self.quality is not None:
            console.print(str(self.quality), soft_wrap=True)
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True)


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
    return f"{role}: {change.before:,} -> {change.after:,} in {counted(change.groups, 'group')}"


def counted(number: int, noun: str) -> str:
    """A number and a noun that agree."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def _counted(reasons: Mapping[str, int], title: str) -> str:
    if not reasons:
        return ""
    return f"{title}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
