"""Counts under a budget against every possible choice, and against a solver of integer programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from scipy.optimize import Bounds, LinearConstraint, milp

from models.architectures import densenet121, mobilenet_v2, resnet18, shufflenet_v2
from models.builder import Graph
from models.recurrent import RECURRENT
from models.transformers import TRANSFORMERS
from onnxprune import allocation
from onnxprune.allocation import Alignment, Allocation, Curve, Removal, Rounding, budget
from onnxprune.axes import Var
from onnxprune.blocks import Blocks
from onnxprune.cost import CostModel, Ledger, Measure, Tangent
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.errors import UserError
from tests.reference import graph_of

MEASURES: tuple[Measure, ...] = ("macs", "params", "bytes")
Curves = Mapping[Group, Curve]


def chain(rng: np.random.Generator) -> ModelProto:
    g = Graph(seed=0)
    x = g.input("batch", 3, 6, 6)
    for width in rng.integers(4, 9, size=rng.integers(2, 5)):
        x = g.relu(g.conv(x, int(width), int(rng.choice([1, 3]))))
    return g.model(g.gemm(g.flatten(g.gap(x)), 5))


def dense(rng: np.random.Generator) -> ModelProto:
    g = Graph(seed=0)
    x = g.conv(g.input("batch", 3, 6, 6), 4, 3)
    for width in rng.integers(4, 7, size=3):
        x = g.concat(x, g.relu(g.conv(x, int(width), 3)))
    return g.model(g.gemm(g.flatten(x), 5))


def residual(rng: np.random.Generator, blocks: int = 3) -> ModelProto:
    g = Graph(seed=0)
    x = g.conv(g.input("batch", 3, 6, 6), 6, 3)
    for width in rng.integers(4, 8, size=blocks):
        x = g.add(x, g.conv(g.relu(g.conv(x, int(width), 3)), 6, 1))
    return g.model(g.gemm(g.flatten(g.gap(x)), 5))


def curve(rng: np.random.Generator, size: int, options: int = 5) -> Curve:
    """Neither monotone nor convex; sometimes the smallest count is not to be chosen."""
    lower = rng.choice(np.arange(1, size), min(size - 1, options - 1), replace=False)
    counts = np.array([*sorted(lower.tolist()), size])
    errors = rng.lognormal(0, 1) * (1 - counts / size) ** rng.uniform(0.5, 3)
    errors *= rng.lognormal(0, 0.4, len(counts))
    if rng.random() < 0.3:
        errors[0] = np.inf
    return Curve(tuple(counts.tolist()), np.where(counts == size, 0.0, errors))


def removals(graph: DependencyGraph, rng: np.random.Generator) -> list[Removal]:
    blocks = Blocks(graph)
    return [Removal(b.name, blocks.gone([b]), float(rng.lognormal(0, 0.7))) for b in blocks.residual]


def gone(chosen: Sequence[Removal]) -> frozenset[int]:
    return frozenset[int]().union(*(removal.nodes for removal in chosen))


def measured(graph: DependencyGraph, found: Allocation, name: Measure, options: Sequence[Removal]) -> int:
    out = gone([removal for removal in options if removal.name in found.removed])
    cost: int = getattr(CostModel(graph, out)({g.var: n for g, n in found.counts.items()}), name)
    return cost


def predicted(curves: Curves, found: Allocation, options: Sequence[Removal]) -> float:
    chosen = [removal for removal in options if removal.name in found.removed]
    total = sum(removal.error for removal in chosen)
    for group, errors in curves.items():
        if not all(node.index in gone(chosen) for node in group.nodes):
            total += errors.errors[errors.counts.index(found.counts[group])]
    return float(total)


def best(
    graph: DependencyGraph, curves: Curves, name: Measure, limit: float, options: Sequence[Removal]
) -> float:
    """Of every choice there is."""
    least = np.inf
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(options, n) for n in range(len(options) + 1)
    ):
        out = gone(chosen)
        cost = CostModel(graph, out)
        live = [g for g in curves if not all(node.index in out for node in g.nodes)]
        for picks in itertools.product(*(range(len(curves[g].counts)) for g in live)):
            error = sum(r.error for r in chosen) + sum(
                curves[g].errors[k] for g, k in zip(live, picks, strict=True)
            )
            if error < least:
                kept = {g.var: curves[g].counts[k] for g, k in zip(live, picks, strict=True)}
                if getattr(cost(kept), name) <= limit:
                    least = error
    return float(least)


# --------------------------------------------------------------------------------------- the ledger

MODELS: dict[str, Callable[[], ModelProto]] = {
    "resnet": lambda: resnet18(width=0.125, image=32, classes=4),
    "mobilenet": lambda: mobilenet_v2(width=0.25, image=32, classes=4),
    "densenet": lambda: densenet121(width=0.25, image=32, classes=4),
    "shufflenet": lambda: shufflenet_v2(width=0.25, image=32, classes=4),
    "lstm": RECURRENT["lstm"],
    "bidirectional": RECURRENT["bidirectional_stacked"],
    "transformer": TRANSFORMERS["torchscript"],
    "fused": TRANSFORMERS["fused_split"],
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_ledger_follows_the_cost_model(build: Callable[[], ModelProto]) -> None:
    """Counts up and down, nodes out and in, with the cost model built anew as the reference."""
    rng = np.random.default_rng(0)
    graph = graph_of(build())
    whole = CostModel(graph)
    ledgers = {name: whole.ledger(name) for name in MEASURES}
    counts: dict[Var, int] = {}
    out: list[list[int]] = []
    for _ in range(30):
        if rng.random() < 0.7:
            group = graph.groups[rng.integers(len(graph.groups))]
            counts[group.var] = int(rng.integers(1, group.size + 1))
            for ledger in ledgers.values():
                before, saving = ledger.total, ledger.saving(group.var, counts[group.var])
                ledger.set(group.var, counts[group.var])
                assert ledger.total == before - saving
        elif out and rng.random() < 0.4:
            back = out.pop(int(rng.integers(len(out))))
            for ledger in ledgers.values():
                ledger.put_back(back)
        else:
            out.append(rng.choice(len(graph.model.nodes), 3, replace=False).tolist())
            for ledger in ledgers.values():
                ledger.take_out(out[-1])
        left = CostModel(graph, frozenset(itertools.chain.from_iterable(out)))(counts)
        assert {n: ledger.total // ledger.unit for n, ledger in ledgers.items()} == {
            n: getattr(left, n) for n in MEASURES
        }


def relaxed(tangent: Tangent, here: Mapping[Var, int], counts: Mapping[Var, int]) -> float:
    total = tangent.constant
    for var, powers in tangent.powers.items():
        total += sum(c * counts[var] ** power for power, c in powers.items())
    for var, weight in tangent.logs.items():
        total += weight * np.log(counts[var] / here[var])
    return total


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_tangents_are_below_the_cost_and_touch_it(build: Callable[[], ModelProto]) -> None:
    rng = np.random.default_rng(1)
    graph = graph_of(build())
    for logarithmic in (True, False):
        ledger = CostModel(graph).ledger("macs")
        if logarithmic:
            for group in graph.groups:
                ledger.set(group.var, int(rng.integers(1, group.size + 1)))
        tangent = ledger.tangent(logarithmic)
        here = {group.var: ledger.counts.get(group.var, group.size) for group in graph.groups}

        assert relaxed(tangent, here, here) == pytest.approx(ledger.total, rel=1e-9)
        for _ in range(30):
            there = {group.var: int(rng.integers(1, group.size + 1)) for group in graph.groups}
            for var, count in there.items():
                ledger.set(var, count)
            assert relaxed(tangent, here, there) <= ledger.total * (1 + 1e-9)


# --------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize("with_blocks", [False, True])
@pytest.mark.parametrize("build", [chain, dense, residual])
def test_a_budget_is_near_the_best_choice(
    build: Callable[[np.random.Generator], ModelProto], with_blocks: bool
) -> None:
    """Never over the limit, never under the bound, and nearly always the best there is."""
    optimal, tried = 0, 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        graph = graph_of(build(rng))
        cost, name = CostModel(graph), MEASURES[seed % 3]
        curves = {group: curve(rng, group.size) for group in graph.groups}
        options = removals(graph, rng) if with_blocks else []
        limit = rng.uniform(0.2, 0.9) * getattr(cost(), name)
        least = best(graph, curves, name, limit, options)
        if least == np.inf:
            with pytest.raises(UserError, match="cannot be reached"):
                budget(curves, cost, name, limit, options)
            continue
        found = budget(curves, cost, name, limit, options)
        assert measured(graph, found, name, options) <= limit
        assert found.error == pytest.approx(predicted(curves, found, options), abs=1e-12)
        assert found.bound <= least + 1e-9
        assert found.error >= least - 1e-9
        optimal += found.error <= least + 1e-9
        tried += 1
    assert tried >= 8
    assert optimal >= tried - 1


def test_removals_may_overlap() -> None:
    """Any sets of nodes: what a set frees counts once, and some only together with others."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        graph = graph_of(residual(rng, blocks=2))
        nodes = len(graph.model.nodes)
        curves = {group: curve(rng, group.size, options=3) for group in graph.groups}
        options = [
            Removal(f"r{i}", frozenset(rng.choice(nodes, 4, replace=False).tolist()), float(rng.random()))
            for i in range(3)
        ]
        limit = 0.4 * CostModel(graph)().params
        least = best(graph, curves, "params", limit, options)
        if least < np.inf:
            found = budget(curves, CostModel(graph), "params", limit, options)
            assert measured(graph, found, "params", options) <= limit
            assert found.error == pytest.approx(predicted(curves, found, options), abs=1e-12)
            assert found.bound <= least + 1e-9 <= found.error + 2e-9


