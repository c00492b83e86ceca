"""How sensitive a model is, group by group: what the metric or the outputs lose when one group alone is cut.

Every group of units is cut to a few shares, each alone, masked in the original with its readers repaired in one
shot (`onnxprune.sensitivity.Probe`); every residual block is taken out, alone, and repaired likewise. The drop is
what repair leaves, and drops of several cuts do not simply add up. Each cut takes a run of the data, so the file of
a survey is written while it goes on, and one that was interrupted is taken up.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.table import Table

from onnxprune import criteria, metrics, surgery
from onnxprune.allocation import kept_units
from onnxprune.blocks import Blocks
from onnxprune.calibration import Calibration
from onnxprune.cost import Cost, CostModel
from onnxprune.data import Data, Preprocess, Spec, open_data
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.errors import UserError
from onnxprune.job import Progress, quiet
from onnxprune.metrics import Runner
from onnxprune.model import Model, atomic
from onnxprune.naming import group_names
from onnxprune.plan import Plan, Remove
from onnxprune.repair import repair
from onnxprune.runtime import Session
from onnxprune.sensitivity import Probe, masks

FORMAT = 1
RATIOS = (0.1, 0.25, 0.5, 0.75)
SAMPLES = 128
SAVED = 5.0  # seconds between two writings of a file
SIZE = 16  # samples that a metric sees at a time
ERROR = "error"  # what is measured where there is no metric

Key = tuple[str, str, float | None]


@dataclass(frozen=True)
class Asked:
    """What a survey is to find.

    ratios      shares of each group that go, each in (0, 1)
    criterion   which units go first; `auto` is obs
    metric      of `onnxprune.metrics`; None: the one that fits the labels of the data, or where it has none the
                error of the outputs (see `Probe.error`)
    samples     of the data
    """

    ratios: tuple[float, ...] = RATIOS
    criterion: str = "auto"
    metric: str | None = None
    samples: int = SAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        bad = [ratio for ratio in self.ratios if not 0 < ratio < 1]
        if bad or not self.ratios:
            raise UserError(f"--ratios {bad[0] if bad else ''}: shares of a group to remove lie in (0, 1)")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: a seed is 0 or more")
        if self.criterion not in ("auto", *criteria.NAMES):
            known = ", ".join(("auto", *criteria.NAMES))
            raise UserError(f"criterion '{self.criterion}' is unknown; choose one of {known}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One cut, alone.

    part    the group, or the residual block: its name in plans
    label   its name for people (`naming`)
    role    the group's, or `layer`
    ratio   the share that was asked for; None for a block
    units   before; `kept`, after (of a block 1 and 0)
    drop    what the metric loses, in its unit, or the error of the outputs; None where it cannot be measured
    macs, params  of the model so cut
    """

    part: str
    label: str
    role: str
    ratio: float | None
    units: int
    kept: int
    drop: float | None
    macs: int
    params: int

    @property
    def key(self) -> Key:
        return self.role, self.part, self.ratio


@dataclass(frozen=True)
class Survey:
    """What was found; `complete` unless it was interrupted. Entries are sorted by what they lose; `notes` are those
    of the data."""

    model: str
    digest: str
    data: Mapping[str, Any]
    options: Mapping[str, Any]
    metric: str
    before: float | None
    macs: int
    params: int
    entries: tuple[Entry, ...] = field(repr=False)
    complete: bool = True
    notes: tuple[str, ...] = ()

    def head(self) -> dict[str, Any]:
        """What must agree for one survey to go on where another stopped."""
        return {
            "onnxprune-sensitivity": FORMAT,
            "model": self.digest,
            "data": dict(self.data),
            "options": dict(self.options),
            "metric": self.metric,
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.head(),
            "complete": self.complete,
            "notes": list(self.notes),
            "before": {"metric": self.before, "macs": self.macs, "params": self.params},
            "entries": [asdict(entry) for entry in self.entries],
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"

    def print(self, console: Console) -> None:
        """A line for each group and block, the least sensitive first, a column for each share; blocks go whole."""
        console.print(self.model, soft_wrap=True)
        if self.before is None:
            console.print("error of the outputs, as a share of their energy, when one part alone goes")
        else:
            console.print(
                f"what {self.metric} ({self.before:.4g} for the whole) loses when one part alone goes"
            )
        ratios = sorted({entry.ratio for entry in self.entries if entry.ratio is not None})
        table = Table()
        table.add_column("group or block", overflow="fold")
        whole: list[float | None] = [None] if any(entry.ratio is None for entry in self.entries) else []
        shares = [*ratios, *whole]
        for name in (*(f"-{1 if share is None else share:.0%}" for share in shares), "MACs left"):
            table.add_column(name, justify="right")
        for entries in self._parts():
            drops = {entry.ratio: entry for entry in entries}
            last = entries[-1]
            cells = [_shown(drops[share]) if share in drops else "" for share in shares]
            table.add_row(last.label, *cells, f"{last.macs / max(self.macs, 1):.1%}")
        console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True)

    def _parts(self) -> list[list[Entry]]:
        """Entries of each part by ratio, the parts by their mean drop."""
        parts: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            parts.setdefault((entry.role, entry.part), []).append(entry)
        for entries in parts.values():
            entries.sort(key=lambda entry: entry.ratio or 0)
        return sorted(parts.values(), key=lambda entries: sum(map(_loss, entries)) / len(entries))


