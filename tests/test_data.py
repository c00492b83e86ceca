"""Data: every source gives the samples that lie in it, checked; hostile files are refused in one line."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from models.recurrent import RECURRENT
from onnxprune.data import PRESETS, Batch, Data, Preprocess, batches, open_data, sources, synthetic
from onnxprune.data.batches import Interface
from onnxprune.data.patterns import pink
from onnxprune.errors import UserError
from onnxprune.model import Array, Model
from onnxprune.runtime import Session
from onnxprune.shapes import Shapes, analyse
from tests.small import floats, net, weight

node = helper.make_node
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def tensor(name: str, kind: int, dims: Sequence[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(dims))


def passing(*inputs: onnx.ValueInfoProto) -> Model:
    """A model that passes its inputs on."""
    nodes = [node("Identity", [i.name], [f"{i.name}_out"]) for i in inputs]
    outputs = [onnx.ValueInfoProto(name=f"{i.name}_out", type=i.type) for i in inputs]
    graph = helper.make_graph(nodes, "net", list(inputs), outputs)
    return Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def single(*dims: Any, kind: int = FLOAT) -> Model:
    return passing(tensor("x", kind, dims))


def opened(spec: Any, model: Model, **options: Any) -> Data:
    return open_data(spec, model, analyse(model), **options)


def refused(spec: Any, model: Model, *words: object, **options: Any) -> None:
    with pytest.raises(UserError) as error:
        opened(spec, model, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.isprintable()
    for word in words:
        assert str(word) in text, text


def rows(data: Data, name: str = "x", size: int = 16) -> Array:
    return np.concatenate([batch.feeds[name] for batch in data.batches(size)])


def labels(data: Data) -> Array:
    found = [batch.labels for batch in data.batches() if batch.labels is not None]
    return np.concatenate(found)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(a: Iterator[Batch], b: Iterator[Batch]) -> bool:
    for x, y in zip(a, b, strict=True):
        if x.count != y.count or any(x.feeds[k].tobytes() != y.feeds[k].tobytes() for k in x.feeds):
            return False
        if (x.labels is None) != (y.labels is None) or np.any(x.labels != y.labels):
            return False
    return True


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held: samples are read again on each pass, large arrays lie in files."""
    monkeypatch.setattr(batches, "HELD", 0)
    monkeypatch.setattr(sources, "HELD", 0)


# ------------------------------------------------------------------------------------------- batching


