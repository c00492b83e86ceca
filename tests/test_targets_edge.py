"""Targets at the edge: 64-bit ARM in an emulator, ncnn, LiteRT. What they say where they are not installed, what they
do with processes that die, and (`-m targets`) that outputs there are those of onnxruntime here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from models import targets as recipes
from models.control_flow import CONTROL_FLOW
from onnxprune import model as models
from onnxprune.allocation import Alignment
from onnxprune.runtime import Session
from onnxprune.targets import TARGETS, Target, TargetError, openvino_ort, target
from onnxprune.targets import arm64 as arm
from onnxprune.targets import litert as lite
from onnxprune.targets.arm64 import Arm64
from onnxprune.targets.cache import kept
from onnxprune.targets.fixed import dtypes, fixed, opened
from onnxprune.targets.litert import INPUT, OUTPUT, LiteRt
from onnxprune.targets.ncnn import Ncnn
from tests.small import run as onnxprune
from tests.target_models import (
    OTHER,
    SMALL,
    broken,
    convolutions,
    error,
    other_than_numbers,
    symmetric,
    truth,
    written,
)

QUANTUM = 0.02  # one step of int8, of the scale of the outputs: engines round in different places
EDGE: dict[str, type[Target]] = {"arm64": Arm64, "ncnn": Ncnn, "litert": LiteRt}
STATES = {name: kind().state() for name, kind in EDGE.items()}
HOST = pytest.mark.skipif(
    STATES["arm64"].device != arm.DEVICE, reason="the emulator runs on x86-64 Linux only"
)
on = {
    name: [pytest.mark.targets, pytest.mark.skipif(state.reach != "runs", reason=state.missing)]
    for name, state in STATES.items()
}
everywhere = pytest.mark.parametrize("where", [pytest.param(name, marks=marks) for name, marks in on.items()])


def package(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a package that brings nothing."""
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("name", EDGE)
def test_they_are_targets_in_blocks_of_eight(name: str) -> None:
    assert TARGETS[name] is EDGE[name]
    assert target(name).alignment() == Alignment(8, 8, 8)


@HOST
def test_a_missing_arm_environment_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path))
    state = Arm64().state()
    assert state.reach == "absent"
    assert "python -m models.targets arm64" in state.missing
    with pytest.raises(TargetError, match=r"python -m models\.targets arm64"):
        Arm64().load(tmp_path / "model.onnx")
    package(tmp_path / "targets" / "arm64" / "site", "onnxruntime", "1.2.3")  # a recipe that was interrupted
    assert Arm64().state().reach == "absent"
    program(tmp_path / "targets" / "arm64" / "bin" / "python", "")
    assert Arm64().state().version == "onnxruntime 1.2.3"


@pytest.mark.parametrize(("machine", "advice"), [("aarch64", "use cpu"), ("riscv64", "x86-64 Linux only")])
def test_elsewhere_there_is_no_emulator(machine: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert Arm64().state().reach == "absent"
    assert advice in Arm64().state().missing


def test_a_missing_litert_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path))
    with pytest.raises(TargetError, match=r"pip install onnx2tf"):
        LiteRt().load(tmp_path / "model.onnx")
    packages = tmp_path / "targets" / "litert" / "lib" / "python3.99" / "site-packages"
    package(packages, "onnx2tf", "2.0")
    assert LiteRt().state().reach == "absent"
    package(packages, "ai_edge_litert", "1.0")
    assert LiteRt().state().version == "LiteRT 1.0, onnx2tf 2.0"


