"""Weights that stay in their data files: the same models, plans and bytes as with everything in memory."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import onnxprune
from models.architectures import ARCHITECTURES
from models.builder import Graph
from onnxprune import model as files
from onnxprune import stored

OPTIONS = {"channels": 0.4, "align": 1}


@pytest.fixture(autouse=True)
def everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "STORED", 64)


def network() -> onnx.ModelProto:
    return ARCHITECTURES["resnet18"](width=0.125, image=32, classes=4)


def write(proto: onnx.ModelProto, folder: Path, one_file: bool = True) -> Path:
    path = folder / "model.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    onnx.save(copy, path, save_as_external_data=True, all_tensors_to_one_file=one_file, size_threshold=0)
    return path


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("one_file", [True, False])
def test_the_same_result_as_in_memory(one_file: bool, tmp_path: Path) -> None:
    proto = network()
    wanted = onnxprune.shrink(proto, **OPTIONS)
    path = write(proto, tmp_path, one_file)
    result = onnxprune.shrink(path, **OPTIONS)
    assert any(map(stored.is_stored, result.proto.graph.initializer))
    assert result.plan == wanted.plan
    assert not any(map(stored.is_stored, result.model.graph.initializer))
    assert tensors_of(result.model) == tensors_of(wanted.model)
    result.save(tmp_path / "small.onnx")
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    assert tensors_of(onnx.load(tmp_path / "small.onnx")) == tensors_of(wanted.model)


def tensors_of(proto: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer}


def test_data_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    """One file of weights gives one; one file per tensor gives as many, and each tensor lies in its own."""
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    proto = network()
    onnxprune.shrink(write(proto, tmp_path / "one"), **OPTIONS).save(tmp_path / "one" / "small.onnx")
    onnxprune.shrink(write(proto, tmp_path / "many", False), **OPTIONS).save(tmp_path / "many" / "small.onnx")
    assert len(list((tmp_path / "one").glob("small.onnx.*"))) == 1
    plain = onnx.load(tmp_path / "many" / "small.onnx", load_external_data=False)
    places = [
        entry.value for t in plain.graph.initializer for entry in t.external_data if entry.key == "location"
    ]
    assert len(places) == len(set(places)) == len(list((tmp_path / "many").glob("small.onnx.*"))) > 10
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name]


def test_the_digest_is_that_of_the_weights_wherever_they_lie(tmp_path: Path) -> None:
    proto = network()
    onnx.save(proto, tmp_path / "whole.onnx")
    inside = files.load(tmp_path / "whole.onnx").digest()
    path = write(proto, tmp_path)
    assert files.load(path).digest() == inside
    data = next(tmp_path.glob("*.onnx_data"), None) or next(
        p for p in tmp_path.iterdir() if p.suffix != ".onnx"
    )
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(bytes(changed))
    assert files.load(path).digest() != inside


def test_nothing_is_read_that_is_not_needed(tmp_path: Path) -> None:
    path = write(network(), tmp_path)
    model = files.load(path)
    large = [t for t in model.proto.graph.initializer if stored.is_stored(t)]
    assert large
    assert not any(t.raw_data for t in large)
    for tensor in large:
        assert isinstance(files.to_array(tensor).base, np.memmap | np.ndarray)
        assert not files.to_array(tensor).flags.writeable


@pytest.mark.parametrize("axis", [0, 1])
def test_a_cut_of_a_cut_is_one_cut(axis: int, tmp_path: Path) -> None:
    path = write(network(), tmp_path)
    tensor = next(
        t for t in files.load(path).proto.graph.initializer if len(t.dims) == 4 and stored.is_stored(t)
    )
    array = files.to_array(tensor)
    first = np.array([i for i in range(array.shape[axis]) if i % 3 != 1])
    second = np.array([0, *range(2, len(first))])
    kept: list[np.ndarray | None] = [None] * 4
    kept[axis] = first
    once = stored.cut(tensor, "once", kept)
    kept[axis] = second
    twice = stored.cut(once, "twice", kept)
    assert twice.name == "twice"
    np.testing.assert_array_equal(stored.read(twice), array.take(first[second], axis=axis))
    assert list(twice.dims) == list(stored.read(twice).shape)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("outside", [False, True])
def test_types_that_onnxruntime_has_few_kernels_for(dtype: type, outside: bool, tmp_path: Path) -> None:
    """They are cut in their own type, and checked in float32."""
    element = TensorProto.BFLOAT16 if dtype is ml_dtypes.bfloat16 else TensorProto.DOUBLE
    g = Graph(seed=3)
    x = g.input("batch", 12, dtype=element)
    wide = g.store("w1", g.normal(12, 20).astype(dtype))
    back = g.store("w2", g.normal(20, 5).astype(dtype))
    shape = g.op("MatMul", g.op("Erf", g.op("MatMul", x, wide)), back)
    proto = g.model(shape)
    path = write(proto, tmp_path) if outside else tmp_path / "model.onnx"
    if not outside:
        onnx.save(proto, path)
    result = onnxprune.shrink(path, channels=0.25, align=1)
    assert result.report.equivalence is not None
    assert any("float32" in note for note in result.report.equivalence.notes)
    result.save(tmp_path / "small.onnx")
    small, old = tensors(tmp_path / "small.onnx"), tensors(path)
    (keep,) = result.plan.keeps
    np.testing.assert_array_equal(small["w1"], old["w1"][:, list(keep.units)])
    np.testing.assert_array_equal(small["w2"], old["w2"][list(keep.units)])
    assert small["w1"].dtype == dtype


def test_a_file_for_engines_holds_its_weights_where_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = files.load(write(network(), tmp_path))
    assert any(map(stored.is_stored, loaded.proto.graph.initializer))
    files.save_whole(loaded.proto, tmp_path / "whole.onnx")
    assert files.load(tmp_path / "whole.onnx").files == {tmp_path / "whole.onnx"}
    monkeypatch.setattr(files, "INSIDE", 1000)
    files.save_whole(loaded.proto, tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").stat().st_size > 1000
    wanted = tensors_of(network())
    assert tensors_of(onnx.load(tmp_path / "whole.onnx")) == wanted
    assert tensors_of(onnx.load(tmp_path / "large.onnx")) == wanted