@pytest.mark.parametrize("with_blocks", [False, True])
def test_where_costs_add_up_an_integer_program_finds_no_less(with_blocks: bool) -> None:
    """Inner channels only: their costs are sums. One option per group, or its block out, is an integer program."""
    rng = np.random.default_rng(3)
    graph = graph_of(residual(rng, blocks=24))
    cost = CostModel(graph)
    options = removals(graph, rng) if with_blocks else []
    blocks = Blocks(graph)
    inner = [group for group in graph.groups if blocks.role(group) != "hidden"]
    assert len(inner) == 24
    curves = {group: curve(rng, group.size) for group in inner}
    whole = cost().params
    limit = 0.6 * whole
    weights, errors, owner = [], [], []
    for i, (group, errs) in enumerate(curves.items()):
        for count, error in zip(errs.counts, errs.errors, strict=True):
            if error < np.inf:
                weights.append(cost({group.var: count}).params - whole)
                errors.append(error)
                owner.append(i)
        for removal in options:
            if all(node.index in removal.nodes for node in group.nodes):
                weights.append(CostModel(graph, removal.nodes)().params - whole)
                errors.append(removal.error)
                owner.append(i)
    one = np.array([[o == i for o in owner] for i in range(len(inner))], dtype=float)
    solved = milp(
        errors,
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(np.array([weights]), -np.inf, limit - whole),
        ],
        options={"mip_rel_gap": 0.0},
    )
    found = budget(curves, cost, "params", limit, options)
    assert measured(graph, found, "params", options) <= limit
    assert found.bound <= solved.fun + 1e-9
    assert solved.fun - 1e-9 <= found.error <= solved.fun * 1.02


