"""What all targets share: the newest versions of ONNX that they load, what is in a run that is timed, builds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import model as models
from onnxprune.runtime import Session, newest
from onnxprune.targets import TARGETS, TargetError, described, qnn, target
from onnxprune.targets.cpu import Cpu, CpuEngine
from onnxprune.targets.messages import one_line
from onnxprune.targets.provider import ProviderEngine
from onnxprune.targets.remote import newest_of
from onnxprune.targets.target import Versions
from tests.small import run as onnxprune
from tests.target_models import convolutions, error, truth, written

CPU = "CPUExecutionProvider"
LATEST = (onnx.defs.onnx_opset_version(), int(onnx.IR_VERSION))
VERSIONS = sorted({(20, 9), (25, 13), (26, 13), (27, 13), (17, LATEST[1]), LATEST})
ALWAYS = ("cpu", "openvino", "tract", "tensorrt")  # installed with the tests
STATES = {name: target(name).state() for name in TARGETS}


def marked(name: str) -> Any:
    absent = pytest.mark.skipif(STATES[name].reach == "absent", reason=STATES[name].missing)
    return pytest.param(name, marks=[absent] if name in ALWAYS else [absent, pytest.mark.targets])


def of(opset: int, ir: int, folder: Path) -> Path:
    """A convolution in that opset and IR."""
    weight = numpy_helper.from_array(np.ones((16, 4, 3, 3), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 6, 6])
    graph = helper.make_graph(nodes, "one", [x], [y], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    path = folder / f"opset{opset}_ir{ir}.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


# Versions


@pytest.mark.parametrize("name", [marked(name) for name in TARGETS])
def test_newer_versions_are_objected_to_where_they_are_refused(name: str, tmp_path: Path) -> None:
    where = target(name)
    limit = where.newest()
    for opset, ir in VERSIONS:
        path = of(opset, ir, tmp_path)
        told = [line for line in where.objections(models.load(path)) if "takes up to" in line]
        expected = []
        if limit is not None and opset > limit.opset:
            expected.append(f"opset {opset}: {name} takes up to {limit.opset}")
        if limit is not None and ir > limit.ir:
            expected.append(f"IR version {ir}: {name} takes up to {limit.ir}")
        assert told == expected
        refused = ""
        try:
            where.build(path) if STATES[name].reach == "builds" else where.load(path).close()
        except TargetError as refusal:
            refused = f"{refusal}"
        assert bool(told) == bool(refused), (opset, ir, refused)


def test_functions_have_versions_of_their_own(tmp_path: Path) -> None:
    """Which onnxruntime holds against its limit, too."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    limit = newest()[0]
    for opset in (limit - 1, limit, limit + 1):
        inner = [helper.make_node("Relu", ["a"], ["b"])]
        function = helper.make_function("my", "F", ["a"], ["b"], inner, [helper.make_opsetid("", opset)])
        graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="my")], "one", [x], [y])
        imports = [helper.make_opsetid("", limit - 1), helper.make_opsetid("my", 1)]
        proto = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
        path = tmp_path / f"{opset}.onnx"
        path.write_bytes(proto.SerializeToString())
        told = Cpu().objections(models.load(path))
        if opset <= limit:
            assert told == []
            Cpu().load(path)
        else:
            assert told == [f"opset {opset}: cpu takes up to {limit}"]
            with pytest.raises(TargetError):
                Cpu().load(path)


def test_onnxruntime_here_is_in_the_table_of_releases_as_it_is() -> None:
    """The table is for environments in which trying would take seconds; what it has of this release must be true."""
    assert newest_of(ort.__version__) in (None, Versions(*newest()))
    assert newest_of("1.24.1") == Versions(25, 13)
    assert newest_of("1.2.4") is newest_of("") is None


def test_versions_are_listed() -> None:
    found = {one["target"]: one["newest"] for one in described()}
    assert found["cpu"] == found["cuda"] == dict(zip(("opset", "ir"), newest(), strict=True))
    assert found["openvino"] is None


def test_reasons_come_without_the_function_that_gives_them() -> None:
    """As other builds of onnxruntime word them than the one here."""
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Load model from /tmp/a/model.onnx failed:/b/core/model_load_utils.h:47 void "
        "onnxruntime::model_load_utils::ValidateOpsetForDomain(const std::unordered_map<std::__cxx11::basic_string<char>"
        ", int>&, const onnxruntime::logging::Logger&, bool, const string&, int) ONNX Runtime takes opset (25) only"
    )
    assert one_line(text) == "FAIL : ONNX Runtime takes opset (25) only"


# Runs that are timed


def test_a_timed_run_has_next_to_nothing_of_ours_in_it(tmp_path: Path) -> None:
    """No thread is made, nothing is looked up anew."""
    path = written(convolutions(), tmp_path)
    engine, (feeds, _) = Cpu().load(path), truth(path)
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "onnxruntime" not in Path(frame.f_code.co_filename).parts:
            called.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        engine.run(feeds)
    finally:
        sys.setprofile(None)
    assert set(called) <= {"CpuEngine.run", "Session.run", "Session.run.<locals>.<dictcomp>"}


def test_feeds_are_fitted_and_results_named(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    (feeds, expected), session = truth(path), Session(path)
    wide = {name: value.astype(np.float64) for name, value in feeds.items()}
    assert error(session.run({**wide, "unknown": np.zeros(3)}), expected) < 1e-6
    assert wide["image"].dtype == np.float64
    assert list(session.run(feeds, ["logits"])) == ["logits"]
    feeds["image"] = -feeds["image"]  # the same dictionary with something else in it
    assert error(session.run(feeds), expected) > 1e-3


def test_idle_threads_do_not_spin(tmp_path: Path) -> None:
    """Or those of one engine take the processors from the other."""
    path = written(convolutions(), tmp_path)
    engine, other = Cpu().load(path, 2), ProviderEngine(path, CPU, {}, 2)
    assert isinstance(engine, CpuEngine)
    for session, settings in (
        (engine._session._session, engine.settings),
        (other._session, other.settings),
    ):
        options = session.get_session_options()
        assert options.intra_op_num_threads == settings["threads"] == 2
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert settings["spinning"] is False


# Builds, and what is not there


@pytest.mark.parametrize("name", ["cpu", "openvino", "tract"])
def test_where_there_are_no_engine_files_building_is_trying(name: str, tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    built = target(name).build(path)
    assert built["version"] == STATES[name].version
    assert built["precision"] in ("fp32", "as stored")
    with pytest.raises(TargetError, match="no engine files"):
        target(name).build(path, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_commands_of_a_target_without_engine_files_are_shown(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    done = onnxprune("build", path, "--target", "openvino")
    assert done.exit_code == 0, done.output
    assert f"benchmark_app -m {path}" in done.stdout
    done = onnxprune("build", path, "--target", "openvino", "-o", tmp_path / "engine")
    assert done.exit_code == 2
    assert "no engine files" in done.stderr


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cuda", "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("directml", "pip uninstall -y onnxruntime && pip install onnxruntime-directml"),
        ("coreml", "pip install onnxruntime"),
        ("xnnpack", "./build.sh --config Release --use_xnnpack --build_wheel"),
    ],
)
def test_what_is_missing_comes_with_a_command_to_paste(name: str, command: str) -> None:
    assert STATES[name].reach == "runs" or command in STATES[name].missing


def test_no_command_is_given_where_none_would_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The extra is empty there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "pip install 'onnxprune[qnn]'" in qnn.Qnn().state().missing
    monkeypatch.setattr(sys, "platform", "darwin")
    assert qnn.Qnn().state().missing == "onnxruntime-qnn is for Linux and Windows only"
