"""Graphs with bodies and local functions: flattened, cut, nested again, and still the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.builder import Graph
from models.control_flow import CONTROL_FLOW, UNKNOWN, local_functions
from models.topologies import TOPOLOGIES
from onnxprune import api, flow, pipeline
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import Model
from onnxprune.passes import Options
from onnxprune.passes import fold as folding
from onnxprune.plan import Plan
from onnxprune.validation.equivalence import check
from tests.reference import TOLERANCE, Array, error, graph_of, masks, run, stays
from tests.small import check_refused, floats, net, shrink, weight, write

PLAIN: Any = {"criterion": "l2", "allocation": "uniform", "repair": "none"}  # looks at weights alone

node = helper.make_node
GROUPS = {
    "if_weights_inside": [11, 17, 19, 23],
    "if_weights_in_constants": [11, 17, 19, 23],
    "if_weights_captured": [11, 13],
    "if_vector_of_two_layers": [11, 13, 13],
    "if_compared": [17, 19],
    "if_nested": [11, 17, 19, 23],
    "if_branches_disagree": [13, 13],
    "if_gives_a_weight": [13],
    "if_by_shape": [13],
    "loop_gru": [13],
    "loop_scan_outputs": [13, 17],
    "loop_until": [13],
    "loop_growing": [19],
    "scan_rnn": [13, 17],
    "scan_backwards": [11, 13],
    "loop_in_branch": [13],
}
PINNED = {
    "if_branches_disagree": "its branches give (3, 23) and (3, 29)",
    "loop_growing": "'loop_1' changes extents from one iteration to the next",
}
ALL = {**CONTROL_FLOW, **UNKNOWN, "if_captures": TOPOLOGIES["if_captures"]}


def serialized(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all bodies in it, outer ones first."""
    yield graph
    for each in graph.node:
        for attribute in each.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from bodies(attribute.g)


