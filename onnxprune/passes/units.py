"""Remove units: of every group the share that the scores rank lowest.

Channels, attention heads, their width, neurons and the residual stream are all groups of units; a role
(see `blocks`) says which share applies.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from onnxprune import allocation, criteria
from onnxprune.blocks import Block, Blocks, Role
from onnxprune.calibration import Calibration
from onnxprune.cost import Cost, CostModel, Measure
from onnxprune.dependency import Group
from onnxprune.errors import Unreachable, UserError
from onnxprune.passes import layers
from onnxprune.passes.options import Options
from onnxprune.plan import Keep, Remove


@dataclass(frozen=True, slots=True)
class Choice:
    """A group with its role, and why it is left alone, or None where it may be cut."""

    group: Group
    role: Role
    skipped: str | None


def choose(blocks: Blocks, options: Options, gone: frozenset[int] = frozenset()) -> list[Choice]:
    """Which groups may be cut, and for each of the others the reason in a word or two.

    gone  indices of nodes that leave with a removed layer
    """
    graph = blocks.graph
    roles = {group: blocks.role(group) for group in graph.groups}
    taken: dict[Group, Role] = {}
    reasons: dict[Group, str] = {}
    for group in sorted(graph.groups, key=lambda group: _preference(group, roles[group])):
        option = options.option_for(roles[group])
        if option is None:
            reasons[group] = "not asked for"
        elif all(node.index in gone for node in group.nodes):
            reasons[group] = "in a removed layer"
        elif group.kind == "lossy" and not options.allow_lossy:
            reasons[group] = "lossy"
        elif any(_matches(group, pattern) for pattern in options.exclude):
            reasons[group] = "excluded"
        elif options.include and not any(_matches(group, pattern) for pattern in options.include):
            reasons[group] = "not included"
        elif group.size <= options.minimum:
            reasons[group] = "too small"
        elif any(taken.get(sibling) == option for sibling in group.siblings):
            reasons[group] = "other factor cut"
        else:
            taken[group] = option
    return [Choice(group, roles[group], reasons.get(group)) for group in graph.groups]


def _preference(group: Group, role: Role) -> tuple[bool, bool, int, str]:
    """Of the factors of one product the outer one (whole heads, whole convolution groups) is cut, unless
    it is too coarse; heads never are, because kernels and runtimes ask for certain widths."""
    coarse = group.size < 4 and role != "heads"
    return (coarse, group.inner, -group.size, group.name)


def _matches(group: Group, pattern: str) -> bool:
    names = {o.tensor for o in group.occurrences} | {o.node.label for o in group.occurrences}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True, slots=True)
class Decision:
    """What goes: units, and residual blocks that the budget gave up for them.

    solved   the ratio that meets the target, where one was solved for
    error    the predicted output error, where there is a prediction
    """

    keeps: tuple[Keep, ...]
    removed: tuple[Remove, ...] = ()
    solved: float | None = None
    error: float | None = None


class Units:
    """Decides which units go; scores and error curves are found once for any number of decisions.

    removed      residual blocks that go anyway
    prices       of multiply-accumulates in each node, where a time is the target (see `latency`)
    calibration  data, for criteria and allocations that need it

    Raises `UserError` for criteria and allocations that need data where there is none.
    """

    def __init__(
        self,
        blocks: Blocks,
        options: Options,
        removed: Sequence[Remove] = (),
        calibration: Calibration | None = None,
    ) -> None:
        self.blocks = blocks
        self.graph = blocks.graph
        self.options = options
        self.calibration = calibration
        self.prices: Mapping[int, int] = {}
        self.gone = blocks.gone(blocks.named(edit.block) for edit in removed)
        self.pools: dict[Role, list[Group]] = {}
        self.roles: dict[Group, Role] = {}
        for choice in choose(blocks, options, self.gone):
            option = options.option_for(choice.role)
            if choice.skipped is None and option is not None:
                self.pools.setdefault(option, []).append(choice.group)
                self.roles[choice.group] = choice.role
        self.groups = [group for group in self.graph.groups if group in self.roles]
        if options.strategy in allocation.MEASURED and calibration is None:
            raise UserError(
                f"{self.graph.model.name}: --allocation {options.strategy} measures errors; give inputs with --data"
            )

    @functools.cached_property
    def scores(self) -> dict[Group, criteria.Scores]:
        needs = criteria.needs_data(self.options.criterion)
        if self.calibration is not None and (needs or self.options.strategy in allocation.MEASURED):
            evidence = self.calibration.evidence
        else:
            evidence = criteria.Evidence.of(self.graph)
        return criteria.score(evidence, self.groups, self.options.criterion, self.options.seed)

    @functools.cached_property
    def curves(self) -> dict[Group, allocation.Curve]:
        """The measured error of every group by the units it keeps."""
        assert self.calibration is not None
        return self.calibration.curves(self.scores, self.allowed(), len(self._removable))

    def allowed(self) -> dict[Group, tuple[int, ...]]:
        """Units that each group may keep, ascending."""
        return {group: self._rounding(group).allowed(group) for group in self.groups}

    @functools.cached_property
    def _removable(self) -> list[Block]:
        """Residual blocks that the budget may give up: where nothing says which layers are to go."""
        free = self.options.strategy == "budget" and self.options.layers is None
        excluded = self.options.exclude
        return [b for b in self.blocks.residual if free and not layers.touches(b, excluded)]

    @functools.cached_property
    def removals(self) -> list[allocation.Removal]:
        assert self.calibration is not None
        errors = self.calibration.without(self._removable, len(self.curves))
        return [
            allocation.Removal(block.name, self.blocks.gone([block]), errors[block.name])
            for block in self._removable
            if math.isfinite(errors[block.name])
        ]

    def rescored(self, scores: Mapping[Group, criteria.Scores]) -> Units:
        """The same groups with other scores, and error curves of their own."""
        other = copy.copy(self)
        other.__dict__.pop("curves", None)
        other.__dict__["scores"] = dict(scores)
        return other

    def decide(self, target: tuple[str, float] | None = None, part: float = 1.0) -> Decision:
        """What goes for this target (cost, share to keep), or for the options' own.

        part  of the options' shares that is to go

        Raises `UserError` if the target cannot be reached.
        """
        target = target or self.options.aim
        if self.options.strategy == "budget" and target is not None:
            return self._budget(*target)
        ratios = {role: part * self.options.share(role) for role in self.pools}
        solved = None
        if target is not None:
            solved = _solve(
                CostModel(self.graph, prices=self.prices),
                CostModel(self.graph, self.gone, self.prices),
                lambda ratio: self._counts(dict.fromkeys(self.pools, ratio)),
                *target,
            )
            ratios = dict.fromkeys(self.pools, solved)
        kept = self._counts(ratios)
        options = self.options
        why = {
            group: f"{role}, {options.criterion}, {options.strategy} {ratios[role]:.4g}"
            for role, pool in self.pools.items()
            for group in pool
        }
        return Decision(self._keeps(kept, why), (), solved)

    def _budget(self, name: str, share: float) -> Decision:
        cost = CostModel(self.graph, self.gone, self.prices)
        limit = share * getattr(CostModel(self.graph, prices=self.prices)(), name)
        found = allocation.budget(self.curves, cost, cast(Measure, name), limit, self.removals)
        chosen = {removal: self.blocks.named(removal) for removal in found.removed}
        gone = self.gone | self.blocks.gone(chosen.values())
        kept = {
            group: group.size if all(node.index in gone for node in group.nodes) else count
            for group, count in found.counts.items()
        }
        why = {group: f"{self.roles[group]}, {self.options.criterion}, budget" for group in kept}
        errors = {removal.name: removal.error for removal in self.removals}
        removed = tuple(
            Remove(block, f"{chosen[block].kind}, budget {errors[block]:.3g}") for block in found.removed
        )
        return Decision(self._keeps(kept, why), removed, None, found.error)

    def _counts(self, ratios: Mapping[Role, float]) -> dict[Group, int]:
        kept: dict[Group, int] = {}
        for role, pool in self.pools.items():
            rounding = self._rounding_of(role)
            strategy = self.options.strategy
            if strategy == "sensitivity":
                kept |= allocation.by_sensitivity(
                    {g: self.curves[g] for g in pool if g in self.curves}, ratios[role]
                )
            elif strategy == "isomorphic":
                kept |= allocation.isomorphic(pool, self.scores, ratios[role], self.roles, rounding)
            else:
                kept |= allocation.counts(pool, self.scores, ratios[role], strategy, rounding)
        return kept

    def unrounded(self) -> dict[Group, int] | None:
        """Units that would stay if counts were not rounded to blocks, where shares to remove were given; curves of
        sensitivities know rounded counts only."""
        if self.options.aimed or self.options.strategy == "sensitivity":
            return None
        other = copy.copy(self)
        other.options = replace(self.options, align=1)
        return other._counts({role: self.options.share(role) for role in self.pools})

    def _rounding(self, group: Group) -> allocation.Rounding:
        option = self.options.option_for(self.roles[group])
        return self._rounding_of(self.roles[group] if option is None else option)

    def _rounding_of(self, role: Role) -> allocation.Rounding:
        rounding = self.options.rounding
        return replace(rounding, alignment=allocation.Alignment.of(1)) if role == "heads" else rounding

    def _keeps(self, kept: Mapping[Group, int], why: Mapping[Group, str]) -> tuple[Keep, ...]:
        edits = [
            Keep(
                group.name,
                group.size,
                allocation.kept_units(self.scores[group], count),
                group.kind,
                why[group],
            )
            for group, count in kept.items()
            if count < group.size
        ]
        return tuple(sorted(edits, key=lambda edit: edit.group))


def _solve(
    whole: CostModel, model: CostModel, counts: Callable[[float], dict[Group, int]], name: str, share: float
) -> float:
    """The smallest ratio whose plan meets the target, by bisection on the cost polynomials."""
    budget = share * getattr(whole(), name)

    def cost(ratio: float) -> Cost:
        return model({group.var: count for group, count in counts(ratio).items()})

    low, high = 0.0, 0.999
    if getattr(cost(low), name) <= budget:
        return low
    if getattr(cost(high), name) > budget:
        least = getattr(cost(high), name) * share / max(budget, 1e-9)
        raise Unreachable(
            f"{whole.graph.model.name}: --{name} {share} cannot be reached; the least possible here is {least:.3f} "
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
