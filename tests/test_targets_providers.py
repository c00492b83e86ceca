"""Providers of onnxruntime beyond the CPU: who runs what is read, not believed; simulators show that results are right.

What is marked `targets` needs the extras `qnn` and `webgpu`, and SwiftShader (`python -m models.targets swiftshader`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from models.builder import Graph
from models.control_flow import CONTROL_FLOW
from onnxprune import comparison
from onnxprune import model as models
from onnxprune.allocation import Alignment
from onnxprune.plan import Plan
from onnxprune.reference import Reference
from onnxprune.sizes import dynamic_dims
from onnxprune.targets import TARGETS, target
from onnxprune.targets.fixed import opened
from onnxprune.targets.provider import FixedEngine, ProviderEngine, ProviderTarget, library
from onnxprune.targets.qnn import PROVIDER as QNN
from onnxprune.targets.qnn import SOC, Qnn
from onnxprune.targets.remote import RemoteEngine, taken
from onnxprune.targets.target import Engine, TargetError
from onnxprune.targets.webgpu import PROVIDER as WEBGPU
from onnxprune.targets.webgpu import WebGpu
from tests.small import floats, weight
from tests.small import run as onnxprune
from tests.target_models import SMALL, broken, convolutions, error, truth, written

CPU = "CPUExecutionProvider"
IDLE = "AzureExecutionProvider"  # comes with onnxruntime's wheels, and takes no node of a model
BUILT_IN = ("cuda", "directml", "coreml", "xnnpack")
QNN_HERE, WEBGPU_HERE = Qnn().state(), WebGpu().state()
QUANTUM = 0.02  # one step of int8, of the scale of the outputs: engines round in different places


class BuiltIn(ProviderTarget):
    """What `cuda` and the like are, of the provider that every onnxruntime has."""

    name = "built-in"
    title = "the CPU, through the door of the others"
    provider: ClassVar[str] = CPU
    on_cpu: ClassVar[bool] = True

    def alignment(self) -> Alignment:
        return Alignment.of(1)


class Shaped(BuiltIn):
    """The same for one set of shapes at a time."""

    shaped: ClassVar[bool] = True


class Idle(BuiltIn):
    """A provider that is there and does nothing."""

    provider: ClassVar[str] = IDLE


def grouped(channels: int, groups: int, kernel: int = 3) -> onnx.ModelProto:
    """One grouped convolution."""
    g = Graph("grouped", seed=1)
    return g.model(
        g.conv(g.input(1, channels, 8, 8, name="image"), channels, kernel, group=groups), names=["y"]
    )


# In this process


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", [BuiltIn, Shaped])
def test_a_provider_computes_what_a_session_does(
    kind: type[ProviderTarget], name: str, tmp_path: Path
) -> None:
    path = written(SMALL[name](), tmp_path)
    engine = kind().load(path)
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        assert error(engine.run(feeds), expected) < 1e-6
    assert engine.nodes[CPU] > 3
    assert engine.place == engine.settings["provider"] == CPU
    assert (engine.settings["on_cpu"], engine.settings["threads"]) == (True, 1)
    assert engine.settings["precision"] == "as stored"


@pytest.mark.skipif(IDLE not in ort.get_available_providers(), reason=f"this onnxruntime has no {IDLE}")
def test_a_provider_that_takes_no_node_is_refused(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    assert Idle().state().reach == "runs"
    with pytest.raises(TargetError, match=rf"^no node runs on {IDLE} \(\d+ on {CPU}\)$"):
        Idle().load(path)
    both = Reference(path, [truth(path, 0)[0], truth(path, 1)[0]])
    found = comparison.compare(Idle(), both, both)
    assert found.failed.startswith(f"original refused: no node runs on {IDLE}")
    assert found.agrees is None


@pytest.mark.parametrize(
    ("nodes", "told"),
    [({}, "none at all"), ({"X": 0}, "0 on X"), ({"A": 3, "B": 1}, "3 on A, 1 on B")],
)
def test_who_took_the_nodes_is_told(nodes: dict[str, int], told: str) -> None:
    with pytest.raises(TargetError, match=rf"^no node runs on X \({told}\)$"):
        taken(nodes, "X")
    taken({**nodes, "X": 1}, "X")


def test_a_broken_model_is_refused_in_one_line(tmp_path: Path) -> None:
    feeds, _ = truth(written(convolutions(), tmp_path))
    engine = BuiltIn().load(written(broken(), tmp_path))
    with pytest.raises(TargetError, match="channels") as caught:
        engine.run(feeds)
    assert f"{caught.value}".isprintable()
    assert "ONNXRuntimeError" not in f"{caught.value}"


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08\x3a\x00"])
@pytest.mark.parametrize("kind", [BuiltIn, Shaped])
def test_what_is_no_model_is_refused(kind: type[ProviderTarget], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(TargetError):
        kind().load(path)


def test_a_model_of_fixed_shapes_is_loaded_once_for_each_set(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    files: list[onnx.ModelProto] = []

    def load(file: Path) -> Engine:
        files.append(onnx.load(file))
        return ProviderEngine(file, CPU, {}, 1)

    engine = FixedEngine(path, load)
    _, first = opened(path)
    image, expected = first["image"], truth(path)[1]["logits"]
    for batch in (len(image), len(image), 1, 1, len(image)):
        feeds, _ = truth(path)
        result = engine.run({"image": feeds["image"][:batch]})["logits"]
        assert abs(result - expected[:batch]).max() < 1e-5 * abs(expected).max()
    assert [file.graph.input[0].type.tensor_type.shape.dim[0].dim_value for file in files] == [3, 1, 3]
    assert dynamic_dims(models.load(path))
    engine.close()


def test_shapes_that_are_refused_leave_the_cause_and_the_others(tmp_path: Path) -> None:
    """The matrix takes three rows of an input, whose number is open."""
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["x"], ["columns"]),
            helper.make_node("MatMul", ["columns", "w"], ["y"]),
        ],
        "three",
        [floats("x", "rows", 4)],
        [floats("y", 4, 2)],
        [weight("w", 3, 2)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = written(proto, tmp_path)
    engine = FixedEngine(path, lambda file: RemoteEngine(file, CPU, {}, 1))
    feeds, expected = truth(path)
    assert feeds["x"].shape == (3, 4)
    for _ in range(2):
        assert error(engine.run(feeds), expected) < 1e-6
        for _ in range(2):
            with pytest.raises(TargetError, match=r"(?i)incompatible dimensions"):
                engine.run({"x": np.ones((5, 4), np.float32)})
    engine.close()


def test_a_plugin_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    missing = str(tmp_path / "nothing.so")
    with pytest.raises(TargetError, match=r"nothing\.so"):
        RemoteEngine(path, WEBGPU, {}, 1, plugin=missing)
    with pytest.raises(TargetError, match=r"nothing\.so"):
        ProviderEngine(path, WEBGPU, {}, 1, plugin=missing)


# What they are, wherever this runs


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_this_onnxruntime_lacks_is_absent_with_a_way_to_get_it(name: str, tmp_path: Path) -> None:
    one = target(name)
    assert isinstance(one, ProviderTarget)
    state = one.state()
    if one.provider in ort.get_available_providers():
        assert state.reach == "runs" or state.missing
        return
    assert state.reach == "absent"
    assert one.provider in state.missing
    assert "onnxruntime" in one.install()
    assert one.install() in state.missing
    with pytest.raises(TargetError, match="untried"):
        one.load(written(convolutions(), tmp_path))
    done = onnxprune("bench", tmp_path / "model.onnx", tmp_path / "model.onnx", "--target", name)
    assert done.exit_code == 2
    assert one.install() in done.stderr


def test_without_packages_the_command_is_named() -> None:
    """In an interpreter that sees neither plug-in."""
    code = (
        "import importlib.metadata as m, importlib.util as u; version, find = m.version, u.find_spec\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        "m.version = absent\n"
        "u.find_spec = lambda name: None if name.startswith('onnxruntime_') else find(name)\n"
        "from onnxprune.targets import target\n"
        "import json; print(json.dumps([[s.reach, s.missing] for s in (target(n).state() for n in ('qnn', 'webgpu'))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for (reach, missing), name in zip(json.loads(done.stdout), ("qnn", "webgpu"), strict=True):
        assert reach == "absent"
        assert f"pip install 'onnxprune[{name}]'" in missing


@pytest.mark.skipif(WEBGPU_HERE.version == "", reason=WEBGPU_HERE.missing)
def test_without_an_adapter_the_way_to_software_is_named(tmp_path: Path) -> None:
    """A cache in which nothing lies; on a machine with an adapter it runs all the same."""
    code = "from onnxprune.targets.webgpu import WebGpu as W; s = W().state(); print(s.reach, W().timed, s.missing)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"ONNXPRUNE_CACHE": str(tmp_path), "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(("runs True", "absent False ")), done.stdout
    assert done.stdout.startswith("runs") or "python -m models.targets swiftshader" in done.stdout


def test_the_list_of_targets_has_every_precision() -> None:
    found = {one["target"]: one for one in json.loads(onnxprune("targets", "--json").stdout)}
    for kind in TARGETS.values():
        for precision in kind.precisions:
            assert f"{kind(precision)}" in found
    assert found["qnn"]["timed"] is found["qnn:int8"]["timed"] is False
    assert found["webgpu"]["timed"] is (
        WEBGPU_HERE.reach == "runs" and "SwiftShader" not in WEBGPU_HERE.device
    )
    printed = onnxprune("targets").stdout
    assert all(name in printed for name in ("qnn", "webgpu", *BUILT_IN))


@pytest.mark.parametrize(
    ("name", "block", "kept"),
    [("qnn", 32, 96), ("webgpu", 16, 96), ("cuda", 8, 88), ("coreml", 16, 96), ("xnnpack", 8, 88)],
)
def test_counts_are_rounded_to_the_blocks_of_a_target(
    name: str, block: int, kept: int, tmp_path: Path
) -> None:
    """Of 128 channels 90 would stay."""
    g = Graph("wide", seed=2)
    x = g.input("batch", 3, 8, 8, name="image")
    x = g.relu(g.conv(g.relu(g.conv(x, 128)), 128))
    proto = g.model(g.gemm(g.flatten(g.gap(x)), 5), names=["logits"])
    done = onnxprune(
        "plan", written(proto, tmp_path), "-o", "-", "--channels", 0.3, "--criterion", "l2", "--target", name
    )
    assert done.exit_code == 0, done.output
    counts = {len(keep.units) for keep in Plan.from_json(done.stdout).keeps}
    assert counts == {kept}
    assert kept % block == 0


def test_precisions_are_stated_to_the_provider() -> None:
    """TF32 and fp16 are what these providers compute in by default where fp32 was meant."""
    options = {name: target(name).options(1) for name in ("cuda", "cuda:tf32", "coreml", "coreml:fp16")}  # type: ignore[attr-defined]
    assert [options[name]["use_tf32"] for name in ("cuda", "cuda:tf32")] == ["0", "1"]
    assert [options[n]["ModelFormat"] for n in ("coreml", "coreml:fp16")] == ["MLProgram", "NeuralNetwork"]


def test_who_computes_on_the_processor_says_so() -> None:
    assert {name: target(name).on_cpu for name in BUILT_IN} == {name: name == "xnnpack" for name in BUILT_IN}  # type: ignore[attr-defined]


def test_objections(tmp_path: Path) -> None:
    fixed, loose = (
        models.load(written(grouped(8, 2), tmp_path)),
        models.load(written(convolutions(), tmp_path)),
    )
    looped = models.load(written(CONTROL_FLOW["loop_gru"](), tmp_path))
    quantised = models.load(written(SMALL["quantised"](), tmp_path))
    assert target("qnn").objections(fixed) == target("coreml").objections(fixed) == []
    for name in ("qnn", "coreml"):
        (line,) = target(name).objections(loose)
        assert "'batch'" in line
    for name in ("qnn", "webgpu", *BUILT_IN):
        assert any("Loop" in line and "CPU" in line for line in target(name).objections(looped))
    assert any("ask for qnn:int8" in line for line in target("qnn").objections(quantised))
    assert any("nothing in the model is quantised" in line for line in target("qnn:int8").objections(fixed))
    late = grouped(8, 2)
    late.opset_import[0].version = 21
    late.ir_version = 10
    (line,) = target("directml").objections(models.load(written(late, tmp_path)))
    assert "opset 21" in line
    assert target("directml").objections(fixed) == []


ASTRIDE = [
    (channels, groups)
    for groups in (1, 2, 3, 5, 6)
    for channels in range(groups, 40)
    if not channels % groups
]


def wrong(channels: int, groups: int) -> bool:
    """Whether some vector of channels, as wide as divides them all, has channels of two groups; groups of fewer than
    4 channels are computed one by one."""
    each = channels // groups
    width = 4 if channels % 4 == 0 else 2 if channels % 2 == 0 else 1
    vectors = (range(start, start + width) for start in range(0, channels, width))
    return each >= 4 and any(len({channel // each for channel in vector}) > 1 for vector in vectors)


def test_grouped_convolutions_that_webgpu_computes_wrong_are_objected_to(tmp_path: Path) -> None:
    flagged = set()
    for channels, groups in ASTRIDE:
        model = models.load(written(grouped(channels, groups, 1), tmp_path))
        if WebGpu().objections(model):
            flagged.add((channels, groups))
    assert flagged == {case for case in ASTRIDE if wrong(*case)}
    assert len(flagged) > 5
    block = WebGpu().alignment().grouped
    assert not any(channels // groups % block == 0 for channels, groups in flagged)


def dense(inputs: int, outputs: int, kernel: int = 3) -> onnx.ModelProto:
    """One convolution."""
    g = Graph("dense", seed=1)
    return g.model(g.conv(g.input(1, inputs, 6, 6, name="image"), outputs, kernel), names=["y"])


def in_threes(inputs: int, outputs: int, kernel: int) -> bool:
    """What was found of version 0.4.0 by running it: (9, 4, 2) is wrong, (9, 18, 3), (12, 16, 3) and (6, 16, 1) are
    not; multiples of 4 never are."""
    return kernel > 1 and outputs % 4 == 0 and inputs in (6, 9, 15, 18, 21, 27, 30, 33, 39)


def test_convolutions_that_webgpu_reads_in_threes_are_objected_to(tmp_path: Path) -> None:
    for outputs, kernel in ((16, 3), (18, 3), (4, 2), (16, 1)):
        flagged = [
            inputs
            for inputs in range(1, 41)
            if WebGpu().objections(models.load(written(dense(inputs, outputs, kernel), tmp_path)))
        ]
        assert flagged == [inputs for inputs in range(1, 41) if in_threes(inputs, outputs, kernel)]


# On simulators


def made(name: str, quantised: bool) -> Callable[[Path], Engine]:
    return target("qnn:int8" if name == "qnn" and quantised else name).load


HERE = [
    pytest.param("qnn", marks=pytest.mark.skipif(QNN_HERE.reach != "runs", reason=QNN_HERE.missing)),
    pytest.param("webgpu", marks=pytest.mark.skipif(WEBGPU_HERE.reach != "runs", reason=WEBGPU_HERE.missing)),
]
PROVIDERS = {"qnn": QNN, "webgpu": WEBGPU}


@pytest.mark.targets
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("small", [name for name in SMALL if name != "off-blocks"])
def test_outputs_are_those_of_onnxruntime(small: str, name: str, tmp_path: Path) -> None:
    path = written(SMALL[small](), tmp_path)
    engine = made(name, small == "quantised")(path)
    limit = QUANTUM if small in ("quantised", "integers") else target(name).tolerance
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        assert error(engine.run(feeds), expected) < limit
    assert engine.nodes[PROVIDERS[name]] > 3
    assert engine.settings["on_cpu"] is False
    engine.close()


@pytest.mark.targets
@pytest.mark.parametrize("name", HERE)
def test_a_pruned_model_runs_and_agrees(name: str, tmp_path: Path) -> None:
    path, small = written(convolutions(channels=64), tmp_path), tmp_path / "small.onnx"
    done = onnxprune("shrink", path, "-o", small, "--channels", 0.5, "--target", name, "--repair", "none")
    assert done.exit_code == 0, done.output
    assert small.stat().st_size < path.stat().st_size
    done = onnxprune("validate", path, small, "--target", name, "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["targets"]
    assert found["agrees"] is True
    assert found["nodes"].keys() == {PROVIDERS[name]}
    assert found["timing"] is None or name == "webgpu"


@pytest.mark.targets
@pytest.mark.skipif(QNN_HERE.reach != "runs", reason=QNN_HERE.missing)
def test_the_simulator_computes_in_fp16_and_alone(tmp_path: Path) -> None:
    """The difference from fp32 is fp16's, and another engine beside it changes no bit: each has its own process."""
    path = written(convolutions(), tmp_path)
    feeds, expected = truth(path)
    alone = Qnn().load(path)
    first = alone.run(feeds)
    assert 1e-5 < error(first, expected) < Qnn().tolerance
    (tmp_path / "other").mkdir()
    other = written(SMALL["quantised"](), tmp_path / "other")
    beside = Qnn("int8").load(other)
    beside.run(truth(other)[0])
    assert error(alone.run(feeds), first) == 0
    assert SOC[2] in alone.settings["device"]
    one = alone.run({"image": feeds["image"][:1]})["logits"]
    assert one.shape == (1, 5)
    assert abs(one - expected["logits"][:1]).max() < Qnn().tolerance * abs(expected["logits"]).max()
    alone.close()
    beside.close()


