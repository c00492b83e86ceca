"""How many units each group keeps, and how counts are rounded for fast kernels.

Shares: the same of every group (uniform), of all units at once (global), of all units of like groups
(isomorphic), or up to an error that is the same for all groups (by sensitivity). Or a budget: the counts,
and the residual blocks to remove, that meet a cost at the least predicted error.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.cost import CostModel, Ledger, Measure, Tangent
from onnxprune.dependency import Group
from onnxprune.errors import Unreachable, UserError

Floats = npt.NDArray[np.float64]
Scores = Mapping[Group, Floats]
MEASURED = ("sensitivity", "budget")  # allocations that need error curves
STRATEGIES = ("uniform", "global", "isomorphic", *MEASURED)
GROUPED = 4  # grouped and depthwise convolutions off a multiple of this fall to slow kernels
# What a channel costs off multiples of 4 on x86, in channels of full blocks. Measured: in stacks of equal convolutions 1.2
# (63 channels) to 1.5 (18); with depthwise ones 1.3 (ShuffleNet V2) to 2.4 and more (inverted residual blocks).
SLOWER, SLOWER_GROUPED = 1.3, 1.6
GLOBAL_FLOOR = 0.1  # the least share of a group that global allocation leaves


@dataclass(frozen=True, slots=True)
class Alignment:
    """Multiples of channels that kernels fill; 1: any number.

    channels  of convolutions
    grouped   of depthwise convolutions, and of others within each group
    products  of matrix products and recurrent layers
    whole     whether convolutions take other, slower kernels off the blocks: then no group that fills a block is cut
              to a part of one. MLAS on x86: where they write less than a block, are in groups and off a multiple of 4,
              or read a block or more off a multiple of 4 (`nchwc_transformer.cc`)
    """

    channels: int = 16
    grouped: int = 16
    products: int = 16
    whole: bool = False

    @staticmethod
    def of(block: int) -> Alignment:
        """The same everywhere. Raises `UserError` where it is no number of channels."""
        if block < 1:
            raise UserError(f"--align {block}: give a positive number of channels (1 turns it off)")
        return Alignment(block, block, block)

    def joined(self, other: Alignment) -> Alignment:
        """What fills the kernels of both."""
        return Alignment(
            math.lcm(self.channels, other.channels),
            math.lcm(self.grouped, other.grouped),
            math.lcm(self.products, other.products),
            self.whole or other.whole,
        )

    def block(self, group: Group) -> int:
        """Channels between two counts that fill the kernels of a group."""
        if group.grouped:
            return self.grouped if self.grouped == 1 else math.lcm(self.grouped, GROUPED)
        return self.channels if group.windowed else self.products

    def filled(self, group: Group, count: int) -> int:
        """Units in full blocks that cost as much as `count` of a group: in convolutions those of all blocks that are
        begun, and where counts off a multiple of 4 leave the kernels of blocks (`whole`), `SLOWER` times the count (at
        least its blocks in groups). Matrix products cost what they hold."""
        if not (group.windowed or group.grouped):
            return count
        block = self.block(group)
        width = _width(group)
        blocks = math.ceil(math.ceil(count * width / block) * block / width)
        if not self.whole or block % GROUPED or count * width % GROUPED == 0:
            return blocks
        if group.grouped:
            return max(blocks, math.ceil(count * SLOWER_GROUPED))
        return math.ceil(count * SLOWER) if count * width >= block else blocks

    def __str__(self) -> str:
        if self.channels == self.grouped == self.products:
            return f"{self.channels}"
        return f"{self.channels} (in groups {self.grouped}, products {self.products})"


def _width(group: Group) -> int:
    """Channels per unit, where blocks are counted: of positions inside the groups of a convolution within each group."""
    return 1 if group.grouped and group.inner else group.stride


@dataclass(frozen=True, slots=True)
class Rounding:
    """Channels per group are rounded to blocks, and never fall below `minimum` (rounded up, or all that there are).

    The count nearest to what is asked for; a size off the blocks counts as the block that it begins. Where parts of
    blocks cost as much as the whole (`Alignment.whole`) cost decides: see `_cheaper`.
    """

    alignment: Alignment = Alignment()
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.minimum < 1:
            raise UserError(f"--min-channels {self.minimum}: at least 1 channel must stay")

    def step(self, group: Group) -> int:
        """Units between two allowed counts: the alignment in channels over the channels per unit.

        Groups smaller than two blocks use half blocks (down to 4 channels), so that they can be cut at all; of
        convolutions that run on whole blocks only those that fill none. Parts of blocks in grouped convolutions are
        multiples of 4, too.
        """
        block, width = self.alignment.block(group), _width(group)
        if not self._whole(group):
            while block > GROUPED and group.size * width < 2 * block:
                block = max(block // 2, GROUPED)
                if group.grouped and block % GROUPED:
                    block = GROUPED
        return max(block // math.gcd(block, width), 1)

    def _whole(self, group: Group) -> bool:
        """Whether parts of a block would cost more than the block that a group fills."""
        convolved = group.windowed or group.grouped
        return (
            self.alignment.whole and convolved and group.size * _width(group) >= self.alignment.block(group)
        )

    def count(self, group: Group, wish: float) -> int:
        """The allowed count for `wish`, at most the group's size and at least the minimum. Half a unit goes (a quarter
        of two heads is one), half a block stays."""
        step = self.step(group)
        if step == 1:
            count = math.ceil(wish - 0.5)
        elif self._whole(group):
            return self._cheaper(group, wish)
        elif group.size < 2 * step:
            count = group.size
        else:
            count = max(step, step * math.floor(wish / step + 0.5))
        least = step * math.ceil(self.minimum / step)
        return min(group.size, max(count, least))

    def allowed(self, group: Group) -> tuple[int, ...]:
        """Every count that `count` gives for some wish, ascending, and the size itself."""
        step = self.step(group)
        if step > 1 and self._whole(group):
            return self._full(group)
        counts = {self.count(group, wish) for wish in range(0, group.size + 1, step)}
        return tuple(sorted(counts | {self.count(group, group.size), group.size}))

    def _full(self, group: Group) -> tuple[int, ...]:
        """Counts of a group on whole blocks, ascending, from the minimum on; none costs more than the next.

        Full blocks and the size itself; of a size off multiples of 4 also the next below, which is on the kernels of
        blocks: 27 channels take 1.3 times as long as 24.
        """
        size, width, step = group.size, _width(group), self.step(group)
        four = GROUPED // math.gcd(GROUPED, width)
        counts = {size, *range(step, size, step)}
        below = size - size % four
        if below and self.alignment.filled(group, below) < self.alignment.filled(group, size):
            counts.add(below)
        return tuple(sorted(n for n in counts if n >= min(self.minimum, size)))

    def _cheaper(self, group: Group, wish: float) -> int:
        """Of the two counts around `wish` the lower if the units that the upper has too many cost more than it has too
        few: one unit too few counts 1 (an error that was not asked for), one too many what it costs in full blocks
        (`Alignment.filled`), the mean over those between the two counts.

        Between full blocks that is the nearest, and the upper of two as near. 22 channels in blocks of 16: the upper
        6 cost 13, and are kept only for wishes above 20.1.
        """
        counts = self._full(group)
        at = bisect.bisect_left(counts, wish)
        if at in (0, len(counts)):
            return counts[min(at, len(counts) - 1)]
        low, high = counts[at - 1 : at + 1]
        saved = self.alignment.filled(group, high) - self.alignment.filled(group, low)
        return low if (high - wish) * saved > (wish - low) * (high - low) else high


def counts(
    groups: Sequence[Group], scores: Scores, ratio: float, strategy: str, rounding: Rounding
) -> dict[Group, int]:
    """Units kept per group when the share `ratio` of all units is to go.

    uniform   the same share of every group
    global    the least important units wherever they are; scores are divided by their group's mean
              first, and no group falls below a tenth
    """
    if strategy == "uniform":
        return {g: rounding.count(g, g.size * (1 - ratio)) for g in groups}
    if strategy != "global":
        raise UserError(f"allocation '{strategy}' is unknown; choose one of {', '.join(STRATEGIES)}")
    return _ranked(groups, [_normalised(scores[g]) for g in groups], ratio, rounding)


def _ranked(
    groups: Sequence[Group], pooled: Sequence[npt.NDArray[np.float64]], ratio: float, rounding: Rounding
) -> dict[Group, int]:
    """Units kept per group when the lowest of all values go."""
    floors = [max(math.ceil(g.size * GLOBAL_FLOOR), rounding.minimum) for g in groups]
    removable = [np.sort(p)[: max(g.size - f, 0)] for p, g, f in zip(pooled, groups, floors, strict=True)]
    everything = np.sort(np.concatenate([*removable, np.empty(0)]))
    wanted = min(round(ratio * sum(g.size for g in groups)), len(everything))
    if not wanted:
        return {g: g.size for g in groups}
    threshold = everything[wanted - 1]
    gone = [int(np.searchsorted(r, threshold, side="left")) for r in removable]
    for i, values in enumerate(removable):  # ties at the threshold, in group order
        ties = int(np.searchsorted(values, threshold, side="right")) - gone[i]
        gone[i] += min(ties, wanted - sum(gone))
    return {g: rounding.count(g, g.size - n) for g, n in zip(groups, gone, strict=True)}


def isomorphic(
    groups: Sequence[Group], scores: Scores, ratio: float, roles: Mapping[Group, str], rounding: Rounding
) -> dict[Group, int]:
    """Units kept per group when each class of like groups is to lose the share `ratio` of its units.

    Groups are alike where they have the same role and occur in the same places: the multiset of (operator,
    role of the occurrence). The least important units of a class go wherever in it they are; scores are
    compared as they are, since like structures have like scales. No group falls below a tenth. Fang et al.,
    "Isomorphic Pruning for Vision Models" (ECCV 2024), section 3.
    """
    classes: dict[tuple[str, tuple[tuple[str, str], ...]], list[Group]] = {}
    for group in groups:
        places = tuple(sorted((o.node.op, o.role) for o in group.occurrences))
        classes.setdefault((roles[group], places), []).append(group)
    kept: dict[Group, int] = {}
    for alike in classes.values():
        kept |= _ranked(alike, [scores[g] for g in alike], ratio, rounding)
    return {g: kept[g] for g in groups}


def _normalised(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mean = values.mean()
    return values / mean if mean > 0 else np.zeros_like(values)


def kept_units(values: npt.NDArray[np.float64], count: int) -> tuple[int, ...]:
    """The `count` units of highest score, in order; ties keep the lower index."""
    order = np.argsort(-values, kind="stable")[:count]
    return tuple(int(u) for u in np.sort(order))


@dataclass(frozen=True, slots=True)
class Curve:
    """What a group costs the output, by how many units it keeps.

    counts   allowed counts, ascending; the last is the group's size
    errors   predicted output error at each (infinite: not to be chosen); 0 at the size

    Errors of different groups must add up.
    """

    counts: tuple[int, ...]
    errors: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.counts)))
        if not self.counts or not ascending or self.errors.shape != (len(self.counts),):
            raise ValueError(f"counts must ascend from 1 with an error each, not {self.counts}")
        if np.isnan(self.errors).any() or (self.errors == -np.inf).any() or self.errors[-1] != 0:
            raise UserError(
                f"an error curve up to {self.counts[-1]} units: errors must be numbers, and 0 where all are kept"
            )


def by_sensitivity(curves: Mapping[Group, Curve], ratio: float) -> dict[Group, int]:
    """Units kept per group when the share `ratio` of all units is to go, up to the same error in each group.

    Steps are taken in the order of the error that they lead to (where a curve falls again, the error before),
    until enough units have gone. Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.2.
    """
    steps: list[tuple[float, str, int, Group]] = []
    for group, curve in curves.items():
        worst = np.maximum.accumulate(curve.errors[::-1])[::-1]
        steps += [(float(e), group.name, -n, group) for n, e in zip(curve.counts, worst, strict=True)]
    steps.sort(key=lambda step: step[:3])
    kept = {group: curve.counts[-1] for group, curve in curves.items()}
    left = ratio * sum(kept.values())
    for error, _, negative, group in steps:
        if left <= 0 or error == np.inf:
            break
        left -= kept[group] + negative
        kept[group] = -negative
    return kept


@dataclass(frozen=True, slots=True)
class Removal:
    """A residual block that may go as a whole.

    nodes   indices of the nodes that go with it (`Blocks.gone`)
    error   predicted output error without it, in the unit of the curves
    """

    name: str
    nodes: frozenset[int]
    error: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Units kept per group (all, where a group is in a removed block) and the blocks that go.

    error   predicted: the sum over groups and removed blocks
    bound   no choice that meets the limit has a smaller error than this, up to rounding
    """

    counts: dict[Group, int]
    removed: tuple[str, ...]
    error: float
    bound: float


