"""Remove units: of every group the share that the scores rank lowest.

Channels, attention heads, their width, neurons and the residual stream are all groups of units; a role
(see `blocks`) says which share applies.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxprune import allocation, criteria
from onnxprune.blocks import Blocks, Role
from onnxprune.cost import Cost, CostModel
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.errors import UserError
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


def plan(blocks: Blocks, options: Options, removed: Sequence[Remove] = ()) -> tuple[list[Keep], float | None]:
    """Which units go; and the ratio that meets the target, where one was given.

    Raises `UserError` if the target cannot be reached.
    """
    graph = blocks.graph
    gone = blocks.gone(blocks.named(edit.block) for edit in removed)
    pools: dict[Role, list[Group]] = {}
    for choice in choose(blocks, options, gone):
        option = options.option_for(choice.role)
        if choice.skipped is None and option is not None:
            pools.setdefault(option, []).append(choice.group)
    pooled = {group for pool in pools.values() for group in pool}
    groups = [group for group in graph.groups if group in pooled]
    scores = criteria.score(graph, groups, options.criterion, options.seed)

    def counts(ratios: Mapping[Role, float]) -> dict[Group, int]:
        kept: dict[Group, int] = {}
        for role, pool in pools.items():
            rounding = replace(options.rounding, align=1) if role == "heads" else options.rounding
            kept |= allocation.counts(pool, scores, ratios[role], options.strategy, rounding)
        return kept

    ratios = {role: options.share(role) for role in pools}
    solved = None
    if options.target is not None:
        solved = _solve(graph, lambda ratio: counts(dict.fromkeys(pools, ratio)), gone, *options.target)
        ratios = dict.fromkeys(pools, solved)
    kept = counts(ratios)
    edits = []
    for role, pool in pools.items():
        why = f"{role}, {options.criterion}, {options.strategy} {ratios[role]:.4g}"
        for group in pool:
            if kept[group] < group.size:
                units = allocation.kept_units(scores[group], kept[group])
                edits.append(Keep(group.name, group.size, units, group.kind, why))
    return sorted(edits, key=lambda edit: edit.group), solved


def _solve(
    graph: DependencyGraph,
    counts: Callable[[float], dict[Group, int]],
    gone: frozenset[int],
    name: str,
    share: float,
) -> float:
    """The smallest ratio whose plan meets the target, by bisection on the cost polynomials."""
    budget = share * getattr(CostModel(graph)(), name)
    model = CostModel(graph, gone)

    def cost(ratio: float) -> Cost:
        return model({group.var: count for group, count in counts(ratio).items()})

    low, high = 0.0, 0.999
    if getattr(cost(low), name) <= budget:
        return low
    if getattr(cost(high), name) > budget:
        least = getattr(cost(high), name) * share / max(budget, 1e-9)
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