@pytest.mark.targets
@pytest.mark.skipif(QNN_HERE.reach != "runs", reason=QNN_HERE.missing)
def test_another_precision_than_the_file_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"ask for qnn$"):
        Qnn("int8").load(written(convolutions(), tmp_path))
    with pytest.raises(TargetError, match="ask for qnn:int8"):
        Qnn().load(written(SMALL["quantised"](), tmp_path))


class Saver(Qnn):
    """QNN with the back end that writes down what it is asked, and computes nothing."""

    def load(self, path: Path, threads: int = 1) -> Engine:
        backend = str(Path(library("onnxruntime_qnn", "QnnHtp")).with_name("libQnnSaver.so"))
        plugin = library("onnxruntime_qnn", "onnxruntime_providers_qnn")
        return FixedEngine(
            path, lambda file: RemoteEngine(file, QNN, {"backend_path": backend}, 1, plugin=plugin)
        )


@pytest.mark.targets
@pytest.mark.skipif(QNN_HERE.reach != "runs", reason=QNN_HERE.missing)
def test_a_back_end_that_returns_zeros_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it leaves its notes
    path = written(convolutions(), tmp_path)
    feeds = [truth(path, seed)[0] for seed in (0, 1)]
    engine = Saver().load(path)
    assert not np.asarray(engine.run(feeds[0])["logits"]).any()
    engine.close()
    both = Reference(path, feeds)
    found = comparison.compare(Saver(), both, both)
    assert found.failed == "original fails: returned the same values for different inputs: output 'logits'"


