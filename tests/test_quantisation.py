"""The hand-off to onnxruntime's quantiser: what comes out is what was asked for, runs, and leaves all else as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune import model as models
from onnxprune.errors import NothingToPrune, UserError
from onnxprune.model import Array, Model
from onnxprune.targets.tensorrt import TensorRt
from tests.small import check_refused, floats, net, run, weight, write
from tests.target_models import convolutions, symmetric

GENERATOR = np.random.default_rng(7)
IMAGES = GENERATOR.normal(0.5, 1, (48, 3, 12, 12)).astype(np.float32)
SMALL = GENERATOR.normal(0.5, 1, (48, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    proto = convolutions()
    proto.metadata_props.add(key="author", value="somebody")
    proto.producer_name, proto.producer_version, proto.doc_string = "maker", "7", "what it is for"
    proto.graph.node[0].name = "first"
    return proto


@pytest.fixture(scope="module")
def on_cpu(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnxprune.quantize(model, IMAGES).model


def constants(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def output(proto: onnx.ModelProto, feeds: Array) -> Array:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {session.get_inputs()[0].name: feeds})[0]
    return result


def borders(proto: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == op]


def folded_weights(model: onnx.ModelProto) -> dict[str, Array]:
    return constants(onnxprune.fold(model).model)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_weights_are_rounded_by_channel(model: onnx.ModelProto, target: str) -> None:
    """q = round(w / s) with s = max |w| / 127 over each output channel, the first axis of all weights here."""
    proto = onnxprune.quantize(model, IMAGES, target).model
    stored, original, seen = constants(proto), folded_weights(model), 0
    for node in borders(proto, "DequantizeLinear"):
        values = stored.get(node.input[0])
        if values is None or values.dtype != np.int8:
            continue
        (axis,) = (a.i for a in node.attribute if a.name == "axis")
        weights = original[node.input[0].removesuffix("_quantized")].astype(np.float64)
        others = tuple(i for i in range(weights.ndim) if i != axis)
        scale = np.abs(weights).max(axis=others, keepdims=True) / 127
        assert np.allclose(stored[node.input[1]], scale.reshape(-1), rtol=1e-5)
        assert not stored[node.input[2]].any()
        assert np.abs(weights / scale - values).max() <= 0.5001
        seen += 1
    convolution = {"Conv", "Gemm"}
    assert seen == sum(node.op_type in convolution for node in proto.graph.node) == 5


def test_ranges_are_those_of_the_data(model: onnx.ModelProto) -> None:
    """The input's: 255 steps from the least to the largest value, or from minus the largest magnitude to it."""
    scales = {}
    for target in ("cpu", "tensorrt"):
        proto = onnxprune.quantize(model, IMAGES, target).model
        node = next(n for n in borders(proto, "QuantizeLinear") if n.input[0] == "image")
        scales[target] = [constants(proto)[name] for name in node.input[1:]]
    (scale, zero), (even, none) = scales["cpu"], scales["tensorrt"]
    low, high = float(IMAGES.min()), float(IMAGES.max())
    assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert abs(float(zero) + low / float(scale)) <= 0.5
    assert zero.dtype == np.uint8
    assert even == pytest.approx(2 * max(-low, high) / 254, rel=5e-3)  # 254 or 255 steps
    assert none.dtype == np.int8
    assert none == 0


@pytest.mark.parametrize("target", ["cpu", "tensorrt", "qnn"])
def test_outputs_are_near(model: onnx.ModelProto, target: str) -> None:
    result = onnxprune.quantize(model, IMAGES, target)
    before, after = output(model, IMAGES), output(result.model, IMAGES)
    noise = np.square(before - after).sum() / np.square(before).sum()
    assert 0 < noise < 0.01
    (agreement,) = result.report.agreement
    assert agreement.snr == pytest.approx(-10 * np.log10(noise), abs=0.5)
    assert result.report.share == 1
    assert not result.report.left


