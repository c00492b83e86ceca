"""What holds for every graph: laws of pruning, checked on random networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto, numpy_helper

from models.topologies import TOPOLOGIES
from onnxprune import passes
from onnxprune.axes import Axis, Const, Product, Sum, Var, resolve
from onnxprune.blocks import Blocks
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.flow import graphs, nest
from onnxprune.passes import Options
from onnxprune.plan import Keep, Plan, Remove
from onnxprune.surgery import apply
from tests.reference import (
    TOLERANCE,
    Array,
    assert_equal_to_masked,
    elements,
    error,
    feeds,
    graph_of,
    macs,
    masks,
    parameters,
    random_plan,
    run,
    stored_tensors,
)
from tests.reference_blocks import assert_equal, branch_of
from tests.strategies import networks, seeds, sizeless_networks, token_networks, transformers

Law = Callable[[ModelProto, int], None]


def some(examples: int) -> settings:
    """Few examples, the same every time, however long each takes."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


# --------------------------------------------------------------------------------------------- the laws


def pruned_equals_masked(proto: ModelProto, seed: int) -> None:
    graph = graph_of(proto)
    plan = random_plan(graph, graph.model.digest(), seed)
    pruned = apply(graph, plan)
    onnx.checker.check_model(pruned, full_check=True)
    assert_equal_to_masked(graph, plan, pruned)


def lossy_cuts_are_valid(proto: ModelProto, seed: int) -> None:
    """Any units of any groups can go: what is left runs and keeps its interface."""
    graph = graph_of(proto)
    pruned = apply(graph, random_plan(graph, graph.model.digest(), seed, lossy=True))
    onnx.checker.check_model(pruned, full_check=True)
    for batch in (1, 2):
        inputs = feeds(proto, batch)
        assert [o.shape for o in run(pruned, inputs)] == [o.shape for o in run(proto, inputs)]


def nothing_removed_changes_nothing(proto: ModelProto, seed: int) -> None:
    graph = graph_of(proto)
    before = proto.SerializeToString(deterministic=True)
    whole = tuple(Keep(g.name, g.size, tuple(range(g.size))) for g in graph.groups)
    for edits in ((), whole):
        assert apply(graph, Plan("", edits)).SerializeToString(deterministic=True) == before
    apply(graph, random_plan(graph, "", seed))
    assert proto.SerializeToString(deterministic=True) == before


def plans_survive_a_file(proto: ModelProto, seed: int) -> None:
    graph = graph_of(proto)
    for plan in (
        random_plan(graph, graph.model.digest(), seed, lossy=True),
        passes.plan(Blocks(graph), Options(channels=0.4, align=1), graph.model.digest()),
    ):
        again = Plan.from_json(plan.to_json())
        assert again.edits == plan.keeps
        assert again.model == plan.model
        assert again.to_json() == plan.to_json()
        assert apply(graph, again) == apply(graph, plan)


def names_and_interface_survive(proto: ModelProto, seed: int) -> None:
    graph = graph_of(proto)
    pruned = apply(graph, random_plan(graph, "", seed))
    stored = {tensor.name for tensor in proto.graph.initializer}
    assert [i.name for i in pruned.graph.input] == [i.name for i in proto.graph.input]
    kept = [i for i in pruned.graph.input if i.name not in stored]
    assert kept == [i for i in proto.graph.input if i.name not in stored]
    assert list(pruned.graph.output) == list(proto.graph.output)
    assert pruned.ir_version == proto.ir_version
    assert list(pruned.opset_import) == list(proto.opset_import)
    assert pruned.producer_name == proto.producer_name
    made = {o for node in pruned.graph.node for o in node.output}
    assert {o for node in proto.graph.node for o in node.output} <= made
    assert {node.name for node in proto.graph.node} <= {node.name for node in pruned.graph.node}
    assert stored_tensors(proto).keys() <= stored_tensors(pruned).keys()


def every_choice_makes_it_smaller(proto: ModelProto, seed: int) -> None:
    """A plan that removes units removes parameters."""
    graph = graph_of(proto)
    plan = random_plan(graph, "", seed)
    pruned = apply(graph, plan)
    if plan.keeps:
        assert parameters(pruned) < parameters(proto)


def node_order_is_irrelevant(proto: ModelProto, seed: int) -> None:
    other = shuffled(proto, seed)
    first, second = graph_of(proto), graph_of(other)
    names = [[(g.name, g.size, g.kind) for g in graph.groups] for graph in (first, second)]
    assert names[0] == names[1]
    options = Options(channels=0.4, align=1)
    plan = passes.plan(Blocks(first), options, "")
    assert passes.plan(Blocks(second), options, "") == plan
    inputs = feeds(proto)
    assert error(run(apply(second, plan), inputs), run(apply(first, plan), inputs)) < TOLERANCE


