"""TensorRT-RTX parses and builds without a GPU: what it takes, what it refuses, and what was foreseen of that.

Running needs a CUDA device; `test_outputs_are_those_of_onnxruntime` is skipped, and says so, where there is none.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper

from models.quantised import QUANTISED
from models.transformers import TRANSFORMERS
from onnxprune import model as models
from onnxprune.errors import UserError
from onnxprune.targets.cuda_driver import Stream, gpu
from onnxprune.targets.ranges import BATCH, ranges_of
from onnxprune.targets.target import TargetError
from onnxprune.targets.tensorrt import PORTABLE, WIDTHS, TensorRt
from tests.small import run as onnxprune
from tests.target_models import SMALL, broken, convolutions, error, symmetric, truth, written

BUILT = [name for name in SMALL if name != "integers"]
DEVICE = gpu()


def asked(name: str) -> TensorRt:
    return TensorRt("int8" if name == "quantised" else "fp32")


@pytest.mark.parametrize("name", BUILT)
def test_what_it_does_not_object_to_is_built(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    target = asked(name)
    assert target.objections(models.load(path)) == []
    report = target.build(path)
    assert report["bytes"] > 10_000
    assert report["layers"] > 3
    assert report["engine"] is None
    assert list(tmp_path.iterdir()) == [path]


def test_a_pruned_model_is_built_and_smaller(tmp_path: Path) -> None:
    path, small = written(convolutions(channels=64), tmp_path), tmp_path / "small.onnx"
    assert onnxprune("shrink", path, "-o", small, "--channels", 0.5, "--align", 1).exit_code == 0
    before, after = TensorRt().build(path), TensorRt().build(small)
    assert before["model"] != after["model"]
    assert after["bytes"] < before["bytes"]


def test_the_engine_lies_beside_what_it_is_built_for(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    output = tmp_path / "model.engine"
    report = TensorRt().build(path, output)
    assert output.stat().st_size == report["bytes"]
    assert json.loads((tmp_path / "model.engine.json").read_text()) == report
    assert report["version"] == f"TensorRT-RTX {tensorrt_rtx.__version__}"
    assert report["built_for"] == [f"SM{capability}" for capability in PORTABLE]
    assert report["precision"] == "fp32"
    assert report["model"] == models.load(path).digest()
    low, likely, high = (report["profile"]["image"][key] for key in ("min", "opt", "max"))
    assert (low[0], high[0], low[1:]) == (1, BATCH, [3, 12, 12])
    assert low[0] <= likely[0] <= high[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.engine", "model.engine.json", "model.onnx"]


def test_a_refusal_leaves_the_engine_that_was_there(tmp_path: Path) -> None:
    output = tmp_path / "model.engine"
    TensorRt().build(written(convolutions(), tmp_path), output)
    before = output.read_bytes(), (tmp_path / "model.engine.json").read_bytes()
    with pytest.raises(TargetError):
        TensorRt().build(written(broken(), tmp_path), output)
    assert (output.read_bytes(), (tmp_path / "model.engine.json").read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 3


def test_the_model_is_not_overwritten(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="overwrite the input"):
        TensorRt().build(path, path)
    assert path.read_bytes() == before


def test_a_broken_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        TensorRt().build(written(broken(), tmp_path))
    assert "conv" in f"{caught.value}".lower()
    assert f"{caught.value}".isprintable()
    assert "cudaError" not in f"{caught.value}"


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(TargetError):
        TensorRt().build(path)


# Precisions are those of the file


def of_type(proto: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model with all its floats in another type, inputs and outputs included."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    del proto.graph.value_info[:]
    return proto


TYPED = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.mark.parametrize("stored", TYPED)
@pytest.mark.parametrize("precision", TensorRt.precisions)
def test_a_precision_asks_for_a_file_of_that_type(stored: str, precision: str, tmp_path: Path) -> None:
    proto = of_type(convolutions(), TYPED[stored])
    if stored == "bf16":
        proto.opset_import[0].version, proto.ir_version = 22, 10
    path = written(proto, tmp_path)
    target = TensorRt(precision)
    if stored == precision or (stored, precision) == ("fp32", "tf32"):
        assert target.objections(models.load(path)) == []
        assert target.build(path)["precision"] == precision
        return
    (objection,) = target.objections(models.load(path))
    assert f"tensorrt:{stored}" in objection
    with pytest.raises(TargetError) as caught:
        target.build(path)
    assert f"{caught.value}" == objection


def test_a_quantised_file_is_int8(tmp_path: Path) -> None:
    path = written(symmetric(), tmp_path)
    with pytest.raises(TargetError, match="ask for tensorrt:int8"):
        TensorRt().build(path)
    assert TensorRt("int8").build(path)["precision"] == "int8"


@pytest.mark.parametrize("precision", TensorRt.precisions)
def test_narrow_types_ask_for_wider_blocks(precision: str) -> None:
    alignment = TensorRt(precision).alignment()
    bits = {"int8": 8, "fp16": 16, "bf16": 16}.get(precision, 32)
    assert alignment.products * bits == 128  # tensor cores read 16 bytes at once


# What it does not take, foreseen and found


def attention(
    heads: int, keys: int, values: int, kind: int = TensorProto.FLOAT16, flat: bool = True, groups: int = 0
) -> onnx.ModelProto:
    groups = groups or heads

    def shape(count: int, width: int) -> Sequence[int | str]:
        return ["batch", "length", count * width] if flat else ["batch", count, "length", width]

    operands = (("q", heads, keys), ("k", groups, keys), ("v", groups, values))
    inputs = [
        helper.make_tensor_value_info(name, kind, shape(count, width)) for name, count, width in operands
    ]
    output = helper.make_tensor_value_info("y", kind, shape(heads, values))
    given = {"q_num_heads": heads, "kv_num_heads": groups} if flat else {}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention", **given)
    graph = helper.make_graph([node], "attention", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (attention(4, WIDTHS[0] - 1, WIDTHS[0] - 1), ["wide"]),
        (attention(4, WIDTHS[0], WIDTHS[0]), []),
        (attention(4, 63, 63, flat=False), []),
        (attention(1, 16, 16, flat=False), []),
        (attention(6, 24, 24, groups=2), []),
        (attention(4, WIDTHS[-1], WIDTHS[-1]), []),
        (attention(4, WIDTHS[-1] + 1, WIDTHS[-1] + 1), ["wide"]),
        (attention(4, 32, 24), ["values"]),
        (attention(4, 32, 32, kind=TensorProto.BFLOAT16), []),
        (attention(4, 32, 32, kind=TensorProto.FLOAT), ["float32"]),
    ],
    ids=["narrowest", "narrow", "odd", "single", "grouped", "wide", "widest", "uneven", "bf16", "fp32"],
)
def test_limits_of_attention(proto: onnx.ModelProto, words: list[str], tmp_path: Path) -> None:
    """Whatever is objected to is refused, and nothing else."""
    path = written(proto, tmp_path)
    found = TensorRt().objections(models.load(path))
    assert len(found) == len(words)
    assert all(word in text and "'attention'" in text for word, text in zip(words, found, strict=True))
    if found:
        with pytest.raises(TargetError):
            TensorRt().build(path)
    else:
        assert TensorRt().build(path)["bytes"] > 10_000


def changed(name: str) -> onnx.ModelProto:
    """A quantised model that breaks one of TensorRT's rules."""
    proto = symmetric()
    stored = {t.name: t for t in proto.graph.initializer}
    if name in ("shifted", "unsigned"):
        dtype, value = (np.int8, 3) if name == "shifted" else (np.uint8, 0)
        zero = numpy_helper.from_array(np.array(value, dtype), "other")
        proto.graph.initializer.append(zero)
        for node in proto.graph.node[:2]:
            node.input[2] = "other"
    elif name == "silent":
        del proto.graph.node[0].input[2]
    else:
        convolution = next(node for node in proto.graph.node if node.op_type == "Conv")
        bias = stored[convolution.input[2]]
        if name == "bias":
            values = np.round(numpy_helper.to_array(bias) / 1e-4).astype(np.int32)
            node = helper.make_node("DequantizeLinear", ["bias", "step"], ["real"], name="dequantised")
            proto.graph.initializer.append(numpy_helper.from_array(np.float32(1e-4), "step"))
        else:
            values = np.round(numpy_helper.to_array(bias) * 64).astype(np.int8)
            node = helper.make_node("Cast", ["bias"], ["real"], name="cast", to=TensorProto.FLOAT)
        proto.graph.initializer.append(numpy_helper.from_array(values, "bias"))
        proto.graph.node.insert(0, node)
        convolution.input[2] = "real"
    return proto


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shifted", "zero point"),
        ("unsigned", "uint8"),
        ("silent", "uint8"),
        ("bias", "int32 bias"),
        ("bare", "int8 constant"),
    ],
)
def test_rules_of_quantisation(name: str, words: str, tmp_path: Path) -> None:
    path = written(changed(name), tmp_path)
    (objection,) = TensorRt("int8").objections(models.load(path))
    assert words in objection
    with pytest.raises(TargetError):
        TensorRt("int8").build(path)


