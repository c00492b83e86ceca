"""OpenVINO's provider in an onnxruntime of another environment, and the process that serves it."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.targets.openvino_ort import PROVIDER, OpenVinoOrt
from onnxprune.targets.remote import RemoteEngine
from onnxprune.targets.target import TargetError
from tests.target_models import OTHER, SMALL, broken, convolutions, error, other_than_numbers, truth, written

STATE = OpenVinoOrt().state()
CPU = "CPUExecutionProvider"
QUANTUM = 0.02  # one step of int8, of the scale of the outputs: engines round in different places


def served(path: Path, provider: str = CPU) -> RemoteEngine:
    """This environment's own onnxruntime, through the same process and pipes."""
    return RemoteEngine(path, provider, {}, 1, interpreter=Path(sys.executable))


@pytest.mark.parametrize("name", SMALL)
def test_what_comes_through_the_pipe_is_what_was_computed(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    engine = served(path)
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        assert error(engine.run(feeds), expected) < 1e-6
    assert engine.nodes[CPU] > 3
    assert engine.settings["version"] == f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    engine.close()


def test_a_provider_that_falls_back_in_silence_is_refused(tmp_path: Path) -> None:
    """onnxruntime without OpenVINO, asked for it, loads the model on the CPU with a warning."""
    with pytest.raises(TargetError, match=rf"^no node runs on {PROVIDER} \(\d+ on {CPU}\)$"):
        served(written(convolutions(), tmp_path), PROVIDER)


def test_a_broken_model_is_refused(tmp_path: Path) -> None:
    """Like onnxruntime itself, which loads it and finds out when it runs."""
    feeds, _ = truth(written(convolutions(), tmp_path))
    engine = served(written(broken(), tmp_path))
    with pytest.raises(TargetError, match="channels") as caught:
        engine.run(feeds)
    assert f"{caught.value}".isprintable()
    engine.close()


def test_wrong_feeds_are_told_and_the_next_ones_answered(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    engine = served(path)
    feeds, expected = truth(path)
    with pytest.raises(TargetError, match="image"):
        engine.run({"image": feeds["image"][:, :2]})
    assert error(engine.run(feeds), expected) < 1e-6
    engine.close()


@pytest.mark.parametrize("kind", OTHER)
def test_outputs_that_do_not_go_through_the_pipe_are_named(kind: str, tmp_path: Path) -> None:
    path = written(other_than_numbers(kind), tmp_path)
    engine = served(path)
    for seed in (0, 1):  # it has not ended
        with pytest.raises(TargetError, match=r"^'made' is no tensor of numbers"):
            engine.run(truth(path, seed)[0])
    engine.close()


def test_texts_that_do_not_go_through_the_pipe_are_named_and_others_answered(tmp_path: Path) -> None:
    ends = [
        helper.make_tensor_value_info(*fact)
        for fact in (("text", TensorProto.STRING, [3]), ("same", TensorProto.BOOL, [3]))
    ]
    wanted = helper.make_tensor("wanted", TensorProto.STRING, [3], [b"a", b"b", b"c"])
    node = helper.make_node("Equal", ["text", "wanted"], ["same"])
    graph = helper.make_graph([node], "texts", ends[:1], ends[1:], [wanted])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    engine = served(written(proto, tmp_path))
    texts = np.array(["a", "x", "c"])
    with pytest.raises(TargetError, match=r"^'text' is no tensor of numbers"):
        engine.run({"text": texts.astype(object)})
    assert engine.run({"text": texts})["same"].tolist() == [True, False, True]
    engine.close()


def test_a_process_that_dies_is_an_error(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    engine = served(path)
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(TargetError, match="died of SIGKILL"):
        engine.run(truth(path)[0])
    engine.close()
    with pytest.raises(TargetError, match="ended"):
        engine.run(truth(path)[0])


def test_an_engine_that_is_dropped_leaves_no_process(tmp_path: Path) -> None:
    engine = served(written(convolutions(), tmp_path))
    process = engine._process
    assert process.poll() is None
    del engine
    assert process.poll() is not None


def test_a_missing_environment_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path))
    state = OpenVinoOrt().state()
    assert state.reach == "absent"
    assert "pip install onnxruntime-openvino" in state.missing
    with pytest.raises(TargetError, match="pip install onnxruntime-openvino"):
        OpenVinoOrt().load(tmp_path / "model.onnx")


@pytest.mark.skipif(STATE.reach != "runs", reason=STATE.missing)
@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_onnxruntime(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    engine = OpenVinoOrt().load(path)
    feeds, expected = truth(path)
    assert error(engine.run(feeds), expected) < (QUANTUM if name == "quantised" else OpenVinoOrt().tolerance)
    assert engine.nodes[PROVIDER] > 3
    engine.close()