NEAREST = 48  # groups that a swap tries to take units from, the cheapest ones first
ROUNDS = 12  # of local search
WORK = 6000  # steps of all groups that local search makes in each round
TRIALS = 24  # blocks that local search takes out or puts back in each round
DOUBLINGS, THIRDS = 20, 30  # of the search for the best price of a unit of cost


def budget(
    curves: Mapping[Group, Curve],
    cost: CostModel,
    name: Measure,
    limit: float,
    removals: Sequence[Removal] = (),
) -> Allocation:
    """The counts, and the blocks to remove, of the least predicted error whose cost is at most `limit`.

    A multiple-choice knapsack whose weights are polynomials in the counts. Greedy on the lower convex hulls of
    the curves (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", 1979): the step of the least error
    per cost saved is taken, at the prices that the other counts make. Where others shrink prices only fall, so
    an outdated price is optimistic, and only the head of the queue is priced again (Minoux, 1978). Then local
    search: units are given back and taken elsewhere, blocks are put back or taken out, while the error falls.

    A block that goes frees the cost of its nodes; groups that live in removed blocks only have no error. Nodes
    that several removals share are free with the first of them.

    limit   in units of the cost (MACs, elements, bytes)

    Raises `Unreachable` if no choice meets the limit.
    """
    search = _Search(curves, cost.ledger(name), limit, removals)
    search.smallest()
    if not search.fits:
        whole = getattr(CostModel(cost.graph, prices=cost.prices)(), name)
        least = search.ledger.total // search.ledger.unit / max(whole, 1)
        raise Unreachable(
            f"{cost.graph.model.name}: --{name} {limit / max(whole, 1):.3g} cannot be reached; the least possible "
            f"here is {least:.3f} (see `onnxprune inspect` for what is pinned)"
        )
    search.largest()
    search.descend()
    if not search.fits:  # removals that free something only together
        search.smallest()
    search.improve()
    counts = {group: search.count(i) for group, i in search.index.items()}
    removed = tuple(r.name for b, r in enumerate(search.removals) if search.out[b])
    error = search.error()
    return Allocation({g: counts[g] for g in curves}, removed, error, search.bound())