def wide() -> tuple[DependencyGraph, list[Group]]:
    g = Graph(seed=0)
    x = g.relu(g.conv(g.input("batch", 3, 6, 6), 8, 3))
    x = g.relu(g.conv(x, 8, 3))
    graph = graph_of(g.model(g.gemm(g.flatten(g.gap(x)), 5)))
    return graph, list(graph.groups)


def test_nothing_goes_where_the_limit_is_met() -> None:
    graph, groups = wide()
    flat = Curve((2, 4, 8), np.zeros(3))
    cost = CostModel(graph)
    for limit in (cost().macs, np.inf):
        found = budget(dict.fromkeys(groups, flat), cost, "macs", limit)
        assert found == Allocation(dict.fromkeys(groups, 8), (), 0.0, 0.0)


def test_a_count_that_lowers_the_error_is_taken_without_need() -> None:
    graph, (a, b) = wide()
    curves = {a: Curve((4, 6, 8), np.array([1.0, -0.5, 0.0])), b: Curve((4, 8), np.array([np.inf, 0.0]))}
    found = budget(curves, CostModel(graph), "params", CostModel(graph)().params)
    assert found.counts == {a: 6, b: 8}
    assert found.error == found.bound == -0.5


def test_a_target_out_of_reach_names_the_least_share() -> None:
    graph, (a, b) = wide()
    curves = {a: Curve((4, 8), np.array([1.0, 0.0])), b: Curve((4, 8), np.array([np.inf, 0.0]))}
    cost = CostModel(graph)
    least = cost({a.var: 4}).params / cost().params
    with pytest.raises(
        UserError, match=rf"--params 0\.1 cannot be reached; the least possible here is {least:.3f}"
    ):
        budget(curves, cost, "params", 0.1 * cost().params)
    assert budget(curves, cost, "params", cost({a.var: 4}).params).counts == {a: 4, b: 8}


