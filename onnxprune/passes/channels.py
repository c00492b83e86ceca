"""Remove channels: the share of every prunable group that the scores rank lowest."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from onnxprune import allocation, criteria
from onnxprune.allocation import Rounding
from onnxprune.cost import Cost, CostModel
from onnxprune.dependency import DependencyGraph, Group, uncollected
from onnxprune.errors import UserError
from onnxprune.plan import Keep, Plan


@dataclass(frozen=True, slots=True)
class Channels:
    """Options of the pass.

    ratio        share of the units of each group to remove, in [0, 1)
    macs, params targets: the share of the model's MACs or parameters to keep (instead of `ratio`)
    include      patterns on node and weight names; only groups that touch one are cut
    exclude      patterns; groups that touch one stay whole
    allow_lossy  cut groups that a statistic is taken over, too
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    criterion: str = "l2"
    strategy: str = "uniform"
    align: int = 16
    minimum: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_lossy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "macs", "params") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError("give exactly one of --channels, --macs and --params")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(f"--channels {self.ratio}: the share to remove lies in [0, 1)")
        for name in ("macs", "params"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"--{name} {value}: the share to keep lies in (0, 1]")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: a seed is 0 or more")
        if self.criterion not in criteria.NAMES:
            raise UserError(
                f"criterion '{self.criterion}' is unknown; choose one of {', '.join(criteria.NAMES)}"
            )
        if self.strategy not in allocation.STRATEGIES:
            raise UserError(f"allocation '{self.strategy}' is unknown; choose uniform or global")

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.align, self.minimum)


@dataclass(frozen=True, slots=True)
class Choice:
    """Why a group is left alone, or None where it may be cut."""

    group: Group
    skipped: str | None


def choose(graph: DependencyGraph, options: Channels) -> list[Choice]:
    """Which groups may be cut, and for each of the others the reason in a word or two."""
    taken: set[Group] = set()
    reasons: dict[Group, str] = {}
    for group in sorted(graph.groups, key=_preference):
        if group.kind == "lossy" and not options.allow_lossy:
            reasons[group] = "lossy"
        elif any(_matches(group, pattern) for pattern in options.exclude):
            reasons[group] = "excluded"
        elif options.include and not any(_matches(group, pattern) for pattern in options.include):
            reasons[group] = "not included"
        elif group.size <= options.minimum:
            reasons[group] = "too small"
        elif any(sibling in taken for sibling in group.siblings):
            reasons[group] = "other factor cut"
        else:
            taken.add(group)
    return [Choice(group, reasons.get(group)) for group in graph.groups]


def _preference(group: Group) -> tuple[bool, bool, int, str]:
    """Of the factors of one product the outer one (whole heads, whole convolution groups) is cut, unless
    it is too coarse."""
    return (group.size < 4, group.inner, -group.size, group.name)


def _matches(group: Group, pattern: str) -> bool:
    names = {o.tensor for o in group.occurrences} | {o.node.label for o in group.occurrences}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


@uncollected
def plan(graph: DependencyGraph, options: Channels, digest: str) -> Plan:
    """Decide which units go.

    Raises `UserError` if a target cannot be reached.
    """
    groups = [choice.group for choice in choose(graph, options) if choice.skipped is None]
    scores = criteria.score(graph, groups, options.criterion, options.seed)

    def counts(ratio: float) -> dict[Group, int]:
        return allocation.counts(groups, scores, ratio, options.strategy, options.rounding)

    ratio = options.ratio if options.ratio is not None else _solve(graph, counts, options)
    edits = []
    for group, count in counts(ratio).items():
        if count < group.size:
            units = allocation.kept_units(scores[group], count)
            why = f"{options.criterion}, {options.strategy} {ratio:.4g}"
            edits.append(Keep(group.name, group.size, units, group.kind, why))
    given = asdict(options) | {
        "include": list(options.include),
        "exclude": list(options.exclude),
    }  # as JSON has them
    stated = {name: value for name, value in given.items() if value is not None}
    return Plan(digest, tuple(edits), {"pass": "channels", **stated, "solved_ratio": ratio})


def _solve(graph: DependencyGraph, counts: Callable[[float], dict[Group, int]], options: Channels) -> float:
    """The smallest ratio whose plan meets the target, by bisection on the cost polynomials."""
    name = "macs" if options.macs is not None else "params"
    share = options.macs if options.macs is not None else options.params
    assert share is not None
    model = CostModel(graph)
    budget = share * getattr(model(), name)

    def cost(ratio: float) -> Cost:
        return model({group.var: count for group, count in counts(ratio).items()})

    low, high = 0.0, 0.999
    if getattr(cost(low), name) <= budget:
        return low
    if getattr(cost(high), name) > budget:
        least = getattr(cost(high), name) / max(getattr(model(), name), 1)
        raise UserError(
            f"{graph.model.name}: --{name} {share} cannot be reached; the least possible here is {least:.3f} "
            "(see `onnxprune inspect` for what is pinned)"
        )
    for _ in range(40):
        middle = (low + high) / 2
        if getattr(cost(middle), name) <= budget:
            high = middle
        else:
            low = middle
    return high


def skipped_reasons(choices: Sequence[Choice]) -> dict[str, int]:
    """How many groups were left alone, by reason."""
    counted: dict[str, int] = {}
    for choice in choices:
        if choice.skipped is not None:
            counted[choice.skipped] = counted.get(choice.skipped, 0) + 1
    return dict(sorted(counted.items()))