def stored(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Every weight by name, wherever it lies (the networks give no name twice)."""
    found: dict[str, onnx.TensorProto] = {}
    for graph in bodies(proto.graph):
        tensors = {t.name: t for t in graph.initializer}
        tensors |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        assert found.keys().isdisjoint(tensors)
        found |= tensors
    return found


def structure(graph: onnx.GraphProto) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """The names of bodies, of their nodes and of their outputs."""
    return [
        (g.name, [(n.name, n.op_type) for n in g.node], [o.name for o in g.output]) for g in bodies(graph)
    ]


def zeroed(graph: DependencyGraph, plan: Plan) -> onnx.ModelProto:
    """The original, bodies and all, with zeros in the weights that read removed units."""
    keep = masks(graph, plan)
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.model.source)
    tensors = stored(proto)
    for group in graph.groups:
        for use in group.occurrences:
            typed = graph.axes_of(use.node, use.input)
            assert typed is not None
            if use.role == "consume":
                array = numpy_helper.to_array(tensors[use.tensor]).copy()
                np.moveaxis(array, use.axis, 0)[~stays(typed[use.axis], keep)] = 0
                tensors[use.tensor].CopyFrom(numpy_helper.from_array(array, use.tensor))
    return proto


def inputs(proto: onnx.ModelProto, seed: int) -> dict[str, Array]:
    """Inputs that take another way through the graph for each seed."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for i, value in enumerate(proto.graph.input):
        shape = [dim.dim_value or seed + 2 for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.BOOL:
            feeds[value.name] = np.array(bool(seed >> (i - 1) & 1))
        elif value.type.tensor_type.elem_type == TensorProto.INT64:
            feeds[value.name] = np.array((8000, 16000)[seed % 2])
        else:
            feeds[value.name] = rng.standard_normal(shape, dtype=np.float32)
    return feeds


@pytest.mark.parametrize("name", sorted(ALL))
def test_flat_and_back_is_the_same_file(name: str) -> None:
    proto = ALL[name]()
    before = serialized(proto)
    flat = flow.flatten(proto).proto
    assert all(not list(flow.subgraphs(n)) for n in flat.graph.node)
    assert serialized(flow.nest(flat)) == before
    assert serialized(proto) == before


def test_a_graph_without_bodies_is_flat() -> None:
    proto = net()
    assert flow.flatten(proto).proto is proto
    assert flow.nest(proto) is proto


@pytest.mark.parametrize("name", sorted(CONTROL_FLOW))
def test_groups_and_what_is_pinned(name: str) -> None:
    graph = graph_of(CONTROL_FLOW[name]())
    assert sorted(group.size for group in graph.groups) == GROUPS[name]
    inner = {pinned.reason.text for pinned in graph.pinned if pinned.reason.kind != "interface"}
    assert any(PINNED[name] in text for text in inner) if name in PINNED else not inner


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("name", sorted(CONTROL_FLOW))
def test_cut_right(name: str, ratio: float) -> None:
    proto = CONTROL_FLOW[name]()
    result = api.shrink(proto, channels=ratio, align=1, **PLAIN)
    graph = graph_of(proto)
    onnx.checker.check_model(result.model, full_check=True)
    assert structure(result.model.graph)[1:] == structure(proto.graph)[1:]
    assert not result.report.equivalence or not result.report.equivalence.notes
    before, after = stored(proto), stored(result.model)
    cut = {o.tensor for g in graph.groups for o in g.occurrences if o.role in ("produce", "consume")}
    assert all(np.prod(after[tensor].dims) < np.prod(before[tensor].dims) for tensor in cut)
    reference = zeroed(graph, result.plan)
    wants = []
    for seed in range(4):
        feeds = inputs(proto, seed)
        wants.append(run(reference, feeds))
        assert error(run(result.model, feeds), wants[-1]) < TOLERANCE
    assert error(run(proto, feeds), wants[-1]) > 10 * TOLERANCE


@pytest.mark.parametrize("name", sorted(CONTROL_FLOW))
def test_plan_replays_and_validates(name: str, tmp_path: Path) -> None:
    proto = CONTROL_FLOW[name]()
    path = write(proto, tmp_path / "model.onnx")
    result = api.shrink(path, channels=0.5, align=1, samples=8)
    result.save(tmp_path / "pruned.onnx")
    assert serialized(api.apply(path, result.plan).model) == serialized(result.model)
    judged = api.validate(path, tmp_path / "pruned.onnx", result.plan)
    assert judged.passed


@pytest.mark.parametrize("name", sorted(CONTROL_FLOW))
def test_fold_leaves_the_function_as_it_is(name: str) -> None:
    proto = CONTROL_FLOW[name]()
    folded = api.fold(proto).model
    onnx.checker.check_model(folded, full_check=True)
    for seed in range(4):
        feeds = inputs(proto, seed)
        assert error(run(folded, feeds), run(proto, feeds)) < TOLERANCE


def test_fold_inside_a_branch() -> None:
    g = Graph()
    x, flag = g.input("batch", 3, 5, 5), g.input(name="flag", dtype=TensorProto.BOOL)
    yes, no = g.subgraph(), g.subgraph()
    y = g.op(
        "If",
        flag,
        then_branch=yes.graph(yes.bn(yes.conv(x, 7))),
        else_branch=no.graph(no.conv(no.op("Identity", x), 7)),
        shape=("batch", 7, 5, 5),
        dtype=x.dtype,
    )
    proto = g.model(g.relu(y))
    folded, edits = folding.fold(Model(proto))
    assert edits
    assert [[n.op_type for n in body.node] for body in bodies(folded.graph)][1:] == [["Conv"], ["Conv"]]
    for flag_value in (True, False):
        feeds = {"input": np.ones((2, 3, 5, 5), np.float32), "flag": np.array(flag_value)}
        assert error(run(folded, feeds), run(proto, feeds)) < TOLERANCE


def test_fold_does_not_move_work_into_a_loop() -> None:
    g = Graph()
    x = g.gemm(g.input(3, 7), 11)
    body = g.subgraph()
    body.input(name="step", dtype=TensorProto.INT64)
    going = body.input(name="going", dtype=TensorProto.BOOL)
    state = body.input(3, 11, name="state")
    new = body.add(state, body.mul(x, body.const(np.full(11, 2.0), np.float32)))
    last = g.op(
        "Loop",
        g.const(3),
        None,
        g.const(np.zeros((3, 11)), np.float32),
        body=body.graph(body.op("Identity", going), new),
        shape=(3, 11),
        dtype=TensorProto.FLOAT,
    )
    proto = g.model(last)
    folded = api.fold(proto).model
    assert [n.op_type for n in folded.graph.node] == ["Gemm", "Loop"]


# ------------------------------------------------------------------------------------------ what is reported


def test_branch_that_no_input_takes_is_reported() -> None:
    g = Graph()
    x = g.input("batch", 7)
    square = g.op("ReduceSum", g.mul(x, x), keepdims=0)
    flag = g.op("Greater", square, g.const(-1.0, np.float32), dtype=TensorProto.BOOL, shape=())
    yes, no = g.subgraph(), g.subgraph()
    y = g.op(
        "If",
        flag,
        name="choice",
        then_branch=yes.graph(yes.gemm(yes.relu(yes.gemm(x, 13)), 5)),
        else_branch=no.graph(no.gemm(no.relu(no.gemm(x, 11)), 5)),
        shape=("batch", 5),
        dtype=x.dtype,
    )
    proof = api.shrink(g.model(y), channels=0.5, align=1, **PLAIN).report.equivalence
    assert proof is not None
    assert proof.notes == ("branches that no input of the check takes: else of 'choice'",)


def test_operator_without_a_declaration_pins_what_it_touches() -> None:
    proto = UNKNOWN["unknown_in_branch"]()
    graph = graph_of(proto)
    assert graph.opaque == {"acme.Frobnicate": 1}
    assert [group.size for group in graph.groups if group.size == 17] == [17]
    assert any("acme.Frobnicate" in pinned.reason.text for pinned in graph.pinned)
    with pytest.raises(UserError, match=r"onnxruntime has no acme\.Frobnicate"):
        api.shrink(proto, channels=0.5, align=1, **PLAIN)


@pytest.mark.parametrize("outputs", [["f"], ["f", ""]])
def test_an_output_that_an_unknown_operator_leaves_out_hides_nothing(outputs: list[str]) -> None:
    """Operands that are left out have no name, either, and do not come from it."""
    proto = net()
    proto.graph.node[-1].input[0] = "d"
    clip = helper.make_node("Clip", ["c", "", "six"], ["d"])
    unknown = helper.make_node("Frobnicate", ["b"], outputs, domain="acme")
    behind = helper.make_node("Dropout", ["f"], ["g", ""])
    nodes = [*proto.graph.node[:-1], unknown, behind, clip, proto.graph.node[-1]]
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(6), "six"))
    proto.graph.output.append(helper.make_tensor_value_info("g", onnx.TensorProto.FLOAT, None))
    proto.opset_import.add(domain="acme", version=1)
    graph = graph_of(proto)
    assert "y" in check(graph, {}, proto).outputs