def test_a_block_refunds_what_its_groups_paid() -> None:
    """The block errs more than any cut inside it, yet less than the deep cut that alone meets the limit."""
    rng = np.random.default_rng(0)
    graph = graph_of(residual(rng, blocks=1))
    blocks = Blocks(graph)
    (block,) = blocks.residual
    out = blocks.gone([block])
    (inner,) = (g for g in graph.groups if all(node.index in out for node in g.nodes))
    curves = {inner: Curve((1, 2, inner.size), np.array([3.0, 1.0, 0.0]))}
    removal = Removal(block.name, out, 2.0)
    cost = CostModel(graph)
    found = budget(curves, cost, "macs", cost({inner.var: 1}).macs, [removal])
    assert (found.removed, found.counts, found.error) == ((block.name,), {inner: inner.size}, 2.0)
    found = budget(curves, cost, "macs", cost({inner.var: 2}).macs, [removal])
    assert (found.removed, found.counts, found.error) == ((), {inner: 2}, 1.0)


def test_the_bound_knows_what_a_block_frees() -> None:
    """Where only the removal meets the limit, no bound may be above its error."""
    graph = graph_of(residual(np.random.default_rng(0), blocks=2))
    blocks = Blocks(graph)
    options = [Removal(b.name, blocks.gone([b]), 0.25) for b in blocks.residual]
    curves = {g: Curve((1, g.size), np.array([1e6, 0.0])) for g in graph.groups}
    for name in MEASURES:
        limit = getattr(CostModel(graph, gone(options))(), name)
        found = budget(curves, CostModel(graph), name, limit, options)
        assert found.removed == tuple(sorted(r.name for r in options))
        assert 0 < found.bound <= found.error + 1e-9 == 0.5 + 1e-9


def test_the_order_of_the_arguments_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    graph = graph_of(residual(rng, blocks=6))
    curves = dict.fromkeys(graph.groups, Curve((1, 2, 3), np.array([2.0, 1.0, 0.0])))
    curves = {g: Curve((1, 2, g.size), np.array([2.0, 1.0, 0.0])) for g in curves}  # ties wherever one looks
    options = [Removal(r.name, r.nodes, 2.0) for r in removals(graph, rng)]
    limit = 0.5 * CostModel(graph)().macs
    first = budget(curves, CostModel(graph), "macs", limit, options)
    again = budget(dict(reversed(curves.items())), CostModel(graph), "macs", limit, options[::-1])
    assert first == again