def permuted_units_are_the_same_model(proto: ModelProto, seed: int) -> None:
    """Relabelling the units of every exact group changes no output, before and after a cut."""
    graph = graph_of(proto)
    rng = np.random.default_rng(seed)
    exact = [group for group in graph.groups if group.kind == "exact"]
    orders = {group.var: rng.permutation(group.size) for group in exact}
    names = {group.name: orders[group.var] for group in exact}
    relabelled = permuted(graph, orders)
    inputs = feeds(proto)
    assert error(run(relabelled, inputs), run(proto, inputs)) < TOLERANCE
    if stored_tensors(relabelled).keys() != stored_tensors(proto).keys():
        return  # a copy of a constant is a group of another name
    other = graph_of(relabelled)
    plan = random_plan(graph, "", seed)
    moved = tuple(
        Keep(e.group, e.size, tuple(int(u) for u in np.flatnonzero(np.isin(names[e.group], e.units))))
        for e in plan.keeps
    )
    got = run(apply(other, Plan("", moved)), inputs)
    assert error(got, run(apply(graph, plan), inputs)) < TOLERANCE


def cost_is_known_before_the_cut(proto: ModelProto, seed: int) -> None:
    graph = graph_of(proto)
    model = CostModel(graph)
    plan = random_plan(graph, "", seed)
    kept = masks(graph, plan)
    pruned = apply(graph, plan)
    predicted = model({var: int(mask.sum()) for var, mask in kept.items()})
    assert model().params == parameters(proto)
    assert predicted.params == parameters(pruned) - _cloned(proto, pruned)
    batch = 1 if _dynamic(proto) else 2
    inputs = feeds(proto, batch)
    if len(list(graphs(proto))) > 1:  # the reference counts no multiplications in bodies
        return
    assert model().macs == macs(proto, inputs)
    assert predicted.macs == macs(pruned, inputs)


def pruning_twice_is_pruning_once(proto: ModelProto, seed: int) -> None:
    """The pruned model has no groups but those that were left, of the sizes that were kept."""
    graph = graph_of(proto)
    plan = random_plan(graph, "", seed)
    if any(len(edit.units) == 1 for edit in plan.keeps):
        return  # an axis of one unit couples nothing, so that what it pinned may be free now
    left = {group.name: group.size for group in graph.groups}
    left |= {edit.group: len(edit.units) for edit in plan.keeps}
    again = graph_of(apply(graph, plan))
    sizes = [group.size for group in again.groups if group.size > 1]
    assert not Counter(sizes) - Counter(left.values())


LAWS = (
    pruned_equals_masked,
    lossy_cuts_are_valid,
    nothing_removed_changes_nothing,
    plans_survive_a_file,
    names_and_interface_survive,
    every_choice_makes_it_smaller,
    node_order_is_irrelevant,
    permuted_units_are_the_same_model,
    cost_is_known_before_the_cut,
    pruning_twice_is_pruning_once,
)
EXCEPTIONS = {
    ("dynamic_conv", cost_is_known_before_the_cut): "its kernels are mixed once per batch, not per image",
    ("two_towers_similarity", cost_is_known_before_the_cut): "it compares each pair of images of a batch",
    ("weight_from_constant_of_shape", cost_is_known_before_the_cut): "a weight made at run time counts too",
}


# ------------------------------------------------------------------------------------------------ tools


def shuffled(proto: ModelProto, seed: int) -> ModelProto:
    """The same graph with its nodes in another topological order and its initializers in another."""
    rng = np.random.default_rng(seed)
    known = {i.name for i in proto.graph.input} | {t.name for t in proto.graph.initializer} | {""}
    waiting = [proto.graph.node[i] for i in rng.permutation(len(proto.graph.node))]
    order = []
    while waiting:
        ready = next(node for node in waiting if known.issuperset(node.input))
        waiting.remove(ready)
        known.update(ready.output)
        order.append(ready)
    result = ModelProto()
    result.CopyFrom(proto)
    del result.graph.node[:]
    result.graph.node.extend(order)
    del result.graph.initializer[:]
    result.graph.initializer.extend(reversed(proto.graph.initializer))
    return result