# --------------------------------------------------------------------------------------------- functions


def test_local_functions_are_unfolded() -> None:
    proto = local_functions()
    result = api.shrink(proto, channels=0.5, align=1, **PLAIN)
    assert [f"{f.domain}.{f.name}" for f in result.model.functions] == ["layers.Unused"]
    assert any("blocks.Block (2), layers.Linear (2)" in note for note in result.report.notes)
    assert {o.domain: o.version for o in result.model.opset_import} == {"": 17, "blocks": 1, "layers": 1}
    assert sorted(edit.size for edit in result.plan.keeps) == [11, 13]
    reference = zeroed_flat(proto, result.plan)
    for seed in range(2):
        feeds = {"x": np.random.default_rng(seed).standard_normal((3, 7), dtype=np.float32)}
        assert error(run(result.model, feeds), run(reference, feeds)) < TOLERANCE
    slopes = [n.attribute[0].f for n in result.model.graph.node if n.op_type == "LeakyRelu"]
    assert slopes == [0.25, 0.5]


def zeroed_flat(proto: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    """The original, calls and all, with zeros in the rows of matrices that read removed units."""
    graph = graph_of(proto)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    tensors = {t.name: t for t in result.graph.initializer}
    for group in graph.groups:
        for use in group.occurrences:
            typed = graph.axes_of(use.node, use.input)
            if use.role == "consume" and typed is not None:
                array = numpy_helper.to_array(tensors[use.tensor]).copy()
                np.moveaxis(array, use.axis, 0)[~stays(typed[use.axis], masks(graph, plan))] = 0
                tensors[use.tensor].CopyFrom(numpy_helper.from_array(array, use.tensor))
    return result


def test_function_that_another_one_still_calls_stays() -> None:
    proto = local_functions()
    unused = proto.functions[-1]
    unused.node[0].CopyFrom(node("Block", ["a", "a", "a"], ["b"], domain="blocks"))
    unused.opset_import.add(domain="blocks", version=1)
    model = api.shrink(proto, channels=0.5, align=1, **PLAIN).model
    assert [f.name for f in model.functions] == ["Linear", "Block", "Unused"]


def test_function_of_another_operator_set_stays() -> None:
    proto = local_functions()
    for function in proto.functions:
        function.opset_import[0].version = 16
    graph = graph_of(proto)
    assert graph.model.proto is proto
    assert graph.opaque == {"blocks.Block": 2}


def test_function_with_a_body_inside() -> None:
    proto = CONTROL_FLOW["if_weights_inside"]()
    inner = next(n for n in proto.graph.node if n.op_type == "If")
    captured = sorted(flow.captured(inner))
    body = helper.make_function(
        "my", "Choose", ["flag", *captured], list(inner.output), [inner], [helper.make_opsetid("", 17)]
    )
    call = node("Choose", ["flag", *captured], list(inner.output), domain="my", name="call")
    inner_at = list(proto.graph.node).index(inner)
    proto.graph.node[inner_at].CopyFrom(call)
    proto.functions.append(body)
    proto.opset_import.add(domain="my", version=1)
    plain = CONTROL_FLOW["if_weights_inside"]()
    result = api.shrink(proto, channels=0.5, align=1, **PLAIN)
    assert sorted(edit.size for edit in result.plan.keeps) == GROUPS["if_weights_inside"]
    assert not result.model.functions
    want = api.shrink(plain, channels=0.5, align=1, **PLAIN).model
    for seed in range(4):
        feeds = inputs(plain, seed)
        assert error(run(result.model, feeds), run(want, feeds)) < TOLERANCE


# ------------------------------------------------------------------------------------------- odd and broken


def choice(change: Callable[[onnx.NodeProto], object], *extra: onnx.TensorProto) -> onnx.ModelProto:
    """A small network with an If between its convolutions, changed."""

    def branch(op: str, name: str) -> onnx.GraphProto:
        return helper.make_graph([node(op, ["a"], [name])], name, [], [floats(name, "n", 8, 8, 8)])

    held = node(
        "If", ["yes"], ["b"], name="if", then_branch=branch("Relu", "t"), else_branch=branch("Abs", "e")
    )
    change(held)
    return net([held], [numpy_helper.from_array(np.array(True), "yes"), *extra])


def then(held: onnx.NodeProto) -> onnx.GraphProto:
    return next(a.g for a in held.attribute if a.name == "then_branch")


def looped(carried: int) -> onnx.NodeProto:
    values = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    ]
    values += [floats(f"s{k}", "n", 8, 8, 8) for k in range(carried)]
    nodes = [node("Identity", ["go"], ["on"]), node("Relu", ["s0"], ["r"])]
    outputs = [helper.make_tensor_value_info("on", TensorProto.BOOL, []), floats("r", "n", 8, 8, 8)]
    body = helper.make_graph(nodes, "body", values, outputs)
    return node("Loop", ["", "yes", "a"], ["b"], name="loop", body=body)