def test_effort_grows_with_the_model_not_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    saving = Ledger.saving

    def counted(self: Ledger, var: Var, count: int) -> int:
        nonlocal calls
        calls += 1
        return saving(self, var, count)

    monkeypatch.setattr(Ledger, "saving", counted)
    monkeypatch.setattr(allocation, "WORK", 0)
    effort = []
    for blocks in (40, 80, 160):
        rng = np.random.default_rng(0)
        graph = graph_of(residual(rng, blocks))
        curves = {group: curve(rng, group.size) for group in graph.groups}
        calls = 0
        budget(curves, CostModel(graph), "macs", 0.5 * CostModel(graph)().macs, removals(graph, rng))
        effort.append(calls)
    assert effort[2] / effort[0] < 8  # a square would be 16


@pytest.mark.parametrize(
    ("counts", "errors"),
    [((4, 8), [np.nan, 0.0]), ((4, 8), [1.0, 0.5]), ((4, 8), [-np.inf, 0.0])],
)
def test_errors_that_are_no_errors(counts: tuple[int, ...], errors: list[float]) -> None:
    with pytest.raises(UserError, match="up to 8 units"):
        Curve(counts, np.array(errors))


# ------------------------------------------------------------------------- rounding and strategies


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 32), st.integers(1, 40), st.sampled_from([1, 2, 3, 8]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_allowed_counts_are_those_that_rounding_gives(
    size: int, align: int, minimum: int, stride: int, grouped: bool, whole: bool
) -> None:
    rounding = Rounding(Alignment(align, align, align, whole), minimum)
    group = Group("g", Var(size), [], stride=stride, grouped=grouped, windowed=not grouped)
    wishes = np.arange(0, size + 0.25, 0.25)
    assert rounding.allowed(group) == tuple(sorted({rounding.count(group, w) for w in wishes} | {size}))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 200), st.integers(2, 40), st.integers(1, 80), st.sampled_from([1, 2, 3, 8]), st.booleans(),
    st.booleans(), st.lists(st.floats(0, 1), min_size=2, max_size=8),
)  # fmt: skip
def test_rounded_counts_keep_their_floors(
    size: int, align: int, minimum: int, stride: int, grouped: bool, whole: bool, shares: list[float]
) -> None:
    """Grouped convolutions off multiples of 4 are several times slower, whatever is asked for."""
    align = align * 4 if whole else align  # kernels that leave their blocks have blocks of vectors
    rounding = Rounding(Alignment(align, align, align, whole), minimum)
    group = Group("g", Var(size), [], stride=stride, grouped=grouped, windowed=not grouped)
    kept = [rounding.count(group, share * size) for share in sorted(shares)]
    assert kept == sorted(kept)
    for count in kept:
        assert min(size, minimum) <= count <= size
        step_or_four = count % rounding.step(group) == 0 or (whole and count * stride % 4 == 0)
        assert count == size or step_or_four
        assert count == size or not grouped or count * stride % 4 == 0
        assert rounding.alignment.filled(group, count) <= rounding.alignment.filled(group, size)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.booleans(), st.booleans())
def test_between_full_blocks_the_nearest_is_taken(
    blocks: int, share: float, grouped: bool, whole: bool
) -> None:
    size = 16 * blocks + 16
    rounding = Rounding(Alignment(whole=whole))
    group = Group("g", Var(size), [], grouped=grouped, windowed=not grouped)
    wish = share * size
    nearest = min(range(size, 15, -16), key=lambda count: abs(count - wish))
    assert rounding.count(group, wish) == nearest


