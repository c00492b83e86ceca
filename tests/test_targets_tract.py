"""tract on the CPU: agrees with onnxruntime, refuses what is broken, and does not take this process along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tract
from onnx import TensorProto, helper, numpy_helper

from models.recurrent import RECURRENT
from onnxprune import model as models
from onnxprune.targets import tract_program
from onnxprune.targets.target import TargetError
from onnxprune.targets.tract import Tract
from tests.small import run as onnxprune
from tests.target_models import OTHER, SMALL, broken, convolutions, error, other_than_numbers, truth, written

QUANTUM = 0.02  # one step of int8, of the scale of the outputs: engines round in different places


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_onnxruntime(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    engine = Tract().load(path)
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        limit = QUANTUM if name == "quantised" else Tract().tolerance
        assert error(engine.run(feeds), expected) < limit


def test_names_of_open_dimensions_do_not_bind_it(tmp_path: Path) -> None:
    """The file says `batch` at every tensor; tract alone refuses to take 3 for it."""
    path = written(convolutions(), tmp_path)
    proto = onnx.shape_inference.infer_shapes(onnx.load(path))
    proto.graph.value_info.append(
        helper.make_tensor_value_info(proto.graph.node[0].output[0], TensorProto.FLOAT, ["batch", 16, 12, 12])
    )
    onnx.save(proto, path)
    feeds, expected = truth(path)
    with pytest.raises(Exception, match=r"Sym\(batch\) with Val\(3\)"):
        tract_program.Prepared(str(path), feeds)
    engine = Tract().load(path)
    assert error(engine.run(feeds), expected) < Tract().tolerance
    one = engine.run({"image": feeds["image"][:1]})["logits"]
    assert one.shape == (1, 5)
    assert abs(one - expected["logits"][:1]).max() < 1e-4 * abs(expected["logits"]).max()


def test_a_model_at_which_tract_aborts_is_refused(tmp_path: Path) -> None:
    """A step of 0 is a panic that takes the process along; here it is an error like others."""
    numbers = {"starts": 0, "ends": 4, "axes": 1, "steps": 0}
    graph = helper.make_graph(
        [helper.make_node("Slice", ["x", *numbers], ["y"])],
        "slice",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "n"])],
        [numpy_helper.from_array(np.array([value]), name) for name, value in numbers.items()],
    )
    path = written(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path
    )
    with pytest.raises(TargetError, match=r"^tract died of SIGABRT: attempt to divide by zero$"):
        Tract().load(path)


def test_the_trial_cannot_take_all_memory() -> None:
    """Some broken models (a permutation that names an axis twice) make tract ask for memory without end."""
    code = (
        "import os, resource, runpy, sys\n"
        "runpy.run_path(sys.argv[1])['_bound_memory']()\n"
        "whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')\n"
        "print(0 < resource.getrlimit(resource.RLIMIT_AS)[0] <= whole // 2)\n"
        "try: bytearray(whole)\n"
        "except MemoryError: print('refused')\n"
    )
    command = [sys.executable, "-P", "-c", code, tract_program.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "refused"]


def test_open_extents_at_which_tract_aborts_are_fixed_first(tmp_path: Path) -> None:
    """It has no rule for a GRU of an open batch and panics; with the extents of a run it has one."""
    path = written(RECURRENT["gru"](), tmp_path)
    code = f"import tract; tract.onnx().load({str(path)!r}).into_model()"
    died = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert died.returncode < 0
    feeds, expected = truth(path)
    assert error(Tract().load(path).run(feeds), expected) < Tract().tolerance


def test_a_pruned_model_runs_and_agrees(tmp_path: Path) -> None:
    path, small = written(convolutions(), tmp_path), tmp_path / "small.onnx"
    assert onnxprune("shrink", path, "-o", small, "--channels", 0.4, "--align", 1).exit_code == 0
    feeds, expected = truth(small)
    assert small.stat().st_size < path.stat().st_size
    assert error(Tract().load(small).run(feeds), expected) < Tract().tolerance


def test_weights_beside_the_model_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = convolutions()
    large = {t.name: "" for t in proto.graph.initializer if len(t.raw_data) > 100}
    models.save(proto, path, large)
    assert path.with_name("model.onnx.data").exists()
    feeds, expected = truth(path)
    assert error(Tract().load(path).run(feeds), expected) < Tract().tolerance


def test_a_broken_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        Tract().load(written(broken(), tmp_path))
    assert "conv" in f"{caught.value}".lower()
    assert f"{caught.value}".isprintable()


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(TargetError):
        Tract().load(path)


def test_wrong_feeds_are_told(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    feeds, expected = truth(path)
    engine = Tract().load(path)
    with pytest.raises(TargetError):
        engine.run({"image": feeds["image"][:, :2]})
    with pytest.raises(TargetError, match="'image'"):
        engine.run({})
    assert error(engine.run(feeds), expected) < Tract().tolerance


@pytest.mark.parametrize("kind", OTHER)
def test_outputs_that_are_no_tensors_of_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        Tract().load(written(other_than_numbers(kind), tmp_path))
    assert f"{caught.value}".isprintable()


def test_every_batch_is_answered(tmp_path: Path) -> None:
    """An engine that meets many batches gives the right answers for each, also when it comes back to the first."""
    path = written(convolutions(), tmp_path)
    engine = Tract().load(path)
    image = truth(path)[0]["image"]
    batches = [np.concatenate([image] * count)[:size] for count, size in ((1, 1), (1, 2), (2, 5), (1, 1))]
    whole = engine.run({"image": image})["logits"]
    for batch in batches:
        out = engine.run({"image": batch})["logits"]
        assert np.allclose(out, np.concatenate([whole, whole])[: len(batch)], atol=1e-5)


def test_state_names_the_version() -> None:
    state = Tract().state()
    assert (state.reach, state.version) == ("runs", f"tract {tract.version()}")
    assert state.missing == ""