@given(st.lists(st.integers(1, 3), min_size=2, max_size=25), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_batches_stack_consecutive_samples_of_one_shape(lengths: list[int], size: int) -> None:
    """Joined again, batches are the samples in order; none is larger than asked; none could have been joined."""
    model = single("n", "t")
    items = [np.arange(100 * i, 100 * i + n, dtype=np.float32) for i, n in enumerate(lengths)]
    data = opened(lambda: iter(items), model)
    found = list(data.batches(size))
    flat = [row for batch in found for row in batch.feeds["x"]]
    assert len(flat) == len(items) == len(data)
    assert all(np.array_equal(a, b) for a, b in zip(flat, items, strict=True))
    for batch, following in zip(found, [*found[1:], None], strict=True):
        assert batch.count == len(batch.feeds["x"]) <= size
        if following is not None and batch.count < size:
            assert following.feeds["x"].shape[1:] != batch.feeds["x"].shape[1:]


@given(st.lists(st.integers(1, 3), min_size=2, max_size=25), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_part_holds_the_samples_of_some_batches(lengths: list[int], size: int, streamed: bool) -> None:
    items = [np.arange(100 * i, 100 * i + n, dtype=np.float32) for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        if streamed:
            patch.setattr(batches, "HELD", 0)
        data = opened(lambda: iter(items), single("n", "t"))
        wanted = [row for i, batch in enumerate(data.batches(size)) if i % 3 == 1 for row in batch.feeds["x"]]
        part = data.part(size, lambda number: number % 3 == 1)
        assert (part is None) == (not wanted)
        if part is not None:
            found = [row for batch in part.batches(1) for row in batch.feeds["x"]]
            assert len(part) == len(found) == len(wanted)
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert len(part.subset(1)) == 1


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ((("n", 3), ("n", 5)), 0),
        (((None, 3), (None, 5)), 0),
        ((("n", 3), ("m", 5)), None),  # two axes of different names
        ((("n", 3), (4, 5)), None),
        (((4, 3), (4, 5)), 4),
        (((1, 3), (1, 5)), 1),
        (((2, 3), (3, 5)), None),
        ((("n", 3), ()), None),  # a number belongs to no sample
    ],
)
def test_the_batch_axis(inputs: tuple[Any, ...], expected: int | None) -> None:
    model = passing(*[tensor(f"x{i}", FLOAT, dims) for i, dims in enumerate(inputs)])
    assert Interface.of(model, analyse(model)).batch == expected


def test_a_batch_that_the_graph_fixes_is_kept() -> None:
    """The input says any number, a Reshape says one."""
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    stored = [numpy_helper.from_array(np.array([1, 12]), "s"), weight("w", 12, 2)]
    graph = helper.make_graph(nodes, "net", [floats("x", "n", 3, 4)], [floats("y", "m", 2)], stored)
    model = Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = opened({"x": normal(5, 3, 4)}, model)
    assert [batch.count for batch in data.batches()] == [1] * 5
    session = Session(model.proto)
    assert all(session.run(batch.feeds)["y"].shape == (1, 2) for batch in data.batches())


def test_a_fixed_batch_drops_the_rest() -> None:
    data = opened({"x": normal(11, 3)}, single(4, 3), samples=None)
    assert [batch.count for batch in data.batches(16)] == [4, 4]
    assert len(data) == 8
    assert "left out at the end: 3 samples, since runs take 4 at a time" in data.notes
    assert len(data.subset(7)) == 4
    assert len(data.subset(3)) == 4
    assert np.array_equal(rows(data.subset(3)), rows(data)[:4])
    refused({"x": normal(3, 3)}, single(4, 3), "3 samples;", "takes 4 at a time")


def test_runs_of_a_size_that_the_model_does_not_take() -> None:
    """Whether the batch is stated, or fixed by the graph behind an input that states none."""
    runs = [{"x": normal(k, 3, 4, seed=k)} for k in (1, 1)]
    refused(lambda: runs, single(4, 3, 4), "sample 0: holds a batch of 1", "net runs on batches of 4 only")
    refused(lambda: [{"x": normal(4, 3, 5)}] * 2, single(4, 3, 4), "[4, 3, 5]", "float32[4, 3, 4] for a run")
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    stored = [numpy_helper.from_array(np.array([2, 12]), "s"), weight("w", 12, 2)]
    graph = helper.make_graph(nodes, "net", [floats("x", 2, 3, 4)], [floats("y", 2, 2)], stored)
    model = Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    refused(lambda: runs, model, "holds a batch of 1", "on batches of 2 only")
    pair = passing(floats("a", "n", 3), floats("b", "n", 2))
    refused(lambda: [{"a": normal(4, 3), "b": normal(3, 2)}], pair, "different numbers", "'a' 4, 'b' 3")
    refused(lambda: [{"x": normal(0, 3)}], single("n", 3), "holds no samples")


def test_whole_runs_are_neither_parted_nor_joined() -> None:
    """Feeds with their batch axis pass as they are, and count what is in them."""
    runs = [{"x": normal(k, 3, seed=k)} for k in (2, 2, 5)]
    data = opened(lambda: runs, single("n", 3))
    found = list(data.batches(16))
    assert [batch.count for batch in found] == [2, 2, 5]
    assert all(np.array_equal(b.feeds["x"], r["x"]) for b, r in zip(found, runs, strict=True))
    assert len(data) == 9
    assert len(data.subset(8)) == 4
    assert [len(data.subset(count)) for count in (1, 2, 3, 9)] == [2, 2, 2, 9]


def test_models_without_a_batch_axis_get_whole_runs() -> None:
    model = passing(
        tensor("x", FLOAT, ["n", 4]), tensor("state", FLOAT, [2, "n", 3]), tensor("sr", INT64, [])
    )
    arrays = {"x": normal(6, 1, 4), "state": normal(6, 2, 1, 3), "sr": np.full(6, 16000)}
    data = opened(arrays, model)
    assert [batch.count for batch in data.batches()] == [1] * 6
    assert next(iter(data.batches())).feeds["sr"].shape == ()
    assert any("'sr' is 16000" in note for note in data.notes)
    refused({**arrays, "x": normal(6, 4)}, model, "'x'", "[4]", "one whole run")
    del arrays["sr"]
    refused(arrays, model, "'sr'", "missing")


# ------------------------------------------------------------------------------------ choice, repeats


@pytest.mark.parametrize("store", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_gives_the_permuted_rows(tmp_path: Path, store: Any, order: Any) -> None:
    """`samples` rows of the seeded permutation, each with its label, whatever the file's layout."""
    x, y = np.random.default_rng(0).standard_normal((50, 3, 2)), np.arange(50)
    store(tmp_path / "a.npz", images=np.asarray(x, order=order), y=y)
    data = opened(tmp_path / "a.npz", single("n", 3, 2), samples=20, seed=3)
    chosen = np.random.default_rng(3).permutation(50)[:20]
    assert np.array_equal(labels(data), chosen)
    assert np.array_equal(rows(data), x[chosen].astype(np.float32))
    assert data.source.endswith("a.npz (20 samples)")
    assert data.measured
    assert data.labelled
    assert np.array_equal(labels(data.subset(7)), chosen[:7])


def test_reading_again_gives_the_same_bytes(tmp_path: Path, small_memory: None) -> None:
    x = normal(40, 3)
    np.savez_compressed(tmp_path / "a.npz", x=x, label=np.arange(40))
    np.save(tmp_path / "a.npy", x)
    for name in ("a.npz", "a.npy"):
        data = opened(tmp_path / name, single("n", 3), samples=25)
        assert data._held is None
        assert same(data.batches(), data.batches())
        assert np.array_equal(rows(data), x[np.random.default_rng(0).permutation(40)[:25]])
        assert np.array_equal(rows(data.subset(9)), rows(data)[:9])


def test_provenance_tells_data_apart() -> None:
    model, x = single("n", 3), normal(40, 3)

    def told(array: Array, seed: int = 0) -> dict[str, Any]:
        return opened({"x": array}, model, seed=seed).provenance

    assert told(x) == told(x.astype(np.float64)) == told(x.copy())
    assert told(x)["sha256"] != told(x, seed=1)["sha256"]
    assert told(x)["sha256"] != told(np.where(x == x[7, 1], 0, x))["sha256"]
    json.dumps(told(x))
    data = opened({"x": x}, model)
    assert data.subset(10).provenance["sha256"] == opened({"x": x}, model, samples=10).provenance["sha256"]


def test_functions_that_change_are_found_out(small_memory: None) -> None:
    passes = iter(range(10))

    def make() -> list[Array]:
        return _noise(next(passes))

    data = opened(make, single("n", 3))
    with pytest.raises(UserError, match="must be repeatable"):
        list(data.batches())


def _noise(seed: int) -> list[Array]:
    return list(normal(4, 3, seed=seed))


def test_what_can_be_read_once_is_held_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(iter(_noise(0)), single("n", 3))
    assert same(data.batches(), data.batches())
    monkeypatch.setattr(batches, "HELD", 20)
    refused(iter(_noise(0)), single("n", 3), "once only")


def test_what_is_fed_cannot_be_changed() -> None:
    x = normal(4, 1, 3)
    data = opened({"x": x}, single("n", 3))
    before = rows(data)
    x[:] = 0
    for batch in data.batches():
        with pytest.raises(ValueError, match="read-only"):
            batch.feeds["x"][:] = 1
    assert np.array_equal(rows(data), before)
    session = Session(single("n", 3).proto)
    assert all(np.array_equal(session.run(b.feeds)["x_out"], b.feeds["x"]) for b in data.batches())


# --------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (normal(8, 4), ["'x'", "[4]", "float32[3]"]),
        (np.repeat(normal(1, 3), 8, axis=0), ["identical"]),
        (normal(8, 2, 2, 3), ["[2, 2, 3]"]),
        (np.where(np.arange(24).reshape(8, 3) == 5, np.nan, 1), ["NaN"]),
        (np.full((8, 3), np.inf), ["infinite"]),
        (np.full((8, 3), 1e300) * np.arange(1, 9)[:, None], ["too large for float32"]),
        (np.array([["a", "b", "c"]] * 8), ["no numbers"]),
        (np.ones((8, 3)), ["identical"]),
        (np.arange(8.0)[:, None] * np.ones(3), ["one value only"]),
        (normal(1, 3), ["at least 2"]),
        (normal(0, 3), ["at least 2"]),
        (np.zeros((8, 0)), ["nothing"]),
        (2**24 + np.arange(24).reshape(8, 3), ["float32 cannot hold"]),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit(array: Array, words: list[str]) -> None:
    refused({"x": array}, single("n", 3), *words)


def test_types_are_converted_where_nothing_is_lost() -> None:
    whole = np.random.default_rng(0).integers(0, 100, (8, 3))
    for dtype in (np.int8, np.int32, np.uint64, np.int64):
        assert np.array_equal(
            rows(opened({"x": whole.astype(dtype)}, single("n", 3, kind=INT64))), _drawn(whole)
        )
    refused({"x": whole + 200}, single("n", 3, kind=TensorProto.UINT8), "uint8 cannot hold")
    refused(
        {"x": np.full((8, 3), 2**63, np.uint64) + whole.astype(np.uint64)},
        single("n", 3, kind=INT64),
        "int64",
    )
    refused({"x": whole.astype(np.float64)}, single("n", 3, kind=INT64), "float64", "int64")
    data = opened({"x": whole}, single("n", 3))
    assert rows(data).dtype == np.float32
    assert any("not scaled" in note for note in data.notes)
    half = opened({"x": normal(8, 3)}, single("n", 3, kind=TensorProto.BFLOAT16))
    assert np.allclose(rows(half).astype(np.float32), _drawn(normal(8, 3)), rtol=2**-8)


def _drawn(array: Array) -> Array:
    result: Array = array[np.random.default_rng(0).permutation(len(array))]
    return result


def test_names() -> None:
    model = passing(tensor("a", FLOAT, ["n", 3]), tensor("b", FLOAT, ["n", 2]))
    a, b = normal(8, 3), normal(8, 2)
    assert np.array_equal(rows(opened({"a": a, "b": b}, model), "b"), _drawn(b))
    refused({"a": a}, model, "'b'", "missing")
    more = opened({"a": a, "b": b, "c\n": b}, model)
    assert more.notes[0] == "not used, being neither inputs nor labels: 'c\\n'"
    refused({"a": a, "b": b[:7]}, model, "'a' 8, 'b' 7")
    refused({"a": a, "b": b, "y": np.arange(8), "label": np.arange(8)}, model, "both")
    refused(lambda: [{"a": a[0]}, {"a": a[1]}], model, "'b'", "missing")
    refused(lambda: [a[0], a[1]], model, "dict", "'a', 'b'")
    labelled = opened({"b": b, "a": a, "labels": np.arange(8)}, model)
    assert np.array_equal(rows(labelled, "a"), a[labels(labelled)])
    assert np.array_equal(
        rows(opened({"y": normal(8, 3)}, passing(tensor("y", FLOAT, ["n", 3]))), "y").shape, (8, 3)
    )


@pytest.mark.parametrize("name", sources.LABELS)
def test_usual_names_of_labels(name: str) -> None:
    assert np.array_equal(
        labels(opened({"x": normal(40, 3), name: np.arange(40)}, single("n", 3))), _drawn(np.arange(40))
    )


@pytest.mark.parametrize(
    ("inputs", "others", "words"),
    [
        (["image"], ["image", "imgae"], ["'imgae' is no input", "misspelt 'image'"]),
        (["image"], ["image", "Image"], ["'Image' is no input", "misspelt 'image'"]),
        (["image"], ["images", "ids"], ["input 'image'", "is missing; rename 'images'"]),
        (["input_ids", "mask"], ["input_ids", "masks"], ["input 'mask'", "rename 'masks'"]),
        (["image"], ["image", "lables"], ["'lables' is no name of labels", "misspelt 'labels'"]),
        (["image"], ["image", "lables", "labels"], None),
        (["image"], ["image", "image_id", "weights"], None),
        (["input_1"], ["input_1", "input_2"], None),
        (["input_ids", "mask"], ["input_ids", "mask", "token_type_ids", "idx"], None),
    ],
)
def test_names_that_are_neither_inputs_nor_labels(
    inputs: list[str], others: list[str], words: list[str] | None, tmp_path: Path
) -> None:
    """What may be a misspelt input or misspelt labels is refused; anything else is named in a note."""
    model = passing(*[floats(name, "n", 3) for name in inputs])
    arrays: dict[str, Any] = {name: normal(40, 3, seed=i) for i, name in enumerate(others)}
    np.savez(tmp_path / "a.npz", **arrays)
    for spec in (arrays, tmp_path / "a.npz"):
        if words is not None:
            refused(spec, model, *words)
            continue
        notes = opened(spec, model).notes
        left = [name for name in others if name not in (*inputs, "labels")]
        assert len(notes) == 1
        assert notes[0].startswith("not used, being neither inputs nor labels: ")
        assert all(f"'{name}'" in notes[0] for name in left)


@pytest.mark.parametrize(
    ("runs", "size", "told"), [(1, 64, True), (3, 16, True), (4, 16, False), (40, 1, False)]
)
def test_few_runs_are_told(runs: int, size: int, told: bool) -> None:
    """Of runs with their batch axis; single samples make as many runs as are wanted."""
    notes = opened(lambda: [normal(size, 3, seed=i) for i in range(runs)], single("n", 3), samples=None).notes
    assert any(f"{runs * size} samples in {runs} run" in note for note in notes) == told
    assert opened({"x": normal(runs * size, 3)}, single("n", 3), samples=None).notes == ()


def test_few_samples_are_told() -> None:
    few = opened({"x": normal(31, 3)}, single("n", 3)).notes
    assert few == ("only 31 samples: statistics of so few are rough; 32 samples or more are better",)
    refused({"x": normal(1, 3)}, single("n", 3), "holds 1 sample; at least 2 are needed")
    assert opened({"x": normal(32, 3)}, single("n", 3)).notes == ()
    refused({"x": normal(32, 3)}, single("n", 3), "too few", samples=1)


# -------------------------------------------------------------------------------------- hostile files


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")] * 4, dtype=object)
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=trap)
    (tmp_path / "b.npy").write_bytes(__import__("pickle").dumps(trap[0]))
    for name in ("a.npy", "a.npz"):
        refused(tmp_path / name, single("n", 3), "pickled")
    refused(tmp_path / "b.npy", single("n", 3), "no .npy array")
    refused(lambda: list(trap), single("n", 3), "no numbers")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("store", [np.savez, np.savez_compressed])
def test_truncated_files(tmp_path: Path, store: Any) -> None:
    """Cut anywhere, an archive or array is refused."""
    store(tmp_path / "a.npz", x=normal(20, 3))
    np.save(tmp_path / "a.npy", normal(20, 3))
    for name in ("a.npz", "a.npy"):
        whole = (tmp_path / name).read_bytes()
        for size in range(0, len(whole) - 1, 29):
            (tmp_path / name).write_bytes(whole[:size])
            refused(tmp_path / name, single("n", 3), name)


def test_flipped_bytes_are_refused_or_read(tmp_path: Path) -> None:
    """Damage anywhere gives data of the right shape or one line, never another error."""
    np.savez_compressed(tmp_path / "a.npz", x=normal(20, 3))
    whole = (tmp_path / "a.npz").read_bytes()
    refusals = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "a.npz").write_bytes(damaged)
        try:
            assert rows(opened(tmp_path / "a.npz", single("n", 3))).shape == (20, 3)
        except UserError:
            refusals += 1
    assert refusals > 50


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((10**12, 3), "<f4", "do not fill|is filled"),
        ((-5, 3), "<f4", "damaged"),
        ((10**15, 0), "<f4", "holds nothing"),
        ((4, 10**10), "<f4", "too large"),
        ((), "<f4", "single number"),
        ((4, 3), "|V0", "damaged"),
        ((4, 3), "<U1", "do not fill|is filled|no numbers"),
    ],
)
def test_headers_that_lie(tmp_path: Path, shape: tuple[int, ...], dtype: str, words: str) -> None:
    data = header(shape, dtype) + bytes(48)
    (tmp_path / "a.npy").write_bytes(data if 0 not in shape else header(shape, dtype))
    zipped(tmp_path / "a.npz", x=data if 0 not in shape else header(shape, dtype))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(UserError, match=words):
            opened(tmp_path / name, single("n", 3))