def test_a_missing_ncnn_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages are looked for where this interpreter looks; nothing is imported to tell."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    command = "pip install --no-deps pnnx"  # without --no-deps it brings PyTorch
    assert (Ncnn().state().reach, Ncnn().state().version) == ("absent", "")
    assert Ncnn().state().missing.endswith(f"pip install 'onnxprune[ncnn]' && {command}")
    package(tmp_path, "ncnn", "1.0.1")
    assert (Ncnn().state().reach, Ncnn().state().version) == ("absent", "ncnn 1.0.1")
    assert Ncnn().state().missing == f"pnnx is not installed: {command}"
    package(tmp_path, "pnnx", "2")
    assert Ncnn().state().reach == "absent"  # a wheel of another platform, without a program
    program(tmp_path / "pnnx" / "pnnx", "")
    assert (Ncnn().state().reach, Ncnn().state().version) == ("runs", "ncnn 1.0.1, pnnx 2")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -SEGV $$", "died of SIGSEGV"),
        ("echo 'ort Run failed Status Message: the very reason' >&2; kill -SEGV $$", "the very reason"),
        ("exit 3", "exit code 3"),
        ("exit 0", "exit code 0"),
    ],
)
def test_a_converter_that_dies_is_an_error(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ncnn", "pnnx"):
        package(tmp_path, name, "1")
    program(tmp_path / "pnnx" / "pnnx", script)
    with pytest.raises(TargetError, match=rf"^pnnx does not convert it: {told}$"):
        Ncnn().load(written(convolutions(), tmp_path))


@HOST
def test_an_emulator_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path))
    package(tmp_path / "targets" / "arm64" / "site", "onnxruntime", "1")
    program(tmp_path / "targets" / "arm64" / "bin" / "python", "kill -ILL $$")
    with pytest.raises(TargetError, match=r"^the process died of SIGILL$"):
        Arm64().load(written(convolutions(), tmp_path))


def test_ncnn_objects_to_what_pnnx_does_not_convert(tmp_path: Path) -> None:
    assert Ncnn().objections(models.load(written(convolutions(), tmp_path))) == []
    assert "quantised" in Ncnn().objections(models.load(written(symmetric(), tmp_path)))[0]


def test_converters_object_to_bodies(tmp_path: Path) -> None:
    for name in ("ncnn", "litert"):
        assert target(name).objections(models.load(written(convolutions(), tmp_path))) == []
        (told,) = target(name).objections(models.load(written(CONTROL_FLOW["if_weights_inside"](), tmp_path)))
        assert "If, Loop and Scan" in told


def test_ncnn_objects_to_weights_that_half_precision_does_not_hold(tmp_path: Path) -> None:
    """A trained text detector has variances of 1e8 in its first normalisation; as infinity they erase the image."""
    proto = convolutions()
    variance = next(t for t in proto.graph.initializer if t.name.endswith("var"))
    variance.CopyFrom(onnx.numpy_helper.from_array(np.full(variance.dims, 1e8, np.float32), variance.name))
    model = models.load(written(proto, tmp_path))
    assert Ncnn().objections(model) == []
    (told,) = Ncnn("fp16").objections(model)
    assert f"'{variance.name}' reaches 1e+08" in told
    assert Ncnn("fp16").objections(models.load(written(convolutions(), tmp_path))) == []


@pytest.mark.parametrize("name", SMALL)
def test_outputs_in_one_row_are_the_same_values(name: str, tmp_path: Path) -> None:
    """What LiteRT's converter is given: it may move the channels of an image, but not the order of a row."""
    path = written(SMALL[name](), tmp_path)
    feeds, expected = truth(path)
    (tmp_path / "copy").mkdir()
    proto = lite._folded(fixed(path, feeds, tmp_path / "copy"))
    facts = [lite._fact(output) for output in proto.graph.output]
    assert facts == [(value.shape, value.dtype) for value in expected.values()]
    plain = {f"{INPUT}{index}": value for index, value in enumerate(feeds.values())}
    flat = Session(lite._plain(proto, list(feeds)), optimise="all", threads=1).run(plain)
    assert list(flat) == [f"{OUTPUT}{index}" for index in range(len(expected))]
    for row, value in zip(flat.values(), expected.values(), strict=True):
        assert np.allclose(row, value.ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OTHER)