def test_nothing_else_changes(model: onnx.ModelProto, on_cpu: onnx.ModelProto) -> None:
    onnx.checker.check_model(on_cpu, full_check=True)
    assert list(on_cpu.graph.input) == list(model.graph.input)
    assert list(on_cpu.graph.output) == list(model.graph.output)
    assert on_cpu.opset_import == model.opset_import
    assert on_cpu.ir_version == model.ir_version
    assert [(p.key, p.value) for p in on_cpu.metadata_props] == [("author", "somebody")]
    for name in ("producer_name", "producer_version", "doc_string"):
        assert getattr(on_cpu, name) == getattr(model, name)
    names = {node.name for node in on_cpu.graph.node}
    assert "first" in names
    assert not any(name.startswith("node ") for name in names)
    assert not on_cpu.graph.value_info


def test_onnxruntime_fuses_all_of_it(on_cpu: onnx.ModelProto, tmp_path: Path) -> None:
    """Between the borders no convolution or product stays in float, nor the addition between two of them."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(on_cpu.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert found["QLinearConv"] == 4
    assert found["QGemm"] == found["QLinearAdd"] == found["QuantizeLinear"] == 1
    assert not found["Conv"] + found["Gemm"] + found["Relu"] + found["Clip"]


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Where sets come in another order."""
    path, data, out = (
        write(convolutions(), tmp_path / "model.onnx"),
        tmp_path / "data.npz",
        tmp_path / "out.onnx",
    )
    np.savez(data, image=IMAGES[:8])
    command = [sys.executable, "-m", "onnxprune", "quantize", str(path), "--data", str(data), "-o", str(out)]
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
    here = tmp_path / "here.onnx"
    onnxprune.quantize(path, data).save(here)
    assert out.read_bytes() == here.read_bytes()


@pytest.mark.parametrize("name", ["convolutions", "torchscript"])
def test_tensorrt_builds_it(name: str) -> None:
    """And nothing that it is known to refuse is in it: biases are float, zero points are 0."""
    if name == "convolutions":
        result = onnxprune.quantize(convolutions(), IMAGES, "tensorrt")
    else:
        result = onnxprune.quantize(TRANSFORMERS[name](), tokens(TRANSFORMERS[name]()), "tensorrt")
    assert result.report.built["bytes"] > 10_000
    assert not result.report.objections
    assert TensorRt("int8").objections(Model(result.model)) == []
    stored = constants(result.model)
    types = {stored[node.input[2]].dtype for node in borders(result.model, "DequantizeLinear")}
    assert types == {np.dtype(np.int8)}


def tokens(proto: onnx.ModelProto) -> dict[str, Array]:
    """Two dozen samples of what a small transformer reads."""
    generator = np.random.default_rng(2)
    found = {}
    for value in proto.graph.input:
        dims = [d.dim_value or 6 for d in value.type.tensor_type.shape.dim][1:]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            found[value.name] = generator.standard_normal((24, *dims)).astype(np.float32)
        elif "mask" in value.name:
            found[value.name] = np.ones((24, *dims), np.int64)
        else:
            found[value.name] = generator.integers(0, 10, (24, *dims))
    return found


def test_a_layernorm_gets_16_bits_on_the_npu() -> None:
    proto = TRANSFORMERS["torchscript"]()
    made = onnxprune.quantize(proto, tokens(proto), "qnn")
    assert made.report.scheme["activations"] == "uint16"
    kinds = Counter(constants(made.model)[n.input[2]].dtype for n in borders(made.model, "QuantizeLinear"))
    assert kinds[np.dtype(np.uint16)] > 10
    convolutional = onnxprune.quantize(convolutions(), IMAGES, "qnn")
    assert convolutional.report.scheme["activations"] == "uint8"


def test_a_quantised_model_is_pruned(on_cpu: onnx.ModelProto) -> None:
    result = onnxprune.shrink(
        on_cpu, channels=0.5, align=1, repair="none", criterion="l2", allocation="uniform"
    )
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed
    assert result.report.kept["macs"] < 0.5
    ops = [Counter(node.op_type for node in proto.graph.node) for proto in (on_cpu, result.model)]
    assert ops[0] == ops[1]