def test_its_parser_alone_takes_uint8_for_int8(tmp_path: Path) -> None:
    """Why that is refused here: what is quantised to 0 ... 255 would be cut off at 127, and nothing fails."""
    path = written(changed("unsigned"), tmp_path)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    assert tensorrt_rtx.OnnxParser(network, logger).parse_from_file(str(path))
    layers = {network.get_layer(i).name: network.get_layer(i) for i in range(network.num_layers)}
    assert layers["first.q"].get_output(0).dtype == tensorrt_rtx.int8


@pytest.mark.parametrize("name", ["transformer_of_integers", "residual_of_qlinear", "qdq_by_channel"])
def test_other_forms_of_quantisation_are_foreseen(name: str, tmp_path: Path) -> None:
    path = written(QUANTISED[name](), tmp_path)
    assert TensorRt("int8").objections(models.load(path))
    with pytest.raises(TargetError):
        TensorRt("int8").build(path)


# Shapes and command lines


def test_ranges_hold_the_sizes_of_the_analysis() -> None:
    model = models.Model(TRANSFORMERS["torchscript"]())
    ((low, likely, high),) = ranges_of(model).values()
    assert all(a <= b <= c for a, b, c in zip(low, likely, high, strict=True))
    assert (low[0], high[0]) == (1, BATCH)
    assert low[1] < high[1]