def test_converters_refuse_outputs_that_are_no_tensors_of_numbers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they convert anything: this one would fail otherwise."""
    path = written(other_than_numbers(kind), tmp_path)
    (tmp_path / "copy").mkdir()
    copy = fixed(path, truth(path)[0], tmp_path / "copy")
    (output,), (found,) = (ort.InferenceSession(file).get_outputs() for file in (path, copy))
    assert output.type == found.type
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ncnn", "pnnx"):
        package(tmp_path, name, "1")
    program(tmp_path / "pnnx" / "pnnx", "exit 3")
    for refuses in (lambda: lite._folded(copy), lambda: Ncnn().load(path)):
        with pytest.raises(TargetError, match=r"^output 'made' is not a tensor of numbers$"):
            refuses()


@pytest.mark.parametrize("kind", [0, 99])
def test_types_that_there_are_not_are_refused(kind: int, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"^output 'y' is not a tensor of numbers$"):
        dtypes([onnx.helper.make_tensor_value_info("y", kind, [1])], "output")
    proto = convolutions()
    proto.graph.input[0].type.tensor_type.elem_type = kind
    with pytest.raises(TargetError, match=r"^input 'image' is not a tensor of numbers$"):
        opened(written(proto, tmp_path))


@pytest.mark.parametrize("inside", [0, 2**20])
def test_a_fixed_copy_takes_these_shapes_only(inside: int, tmp_path: Path) -> None:
    """Its weights are in its file, or, where they are many, the original's."""
    path = tmp_path / "model.onnx"
    proto = convolutions()
    models.save(proto, path, {t.name: "" for t in proto.graph.initializer if len(t.raw_data) > 100})
    feeds, expected = truth(path)
    (tmp_path / "copy").mkdir()
    copy = fixed(path, feeds, tmp_path / "copy", inside)
    assert error(Session(copy, optimise="all", threads=1).run(feeds), expected) == 0
    assert ort.InferenceSession(copy).get_inputs()[0].shape == list(feeds["image"].shape)
    if inside:
        assert [file.name for file in copy.parent.iterdir()] == ["model.onnx"]
        onnx.load(copy)
    else:
        assert (copy.parent / "data0").samefile(path.with_name("model.onnx.data"))


def test_the_document_has_every_target_and_what_it_can() -> None:
    text = (Path(__file__).parents[1] / "docs" / "targets.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert {row[0].strip("`") for row in rows} == set(TARGETS)
    for name, _, _, _, precisions, _, _ in rows:
        known = TARGETS[name.strip("`")].precisions
        assert precisions in (", ".join(known), "as stored")
        assert precisions != "as stored" or known == ("fp32",)
        assert f"\n## {name.strip('`')}\n" in text


def test_recipes_make_what_targets_look_for() -> None:
    for name in recipes.MAKERS:
        assert recipes.folder_of(name) == kept(name)
    assert {arm.environment(), lite.environment(), openvino_ort.environment()} < {
        kept(n) for n in recipes.MAKERS
    }


def test_an_environment_that_cannot_be_made_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path))
    folder = tmp_path / "targets" / "swiftshader"
    monkeypatch.setitem(recipes.MAKERS, "swiftshader", lambda new: (new / "old").touch())
    assert recipes.make("swiftshader") == folder

    def failing(new: Path) -> None:
        (new / "half").touch()
        raise recipes.NotMade("no index answers")

    monkeypatch.setitem(recipes.MAKERS, "swiftshader", failing)
    with pytest.raises(recipes.NotMade):
        recipes.make("swiftshader")
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert [path.name for path in folder.parent.iterdir()] == ["swiftshader"]


# From here on only with `-m targets`.


REFUSED = {
    ("ncnn", "lstm"): r"output 'output' is of shape \[1, 7, 5\], not \[3, 7, 5\]",
    ("ncnn", "gru"): r"output 'output' is of shape \[1, 7, 5\], not \[3, 7, 5\]",
    ("ncnn", "quantised"): "not exists or registered",
    ("ncnn", "integers"): "not exists or registered",
}