def test_a_pruned_model_is_quantised(model: onnx.ModelProto) -> None:
    pruned = onnxprune.shrink(model, channels=0.25, align=1, repair="none", criterion="l2").model
    result = onnxprune.quantize(pruned, IMAGES, "tensorrt", original=model, metric="cosine")
    first, second, third = (result.report.stages[name] for name in ("original", "model", "quantised"))
    assert list(result.report.stages) == ["original", "model", "quantised"]
    assert first.macs > second.macs == third.macs
    assert first.bytes > second.bytes > 2.5 * third.bytes
    assert third.params == folded_parameters(pruned)
    assert first.quality == pytest.approx(1)
    assert second.quality is not None
    assert third.quality is not None
    assert 0.5 < third.quality < first.quality


def folded_parameters(proto: onnx.ModelProto) -> int:
    return sum(a.size for a in folded_weights(proto).values() if a.ndim and a.dtype == np.float32)


def test_biases_are_parameters_and_scales_are_not(model: onnx.ModelProto, on_cpu: onnx.ModelProto) -> None:
    assert any(a.dtype == np.int32 for a in constants(on_cpu).values())
    result = onnxprune.quantize(model, IMAGES)
    assert result.report.stages["quantised"].params == folded_parameters(model)


@pytest.mark.parametrize("target", ["cpu", "qnn"])
def test_what_bodies_read_is_what_they_read_before(target: str) -> None:
    """The quantiser takes out a Relu whose output has a border, and the body would read what comes before it."""
    proto = TOPOLOGIES["if_captures"]()
    result = onnxprune.quantize(proto, SMALL, target).model
    before, after = output(proto, SMALL[:1]), output(result, SMALL[:1])
    assert np.abs(before - after).max() < 0.1 * np.abs(before).max()
    assert "Relu" in {node.op_type for node in result.graph.node}


@pytest.mark.parametrize("ir", [6, 8])
def test_old_opsets_are_raised(ir: int) -> None:
    proto = net(opset=11, ir=ir)
    result = onnxprune.quantize(proto, SMALL)
    assert [(o.domain, o.version) for o in result.model.opset_import] == [("", 13)]
    assert any("opset 11 to 13" in note for note in result.report.notes)
    before, after = output(proto, SMALL), output(result.model, SMALL)
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()


def test_weights_in_constant_nodes_count_as_weights() -> None:
    proto = net()
    for tensor in proto.graph.initializer:
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del proto.graph.initializer[:]
    assert onnxprune.quantize(proto, SMALL).model == onnxprune.quantize(net(), SMALL).model


def test_nodes_that_are_excluded_stay_in_float(model: onnx.ModelProto, tmp_path: Path) -> None:
    path, out, report = write(net(), tmp_path / "m.onnx"), tmp_path / "out.onnx", tmp_path / "r.json"
    np.savez(tmp_path / "d.npz", x=SMALL)
    asked = ("--data", tmp_path / "d.npz", "-o", out, "--json", report)
    assert run("quantize", path, *asked, "--exclude", "conv2").exit_code == 0
    stated = json.loads(report.read_text())
    assert stated["left_in_float"] == {"Conv": 1}
    assert stated["quantised_macs"] == pytest.approx(8 * 3 * 9 * 36 / (8 * 3 * 9 * 36 + 8 * 4 * 36), rel=1e-4)
    last = next(node for node in onnx.load(out).graph.node if node.name == "conv2")
    assert "w2" in last.input
    check_refused(run("quantize", path, *asked, "--exclude", "conv9"), "conv9", "matches no")
    check_refused(run("quantize", path, *asked, "--exclude", "conv*"), "excluded", code=4)


def test_weights_in_data_files_stay_there(tmp_path: Path) -> None:
    proto = convolutions(channels=64)
    folder = tmp_path / "in"
    folder.mkdir()
    settings = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 1024}
    onnx.save(proto, folder / "model.onnx", **settings)
    np.savez(tmp_path / "data.npz", image=IMAGES)
    out = tmp_path / "small.onnx"
    assert run("quantize", folder / "model.onnx", "--data", tmp_path / "data.npz", "-o", out).exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "in", "small.onnx", "small.onnx.data"]
    there = models.load(out)
    assert set(there.external.values()) == {"small.onnx.data"}
    plain = onnxprune.quantize(convolutions(channels=64), IMAGES).model
    assert np.array_equal(output(models.materialised(there.proto), IMAGES), output(plain, IMAGES))