def test_lengths_that_add_up_do_so_at_both_ends() -> None:
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", "past", 4]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", "new", 4]),
        helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", "past + new", 4]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "past + new", 4])
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["ab"], axis=1),
        helper.make_node("Add", ["ab", "c"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "lengths", inputs, [output])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ranges = ranges_of(models.Model(proto))
    for i in range(3):
        assert ranges["a"][i][1] + ranges["b"][i][1] == ranges["c"][i][1]
    assert ranges["c"][0][1] < ranges["c"][2][1]


def test_fixed_shapes_need_no_range(tmp_path: Path) -> None:
    proto = convolutions()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    path = written(proto, tmp_path)
    assert TensorRt().build(path)["profile"] == {}
    assert not any("Shapes" in command for command in TensorRt().commands(path))


def test_polygraphy_takes_the_shapes(tmp_path: Path) -> None:
    """The options are those of its command line; it builds, as `convert`, what `run` would run on a GPU."""
    path = written(TRANSFORMERS["torchscript"](), tmp_path)
    commands = TensorRt().commands(path)
    command = next(line for line in commands if line.startswith("polygraphy"))
    words = shlex.split(command)
    start, end = words.index("--trt-min-shapes"), words.index("--input-shapes")
    engine = tmp_path / "poly.engine"
    convert = ["convert", str(path), "--convert-to", "trt", "-o", str(engine), *words[start:end]]
    program = Path(sys.executable).with_name("polygraphy")
    done = subprocess.run(
        [str(program), *convert],
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert engine.stat().st_size > 10_000
    ((low, _, high),) = ranges_of(models.load(path)).values()
    assert f"{low}" in done.stdout.replace("[", "(").replace("]", ")") or f"{list(low)}" in done.stdout
    trtexec = shlex.split(commands[0])
    assert f"--minShapes=ids:{low[0]}x{low[1]}" in trtexec
    assert f"--maxShapes=ids:{high[0]}x{high[1]}" in trtexec
    assert "--noTF32" in trtexec
    assert "--noTF32" not in shlex.split(TensorRt("tf32").commands(path)[0])


def test_paths_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "it's a $(folder)"
    folder.mkdir()
    path = written(convolutions(), folder)
    for command in TensorRt().commands(path):
        assert any(str(path) in word for word in shlex.split(command))


# Where it runs


def test_state_says_how_far_it_goes() -> None:
    state = TensorRt().state()
    if DEVICE is None:
        assert state.reach == "builds"
        assert state.version == f"TensorRT-RTX {tensorrt_rtx.__version__}"
        assert "not run here" in state.missing
    else:
        assert state.device == DEVICE.name or "builds" in state.reach


@pytest.mark.skipif(DEVICE is not None, reason="there is a CUDA device")
def test_nothing_is_said_to_run_where_there_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="does not run here: no CUDA device"):
        TensorRt().load(written(convolutions(), tmp_path))


@pytest.mark.skipif(DEVICE is not None, reason="there is a CUDA device")
def test_no_memory_is_had_where_there_is_no_device() -> None:
    with pytest.raises(TargetError, match=r"driver is not installed|cuInit failed: .+ \(\d+\)"):
        Stream()


@pytest.mark.skipif(DEVICE is None, reason="not run: no CUDA device")
def test_what_is_uploaded_comes_back() -> None:
    stream = Stream()
    sent, got = np.arange(1000, dtype=np.float32), np.empty(1000, np.float32)
    address = stream.buffer("x", sent.nbytes)
    assert stream.buffer("x", 4) == address
    stream.upload(address, sent)
    stream.download(address, got)
    stream.wait()
    stream.close()
    assert (got == sent).all()


@pytest.mark.skipif(TensorRt().state().reach != "runs", reason=f"not run: {TensorRt().state().missing}")
@pytest.mark.parametrize("name", BUILT)
def test_outputs_are_those_of_onnxruntime(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    target = asked(name)
    engine = target.load(path)
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        assert error(engine.run(feeds), expected) < target.tolerance
    engine.close()