@pytest.mark.parametrize(
    ("size", "removed", "kept"),
    [
        (22, 0.0, 22),
        (22, 0.05, 22),
        (22, 0.1, 16),  # 22 cost 29
        (24, 0.01, 24),
        (24, 0.1, 24),  # 2.4 too many cost 4.8, 5.6 too few
        (24, 0.12, 16),
        (27, 0.1, 24),  # 24 cost 32 as 27 would, but 27 are off multiples of 4 and cost 36
        (27, 0.2, 24),
        (27, 0.25, 16),
        (40, 0.02, 40),
        (40, 0.1, 32),
        (45, 0.05, 44),
        (64, 0.1, 64),
    ],
)
def test_off_the_blocks_cost_decides(size: int, removed: float, kept: int) -> None:
    """Where parts of a block cost as much as the block, in blocks of 16."""
    group = Group("g", Var(size), [], windowed=True)
    assert Rounding(Alignment(whole=True)).count(group, size * (1 - removed)) == kept


@pytest.mark.parametrize(("size", "kept"), [(18, (16, 18)), (21, (16, 20, 21)), (58, (16, 32, 48, 56, 58))])
def test_depthwise_convolutions_have_a_way_back_to_multiples_of_4(size: int, kept: tuple[int, ...]) -> None:
    """Where a depthwise convolution is off them already: 20 channels take less than half as long as 21."""
    assert Rounding(Alignment(whole=True)).allowed(Group("g", Var(size), [], grouped=True)) == kept


def test_what_counts_cost_in_full_blocks() -> None:
    padding, leaving = Alignment(), Alignment(whole=True)
    dense = Group("g", Var(64), [], windowed=True)
    depthwise = Group("g", Var(64), [], grouped=True)
    product = Group("g", Var(64), [])
    counts = (7, 12, 16, 24, 27, 58)
    assert [padding.filled(dense, n) for n in counts] == [16, 16, 16, 32, 32, 64]
    assert [leaving.filled(dense, n) for n in counts] == [16, 16, 16, 32, 36, 76]
    assert [leaving.filled(depthwise, n) for n in counts] == [16, 16, 16, 32, 44, 93]
    assert [leaving.filled(product, n) for n in counts] == list(counts)


@pytest.mark.parametrize("align", [6, 12, 20, 24])
def test_parts_of_blocks_in_groups_are_multiples_of_4(align: int) -> None:
    group = Group("g", Var(22), [], grouped=True)
    kept = Rounding(Alignment.of(align)).allowed(group)
    assert len(kept) > 1
    assert all(count % 4 == 0 for count in kept[:-1])


@pytest.mark.parametrize(
    ("size", "parts", "whole"),
    [
        (8, (4, 8), (4, 8)),
        (12, (4, 8, 12), (4, 8, 12)),
        (16, (8, 16), (16,)),
        (24, (8, 16, 24), (16, 24)),
        (40, (16, 32, 40), (16, 32, 40)),
    ],
)
def test_a_block_that_is_full_is_not_cut_to_a_part(
    size: int, parts: tuple[int, ...], whole: tuple[int, ...]
) -> None:
    """Where parts of a block run on slower kernels. Matrix products have no such kernels."""
    loose, strict = Rounding(Alignment()), Rounding(Alignment(whole=True))
    convolved = Group("g", Var(size), [], windowed=True)
    multiplied = Group("g", Var(size), [])
    assert loose.allowed(convolved) == loose.allowed(multiplied) == parts
    assert strict.allowed(convolved) == whole
    assert strict.allowed(multiplied) == parts
    assert size > 32 or strict.count(convolved, size * 0.99) == size


def test_blocks_are_counted_within_the_groups_of_a_convolution() -> None:
    """8 groups of 64 positions: a position that goes takes 8 channels along, and leaves 63 in each group."""
    rounding = Rounding(Alignment(16, 16, 16))
    inside = Group("g", Var(64), [], stride=8, grouped=True, inner=True)
    assert rounding.allowed(inside) == (16, 32, 48, 64)
    assert rounding.alignment.filled(inside, 38) == 48
    outer = Group("g", Var(64), [], stride=8)
    assert rounding.allowed(outer) == tuple(range(2, 65, 2))