def averaged(pads: list[int], **attributes: object) -> onnx.ModelProto:
    """An average over windows of 3, of 24 channels."""
    g = Graph("averaged", seed=1)
    x = g.input(1, 24, 14, 14, name="image")
    return g.model(
        g.op("AveragePool", x, kernel_shape=[3, 3], strides=[1, 1], pads=pads, **attributes), names=["y"]
    )


@pytest.mark.targets
@pytest.mark.skipif(QNN_HERE.reach != "runs", reason=QNN_HERE.missing)
@pytest.mark.parametrize(
    ("pads", "attributes", "right"),
    [
        ([0, 0, 0, 0], {}, True),
        ([1, 1, 1, 1], {"count_include_pad": 1}, True),
        ([1, 1, 1, 1], {}, False),
        ([0, 0, 1, 1], {}, False),
    ],
)
def test_averages_that_qnn_computes_wrong_are_objected_to(
    pads: list[int], attributes: dict[str, object], right: bool, tmp_path: Path
) -> None:
    path = written(averaged(pads, **attributes), tmp_path)
    engine = Qnn().load(path)
    feeds, expected = truth(path)
    assert (error(engine.run(feeds), expected) <= Qnn().tolerance) == right
    assert bool(Qnn().objections(models.load(path))) != right
    engine.close()