YES = numpy_helper.from_array(np.array(True), "yes")
BROKEN: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "a branch is missing": (
        lambda: choice(lambda n: n.attribute.pop()),
        "lacks its then_branch or else_branch",
    ),
    "a branch gives nothing": (lambda: choice(lambda n: then(n).output.pop()), "lacks its"),
    "a branch gives too much": (
        lambda: choice(lambda n: then(n).output.append(floats("t"))),
        "has 2 outputs and needs 1",
    ),
    "a branch takes inputs": (
        lambda: choice(lambda n: then(n).input.append(floats("p", 1))),
        "has 1 inputs and needs 0",
    ),
    "a decision without a condition": (
        lambda: choice(lambda n: n.input.pop()),
        "(If) has 0 inputs",
    ),
    "a scan of more than it is given": (
        lambda: net(
            [
                node(
                    "Scan",
                    ["a"],
                    ["b"],
                    body=helper.make_graph([], "body", [], [floats("a", 8)]),
                    num_scan_inputs=10**12,
                )
            ]
        ),
        "and needs 1",
    ),
    "a loop takes too much": (lambda: net([looped(2)], [YES]), "has 4 inputs and needs 3"),
    "it reads what nothing makes": (
        lambda: choice(lambda n: then(n).node[0].input.__setitem__(0, "nothing")),
        "reads 'nothing', which nothing produces",
    ),
    "it gives what nothing makes": (
        lambda: choice(lambda n: setattr(then(n).output[0], "name", "nothing")),
        "reads 'nothing', which nothing produces",
    ),
    "it reads what the other branch makes": (
        lambda: choice(lambda n: then(n).node[0].input.__setitem__(0, "e")),
        "reads 'e', which nothing produces",
    ),
    "it reads what comes later": (
        lambda: choice(lambda n: then(n).node[0].input.__setitem__(0, "c")),
        "before it is produced",
    ),
    "it makes one tensor twice": (
        lambda: choice(lambda n: then(n).node.append(node("Relu", ["a"], ["t"]))),
        "tensor 't' is produced twice",
    ),
    "its nodes are out of order": (
        lambda: choice(lambda n: then(n).node.insert(0, node("Neg", ["t"], ["late"]))),
        "before it is produced",
    ),
    "a weight does not fill its shape": (
        lambda: choice(
            lambda n: then(n).initializer.add(name="short", data_type=1, dims=[3], raw_data=b"1234")
        ),
        "tensor 'short' of shape [3] holds 4 bytes",
    ),
    "a private operator": (
        lambda: net([node("Alias", ["a"], ["b"], domain=flow.DOMAIN)]),
        "which is reserved",
    ),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_bodies_are_refused(name: str, tmp_path: Path) -> None:
    make, words = BROKEN[name]
    check_refused(shrink(write(make(), tmp_path / "model.onnx")), words)