def test_a_zip_bomb_takes_no_memory(tmp_path: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte: only the rows drawn are kept."""
    import tracemalloc

    count = 2**27 // 1024
    path = zipped(tmp_path / "a.npz", x=header((count, 256)) + bytes(count * 1024))
    tracemalloc.start()
    refused(path, single("n", 256), "identical", samples=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < 2**20
    assert peak < 2**25


def test_a_member_that_understates_its_size(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", x=header((8, 3)) + normal(8, 3).tobytes())
    whole = path.read_bytes()
    at = whole.rindex(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    path.write_bytes(whole[:at] + struct.pack("<I", 2**31) + whole[at + 4 :])
    refused(path, single("n", 3), "do not fill")


def test_paths_that_hold_no_data(tmp_path: Path) -> None:
    refused(tmp_path / "none", single("n", 3), "does not exist")
    refused("a\0b", single("n", 3), "does not exist")
    refused("nowhere:", single("n", 3), "does not exist")
    refused("a" * 300, single("n", 3), "cannot be read: File name too long")
    refused(tmp_path, single("n", 3, 8, 8), "holds no images")
    (tmp_path / "a.txt").write_text("1 2 3")
    refused(tmp_path / "a.txt", single("n", 3), "is not data")
    np.save(tmp_path / "a.npy", normal(8, 3))
    np.savez(tmp_path / "b.npz", x=normal(8, 3))
    for source, name, words in (("a.npy", "a.npz", "call it .npy"), ("b.npz", "b.npy", "call it .npz")):
        (tmp_path / name).write_bytes((tmp_path / source).read_bytes())
        refused(tmp_path / name, single("n", 3), words)
    (tmp_path / "a.npz").write_text("no archive")
    refused(tmp_path / "a.npz", single("n", 3), "cannot be read as .npz")
    np.save(tmp_path / "a.npy", normal(8, 3))
    refused(tmp_path / "a.npy", passing(floats("a", "n", 3), floats("b", "n", 3)), "one array")


def test_what_must_not_be_read(tmp_path: Path, powerless: Callable[[], AbstractContextManager[None]]) -> None:
    """Closed folders and files are not taken for missing, damaged or empty ones."""
    here, model = tmp_path, single("n", 3, 8, 8)
    folder_of(here / "images" / "open", 4)
    folder_of(here / "images" / "closed", 4)
    folder_of(here / "part", 4)
    np.savez(here / "a.npz", x=normal(8, 3))
    np.save(here / "a.npy", normal(8, 3))
    closed = [here / "images" / "closed", here / "a.npz", here / "a.npy", here / "part" / "0.png"]
    for path in closed:
        path.chmod(0)
    with powerless():
        for spec, name in (
            ("images", "images/closed"),
            ("images/closed", "closed"),
            ("images/closed/0.png", "0.png"),
        ):
            refused(here / spec, model, f"{name}", "cannot be read: Permission denied")
        for spec in ("a.npz", "a.npy"):
            refused(here / spec, model, f"{spec}: cannot be read (Permission denied)")
        (note,) = [note for note in opened(here / "part", model).notes if "left out" in note]
        assert note == f"1 image left out: {here}/part/0.png cannot be read (Permission denied)"
    for path in closed:
        path.chmod(0o700)


# --------------------------------------------------------------------------------------------- images


def picture(seed: int, height: int = 12, width: int = 10, mode: str = "RGB") -> Image.Image:
    shape = (height, width, {"RGB": 3, "RGBA": 4, "L": 1}[mode])
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values.squeeze() if mode == "L" else values)


def folder_of(path: Path, count: int = 6, **options: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i, **options).save(path / f"{i}.png")
    return path


def test_images_are_normalised_and_laid_out(tmp_path: Path) -> None:
    """Against the arithmetic written out, at the size of the files."""
    folder_of(tmp_path / "a" / "b", 6, height=8, width=10)
    raw = (
        np.stack([np.asarray(picture(int(i), 8, 10)) for i in np.random.default_rng(0).permutation(6)])
        / 255.0
    )
    for text, expected in {
        "0-1,resize": raw,
        "-1-1,resize": raw * 2 - 1,
        "imagenet,resize": (raw - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
        "mean=0.1:0.2:0.3,std=0.5,bgr": ((raw - [0.1, 0.2, 0.3]) / 0.5)[..., ::-1],
    }.items():
        options = {"preprocess": Preprocess.parse(text)}
        chw = opened(tmp_path, single("n", 3, 8, 10), **options)
        hwc = opened(tmp_path, single("n", 8, 10, 3), **options)
        assert np.allclose(rows(hwc), expected, atol=1e-6)
        assert np.array_equal(rows(chw).transpose(0, 2, 3, 1), rows(hwc))
    integers = opened(tmp_path, single(1, 8, 10, 3, kind=TensorProto.UINT8), preprocess=PRESETS["0-1"])
    assert np.array_equal(rows(integers), np.round(raw * 255))
    assert not chw.labelled
    assert chw.provenance["preprocess"]["mean"] == [0.1, 0.2, 0.3]
    assert chw.provenance["preprocess"]["layout"] == "nchw"
    assert chw.source.endswith("/ (6 images)")


def test_sizes(tmp_path: Path) -> None:
    """Stretch, centre crop and open sides, against Pillow."""
    folder_of(tmp_path, 2, height=40, width=60)
    pictures = [picture(int(i), 40, 60) for i in np.random.default_rng(0).permutation(2)]
    scale = np.float32(255)

    def pixels(image: Image.Image) -> Array:
        return np.asarray(image).transpose(2, 0, 1).astype(np.float32) / scale

    def fed(text: str, *dims: Any) -> Array:
        return rows(opened(tmp_path, single("n", 3, *dims), preprocess=Preprocess.parse(text)))

    bilinear = Image.Resampling.BILINEAR
    assert np.array_equal(fed("0-1", 16, 20), [pixels(p.resize((20, 16), bilinear)) for p in pictures])
    assert np.array_equal(fed("0-1", 20, "w"), [pixels(p.resize((30, 20), bilinear)) for p in pictures])
    assert np.array_equal(
        fed("0-1,size=10x14", "h", "w"), [pixels(p.resize((14, 10), bilinear)) for p in pictures]
    )
    # the whole height and the middle of the width, pixel for pixel
    crop = [pixels(p.crop((10, 0, 50, 40))) for p in pictures]
    assert np.array_equal(fed("0-1,crop=1", 40, 40), crop)
    # 0.875 of the short side: 35 of 40 and the middle 35 of 60
    box = (12.5, 2.5, 47.5, 37.5)
    assert np.array_equal(
        fed("0-1,crop", 7, 7), [pixels(p.resize((7, 7), bilinear, box=box)) for p in pictures]
    )
    refused(tmp_path, single("n", 3, "h", "w"), "size is open", preprocess=PRESETS["0-1"])
    refused(tmp_path, single("n", 3, 8, 8), "8x9", preprocess=Preprocess.parse("size=8x9"))
    assert fed("imagenet", "h", "w").shape == (2, 3, 224, 224)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_channels_follow_the_model(tmp_path: Path, channels: int, mode: str) -> None:
    folder_of(tmp_path, 2, height=8, width=8, mode=mode)
    fed = rows(opened(tmp_path, single("n", channels, 8, 8), preprocess=PRESETS["0-1"]))
    first = picture(int(np.random.default_rng(0).permutation(2)[0]), 8, 8, mode)
    expected = np.asarray(first.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(8, 8, channels)
    assert np.allclose(fed[0].transpose(1, 2, 0), expected / 255.0, atol=1e-6)


def test_palettes_and_sixteen_bits(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "0.png")
    picture(1, 8, 8).convert("P").save(tmp_path / "1.gif")
    data = opened(tmp_path, single("n", 1, 8, 8), preprocess=PRESETS["0-1"])
    sixteen = rows(data)[int(np.flatnonzero(np.random.default_rng(0).permutation(2) == 0)[0])]
    assert np.abs(sixteen[0] - wide / 65535).max() <= 1 / 255


def test_one_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        folder_of(tmp_path / "names" / name / "deep", 3)
    for name in ("10", "9"):
        folder_of(tmp_path / "numbers" / name, 3)
    model = single("n", 3, 8, 8)
    order = np.random.default_rng(0).permutation(6)
    named = opened(tmp_path / "names", model)
    assert np.array_equal(labels(named), np.array([0, 0, 0, 1, 1, 1])[order])
    assert any("0 is 'cat', 1 is 'dog'" in note for note in named.notes)
    numbered = opened(tmp_path / "numbers", model)
    assert np.array_equal(labels(numbered), np.array([10, 10, 10, 9, 9, 9])[order])
    picture(0).save(tmp_path / "names" / "loose.png")
    assert not opened(tmp_path / "names", model).labelled


def test_a_table_of_labels(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 4)
    model = single("n", 3, 8, 8)
    order = np.random.default_rng(0).permutation(4)
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n" + "".join(f"in/{i}.png,{7 - i}\n" for i in range(4)))
    assert np.array_equal(labels(opened(tmp_path, model)), 7 - order)
    table.write_text("".join(f"in/{i}.png, {'ba'[i % 2]}\n" for i in range(4)))
    assert np.array_equal(labels(opened(tmp_path, model)), np.array([1, 0, 1, 0])[order])
    assert opened(f"{tmp_path}/in/../", model).labelled
    table.write_text("in/0.png,1\nin/1.png,2\n")
    refused(tmp_path, model, "2 of 4 images", "in/2.png")
    table.write_text("in/0.png 1\n")
    refused(tmp_path, model, "labels.csv", "each line is file,label")
    table.write_bytes(b"\xff\xfe\0\0")
    refused(tmp_path, model, "labels.csv", "cannot be read")


def test_images_that_cannot_be_used_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, 5)
    (tmp_path / "text.png").write_text("this is text")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:90])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "post.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "bomb.png")
    (tmp_path / ".hidden.png").write_text("not looked at")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    model = single("n", 3, 8, 8)
    data = opened(tmp_path, model)
    assert len(data) == 5
    assert any(note.startswith(f"5 images left out: {tmp_path}/") for note in data.notes)
    assert same(data.batches(), data.batches())
    for i in range(5):
        (tmp_path / f"{i}.png").unlink()
    refused(tmp_path, model, "none of 5 images")
    for name in ("text.png", "cut.png", "empty.jpg", "post.png"):
        (tmp_path / name).unlink()
    refused(tmp_path, model, "bomb.png", "9,000 pixels")


def test_damaged_images_never_end_the_run(tmp_path: Path) -> None:
    """Every format, cut and with bytes flipped: usable or left out."""
    model = single("n", 3, 8, 8)
    folder_of(tmp_path, 2)
    generator = np.random.default_rng(0)
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm"):
        out = io.BytesIO()
        picture(0).save(out, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        for i in range(8):
            data = bytearray(out.getvalue())
            for place in generator.integers(0, len(data), 3):
                data[place] ^= int(generator.integers(1, 256))
            (tmp_path / f"flip{i}.{suffix}").write_bytes(data)
            (tmp_path / f"cut{i}.{suffix}").write_bytes(data[: int(generator.integers(1, len(data)))])
    assert len(opened(tmp_path, model)) >= 2


def test_images_are_decoded_again(tmp_path: Path, small_memory: None) -> None:
    folder_of(tmp_path, 5)
    (tmp_path / "text.png").write_text("this is text")
    data = opened(tmp_path, single("n", 3, 8, 8))
    assert same(data.batches(2), data.batches(2))
    picture(99).save(tmp_path / "3.png")
    with pytest.raises(UserError, match="must be repeatable"):
        list(data.batches())


def test_images_and_models_that_take_none(tmp_path: Path) -> None:
    folder_of(tmp_path, 4)
    refused(tmp_path, passing(floats("a", "n", 3, 8, 8), floats("b", "n", 3)), "one input", "'a', 'b'")
    refused(tmp_path, single("n", 3), "takes no images")
    refused(tmp_path, single("n", 8, 8, 8), "layout")
    refused(tmp_path, single("n", 3, 8, 3), "layout=nchw or layout=nhwc")
    refused(tmp_path, single("n", 1, 8, 8), "not bgr", preprocess=Preprocess.parse("bgr"))
    refused(tmp_path, single("n", 1, 8, 8, kind=TensorProto.INT8), "int8 cannot hold")
    assert rows(opened(tmp_path, single("n", 1, 8, 8))).shape == (4, 1, 8, 8)
    told = opened({"x": normal(40, 3)}, single("n", 3), preprocess=PRESETS["0-1"]).notes
    assert told == ("the preprocessing was not applied: arrays are taken as they are",)


@given(
    st.sampled_from(sorted(PRESETS)),
    st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999)),
    st.none() | st.sampled_from(["nchw", "nhwc"]),
    st.none() | st.sampled_from(["rgb", "bgr", "grey"]),
    st.none() | st.floats(0.01, 1),
    st.lists(st.floats(0.001, 2), min_size=1, max_size=4),
)
def test_preprocessing_reads_what_it_prints(
    name: str, size: Any, layout: Any, colour: Any, crop: Any, values: list[float]
) -> None:
    made = Preprocess(name, tuple(values), tuple(values), crop, size, layout, colour)
    assert Preprocess.parse(str(made)) == made


@pytest.mark.parametrize(
    "text",
    ["", "imagnet", "size=0", "size=1x2x3", "size=a", "mean=a", "mean=nan", "std=0", "std=-1", "crop=0", "crop=2", "layout=chw", "mean=1:2:3:4:5", "0-1,,bgr", "\x1b[1m"],
)  # fmt: skip
def test_preprocessing_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="--preprocess") as error:
        Preprocess.parse(text)
    assert str(error.value).isprintable()


# ------------------------------------------------------------------------------------------ protobufs


def test_test_data_of_onnx(tmp_path: Path) -> None:
    """Sets in order of their numbers, tensors by name or else by number; outputs are no labels."""
    model = passing(floats("a", "n", 3), floats("b", "n", 2))
    for i in (0, 2, 10):
        folder = tmp_path / f"test_data_set_{i}"
        folder.mkdir()
        swapped = {"input_0": ("b", normal(2, 2, seed=i)), "input_1": ("a", normal(2, 3, seed=i))}
        plain = {"input_0": ("", normal(2, 3, seed=i)), "input_1": ("", normal(2, 2, seed=i))}
        for name, (tensor_name, array) in (swapped if i else plain).items():
            proto = numpy_helper.from_array(array, tensor_name)
            (folder / f"{name}.pb").write_bytes(proto.SerializeToString())
        (folder / "output_0.pb").write_bytes(b"not looked at")
    data = opened(tmp_path, model)
    order = [(0, 2, 10)[k] for k in np.random.default_rng(0).permutation(3)]
    assert [b.count for b in data.batches()] == [2, 2, 2]
    assert data.source.endswith("(3 data sets, 6 samples)")
    assert any(note.startswith("only 3 data sets, 6 samples") for note in data.notes)
    assert data.subset(5).source.endswith("(2 data sets, 4 samples)")
    assert all(
        np.array_equal(b.feeds["a"], normal(2, 3, seed=i)) for b, i in zip(data.batches(), order, strict=True)
    )
    assert not data.labelled
    assert len(opened(tmp_path / "test_data_set_2", model)) == 2


def test_protobufs_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "input_0.pb"
    model = single("n", 3)
    good = numpy_helper.from_array(normal(4, 3), "x")

    def damaged(**fields: Any) -> bytes:
        proto = onnx.TensorProto()
        proto.CopyFrom(good)
        for key, value in fields.items():
            if isinstance(value, list):
                proto.ClearField(key)  # type: ignore[arg-type]
                getattr(proto, key).extend(value)
            else:
                setattr(proto, key, value)
        return proto.SerializeToString()

    path.write_bytes(numpy_helper.from_array(normal(1, 3), "x").SerializeToString())
    refused(tmp_path, model, "holds 1 data set, 1 sample; at least 2 samples are needed")
    path.write_bytes(good.SerializeToString())
    assert np.array_equal(rows(opened(tmp_path, model)), normal(4, 3))
    for data, word in [
        (b"\xff\xff\xff", "no ONNX tensor"),
        (b"", "no tensor of numbers"),
        (damaged(dims=[5, 3]), "damaged"),
        (damaged(dims=[-4, -3]), "no tensor of numbers"),
        (damaged(dims=[2**40, 2**40]), "damaged"),
        (damaged(data_type=99), "damaged"),
        (damaged(data_location=TensorProto.EXTERNAL), "another file"),
    ]:
        path.write_bytes(data)
        refused(tmp_path, model, word)
    path.write_bytes(good.SerializeToString())
    (tmp_path / "input_1.pb").write_bytes(numpy_helper.from_array(normal(4, 3)).SerializeToString())
    refused(tmp_path, model, "one too many")


# ------------------------------------------------------------------------------------------- datasets


def test_without_the_library_a_data_set_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    try:
        __import__("datasets")
    except ImportError:
        refused(tmp_path, single("n", 3), "pip install 'onnxprune[datasets]'")
    else:
        refused(tmp_path, single("n", 3), "datasets cannot load it")


def test_without_the_library_parquet_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    for spec in (tmp_path, tmp_path / "data", tmp_path / "data" / "train-00000-of-00001.parquet"):
        try:
            __import__("datasets")
        except ImportError:
            refused(spec, single("n", 3), "pip install 'onnxprune[datasets]'")
        else:
            refused(spec, single("n", 3), "datasets cannot load it")


def test_parquet_of_hugging_face(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Shards of one split in the order of their names, images decoded; several splits are not mixed."""
    library = pytest.importorskip("datasets", reason="the datasets library is not installed")
    columns = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b", "c"])})
    pictures = [picture(i) for i in range(6)]
    (tmp_path / "data").mkdir()
    for k in range(2):
        part = {"image": pictures[3 * k : 3 * k + 3], "label": [0, 1, 2]}
        shard = library.Dataset.from_dict(part, features=columns)
        shard.to_parquet(str(tmp_path / "data" / f"train-0000{k}-of-00002.parquet"))
    capfd.readouterr()
    data = opened(tmp_path, single("n", 3, 12, 10), preprocess=PRESETS["0-1"])
    assert capfd.readouterr() == ("", "")
    order = np.random.default_rng(0).permutation(6)
    expected = np.stack([np.asarray(pictures[i]) for i in order]).transpose(0, 3, 1, 2) / 255.0
    assert np.allclose(rows(data), expected, atol=1e-6)
    assert np.array_equal(labels(data), order % 3)
    alone = opened(tmp_path / "data" / "train-00001-of-00002.parquet", single("n", 3, 12, 10))
    assert len(alone) == 3
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    refused(tmp_path, single("n", 3, 12, 10), "several splits", "test, train")


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets", reason="the datasets library is not installed")
    pictures = [picture(i) for i in range(6)]
    columns = {
        "image": library.Image(),
        "label": library.ClassLabel(names=["a", "b"]),
        "note": library.Value("string"),
    }
    made = {"image": pictures, "label": [0, 1] * 3, "note": ["?"] * 6}
    library.Dataset.from_dict(made, features=library.Features(columns)).save_to_disk(str(tmp_path / "images"))
    data = opened(tmp_path / "images", single("n", 3, 12, 10), preprocess=PRESETS["0-1"])
    order = np.random.default_rng(0).permutation(6)
    expected = np.stack([np.asarray(pictures[i]) for i in order]).transpose(0, 3, 1, 2) / 255.0
    assert np.allclose(rows(data), expected, atol=1e-6)
    assert np.array_equal(labels(data), order % 2)
    both = library.Dataset.from_dict({"a": pictures, "n": [[i, 2 * i] for i in range(6)]})
    both.cast_column("a", library.Image()).save_to_disk(str(tmp_path / "mixed"))
    mixed = opened(tmp_path / "mixed", passing(floats("a", "n", 3, 12, 10), floats("n", "n", 2)))
    assert np.array_equal(rows(mixed, "n"), np.stack([order, 2 * order], axis=1))
    assert any("imagenet" in note and "a guess" in note for note in mixed.notes)
    assert any("neither inputs nor labels: 'note'" in note for note in data.notes)
    ids = [[1, 2, 3], [3, 4, 1], [5, 6, 7]]
    table = library.Dataset.from_dict({"ids": ids, "mask": [[1, 1, 1]] * 3, "labels": [0, 1, 2]})
    library.DatasetDict({"test": table, "train": table}).save_to_disk(str(tmp_path / "both"))
    model = passing(tensor("ids", INT64, ["n", "t"]), tensor("mask", INT64, ["n", "t"]))
    refused(tmp_path / "both", model, "test, train")
    data = opened(tmp_path / "both" / "test", model)
    assert np.array_equal(rows(data, "ids"), np.array(ids)[labels(data)])
    refused(tmp_path / "both" / "test", passing(tensor("ids", INT64, ["n", "t"]), floats("p", "n", 2)), "'p'")


# ------------------------------------------------------------------------------------------ functions


def test_functions_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the working directory; feeds, pairs and plain arrays alike; the first ones are taken."""
    (tmp_path / "calibration_of_mine.py").write_text(
        "import numpy as np\n"
        "def arrays():\n    return (np.arange(i, i + 3.0) for i in range(100))\n"
        "def feeds():\n    return ({'x': a} for a in arrays())\n"
        "def pairs():\n    return ((a, i) for i, a in enumerate(arrays()))\n"
        "def broken():\n    yield from list(arrays())[:5]\n    raise ValueError('two\\nlines')\n"
        "def wrong():\n    return 7\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = single("n", 3)
    expected = np.arange(40)[:, None] + np.arange(3.0)
    for name in ("arrays", "feeds", "pairs"):
        data = opened(f"calibration_of_mine:{name}", model, samples=40)
        assert np.array_equal(rows(data), expected)
        assert data.labelled == (name == "pairs")
    assert np.array_equal(labels(data), np.arange(40))
    refused("calibration_of_mine:broken", model, "sample 5", "ValueError: two lines")
    assert len(opened("calibration_of_mine:broken", model, samples=5)) == 5
    refused("calibration_of_mine:wrong", model, "int")
    refused("calibration_of_mine:value", model, "no function 'value'")
    refused("no_such_module_at_all:f", model, "cannot import")
    refused("calibration_of_mine.py:arrays", model, "cannot import", "leave the .py out")


def test_items_of_functions_that_do_not_fit() -> None:
    model = single("n", 3)
    x = normal(3)
    refused(lambda: [(x, 1, 2)] * 3, model, "tuple of 3")
    refused(lambda: [(x, 1), (x + 1, None)], model, "1 of 2 samples have a label")
    refused(lambda: [(x, "cat"), (x + 1, "dog")], model, "label", "no numbers")
    refused(lambda: [(x, np.nan), (x + 1, 0)], model, "label", "NaN")
    refused(lambda: [[[1], [1, 2]]] * 2, model, "different lengths")
    refused(lambda: [None, None], model, "no numbers")
    refused(lambda: [np.array(["a", "b", "c"])] * 2, model, "'x' holds <U1, no numbers")
    refused(lambda: {"x": normal(8, 3)}, model, "gives one dict", "one sample at a time")
    refused(lambda: (normal(8, 3), np.arange(8)), model, "gives one tuple", "one sample at a time")
    refused(lambda: [(normal(4, 3), [1, 2])], model, "4 samples and labels of shape [2]")
    refused([], model, "at least 2")


# ---------------------------------------------------------------------------------------- made-up data


def test_pink_noise_has_the_stated_spectrum() -> None:
    """The amplitude falls as 1/f: its slope over two octaves and more is -1 in logarithms."""
    images = pink(np.random.default_rng(0), 256, 3, 48, 48)
    spectrum = np.abs(np.fft.fft2(images))[..., 1:20].mean(axis=(0, 1))[0]  # along one axis, the other at 0
    slope = np.polyfit(np.log(np.arange(1, 20)), np.log(spectrum), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)
    deviations = images.std(axis=(2, 3))
    assert np.allclose(deviations, deviations[:, :1])
    assert deviations.min() >= 0.5
    assert deviations.max() <= 1.5
    assert np.ptp(images.mean(axis=(1, 2, 3))) > 0.5
    centred = images - images.mean(axis=(2, 3), keepdims=True)
    shared = np.mean(centred[:, 0] * centred[:, 1]) / np.mean(centred[:, 0] ** 2)
    assert shared == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("dims", [("n", 3, 32, 32), (1, 32, 32, 1), (2, 4, 16, 16)])
def test_images_are_made_up_where_images_are_due(dims: tuple[Any, ...]) -> None:
    model = single(*dims)
    shapes = analyse(model)
    data = synthetic(model, shapes, samples=6, seed=1)
    assert len(data) == 6
    assert not data.measured
    assert not data.labelled
    assert "shapes" in data.source
    assert any("nothing was measured" in note for note in data.notes)
    assert same(data.batches(), synthetic(model, shapes, samples=6, seed=1).batches())
    assert data.provenance != synthetic(model, shapes, samples=6, seed=2).provenance
    found = rows(data)
    channels = found.transpose(0, 3, 1, 2) if dims[3] == 1 else found
    neighbours = np.mean([np.corrcoef(c[:, 1:].ravel(), c[:, :-1].ravel())[0, 1] for c in channels[:, 0]])
    assert neighbours > 0.4  # white noise has 0


def test_made_up_feature_maps_are_white() -> None:
    model = single("n", 16, 32, 32)
    found = rows(synthetic(model, analyse(model), samples=4, seed=0))
    assert abs(np.corrcoef(found[..., 1:].ravel(), found[..., :-1].ravel())[0, 1]) < 0.05


def accepts(model: Model, shapes: Shapes, samples: int = 6) -> Data:
    data = synthetic(model, shapes, samples=samples, seed=0)
    session = Session(model.proto)
    for batch in data.batches():
        session.run(batch.feeds)
    return data


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_recurrent_models_accept_made_up_inputs(name: str) -> None:
    model = Model(RECURRENT[name]())
    accepts(model, analyse(model))


def test_made_up_integers_index_their_tables() -> None:
    nodes = [node("Gather", ["table", "ids"], ["y"])]
    inputs = [tensor("ids", INT64, ["n", 6])]
    graph = helper.make_graph(nodes, "net", inputs, [floats("y", "n", 6, 4)], [weight("table", 11, 4)])
    model = Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = accepts(model, analyse(model), 40)
    assert set(rows(data, "ids").ravel().tolist()) == set(range(11))


def test_all_ways_of_a_graph_are_fed() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        return helper.make_graph([node(op, ["x"], [name])], name, [], [floats(name, "n", 3)])

    decides = node("If", ["flag"], ["y"], then_branch=branch("a", "Relu"), else_branch=branch("b", "Neg"))
    inputs = [floats("x", "n", 3), tensor("flag", TensorProto.BOOL, [])]
    graph = helper.make_graph([decides], "net", inputs, [floats("y", "n", 3)])
    model = Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = accepts(model, analyse(model), 8)
    flags = [bool(batch.feeds["flag"]) for batch in data.batches()]
    assert flags.count(True) == flags.count(False) == 4


def test_a_model_that_cannot_run_says_so() -> None:
    proto = net([node("NoSuchOperator", ["a"], ["b"], domain="made.up")])
    proto.opset_import.add(domain="made.up", version=1)
    model = Model(proto)
    with pytest.raises(UserError, match="does not run on made-up inputs"):
        synthetic(model, analyse(model), samples=4, seed=0)