def test_the_report_in_words(tmp_path: Path) -> None:
    path, original = write(net(), tmp_path / "m.onnx"), write(net(), tmp_path / "o.onnx")
    labels = output(net(), SMALL).reshape(48, -1).argmax(1)
    np.savez(tmp_path / "d.npz", x=SMALL, labels=labels)
    asked = ("--data", tmp_path / "d.npz", "--eval", tmp_path / "d.npz", "--metric", "agreement")
    result = run("quantize", path, *asked, "--original", original, "--target", "tensorrt")
    assert result.exit_code == 0, result.output
    for word in (
        "original",
        "model",
        "quantised",
        "file bytes",
        "agreement",
        "100.0% of the MACs",
        "builds it",
    ):
        assert word in result.stdout
    written = tmp_path / "m.quantised.onnx"
    assert written.exists()
    assert f"wrote {written}" in result.stdout
    stated = json.loads(run("quantize", path, *asked, "--json", "-").stdout)
    assert stated["file_bytes"] == stated["stages"]["quantised"]["file_bytes"] == written.stat().st_size
    assert stated["agreement"][0]["snr"] > 20
    assert stated["data"]["samples"] == 48


def half(name: str) -> onnx.ModelProto:
    """A product of float16 matrices."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["n", 8]) for n in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, name, [x], [y], [weight("w", 8, 8, dtype=np.float16)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def idle() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "idle", [floats("x", "n", 8)], [floats("y", "n", 8)]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def poisoned() -> onnx.ModelProto:
    proto = net()
    values = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    values[2, 1, 0, 0] = np.inf
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w1"))
    return proto


def test_what_cannot_be_quantised_is_told(on_cpu: onnx.ModelProto) -> None:
    rows = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    with pytest.raises(UserError, match=r"is quantised already \((Deq|Q)uantizeLinear"):
        onnxprune.quantize(on_cpu, IMAGES)
    with pytest.raises(UserError, match="is quantised already"):
        onnxprune.quantize(symmetric(), SMALL)
    with pytest.raises(
        NothingToPrune, match=r"computes in float16.*quantise the model that it was converted from"
    ):
        onnxprune.quantize(half("half"), rows.astype(np.float16))
    with pytest.raises(NothingToPrune, match="holds no convolution and no matrix product"):
        onnxprune.quantize(idle(), rows)
    with pytest.raises(UserError, match=r"weight 'w1' holds NaN or Inf"):
        onnxprune.quantize(poisoned(), SMALL)
    with pytest.raises(UserError, match="choose one of cpu, openvino"):
        onnxprune.quantize(net(), SMALL, "ncnn")
    with pytest.raises(UserError, match="a quantised model is of int8"):
        onnxprune.quantize(net(), SMALL, "tensorrt:fp16")


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    path, original = write(net(), tmp_path / "m.onnx"), write(net(), tmp_path / "o.onnx")
    np.savez(tmp_path / "d.npz", x=SMALL)
    before = path.read_bytes()
    asked = ("quantize", path, "--data", tmp_path / "d.npz", "--original", original)
    check_refused(run(*asked, "-o", path), "the output is the input")
    check_refused(run(*asked, "-o", original), "the output is the input")
    check_refused(run(*asked, "-o", tmp_path / "a.onnx", "--json", tmp_path / "a.onnx"), "same path")
    check_refused(run("quantize", path, "--data", tmp_path / "none.npz"), "does not exist")
    assert path.read_bytes() == original.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "m.onnx", "o.onnx"]


def test_an_original_of_another_interface_is_another_model() -> None:
    other = net()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "z"
    with pytest.raises(UserError, match=r"^--original .+ is not made of it \(outputs changed: z"):
        onnxprune.quantize(
            net(), np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32), original=other
        )
