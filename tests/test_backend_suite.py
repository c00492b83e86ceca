"""The test models inside the onnx wheel: none may crash, none may come out wrong.

Each is pruned as it is; that only shows that nothing breaks, because nearly all consist of one node between
a graph's input and output. So each node test is also put between two matrix products that give it free
axes: there is something to cut then, and the equivalence check judges every operator in every form that
the onnx project tests.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from onnxprune.errors import NothingToPrune, UserError
from onnxprune.model import Model
from onnxprune.passes import Options
from onnxprune.pipeline import Result, prune
from onnxprune.runtime import RunError, Session

STORED = ("simple", "pytorch-converted", "pytorch-operator")
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
SMALL_LIGHT = ("densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet")
CHUNKS = 4  # of the node tests
THIRD = 3  # one in so many is tried between two products by default
NEWEST_OPSET, NEWEST_IR = 26, 12  # that onnxruntime runs
MIXED = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


@functools.cache
def cases(kind: str) -> list[TestCase]:
    with warnings.catch_warnings():  # the suite overflows on purpose while it makes its data
        warnings.simplefilter("ignore")
        return sorted(load_model_tests(kind=kind), key=lambda case: case.name)


def cut(source: onnx.ModelProto | Path, lossy: bool = False) -> Result | None:
    """The pruned model, proven; None where there is nothing to prune."""
    try:
        result = prune(source, Options(0.5, align=1, allow_lossy=lossy))
    except NothingToPrune:
        return None
    proof = result.report.equivalence
    assert proof is not None
    assert proof.passed
    return result


# ------------------------------------------------------------------------------------------- as they are


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_node_models_are_left_alone(chunk: int) -> None:
    for case in cases("node")[chunk::CHUNKS]:
        assert cut(case.model) is None, case.name


def test_the_wheel_holds_as_many_node_models_as_ever() -> None:
    assert len(cases("node")) >= 1884


@pytest.mark.parametrize("kind", STORED)
def test_stored_models_are_left_alone(kind: str) -> None:
    for case in cases(kind):
        assert cut(Path(case.model_dir) / "model.onnx") is None, case.name


# ----------------------------------------------------------------------------------- networks without weights


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_light_models(path: Path) -> None:
    result = cut(path)
    assert result is not None
    assert result.report.kept["macs"] < 0.7
    assert result.report.kept["params"] < 0.5


@pytest.mark.parametrize("name", SMALL_LIGHT)
def test_light_models_with_real_weights(name: str) -> None:
    """ConstantOfShape fills every filter with one value; random ones make the check tell channels apart."""
    result = cut(_with_weights(onnx.load(LIGHT / f"light_{name}.onnx")))
    assert result is not None
    assert not any("constant" in note for note in result.report.equivalence.notes)  # type: ignore[union-attr]


def _with_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if node.op_type != "ConstantOfShape":
            nodes.append(node)
            continue
        shape = [int(n) for n in stored[node.input[0]]]
        fan_in = max(int(np.prod(shape[1:])), 1)
        values = np.abs(rng.standard_normal(shape, dtype=np.float32)) / np.float32(fan_in) ** 0.5
        if len(shape) > 1:
            values *= rng.choice([-1, 1], shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.ir_version = max(proto.ir_version, 4)  # initializers need not be inputs
    return proto


# --------------------------------------------------------------------------------- between two products


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_node_models_between_products(chunk: int) -> None:
    found = _between(cases("node")[::THIRD][chunk::CHUNKS], lossy=False)
    assert found > 50


@pytest.mark.slow
@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_all_node_models_between_products(chunk: int, lossy: bool) -> None:
    found = _between(cases("node")[chunk::CHUNKS], lossy)
    assert found > 200


def _between(tests: list[TestCase], lossy: bool) -> int:
    """How many could be cut, of the tests and the axes that the products mix."""
    found = 0
    for case in tests:
        for proto in embedded(case):
            try:
                found += cut(proto, lossy) is not None
            except UserError:
                assert not _runs(proto, case), case.name
    return found


def _runs(proto: onnx.ModelProto, case: TestCase) -> bool:
    given = dict(zip((i.name for i in case.model.graph.input), case.data_sets[0][0], strict=False))
    feeds = {i.name: given[i.name.removesuffix(".in")] for i in Model(proto).inputs}
    try:
        Session(proto).run(feeds)
    except RunError:
        return False
    return True


def embedded(case: TestCase) -> Iterator[onnx.ModelProto]:
    """The case with its float inputs and outputs mixed along one axis, for each axis in turn; its other
    inputs become constants."""
    values = [*case.model.graph.input, *case.model.graph.output]
    for axis in range(max((len(_dims(v)) for v in values), default=0)):
        proto = _Embedding(case, axis).build()
        if proto is not None:
            yield proto


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


class _Embedding:
    def __init__(self, case: TestCase, axis: int) -> None:
        self.case = case
        self.axis = axis
        self.rng = np.random.default_rng(axis)
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(case.model)
        self.nodes: list[onnx.NodeProto] = []

    def build(self) -> onnx.ModelProto | None:
        graph = self.proto.graph
        data = self.case.data_sets[0][0]
        inputs = []
        mixed = False
        for i, value in enumerate(graph.input):
            given = data[i] if i < len(data) else None
            if self._mixable(value):
                self._mix(value, f"{value.name}.in", value.name)
                inputs.append(_renamed(value, f"{value.name}.in"))
                mixed = True
            elif isinstance(given, np.ndarray) and given.dtype != object:
                graph.initializer.append(numpy_helper.from_array(np.asarray(given, order="C"), value.name))
            else:
                inputs.append(value)
        if not mixed:
            return None
        self.nodes.extend(graph.node)
        outputs = []
        for value in graph.output:
            if self._mixable(value):
                self._mix(value, value.name, f"{value.name}.out")
                value = _renamed(value, f"{value.name}.out")
            outputs.append(value)
        for field, items in ((graph.input, inputs), (graph.output, outputs), (graph.node, self.nodes)):
            kept: list[Any] = [type(item).FromString(item.SerializeToString()) for item in items]
            del field[:]
            field.extend(kept)
        return self._versions()

    def _mixable(self, value: onnx.ValueInfoProto) -> bool:
        dims = _dims(value)
        element = value.type.tensor_type.elem_type
        return element in MIXED and len(dims) > 0 and dims[self.axis % len(dims)] > 1

    def _mix(self, value: onnx.ValueInfoProto, source: str, target: str) -> None:
        """target = source times a random square matrix along the axis."""
        rank = len(_dims(value))
        axis = self.axis % rank
        size = _dims(value)[axis]
        matrix = self.rng.standard_normal((size, size)) / size**0.5
        element = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        name = f"mix.{target}"
        self.proto.graph.initializer.append(numpy_helper.from_array(matrix.astype(element), f"{name}.matrix"))
        last = [a for a in range(rank) if a != axis] + [axis]
        back = [last.index(a) for a in range(rank)]
        self.nodes += [
            helper.make_node("Transpose", [source], [f"{name}.last"], perm=last),
            helper.make_node("MatMul", [f"{name}.last", f"{name}.matrix"], [f"{name}.mixed"]),
            helper.make_node("Transpose", [f"{name}.mixed"], [target], perm=back),
        ]

    def _versions(self) -> onnx.ModelProto:
        proto = self.proto
        proto.ir_version = min(proto.ir_version, NEWEST_IR)
        default = [o for o in proto.opset_import if o.domain == ""] or [
            proto.opset_import.add(domain="", version=17)
        ]
        default[0].version = min(default[0].version, NEWEST_OPSET)
        return proto


def _renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy
