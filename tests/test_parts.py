"""Models that are run in parts: the verdict is that of the whole, and no fault hides at a border."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from models import large
from models.architectures import resnet18
from models.builder import Graph, Tensor
from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune import Options, Plan, parts, passes
from onnxprune.blocks import Blocks
from onnxprune.model import FLOATS, Model, Node, expected_bytes
from onnxprune.pipeline import prune
from onnxprune.runtime import RunError
from onnxprune.surgery import apply, keep_masks, removed_blocks
from onnxprune.validation import equivalence
from onnxprune.validation.equivalence import Equivalence
from tests.reference import error, feeds, graph_of, run

ALL = Options(0.5, align=1, allow_lossy=True)
NETWORKS: dict[str, Callable[[], ModelProto]] = {
    name: networks[name]
    for networks, names in (
        (TOPOLOGIES, "residual se_conv concat_bn split_two_and_three shufflenet_v2_units fpn two_towers_dot"),
        (TOPOLOGIES, "weight_behind_transpose shared_bias siamese two_outputs"),
        (TRANSFORMERS, "torchscript torch_module disentangled"),
    )
    for name in names.split()
    if name in networks
} | {"resnet18": lambda: resnet18(width=0.25, image=32, classes=10)}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is large, and every part holds few of them."""
    divide(monkeypatch, 64, 1)


def divide(monkeypatch: pytest.MonkeyPatch, part: int, least: int) -> None:
    monkeypatch.setattr(parts, "WHOLE", -1)
    monkeypatch.setattr(parts, "PART", part)
    monkeypatch.setattr(parts, "LARGE", least)


class Case:
    """A model, a plan and what surgery makes of them."""

    def __init__(self, proto: ModelProto, options: Options) -> None:
        self.blocks = Blocks(graph_of(proto))
        self.graph = self.blocks.graph
        self.plan: Plan = passes.plan(self.blocks, options, "")
        self.pruned = apply(self.graph, self.plan, self.blocks)

    def check(self, pruned: ModelProto) -> Equivalence:
        removed = removed_blocks(self.blocks, self.plan)
        return equivalence.check(self.graph, keep_masks(self.graph, self.plan), pruned, removed)


def count(verdict: Equivalence) -> int:
    """The number of parts that the check was made in."""
    for note in verdict.notes:
        if " parts, each" in note:
            return int(note.partition("checked in ")[2].split()[0])
    return 1


def changed(proto: ModelProto, name: str, array: np.ndarray) -> ModelProto:
    """The model with another value of one weight."""
    result = ModelProto()
    result.CopyFrom(proto)
    (tensor,) = (tensor for tensor in result.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return result


def weights(proto: ModelProto) -> dict[str, np.ndarray]:
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type in FLOATS}
    return {name: array for name, array in arrays.items() if array.size > 1}


# ------------------------------------------------------------------------------------------------ the verdict


@pytest.mark.parametrize("name", NETWORKS)
def test_a_check_in_parts_says_what_a_check_of_the_whole_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(NETWORKS[name](), ALL)
    whole = case.check(case.pruned)
    divide(monkeypatch, 64, 1)
    divided = case.check(case.pruned)
    assert whole.passed
    assert divided.passed
    assert count(divided) > count(whole) == 1
    assert divided.outputs == whole.outputs
    assert divided.sizes == whole.sizes


def test_two_sizes_are_compared_where_the_analysis_has_found_one(small_parts: None) -> None:
    """onnx's inference refuses this GroupNormalization at any size."""
    case = Case(TOPOLOGIES["group_norm_21"](), ALL)
    verdict = case.check(case.pruned)
    assert verdict.passed
    assert len({sizes["batch"] for sizes in verdict.sizes}) == 2


@pytest.mark.parametrize("name", ["torchscript", "torch_module"])
def test_removed_layers_in_parts(name: str, small_parts: None) -> None:
    """And units, hidden ones too, that the borders between parts hold as well."""
    options = Options(0.25, align=1, layers="0.5", layer_criterion="last", allow_lossy=True)
    case = Case(TRANSFORMERS[name](), options)
    assert case.plan.removals
    assert case.plan.keeps
    verdict = case.check(case.pruned)
    assert verdict.passed
    assert count(verdict) > 3
    unremoved = apply(case.graph, Plan("", case.plan.keeps), case.blocks)
    assert not case.check(unremoved).passed


def test_a_residual_stream_is_cut_at_every_border(small_parts: None) -> None:
    case = Case(network(), Options(hidden=0.5, align=1))
    assert {case.blocks.role(group) for group in case.graph.groups if cut(case, group.name)} == {"hidden"}
    verdict = case.check(case.pruned)
    assert verdict.passed
    assert count(verdict) > 3