@everywhere
@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_onnxruntime(where: str, name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    if (why := REFUSED.get((where, name))) is not None:
        with pytest.raises(TargetError, match=why):
            target(where).load(path)
        return
    engine = target(where).load(path)
    limit = QUANTUM if name == "quantised" else 1e-5
    for seed in (0, 1, 0):
        feeds, expected = truth(path, seed)
        assert error(engine.run(feeds), expected) < limit
    engine.close()


@everywhere
def test_a_broken_model_is_refused(where: str, tmp_path: Path) -> None:
    feeds, _ = truth(written(convolutions(), tmp_path))
    with pytest.raises(TargetError, match=r"(?i)channel") as caught:
        target(where).load(written(broken(), tmp_path)).run(feeds)
    assert f"{caught.value}".isprintable()


@pytest.mark.parametrize("where", [pytest.param(name, marks=on[name]) for name in ("ncnn", "litert")])
def test_bodies_are_refused_as_objected(where: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        target(where).load(written(CONTROL_FLOW["if_weights_inside"](), tmp_path))


@everywhere
def test_a_pruned_model_agrees(where: str, tmp_path: Path) -> None:
    path, small = written(convolutions(), tmp_path), tmp_path / "small.onnx"
    assert onnxprune("shrink", path, "-o", small, "--channels", 0.4, "--align", 1).exit_code == 0
    result = onnxprune("validate", path, small, "--target", where)
    assert result.exit_code == 0, result.output
    assert f"{where}: outputs agree" in result.output


@everywhere
def test_every_batch_is_answered(where: str, tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    engine = target(where).load(path)
    image = truth(path)[0]["image"]
    whole = engine.run({"image": image})["logits"]
    for count in (1, 2, 1):
        assert np.allclose(engine.run({"image": image[:count]})["logits"], whole[:count], atol=1e-5)
    engine.close()


@everywhere
def test_wrong_feeds_are_told_and_the_next_ones_answered(where: str, tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    engine = target(where).load(path)
    feeds, expected = truth(path)
    for wrong in ({"image": feeds["image"][:, :2]}, {}):
        with pytest.raises(TargetError):
            engine.run(wrong)
    assert error(engine.run(feeds), expected) < 1e-5
    engine.close()


@everywhere
@pytest.mark.parametrize("kind", OTHER)
def test_outputs_that_are_no_tensors_of_numbers_are_named(where: str, kind: str, tmp_path: Path) -> None:
    path = written(other_than_numbers(kind), tmp_path)
    with pytest.raises(TargetError, match=r"'made' is (no|not a) tensor of numbers"):
        target(where).load(path).run(truth(path)[0])


@pytest.mark.parametrize("where", [pytest.param("ncnn", marks=on["ncnn"])])
def test_half_precision_is_half(where: str, tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    feeds, expected = truth(path)
    assert (
        1e-5
        < error(target(f"{where}:fp16").load(path).run(feeds), expected)
        < target(f"{where}:fp16").tolerance
    )


@pytest.mark.parametrize("where", [pytest.param("litert", marks=on["litert"])])
def test_an_image_as_deep_as_it_is_wide_is_not_turned(where: str, tmp_path: Path) -> None:
    """8 channels of 8 by 8: after a converter that moves channels to the end the shape says nothing."""
    path = written(symmetric(channels=8), tmp_path)
    feeds, expected = truth(path)
    assert expected["y"].shape[1:] == (8, 8, 8)
    engine = target(where).load(path)
    assert error(engine.run(feeds), expected) < QUANTUM
    engine.close()


@everywhere
def test_names_are_those_of_the_model(where: str, tmp_path: Path) -> None:
    """TensorFlow's, for one, have colons, which converters change."""
    proto = convolutions()
    new = {"image": "the image:0", "logits": "the/logits:0"}
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = new[value.name]
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    path = written(proto, tmp_path)
    feeds, expected = truth(path)
    engine = target(where).load(path)
    assert error(engine.run(feeds), expected) < 1e-5
    engine.close()


@pytest.mark.parametrize("where", [pytest.param("arm64", marks=on["arm64"])])
def test_it_really_is_another_machine(where: str) -> None:
    interpreter = arm.environment() / "bin" / "python"
    code = "import platform, numpy; print(platform.machine(), numpy.show_config('dicts')['Machine Information']['host']['cpu'])"
    done = subprocess.run([interpreter, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["aarch64", "aarch64"]


@pytest.mark.parametrize("where", [pytest.param("arm64", marks=on["arm64"])])
def test_opsets_go_as_far_as_here(where: str, tmp_path: Path) -> None:
    proto = convolutions()
    proto.opset_import[0].version = 99
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    with pytest.raises(TargetError, match="opset"):
        target(where).load(path)
