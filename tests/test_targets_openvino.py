"""OpenVINO on the CPU: agrees with onnxruntime, refuses what is broken, and computes where and how it was told."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import openvino
import pytest
from onnx import TensorProto, helper

from onnxprune.targets.openvino import DEVICE, OpenVino, verified
from onnxprune.targets.target import TargetError
from tests.small import floats, weight
from tests.small import run as onnxprune
from tests.target_models import OTHER, SMALL, broken, convolutions, error, other_than_numbers, truth, written

BF16 = OpenVino("bf16").state().reach == "runs"
QUANTUM = 0.02  # one step of int8, of the scale of the outputs: engines round in different places


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_onnxruntime(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    target = OpenVino()
    engine = target.load(path)
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        limit = QUANTUM if name == "quantised" else target.tolerance
        assert error(engine.run(feeds), expected) < limit
    assert engine.nodes[DEVICE] == sum(engine.settings["layers"].values()) > 3


def test_one_engine_takes_every_batch(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    engine = OpenVino().load(path)
    feeds, expected = truth(path)
    one = engine.run({"image": feeds["image"][:1]})["logits"]
    assert one.shape == (1, 5)
    assert abs(one - expected["logits"][:1]).max() < 1e-4 * abs(expected["logits"]).max()


def test_a_pruned_model_runs_and_agrees(tmp_path: Path) -> None:
    path, small = written(convolutions(), tmp_path), tmp_path / "small.onnx"
    assert onnxprune("shrink", path, "-o", small, "--channels", 0.4, "--align", 1).exit_code == 0
    feeds, expected = truth(small)
    assert small.stat().st_size < path.stat().st_size
    assert error(OpenVino().load(small).run(feeds), expected) < OpenVino().tolerance


def test_results_outlive_the_next_run(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    engine = OpenVino().load(path)
    (a, _), (b, _) = truth(path, 0), truth(path, 1)
    first = engine.run(a)["logits"]
    kept = first.copy()
    assert abs(engine.run(b)["logits"] - kept).max() > 0.01
    assert (first == kept).all()


@pytest.mark.skipif(not BF16, reason="this CPU has no bf16")
def test_bf16_is_bf16(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    feeds, expected = truth(path)
    target = OpenVino("bf16")
    engine = target.load(path)
    assert engine.settings["layers"]["bf16"] > 3
    assert OpenVino().tolerance < error(engine.run(feeds), expected) < target.tolerance


def test_another_precision_than_asked_for_is_refused(tmp_path: Path) -> None:
    """What a machine with bf16 does by default when fp32 was meant, and one without when bf16 was."""
    core = openvino.Core()
    model = core.read_model(str(written(convolutions(), tmp_path)))
    plain = core.compile_model(model, DEVICE, {"INFERENCE_PRECISION_HINT": "f32"})
    with pytest.raises(TargetError, match="no layer in bf16"):
        verified(plain, DEVICE, "bf16")
    if BF16:
        default = core.compile_model(model, DEVICE)
        with pytest.raises(TargetError, match=r"\d+ layers in 16 bits although fp32"):
            verified(default, DEVICE, "fp32")


def test_another_device_than_asked_for_is_refused(tmp_path: Path) -> None:
    """As AUTO does where there is no GPU: it takes the CPU, and says nothing."""
    core = openvino.Core()
    model = core.read_model(str(written(convolutions(), tmp_path)))
    compiled = core.compile_model(model, "AUTO", {"INFERENCE_PRECISION_HINT": "f32"})
    with pytest.raises(TargetError, match=r"placed the model on .*CPU.* instead of GPU"):
        verified(compiled, "GPU", "fp32")


def test_a_broken_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        OpenVino().load(written(broken(), tmp_path))
    assert "input channels" in f"{caught.value}".lower() or "channel" in f"{caught.value}".lower()
    assert f"{caught.value}".isprintable()


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08\x3a\x00"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(TargetError):
        OpenVino().load(path)


def test_wrong_feeds_are_told(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    feeds, _ = truth(path)
    engine = OpenVino().load(path)
    with pytest.raises(TargetError):
        engine.run({"image": feeds["image"][:, :2]})
    with pytest.raises(TargetError, match="'image'"):
        engine.run({"other": feeds["image"]})


CARRIERS: dict[str, list[onnx.NodeProto]] = {
    "identity": [helper.make_node("Identity", ["x"], ["a"])],
    "dropout": [helper.make_node("Dropout", ["x"], ["a", "mask"])],
    "same": [helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT)],
    "half": [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["a"], to=TensorProto.FLOAT),
    ],
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_inputs_and_outputs_are_known_by_their_place(carrier: str, tmp_path: Path) -> None:
    """OpenVINO names an input after what carries it. One more is read by nobody, one is a weight, one a single number;
    of the outputs two are the same tensor, one is an input."""
    nodes = [
        *CARRIERS[carrier],
        helper.make_node("Identity", ["scale"], ["carried"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Mul", ["b", "carried"], ["c"]),
        helper.make_node("Sub", ["c", "y"], ["d"]),
        *(helper.make_node("Identity", ["d"], [name]) for name in ("first", "last")),
        helper.make_node("Neg", ["b"], ["between"]),
    ]
    inputs = [
        floats("y", 4, 4),
        floats("nobody", 4, 4),
        floats("w", 4, 4),
        floats("x", 4, 4),
        floats("scale"),
    ]
    outputs = [floats(name, 4, 4) for name in ("first", "between", "y", "last")]
    graph = helper.make_graph(nodes, carrier, inputs, outputs, [weight("w", 4, 4)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = written(proto, tmp_path)
    engine = OpenVino().load(path)
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        assert list(feeds) == ["y", "nobody", "x", "scale"]
        back_to_front = dict(reversed(feeds.items()))
        assert error(engine.run(back_to_front), expected) < 1e-3  # half of an input is half of it here, too


def test_texts_are_refused_before_they_corrupt_memory(tmp_path: Path) -> None:
    texts = helper.make_tensor_value_info("texts", TensorProto.STRING, [3])
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Shape", ["texts"], ["count"])]
    outputs = [floats("y", 2, 2), helper.make_tensor_value_info("count", TensorProto.INT64, [1])]
    graph = helper.make_graph(nodes, "texts", [floats("x", 2, 2), texts], outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(TargetError, match=r"^input 'texts' holds strings"):
        OpenVino().load(written(proto, tmp_path))


@pytest.mark.parametrize("kind", OTHER)
def test_outputs_that_are_no_tensors_of_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        OpenVino().load(written(other_than_numbers(kind), tmp_path))
    assert f"{caught.value}".isprintable()


def test_its_own_tool_takes_the_command(tmp_path: Path) -> None:
    """benchmark_app parses it and computes in the precision that is named."""
    path = written(convolutions(), tmp_path)
    (command,) = OpenVino().commands(path)
    program = Path(sys.executable).with_name("benchmark_app")
    words = [str(program), *shlex.split(command)[1:], "-niter", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INFERENCE_PRECISION_HINT: <Type: 'float32'>" in done.stdout


def test_state_names_version_and_needs_no_import() -> None:
    code = "import sys; from onnxprune.targets.openvino import OpenVino as O; s = O().state(); print(s.reach, s.version, 'openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version = openvino.__version__.split("-")[0]
    assert done.stdout.split() == ["runs", "OpenVINO", version, "False"]


def test_a_missing_package_is_named_with_its_command() -> None:
    """In an interpreter that sees no packages but this one and what it stands on."""
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "from onnxprune.targets.openvino import OpenVino\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        "m.version = absent\n"
        "state = OpenVino().state(); print(state.reach, state.missing)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("absent openvino is not installed: pip install 'onnxprune[openvino]'")