def cut(case: Case, group: str) -> bool:
    return any(edit.group == group and edit.removed for edit in case.plan.keeps)


# ------------------------------------------------------------------------------------------------ faults


def network() -> ModelProto:
    """Two residual blocks over a stream of 8, with a table that both parts of the first one read."""
    g = Graph(seed=3)
    x = g.matmul(g.input("batch", 5, 6, name="tokens"), 8, bias=True)
    gate = g.op("Sigmoid", g.store("gate", g.normal(7)))
    for _ in range(2):
        x = block(g, x, gate)
    return g.model(g.gemm(g.op("ReduceMean", x, axes=[1], keepdims=0), 4))


def block(g: Graph, x: Tensor, gate: Tensor) -> Tensor:
    y = g.op("Tanh", g.matmul(x, 7, bias=True))
    return g.add(x, g.matmul(g.mul(y, gate), 8, bias=True))


@pytest.mark.parametrize(("part", "least"), [(64, 1), (64, 200)])
def test_a_wrong_weight_is_found_whichever_part_it_is_in(
    part: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, part, least)
    case = Case(network(), ALL)
    assert case.check(case.pruned).passed
    rng = np.random.default_rng(0)
    names = weights(case.pruned)
    assert len(names) == 13
    for name, array in names.items():
        wrong = array.copy()
        wrong.flat[rng.integers(array.size)] += 0.5
        assert not case.check(changed(case.pruned, name, wrong)).passed, name


def test_swapped_channels_are_found(small_parts: None) -> None:
    """Of one weight; where all that hold the channels are swapped, nothing is wrong."""
    case = Case(network(), ALL)
    for name, array in weights(case.pruned).items():
        for axis in range(array.ndim):
            swapped = np.take(array, [1, 0, *range(2, array.shape[axis])], axis)
            assert not case.check(changed(case.pruned, name, swapped)).passed, (name, axis)


def test_a_wrong_node_is_found_whichever_part_it_is_in(small_parts: None) -> None:
    """Any result squared."""
    case = Case(network(), ALL)
    outputs = [node.output[0] for node in case.pruned.graph.node]
    for i, name in enumerate(outputs):
        wrong = ModelProto()
        wrong.CopyFrom(case.pruned)
        wrong.graph.node[i].output[0] = "before"
        wrong.graph.node.insert(i + 1, helper.make_node("Mul", ["before", "before"], [name]))
        assert not case.check(wrong).passed, name


def test_a_wrong_extent_is_found_at_the_border(small_parts: None) -> None:
    """The pruned stream has a unit more than it should; its weights fit one another."""
    case = Case(network(), Options(hidden=0.5, align=1))
    (edit,) = (edit for edit in case.plan.keeps if edit.removed)
    more = sorted({*edit.units, next(u for u in range(edit.size) if u not in edit.units)})
    other = Plan("", (type(edit)(edit.group, edit.size, tuple(more)),))
    with pytest.raises(RunError):
        case.check(apply(case.graph, other, case.blocks))


# ------------------------------------------------------------------------------------------------ the parts


def behind(model: Model, part: parts.Part) -> dict[str, Node]:
    """The nodes that a part computes, by their first outputs."""
    waiting, found = list(part.outputs), {}
    while waiting:
        name = waiting.pop()
        node = model.producers.get(name)
        if node is not None and name not in part.known and node.outputs[0] not in found:
            found[node.outputs[0]] = node
            waiting += filter(None, node.inputs)
    return found


@pytest.mark.parametrize("name", ["torchscript", "disentangled", "fpn", "two_outputs", "dead_branch"])
def test_parts_make_every_output_of_what_they_have(name: str, small_parts: None) -> None:
    """Each needs only inputs and what parts before it have made; all nodes that an output depends on are in one."""
    graph = graph_of((TOPOLOGIES | TRANSFORMERS)[name]())
    model = graph.model
    outputs = [output.name for output in model.outputs]
    found = parts.partition(model, graph.shapes, model.producers.keys(), outputs)
    assert len(found) > 2
    made: set[str] = set()
    for part in found:
        assert part.known <= made
        assert made.isdisjoint(part.outputs)
        made.update(part.outputs)
    assert made.issuperset(outputs)
    covered = {name for part in found for name in behind(model, part)}
    assert covered >= behind(model, parts.Part(tuple(outputs), frozenset())).keys()