@pytest.mark.targets
@pytest.mark.skipif(WEBGPU_HERE.reach != "runs", reason=WEBGPU_HERE.missing)
@pytest.mark.parametrize(
    "case", [(20, 2), (10, 2), (24, 4), (30, 6), (16, 2), (54, 3), (15, 3), (12, 4), (18, 18), (18, 1)]
)
def test_what_is_objected_to_is_what_comes_out_wrong(case: tuple[int, int], tmp_path: Path) -> None:
    path = written(grouped(*case), tmp_path)
    engine = WebGpu().load(path)
    feeds, expected = truth(path)
    assert (error(engine.run(feeds), expected) > WebGpu().tolerance) == wrong(*case)
    assert bool(WebGpu().objections(models.load(path))) == wrong(*case)
    engine.close()


@pytest.mark.targets
@pytest.mark.skipif(WEBGPU_HERE.reach != "runs", reason=WEBGPU_HERE.missing)
@pytest.mark.parametrize(
    "case",
    [
        (9, 16, 3),
        (18, 16, 3),
        (33, 4, 3),
        (9, 4, 2),
        (9, 18, 3),
        (12, 16, 3),
        (6, 16, 1),
        (3, 16, 3),
        (17, 16, 3),
    ],
)
def test_what_is_read_in_threes_comes_out_wrong(case: tuple[int, int, int], tmp_path: Path) -> None:
    path = written(dense(*case), tmp_path)
    engine = WebGpu().load(path)
    feeds, expected = truth(path)
    assert (error(engine.run(feeds), expected) > WebGpu().tolerance) == in_threes(*case)
    engine.close()


@pytest.mark.targets
@pytest.mark.skipif(WEBGPU_HERE.reach != "runs", reason=WEBGPU_HERE.missing)
def test_a_model_that_is_wrong_there_is_found(tmp_path: Path) -> None:
    """Its original has 8 outputs in each of two groups; the candidate 5, which the provider computes wrong."""
    path, other = written(grouped(16, 2), tmp_path), tmp_path / "other.onnx"
    g = Graph("grouped", seed=1)
    x = g.conv(g.conv(g.input(1, 16, 8, 8, name="image"), 10, 1), 10, group=2)
    onnx.save(g.model(g.conv(x, 16, 1), names=["y"]), other)
    done = onnxprune("bench", path, other, "--target", "webgpu")
    assert done.exit_code == 1
    assert "WRONG" in done.stdout