def reordered(axis: Axis, orders: dict[Var, Array]) -> Array:
    """For each position of an axis the position it takes its content from."""
    axis = resolve(axis)
    if isinstance(axis, Const):
        return np.arange(axis.extent)
    if isinstance(axis, Var):
        return orders.get(axis, np.arange(axis.extent))
    if isinstance(axis, Sum):
        parts, offset = [], 0
        for term in axis.terms:
            parts.append(reordered(term, orders) + offset)
            offset += term.extent
        return np.concatenate(parts)
    assert isinstance(axis, Product)
    result = np.zeros(1, dtype=np.int64)
    for factor in axis.factors:
        result = np.add.outer(result * factor.extent, reordered(factor, orders)).ravel()
    return result


def permuted(graph: DependencyGraph, orders: dict[Var, Array]) -> ModelProto:
    """The model with the units of each group in another order, in every constant that has them.

    A constant used in two orders gets a copy.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.model.proto)
    stored = stored_tensors(proto)
    done: dict[str, list[Array]] = {}
    for link in graph.links:
        for i, typed in enumerate(link.inputs):
            name = link.node.inputs[i]
            if typed is None or name not in stored:
                continue
            order = [reordered(axis, orders) for axis in typed]
            array = graph.model.array(name)
            if name in done and not all(map(np.array_equal, done[name], order)):
                name = f"{name}.{link.node.index}.{i}"
                proto.graph.node[link.node.index].input[i] = name
                proto.graph.initializer.append(numpy_helper.from_array(array, name))
                stored[name] = proto.graph.initializer[-1]
            done[name] = order
            if order:
                stored[name].CopyFrom(numpy_helper.from_array(array[np.ix_(*order)].copy(), name))
    return nest(proto)


def _dynamic(proto: ModelProto) -> bool:
    return bool(proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param)


def _cloned(proto: ModelProto, pruned: ModelProto) -> int:
    """Elements of tensors that the pruned model has more copies of."""
    old = stored_tensors(proto)
    return sum(elements(tensor) for name, tensor in stored_tensors(pruned).items() if name not in old)


# ------------------------------------------------------------------------------------------------ tests


KINDS = {
    "images": (networks, 60, 1500),
    "any_size": (sizeless_networks, 20, 500),
    "tokens": (token_networks, 20, 500),
}
RANDOM = [
    pytest.param(kind, law, id=f"{kind}-{law.__name__}")
    for kind in KINDS
    for law in LAWS
    if kind == "images" or law is not cost_is_known_before_the_cut
]


@pytest.mark.parametrize(("kind", "law"), RANDOM)
def test_law_on_random_networks(kind: str, law: Law) -> None:
    draw, few, _ = KINDS[kind]
    some(few)(given(draw(), seeds())(law))()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "law"), RANDOM)
def test_law_on_many_random_networks(kind: str, law: Law) -> None:
    draw, _, many = KINDS[kind]
    some(many)(given(draw(), seeds())(law))()


@pytest.mark.parametrize(
    ("name", "law"),
    [
        pytest.param(name, law, id=f"{name}-{law.__name__}")
        for name in sorted(TOPOLOGIES)
        for law in LAWS
        if (name, law) not in EXCEPTIONS
    ],
)
def test_law_on_topologies(name: str, law: Law) -> None:
    law(TOPOLOGIES[name](), 3)


# ------------------------------------------------------------------------------------------------ blocks


def blocks_and_units_go(proto: ModelProto, seed: int) -> None:
    """Any residual blocks and any units, of removed blocks as well, can go together."""
    rng = np.random.default_rng(seed)
    graph = graph_of(proto)
    blocks = Blocks(graph)
    joins = {node.name for node in proto.graph.node if "_join_" in node.name}
    assert {(block.name, block.branch) for block in blocks.residual} == {
        (join, branch_of(join)) for join in joins
    }
    going = [block for block in blocks.residual if rng.random() < 0.4]
    drawn = random_plan(graph, graph.model.digest(), seed, lossy=bool(rng.integers(2)))
    units = [
        edit for edit in drawn.keeps if edit.kind == "exact" or len(edit.units) > 1
    ]  # one less its mean is 0
    plan = Plan(graph.model.digest(), (*(Remove(block.name) for block in going), *units))
    pruned = apply(graph, plan, blocks)
    assert_equal(graph, plan, pruned)
    kept = {var: int(mask.sum()) for var, mask in masks(graph, plan).items()}
    assert CostModel(graph, blocks.gone(going))(kept).params == parameters(pruned) - _cloned(proto, pruned)


def test_blocks_and_units_go_from_random_transformers() -> None:
    some(60)(given(transformers(), seeds())(blocks_and_units_go))()


@pytest.mark.slow
def test_blocks_and_units_go_from_many_random_transformers() -> None:
    some(1500)(given(transformers(), seeds())(blocks_and_units_go))()