def like() -> tuple[DependencyGraph, dict[Group, str]]:
    """Four inner widths of one kind; the stem and the stream are two more."""
    graph = graph_of(residual(np.random.default_rng(0), blocks=4))
    blocks = Blocks(graph)
    return graph, {group: blocks.role(group) for group in graph.groups}


def test_isomorphic_ranks_among_like_groups_only() -> None:
    graph, roles = like()
    rng = np.random.default_rng(0)
    inner = [g for g in graph.groups if roles[g] != "hidden"]
    scores = {g: rng.random(g.size) * (1 if g in inner else 1000) + 0.01 for g in graph.groups}
    kept = allocation.isomorphic(graph.groups, scores, 0.4, roles, Rounding(Alignment.of(1)))
    lowest = np.sort(np.concatenate([scores[g] for g in inner]))
    threshold = lowest[round(0.4 * len(lowest)) - 1]
    assert {g: kept[g] for g in inner} == {g: int((scores[g] > threshold).sum()) for g in inner}
    for group in graph.groups:
        if group not in inner:
            assert kept[group] == group.size - round(0.4 * group.size)
    louder = {g: values * (7 if g in inner else 1) for g, values in scores.items()}
    assert allocation.isomorphic(graph.groups, louder, 0.4, roles, Rounding(Alignment.of(1))) == kept


def test_groups_that_occur_in_different_places_are_not_alike() -> None:
    """Both are channels; one is read by a convolution, the other by a matrix product."""
    graph, (a, b) = wide()
    scores = {a: np.arange(1.0, 9.0), b: np.arange(1.0, 9.0) * 100}
    roles = dict.fromkeys(graph.groups, "channels")
    assert allocation.counts([a, b], scores, 0.5, "global", Rounding(Alignment.of(1))) == {a: 4, b: 4}
    assert allocation.isomorphic([a, b], scores, 0.5, roles, Rounding(Alignment.of(1))) == {a: 4, b: 4}
    b.occurrences[:] = a.occurrences
    assert allocation.isomorphic([a, b], scores, 0.5, roles, Rounding(Alignment.of(1))) == {a: 1, b: 7}
    assert allocation.isomorphic(
        [a, b], scores, 0.5, {a: "ffn", b: "channels"}, Rounding(Alignment.of(1))
    ) == {a: 4, b: 4}


def test_sensitivity_stops_at_one_error_for_all() -> None:
    rng = np.random.default_rng(2)
    graph = graph_of(residual(rng, blocks=8))
    curves = {g: curve(rng, g.size) for g in graph.groups}
    everything = sum(g.size for g in curves)
    for ratio in (0.0, 0.1, 0.3, 0.5):
        kept = allocation.by_sensitivity(curves, ratio)
        worst = {g: np.maximum.accumulate(c.errors[::-1])[::-1] for g, c in curves.items()}
        paid = max(worst[g][c.counts.index(kept[g])] for g, c in curves.items())
        below = {
            g: min(n for n, e in zip(c.counts, worst[g], strict=True) if e < paid or n == g.size)
            for g, c in curves.items()
        }
        assert sum(kept.values()) <= (1 - ratio) * everything
        if ratio:
            assert sum(below.values()) > (1 - ratio) * everything
            assert all(kept[g] <= below[g] for g in curves)


def test_sensitivity_never_takes_an_infinite_error() -> None:
    _, (a, b) = wide()
    curves = {a: Curve((2, 8), np.array([np.inf, 0.0])), b: Curve((2, 8), np.array([5.0, 0.0]))}
    assert allocation.by_sensitivity(curves, 0.9) == {a: 8, b: 2}