def test_bodies_nested_too_deep() -> None:
    proto = net()
    graph = proto.graph
    for _ in range(40):
        held = graph.node.add(op_type="If")
        graph = held.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    with pytest.raises(UserError, match="nested more than 32 deep"):
        Model(proto)


def test_functions_that_call_each_other() -> None:
    opsets = [helper.make_opsetid("my", 1)]
    functions = [
        helper.make_function("my", here, ["p"], ["q"], [node(there, ["p"], ["q"], domain="my")], opsets)
        for here, there in (("F", "G"), ("G", "F"))
    ]
    proto = net([node("F", ["a"], ["b"], domain="my")])
    proto.functions.extend(functions)
    with pytest.raises(UserError, match="must not be recursive"):
        Model(proto)


def test_functions_that_unfold_without_end_stay() -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    proto = net([node("F0", ["a"], ["b"], domain="my")])
    for i in range(30):
        calls = [
            node(f"F{i + 1}", ["p"], ["m"], domain="my"),
            node(f"F{i + 1}", ["m"], ["q"], domain="my"),
        ]
        proto.functions.append(helper.make_function("my", f"F{i}", ["p"], ["q"], calls, opsets))
    proto.functions.append(
        helper.make_function("my", "F30", ["p"], ["q"], [node("Relu", ["p"], ["q"])], opsets)
    )
    proto.opset_import.add(domain="my", version=1)
    assert Model(proto).proto is proto