def held(model: Model, part: parts.Part) -> tuple[int, int]:
    """Bytes of the weights that a part reads, and how many nodes read them."""
    stored = weights(model.proto)
    nodes = [node for node in behind(model, part).values() if not stored.keys().isdisjoint(node.inputs)]
    read = {name for node in nodes for name in node.inputs if name in stored}
    return sum(expected_bytes(model.constants[name]) for name in read), len(nodes)


@pytest.mark.parametrize("limit", [500, 5000, 20000])
@pytest.mark.parametrize("name", ["torchscript", "torch_module", "disentangled"])
def test_no_part_holds_more_weights_than_it_may(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless what one node reads is more."""
    divide(monkeypatch, limit, 1)
    graph = graph_of(TRANSFORMERS[name]())
    model = graph.model
    outputs = [output.name for output in model.outputs]
    found = parts.partition(model, graph.shapes, model.producers.keys(), outputs)
    sizes = [held(model, part) for part in found]
    assert all(size <= limit or nodes == 1 for size, nodes in sizes)
    assert sum(size for size, _ in sizes) >= sum(array.nbytes for array in weights(model.proto).values())


def test_a_weight_is_not_read_again_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape is computed again in each part that reads it, from a tensor that the first part has made."""
    divide(monkeypatch, 3000, 1)
    g = Graph()
    words = g.matmul(g.input("batch", "length", 6, name="tokens"), 24)
    shape = g.op("Shape", words)
    x = g.op("Reshape", g.relu(words), shape, shape=words.shape)
    for _ in range(3):
        x = g.matmul(x, 24)
    x = g.op("Reshape", g.relu(x), shape, shape=x.shape)
    graph = graph_of(g.model(g.matmul(x, 5)))
    found = parts.partition(graph.model, graph.shapes, graph.model.producers.keys(), ["output"])
    assert sum(words.name in behind(graph.model, part) for part in found) == 1


def test_what_is_cheap_is_no_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is made from a small vector, so each part makes it anew."""
    divide(monkeypatch, 64, 100)
    graph = graph_of(network())
    found = parts.partition(graph.model, graph.shapes, graph.model.producers.keys(), ["output"])
    assert len(found) > 2
    gate = graph.model.consumers["gate"][0]
    assert all(gate.outputs[0] not in part.outputs for part in found)
    assert sum(gate.outputs[0] in behind(graph.model, part) for part in found) == 2


def test_only_flat_models_of_many_weights_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(network())
    size = sum(array.nbytes for array in weights(model.proto).values())
    for limit, wanted in ((2 * size, False), (size // 2, True)):
        monkeypatch.setattr(parts, "WHOLE", limit)
        assert parts.too_large(model) is wanted
    assert not parts.too_large(Model(TOPOLOGIES["if_captures"]()))


def test_inner_values_in_parts_are_those_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = TRANSFORMERS["torchscript"]()
    graph = graph_of(proto)
    wanted = [
        node.outputs[0]
        for node in graph.model.nodes
        if graph.shapes.elements.get(node.outputs[0]) == TensorProto.FLOAT
    ]
    given = feeds(proto)
    whole = parts.inner_values(graph.model, graph.shapes, wanted)(given)
    divide(monkeypatch, 64, 1)
    divided = parts.inner_values(graph.model, graph.shapes, wanted)(given)
    assert whole.keys() == divided.keys() == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(divided[name], whole[name], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ large models


@pytest.mark.parametrize(
    "options", [Options(heads=0.5, ffn=0.5, align=1), Options(hidden=0.5, layers="1", align=1)]
)
def test_a_model_in_an_external_file_shrinks_in_parts(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"HIDDEN": 32, "HEADS": 8, "GROUPS": 2, "WIDTH": 4, "NEURONS": 48, "WORDS": 50}
    for name, size in sizes.items():
        monkeypatch.setattr(large, name, size)
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * 48)
    path = large.write(tmp_path, (2 * layer + 8 * 32 * 50) / 1e9)
    monkeypatch.setattr(parts, "WHOLE", layer)
    monkeypatch.setattr(parts, "PART", layer // 2)
    monkeypatch.setattr(parts, "LARGE", 1000)
    result = prune(path, options)
    verdict = result.report.equivalence
    assert verdict is not None
    assert verdict.passed
    assert count(verdict) > 3
    assert result.report.after.params < result.report.before.params
    target = tmp_path / "small.onnx"
    result.save(target)
    tokens = {"tokens": np.arange(12).reshape(2, 6) % 50}
    written = onnx.load(target)
    got = run(written, tokens)
    assert got[0].shape == (2, 6, 50)
    assert error(run(result.model, tokens), got) < 1e-6