class _Search:
    """A choice of counts and blocks, its cost, and moves to better ones."""

    def __init__(
        self, curves: Mapping[Group, Curve], ledger: Ledger, limit: float, removals: Sequence[Removal]
    ) -> None:
        self.ledger = ledger
        self.limit = (math.floor(limit) + 1) * ledger.unit - 1 if math.isfinite(limit) else math.inf
        groups = sorted(curves, key=lambda group: group.name)
        self.index = {group: i for i, group in enumerate(groups)}
        self.groups = groups
        self.vars = [group.var for group in groups]
        # Of each group the options worth having, ascending: more units never mean more error.
        options = [_worth(curves[group]) for group in groups]
        self.counts = [counts for counts, _ in options]
        self.errors = [errors for _, errors in options]
        self.removals = sorted((r for r in removals if r.error < math.inf), key=lambda r: r.name)
        self.at = [len(c) - 1 for c in self.counts]
        self.out = [False] * len(self.removals)
        self.gone: dict[int, int] = {}  # node: removed blocks that it is in
        nodes = [frozenset(node.index for node in group.nodes) for group in groups]
        self.left = [len(found) or -1 for found in nodes]  # nodes of each group that stay
        self.lives: dict[int, list[int]] = {}  # node: groups that occur there
        for i, found in enumerate(nodes):
            for node in sorted(found):
                self.lives.setdefault(node, []).append(i)
        self.homes: list[list[int]] = [[] for _ in groups]  # removals that a group is wholly inside
        self.inner: list[list[int]] = []
        for b, removal in enumerate(self.removals):
            touched = dict.fromkeys(i for n in sorted(removal.nodes) for i in self.lives.get(n, ()))
            self.inner.append([i for i in touched if nodes[i] <= removal.nodes])
            for i in self.inner[b]:
                self.homes[i].append(b)
        for i in range(len(groups)):
            self._price(i)
        self.below = [self._hull(i) for i in range(len(groups))]
        self.above: list[list[list[int]]] = [[[] for _ in below] for below in self.below]
        for i, below in enumerate(self.below):
            for k, lower in enumerate(below):
                if lower >= 0:
                    self.above[i][lower].append(k)

    def _hull(self, i: int) -> list[int]:
        """For each option the one below it on the lower convex hull of error over cost, -1 for the last."""
        counts, errors = self.counts[i], self.errors[i]
        cost = counts
        if not self.ledger.affine(self.vars[i]):
            cost = [-self.saving(i, k) for k in range(len(counts))]
        below: list[int] = []
        hull: list[int] = []
        for k in range(len(counts)):
            while len(hull) > 1:
                a, b = hull[-2:]
                whole, part = cost[k] - cost[a], cost[b] - cost[a]
                if (errors[b] - errors[a]) * whole <= (errors[k] - errors[a]) * part:
                    break
                hull.pop()
            below.append(hull[-1] if hull else -1)
            hull.append(k)
        return below

    @property
    def fits(self) -> bool:
        return self.ledger.total <= self.limit

    def inside(self, i: int) -> bool:
        """Whether a group lives in removed blocks only."""
        return self.left[i] == 0

    def count(self, i: int) -> int:
        return self.groups[i].size if self.inside(i) else self.counts[i][self.at[i]]

    def error_of(self, i: int) -> float:
        return 0.0 if self.inside(i) else self.errors[i][self.at[i]]

    def error(self) -> float:
        removed = (r.error for b, r in enumerate(self.removals) if self.out[b])
        return math.fsum(removed) + math.fsum(self.error_of(i) for i in range(len(self.groups)))

    # ----------------------------------------------------------------------------------- moves

    def choose(self, i: int, option: int) -> None:
        self.at[i] = option
        self._price(i)

    def _price(self, i: int) -> None:
        self.ledger.set(self.vars[i], self.count(i))

    def toggle(self, b: int) -> float:
        """Take a block out or put it back; the change of the error."""
        self.out[b] = not self.out[b]
        step = 1 if self.out[b] else -1
        removal = self.removals[b]
        change = step * removal.error
        crossed = []
        for node in sorted(removal.nodes):
            self.gone[node] = self.gone.get(node, 0) + step
            if self.gone[node] == (1 if step > 0 else 0):
                for i in self.lives.get(node, ()):
                    self.left[i] -= step
                    if self.left[i] == (0 if step > 0 else 1):
                        crossed.append(i)
        (self.ledger.take_out if step > 0 else self.ledger.put_back)(sorted(removal.nodes))
        for i in crossed:
            change -= step * self.errors[i][self.at[i]]
            self._price(i)
        return change

    def saving(self, i: int, option: int) -> int:
        return 0 if self.inside(i) else self.ledger.saving(self.vars[i], self.counts[i][option])

    def smallest(self) -> None:
        """The least cost there is."""
        for b in range(len(self.removals)):
            if not self.out[b]:
                self.toggle(b)
        for i in range(len(self.groups)):
            self.choose(i, 0)

    def largest(self) -> None:
        """The least error there is without removals."""
        for b in range(len(self.removals)):
            if self.out[b]:
                self.toggle(b)
        for i in range(len(self.groups)):
            self.choose(i, len(self.counts[i]) - 1)

    def state(self) -> tuple[list[int], list[bool]]:
        return list(self.at), list(self.out)

    def restore(self, state: tuple[list[int], list[bool]]) -> None:
        at, out = state
        for b, wanted in enumerate(out):
            if self.out[b] != wanted:
                self.toggle(b)
        for i, option in enumerate(at):
            if self.at[i] != option:
                self.choose(i, option)

    # ---------------------------------------------------------------------------------- greedy

    def descend(self, fixed: frozenset[int] = frozenset(), kept: frozenset[int] = frozenset()) -> None:
        """Take steps of the least error per cost until the limit is met, or none is left.

        fixed  groups, and `kept` blocks, that are left alone
        """
        heap: list[tuple[float, int, int, int]] = []  # (error per cost, 0 group or 1 block, which, version)
        fresh = [0] * len(self.removals)
        for i in range(len(self.groups)):
            if i not in fixed and (ratio := self._step(i)) is not None:
                heap.append((ratio, 0, i, 0))
        for b in range(len(self.removals)):
            if b not in kept and (found := self._removal(b)) is not None:
                heap.append((found, 1, b, 0))
        heapq.heapify(heap)
        while not self.fits and heap:
            _, kind, which, version = heapq.heappop(heap)
            if kind and version != fresh[which]:
                continue
            now = self._removal(which) if kind else self._step(which)
            if now is None:
                continue
            if heap and (now, kind, which, version) > heap[0]:
                heapq.heappush(heap, (now, kind, which, version))
                continue
            if kind:
                self.toggle(which)
                continue
            self.choose(which, self.below[which][self.at[which]])
            if (ratio := self._step(which)) is not None:
                heapq.heappush(heap, (ratio, 0, which, 0))
            for b in self.homes[which]:  # which has less to lose now
                if b not in kept and (found := self._removal(b)) is not None:
                    fresh[b] += 1
                    heapq.heappush(heap, (found, 1, b, fresh[b]))

    def _step(self, i: int) -> float | None:
        """The error per cost of the next step down, None where there is none."""
        k = self.at[i]
        target = self.below[i][k]
        if target < 0 or self.inside(i):
            return None
        saving = self.saving(i, target)
        return (self.errors[i][target] - self.errors[i][k]) / saving if saving > 0 else None

    def _removal(self, b: int) -> float | None:
        """The error per cost of the removal of a block, None where it frees nothing or is out."""
        if self.out[b]:
            return None
        before = self.ledger.total
        change = self.toggle(b)
        saving = before - self.ledger.total
        self.toggle(b)
        return change / saving if saving > 0 else None

    # ---------------------------------------------------------------------------- local search

    def improve(self) -> None:
        """Local search; never breaks the limit, never raises the error."""
        self.fill()
        for _ in range(ROUNDS):
            before = self.error()
            self._swaps()
            self._deeper()
            self._trials()
            self.fill()
            if not _less(self.error(), before):
                break

    def fill(self) -> None:
        """Give units back where the limit allows, the most error per cost first."""
        heap = []
        for i in range(len(self.groups)):
            if (found := self._raise(i)) is not None:
                heap.append((found[0], i))
        heapq.heapify(heap)
        while heap:
            _, i = heapq.heappop(heap)
            found = self._raise(i)
            if found is None:
                continue
            if heap and (found[0], i) > heap[0]:
                heapq.heappush(heap, (found[0], i))
                continue
            self.choose(i, found[1])
            if (found := self._raise(i)) is not None:
                heapq.heappush(heap, (found[0], i))

    def _raise(self, i: int) -> tuple[float, int] | None:
        """The best option above the present one that the limit allows: (-error per cost, option)."""
        k, errors = self.at[i], self.errors[i]
        last = len(errors) - 1
        if k == last or self.inside(i):
            return None
        slack = self.limit - self.ledger.total
        first = -self.saving(i, k + 1)
        if first > slack:
            return None
        best = ((errors[k + 1] - errors[k]) / max(first, 1), k + 1)
        for option in self.above[i][k]:
            cost = -self.saving(i, option)
            if cost <= slack:
                best = min(best, ((errors[option] - errors[k]) / max(cost, 1), option))
        return best

    def _swaps(self) -> None:
        """Give one group more, and take what that costs from the one that loses least by it."""
        everyone = range(len(self.groups))
        steps = sorted((ratio, i) for i in everyone if (ratio := self._step(i)) is not None)
        nearest = [i for _, i in steps[:NEAREST]]
        for u in everyone:
            k = self.at[u]
            if self.inside(u):
                continue
            for option in dict.fromkeys((k + 1, k + 2, *self.above[u][k])):
                if option < len(self.errors[u]) and self._pay(u, option, nearest):
                    break

    def _deeper(self) -> None:
        """Fix one group at another option and settle the rest anew; the cheapest steps first."""
        moves = []
        for i in range(len(self.groups)):
            k, lower = self.at[i], self.below[i][self.at[i]]
            if self.inside(i):
                continue
            for option in dict.fromkeys((k - 2, k - 1, k + 1, k + 2, lower, *self.above[i][k])):
                if 0 <= option < len(self.errors[i]) and option != k:
                    saving = abs(self.saving(i, option))
                    ratio = abs(self.errors[i][option] - self.errors[i][k]) / max(saving, 1)
                    moves.append((ratio if option < k else -ratio, i, option))
        for _, i, option in _middle(sorted(moves), max(WORK // max(len(self.groups), 1), 1)):
            state, before = self.state(), self.error()
            if self.inside(i) or option == self.at[i]:
                continue
            self.choose(i, option)
            self.settle(before, state, fixed=frozenset((i,)))

    def settle(
        self,
        before: float,
        state: tuple[list[int], list[bool]],
        fixed: frozenset[int] = frozenset(),
        kept: frozenset[int] = frozenset(),
    ) -> bool:
        """Meet the limit again and use it up; back to `state` unless that errs less than `before`."""
        self.descend(fixed, kept)
        if self.fits:
            self.fill()
            if _less(self.error(), before):
                return True
        self.restore(state)
        return False

    def _pay(self, u: int, option: int, payers: Sequence[int]) -> bool:
        """Raise a group to an option if another can pay for it at less error."""
        k = self.at[u]
        best, choice = self.errors[u][k] - self.errors[u][option], None
        if best <= 0:
            return False
        self.choose(u, option)
        need = self.ledger.total - self.limit
        if need <= 0:
            return True
        for v in payers:
            at, errors = self.at[v], self.errors[v]
            if v == u or at == 0 or self.inside(v) or not _less(errors[at - 1] - errors[at], best):
                continue
            # The highest option that saves enough.
            target = bisect.bisect_right(range(at), -need, key=lambda o, v=v: -self.saving(v, o)) - 1
            if target >= 0 and _less(errors[target] - errors[at], best):
                best, choice = errors[target] - errors[at], (v, target)
        if choice is None:
            self.choose(u, k)
            return False
        self.choose(*choice)
        return True

    def _trials(self) -> None:
        """Take a block out, put one back, or one for another, and settle the rest anew: from here, and with
        all units back."""
        blocks = range(len(self.removals))
        inside = sorted((ratio, b) for b in blocks if (ratio := self._removal(b)) is not None)
        outside = sorted((-self.removals[b].error, b) for b in blocks if self.out[b])
        most = min(TRIALS, max(WORK // max(len(self.groups) + len(self.removals), 1), 1))
        coming = [b for _, b in outside][:most]
        going = [b for _, b in inside][:most]
        singles = [(b,) for b in (*coming, *going)]
        pairs = [(a, b) for a in coming for b in going]
        size = max(sum(map(len, self.counts)), 1)
        for n, moved in enumerate([*singles, *pairs[: WORK // size]]):
            state, before = self.state(), self.error()
            if any(self.out[b] != (b in coming) for b in moved):
                continue  # an earlier trial moved it
            for b in moved:
                self.toggle(b)
            if self.settle(before, state, kept=frozenset(moved)) or n >= WORK // size:
                continue
            for b in moved:
                self.toggle(b)
            for i in range(len(self.groups)):
                self.choose(i, len(self.counts[i]) - 1)
            self.settle(before, state, kept=frozenset(blocks))

    # ----------------------------------------------------------------------------------- bound

    def bound(self) -> float:
        """A lower bound of the error of every choice that meets the limit: a Lagrangian dual.

        The cost is replaced by what is never above it and is a sum over groups: its tangent in the logarithms
        of the counts at the present choice, that at full counts, or a mean of the two; less, for each block
        that goes, all that it costs at full counts. Where costs are sums over groups as they are, and no
        block may go, this is the dual of the problem itself, as strong as its linear relaxation.
        """
        for b, out in enumerate(self.out):
            if out:
                self.toggle(b)
        near = _Relaxed(self, self.ledger.tangent(logarithmic=True))
        for group in self.groups:
            self.ledger.set(group.var, group.size)
        far = _Relaxed(self, self.ledger.tangent(logarithmic=False))
        shares = [self.ledger.of_entries(self.ledger.entries_of(sorted(r.nodes))) for r in self.removals]
        return max(_Dual(self, near, far, weight, shares).maximum() for weight in (0.0, 0.25, 0.5, 0.75, 1.0))


class _Relaxed:
    """A tangent of the cost.

    options  of all groups, one after the other, the cost of each option
    whole    of each group the cost of all its units
    """

    def __init__(self, search: _Search, tangent: Tangent) -> None:
        now = search.ledger.counts
        known = set(search.vars)
        self.constant = tangent.constant
        for var, powers in tangent.powers.items():
            if var not in known:
                size = now.get(var, var.extent)
                self.constant += math.fsum(c * size**power for power, c in powers.items())
        costs = []
        for var, counts in zip(search.vars, search.counts, strict=True):
            at = np.array([*counts, var.extent], dtype=np.float64)
            cost = tangent.logs.get(var, 0.0) * np.log(at / now.get(var, var.extent))
            for power, coefficient in tangent.powers.get(var, {}).items():
                cost = cost + coefficient * at**power
            costs.append(cost)
        self.options = np.concatenate([np.empty(0), *(cost[:-1] for cost in costs)])
        self.whole = np.array([cost[-1] for cost in costs])


class _Dual:
    """The Lagrangian dual of the budget with a mean of two relaxed costs.

    shares   what goes with each block, at most
    """

    def __init__(
        self, search: _Search, near: _Relaxed, far: _Relaxed, weight: float, shares: Sequence[int]
    ) -> None:
        self.total = search.ledger.total
        self.limit = search.limit
        self.constant = weight * near.constant + (1 - weight) * far.constant
        self.costs = weight * near.options + (1 - weight) * far.options
        self.whole = weight * near.whole + (1 - weight) * far.whole
        self.starts = np.cumsum([0, *map(len, search.counts)])[:-1]
        # The block that a group is inside; a group in several at once, or split between them, has no error that is sure.
        covered = frozenset[int]().union(*(r.nodes for r in search.removals))
        self.home = np.array([homes[0] if len(homes) == 1 else -1 for homes in search.homes], dtype=np.intp)
        errors = []
        for group, found, home in zip(search.groups, search.errors, self.home, strict=True):
            shared = bool(group.nodes) and all(node.index in covered for node in group.nodes)
            errors.append(np.zeros(len(found)) if shared and home < 0 else found)
        self.errors = np.concatenate([np.empty(0), *errors])
        self.removed = np.array([removal.error for removal in search.removals])
        self.freed = np.array(shares, dtype=np.float64) - self._by_block(self.whole)

    def _by_block(self, values: Floats) -> Floats:
        """Sums over the groups inside each block."""
        inside = self.home >= 0
        sums = np.zeros(len(self.removed))
        np.add.at(sums, self.home[inside], values[inside])
        return sums

    def maximum(self) -> float:
        """The largest value found over prices of a unit of cost; the dual is concave, each is a bound."""
        if self.limit == math.inf:
            return self(0.0)
        span = float(np.abs(self.errors).sum()) + float(np.abs(self.removed).sum())
        unit = span / max(self.total, 1)
        prices = [0.0, *(unit * 2.0**k for k in range(-DOUBLINGS, DOUBLINGS + 1))]
        values = [self(price) for price in prices]
        best = int(np.argmax(values))
        low, high = prices[max(best - 1, 0)], prices[min(best + 1, len(prices) - 1)]
        top = values[best]
        for _ in range(THIRDS):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            a, b = self(left), self(right)
            top = max(top, a, b)
            low, high = (left, high) if a < b else (low, right)
        return top

    def __call__(self, price: float) -> float:
        value = price * (self.constant - self.limit) if price else 0.0
        least = np.empty(0)
        if self.starts.size:
            least = np.minimum.reduceat(self.errors + price * self.costs, self.starts)
        kept = self._by_block(least)
        gone = self.removed - price * self.freed
        return value + float(least[self.home < 0].sum() + np.minimum(kept, gone).sum())


def _worth(curve: Curve) -> tuple[list[int], list[float]]:
    """The counts and errors without infinite errors, and without counts of which a smaller one errs less."""
    counts, errors = [], []
    least = math.inf
    for count, error in zip(curve.counts, curve.errors.tolist(), strict=True):
        if error <= least and error < math.inf:
            least = error
            counts.append(count)
            errors.append(error)
    return counts, errors


def _middle(moves: list[tuple[float, int, int]], most: int) -> list[tuple[float, int, int]]:
    """The cheapest cuts (positive) and the most rewarding raises (negative), `most` of them, half each."""
    raises = sum(ratio < 0 for ratio, _, _ in moves)
    return moves[: min(raises, most // 2)] + moves[raises : raises + most - most // 2]


def _less(a: float, b: float) -> bool:
    """Whether a is smaller by more than rounding."""
    return a < b - 1e-12 * max(abs(a), abs(b))