def in_both(held: onnx.NodeProto) -> None:
    for attribute in held.attribute:
        attribute.g.node[0].output[0] = attribute.g.output[0].name = "same"


def shadowed(held: onnx.NodeProto) -> None:
    body = then(held)
    body.node[0].output[0] = "c"  # a name of the outer graph, made after the If
    body.node.add().CopyFrom(node("Neg", ["c"], ["t"]))


def weighted(held: onnx.NodeProto) -> None:
    for i, attribute in enumerate(held.attribute):
        body = attribute.g
        body.initializer.append(weight("kernel", 8 + i, 8, 1, 1))
        body.initializer.append(weight("back", 8, 8 + i, 1, 1))
        name = body.output[0].name
        body.node[0].output[0] = "inner"
        body.node.extend(
            [node("Conv", ["inner", "kernel"], ["wide"]), node("Conv", ["wide", "back"], [name])]
        )


def passed_on(held: onnx.NodeProto) -> None:
    then(held).initializer.append(weight("kernel", 8, 8, 1, 1))
    then(held).node.append(node("Conv", ["t", "kernel"], ["unread"]))


def sparse(held: onnx.NodeProto) -> None:
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "sparse")
    places = numpy_helper.from_array(np.array([0, 9]), "places")
    then(held).sparse_initializer.append(helper.make_sparse_tensor(values, places, [8, 8, 1, 1]))
    then(held).node[0].CopyFrom(node("Conv", ["a", "sparse"], ["t"]))


def untyped(held: onnx.NodeProto) -> None:
    for attribute in held.attribute:
        attribute.g.output[0].ClearField("type")


STRANGE: dict[str, Callable[[onnx.NodeProto], object]] = {
    "the same names in both branches": in_both,
    "the same weights' names in both branches": weighted,
    "a name of the outer graph": shadowed,
    "a layer that nothing reads": passed_on,
    "a sparse weight": sparse,
    "nameless": lambda n: n.ClearField("name"),
    "no types stated": untyped,
}


@pytest.mark.parametrize("name", sorted(STRANGE))
def test_strange_bodies(name: str, tmp_path: Path) -> None:
    """What onnxruntime runs is cut right, and the rest refused."""
    proto = choice(STRANGE[name])
    assert serialized(flow.nest(flow.flatten(proto).proto)) == serialized(proto)
    result = shrink(write(proto, tmp_path / "model.onnx"), "-o", tmp_path / "pruned.onnx")
    assert result.exit_code in (0, 2, 4), result.output
    assert "Traceback" not in result.output
    if result.exit_code == 0:
        pruned = onnx.load(tmp_path / "pruned.onnx")
        assert structure(pruned.graph)[1:] == structure(proto.graph)[1:]


def test_old_models_with_bodies(tmp_path: Path) -> None:
    proto = choice(weighted)
    proto.ir_version = 3
    proto.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in proto.graph.initializer
    )
    result = shrink(write(proto, tmp_path / "model.onnx"), "-o", tmp_path / "pruned.onnx")
    assert result.exit_code in (0, 2), result.output
    assert "Traceback" not in result.output


def test_a_result_holds_nothing_of_the_flat_form() -> None:
    result = pipeline.prune(CONTROL_FLOW["loop_gru"](), Options(channels=0.5, align=1))
    flow.refuse_private(result.model)
    assert not any(value.name.startswith(flow.DOMAIN) for value in result.model.graph.value_info)