def _shown(entry: Entry) -> str:
    return "-" if entry.drop is None else f"{entry.drop:.3g}"


def _loss(entry: Entry) -> float:
    return math.inf if entry.drop is None else entry.drop


def survey(
    model: Model,
    spec: Spec,
    asked: Asked,
    preprocess: Preprocess | None = None,
    path: Path | None = None,
    progress: Progress = quiet,
) -> Survey:
    """Measure every group and residual block of a model on data.

    path  where the survey is kept while it goes on; what an interrupted one has left there is taken up

    Raises `UserError` for data that does not fit, and for a file at `path` that is anything but a survey of this
    model on this data with these options.
    """
    progress("analyse", None)
    blocks = Blocks(DependencyGraph(model))
    progress("read data", None)
    data = open_data(
        spec, model, blocks.graph.shapes, samples=asked.samples, seed=asked.seed, preprocess=preprocess
    )
    return _Run(blocks, data, asked, path, progress).finished()


class _Run:
    """A survey on its way."""

    def __init__(
        self, blocks: Blocks, data: Data, asked: Asked, path: Path | None, progress: Progress
    ) -> None:
        self.blocks = blocks
        self.graph = blocks.graph
        self.data = data
        self.path = path
        self.progress = progress
        self.seed = asked.seed
        self.ratios = tuple(sorted(set(asked.ratios)))
        self.criterion = "obs" if asked.criterion == "auto" else asked.criterion
        self.metric = self._chosen(asked.metric)
        self.groups = [group for group in self.graph.groups if group.kind == "exact" and group.size > 1]
        self.before: float | None = None
        self.found: dict[Key, Entry] = {}
        self.whole = CostModel(self.graph)

    def _chosen(self, metric: str | None) -> str:
        if metric is not None:
            if metrics.metric(metric)().needs_labels and not self.data.labelled:
                raise UserError(
                    f"--metric {metric} needs labels and {self.data.source} has none; "
                    f"use {', '.join(metrics.AGREEMENTS)}"
                )
            return metric
        if not self.data.labelled:
            return ERROR
        return metrics.default_metric(self.data, next(iter(metrics.outputs_of(self.graph.model, self.data))))

    def finished(self) -> Survey:
        waiting = list(self._cuts())
        if not waiting:
            raise UserError(
                f"{self.graph.model.name}: there is no group and no residual block that could be cut"
            )
        if self.path is not None and self.path.exists():
            self.found = _taken_up(self.path, self.survey().head())
        waiting = [cut for cut in waiting if cut.key not in self.found]
        if not waiting and self.path is not None:
            return self._restored()
        calibration = Calibration(self.graph, self.data, self.progress)
        probe = Probe(calibration.evidence, self.data)
        self._judge(probe)
        scores = criteria.score(calibration.evidence, self.groups, self.criterion, self.seed)
        drops: dict[tuple[str, str, int], float | None] = {
            (entry.role, entry.part, entry.kept): entry.drop for entry in self.found.values()
        }
        total, saved = len(waiting) + len(self.found), time.monotonic()
        try:
            for cut in waiting:
                place = cut.role, cut.part, cut.kept
                if place not in drops:
                    drops[place] = self._drop(probe, cut, scores)
                self.found[cut.key] = cut.entry(drops[place])
                self.progress("measure", len(self.found) / total)
                if time.monotonic() - saved > SAVED:
                    self._save(complete=False)
                    saved = time.monotonic()
        except BaseException:
            if self.found:
                self._save(complete=False)
            raise
        self._save(complete=True)
        return self.survey()

    def survey(self, complete: bool = True) -> Survey:
        cost = self.whole()
        entries = sorted(self.found.values(), key=lambda e: (_loss(e), e.part, e.role, e.ratio or 0))
        options = {"ratios": list(self.ratios), "criterion": self.criterion, "seed": self.seed}
        return Survey(
            self.graph.model.name, self.graph.model.digest(), self.data.provenance, options, self.metric,
            self.before, cost.macs, cost.params, tuple(entries), complete, self.data.notes,
        )  # fmt: skip

    def _save(self, complete: bool) -> None:
        if self.path is not None:
            with atomic(self.path) as temporary:
                temporary.write_text(self.survey(complete).to_json(), encoding="utf-8")

    def _restored(self) -> Survey:
        """What the file says, all of it; what the metric is for the whole stands there, too."""
        assert self.path is not None
        before = json.loads(self.path.read_text(encoding="utf-8"))["before"]["metric"]
        self.before = None if before is None else float(before)
        return self.survey()

    # ------------------------------------------------------------------------------------- measuring

    def _cuts(self) -> Iterator[_Cut]:
        labels = group_names(self.blocks)
        for group in self.groups:
            role = self.blocks.role(group)
            for ratio in self.ratios:
                kept = max(group.size - max(round(group.size * ratio), 1), 1)
                cost = self.whole({group.var: kept})
                yield _Cut(group.name, labels[group], role, ratio, group.size, kept, cost, group=group)
        for block in self.blocks.residual:
            cost = CostModel(self.graph, self.blocks.gone([block]))()
            yield _Cut(block.name, f"{block.name} ({block.kind} block)", "layer", None, 1, 0, cost)

    def _judge(self, probe: Probe) -> None:
        """What the whole scores."""
        if self.metric == ERROR:
            return
        self.make = metrics.metric(self.metric)
        self.higher = self.make().higher_is_better
        whole = probe.masked({})
        self.original = (
            list(metrics.outputs_of(whole, self.data, SIZE)) if self.make().needs_original else None
        )
        self.before = self._score(whole)

    def _score(self, runner: Runner) -> float:
        return metrics.evaluate(runner, self.data, self.make, original=self.original, size=SIZE)

    def _drop(self, probe: Probe, cut: _Cut, scores: Mapping[Group, criteria.Scores]) -> float | None:
        """What one cut costs; None where it is beyond measure."""
        keep = None if cut.group is None else masks([(cut.group, kept_units(scores[cut.group], cut.kept))])
        proto = self._without(probe, cut.part) if keep is None else None
        if self.before is None:
            lost = probe.error(keep or {}) if proto is None else probe.error_of(proto)
        else:
            after = self._score(probe.masked(keep or {}) if proto is None else Session(proto, optimise="all"))
            lost = self.before - after if self.higher else after - self.before
        return float(f"{lost:.9g}") + 0.0 if math.isfinite(lost) else None

    def _without(self, probe: Probe, name: str) -> onnx.ModelProto:
        """The model without a residual block, which the layer before makes up for as far as it can."""
        plan = Plan(self.graph.model.digest(), (Remove(name),))
        removed = surgery.removed_blocks(self.blocks, plan)
        pruned = surgery.apply(self.graph, plan, self.blocks)
        repaired = repair("ridge", self.blocks, {}, removed, pruned, probe.evidence, self.data, self.seed)
        return repaired.proto


@dataclass(frozen=True, eq=False)
class _Cut:
    """One thing to measure: a group with so many units kept, or a residual block."""

    part: str
    label: str
    role: str
    ratio: float | None
    units: int
    kept: int
    cost: Cost
    group: Group | None = None

    @property
    def key(self) -> Key:
        return self.role, self.part, self.ratio

    def entry(self, drop: float | None) -> Entry:
        return Entry(
            self.part, self.label, self.role, self.ratio, self.units, self.kept, drop,
            self.cost.macs, self.cost.params,
        )  # fmt: skip


def _taken_up(path: Path, head: Mapping[str, Any]) -> dict[Key, Entry]:
    """The entries of an earlier survey of the same."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {name: document[name] for name in head}
        entries = [_entry(stated) for stated in document["entries"]]
        before = document["before"]["metric"]
        if not (before is None or type(before) in (int, float)):
            raise TypeError("the metric is no number")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: exists and is no survey of sensitivity; choose another path with -o, or delete it"
        ) from None
    for name, what in {"model": "another model", "data": "other data", "options": "other options"}.items():
        if found[name] != json.loads(json.dumps(head[name])):
            raise UserError(f"{path}: holds a survey of {what}; choose another path with -o, or delete it")
    if found["metric"] != head["metric"] or found["onnxprune-sensitivity"] != FORMAT:
        raise UserError(
            f"{path}: holds a survey by another metric; choose another path with -o, or delete it"
        )
    return {entry.key: entry for entry in entries}


def _entry(stated: Mapping[str, Any]) -> Entry:
    """Raises `TypeError` for what is no entry."""
    entry = Entry(**stated)
    numbers: Sequence[Any] = (entry.units, entry.kept, entry.macs, entry.params)
    texts = entry.part, entry.label, entry.role
    sound = all(type(n) is int for n in numbers) and all(isinstance(text, str) for text in texts)
    if not sound or not all(x is None or type(x) in (int, float) for x in (entry.ratio, entry.drop)):
        raise TypeError("no entry")
    return entry
