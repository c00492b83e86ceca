"""Wrong input in every form a large, recurrent, quantised or attentive model has: one line that says what is
wrong, or a right result; never a crash, half a file, or anything left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.attention import ATTENTION
from models.control_flow import CONTROL_FLOW
from models.quantised import QUANTISED
from models.recurrent import BATCH_FIRST, RECURRENT
from models.transformers import TRANSFORMERS
from onnxprune.errors import UserError
from onnxprune.model import load
from onnxprune.passes import Options
from onnxprune.sizes import assignments
from tests.mutations import mutate
from tests.small import check_refused, floats, net, run, shrink, weight, write
from tests.test_bad_input import _command, apply, listing, plan_of, powerless, refused, temporary

__all__ = ["powerless", "temporary"]  # fixtures
node = helper.make_node
WIDE = 4200  # neurons, so that either weight takes more than a megabyte
Edit = Callable[[onnx.NodeProto], object]


def replaced(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> onnx.ModelProto:
    """The model with one initializer swapped for another of that name."""
    next(t for t in proto.graph.initializer if t.name == tensor.name).CopyFrom(tensor)
    return proto


# ------------------------------------------------------------------------------------------- external data


def mlp(wide: int = WIDE, dtype: Any = np.float32) -> onnx.ModelProto:
    """x (n, 64) -> w1 -> Relu -> w2 -> y (n, 64)."""
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="first"),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w2"], ["y"], name="second"),
    ]
    weights = [weight("w1", 64, wide, dtype=dtype), weight("w2", wide, 64, dtype=dtype)]
    kind = weights[0].data_type
    ends = [helper.make_tensor_value_info(name, kind, ["n", 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def moved_out(
    proto: onnx.ModelProto,
    folder: Path,
    files: Mapping[str, str] | None = None,
    start: int = 64,
    **said: object,
) -> Path:
    """The model with its weights in data files (`data.bin` where not told); `said` overrides what is said about
    the first one, None leaves it out."""
    folder.mkdir(exist_ok=True)
    for number, tensor in enumerate(proto.graph.initializer):
        name = (files or {}).get(tensor.name, "data.bin")
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        before = path.read_bytes() if path.exists() else bytes(start)
        path.write_bytes(before + tensor.raw_data)
        told: dict[str, object] = {"location": name, "offset": len(before), "length": len(tensor.raw_data)}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {**told, **({} if number else said)}.items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))
    return write(proto, folder / "model.onnx")


def plain_digest(folder: Path) -> str:
    """Of the same model in one file."""
    (folder / "plain").mkdir()
    return load(write(mlp(), folder / "plain" / "model.onnx")).digest()


SIZE = 64 * WIDE * 4  # bytes of a weight
DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda data: data.unlink(),
    "empty": lambda data: data.write_bytes(b""),
    "a byte short": lambda data: data.write_bytes(data.read_bytes()[:-1]),
    "half": lambda data: data.write_bytes(data.read_bytes()[: SIZE // 2]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_data_files_that_are_damaged(name: str, tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path)
    DAMAGE[name](tmp_path / "data.bin")
    refused(path, "external data 'data.bin' of tensor 'w", "data")


@pytest.mark.parametrize(
    "said",
    [
        {"offset": -1},
        {"offset": "1e3"},
        {"offset": " "},
        {"offset": 2 * SIZE},
        {"offset": 10**18},
        {"offset": "9" * 5000},
        {"length": 0},
        {"length": SIZE - 4},
        {"length": SIZE + 4},
        {"length": -SIZE},
        {"length": "all"},
        {"length": "9" * 5000},
    ],
    ids=lambda said: " ".join(f"{k} {str(v)[:9]}" for k, v in said.items()),
)
def test_places_that_hold_no_such_tensor(said: dict[str, object], tmp_path: Path) -> None:
    refused(moved_out(mlp(), tmp_path, **said), "external data 'data.bin' of tensor 'w1'")


@pytest.mark.parametrize("start", [0, 1, 63, 4096])
def test_any_offset_is_read(start: int, tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path, start=start)
    assert load(path).digest() == plain_digest(tmp_path)
    assert shrink(path).exit_code == 0


@pytest.mark.parametrize("wide", [WIDE, 20])
def test_data_files_may_be_longer_and_lengths_unstated(wide: int, tmp_path: Path) -> None:
    path = moved_out(mlp(wide), tmp_path, length=None)
    with (tmp_path / "data.bin").open("ab") as file:
        file.write(b"more")
    first, second = (numpy_helper.to_array(t) for t in mlp(wide).graph.initializer)
    model = load(path)
    np.testing.assert_array_equal(model.array("w1"), first)
    np.testing.assert_array_equal(model.array("w2"), second)
    assert shrink(path).exit_code == 0


def test_tensors_may_overlap(tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path)
    proto = onnx.load(path, load_external_data=False)
    entries = {e.key: e for e in proto.graph.initializer[1].external_data}
    entries["offset"].value = "68"  # from the second value of the first
    write(proto, path)
    data = np.frombuffer((tmp_path / "data.bin").read_bytes()[64:], np.float32)
    model = load(path)
    np.testing.assert_array_equal(model.array("w1").ravel(), data[: 64 * WIDE])
    np.testing.assert_array_equal(model.array("w2").ravel(), data[1 : 64 * WIDE + 1])
    assert shrink(path).exit_code == 0
    pruned = load(tmp_path / "model.pruned.onnx")
    assert pruned.array("w1").shape == (64, WIDE // 2)
    assert np.isin(pruned.array("w2"), data).all()


@pytest.mark.parametrize(
    "where",
    ["absolute", "up", "link", "hard link", "linked folder", "folder", "pipe", "empty", "long", "nul", "home"],
)
@pytest.mark.parametrize("wide", [WIDE, 20])
def test_locations_that_are_no_files_of_the_folder(where: str, wide: int, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    path = moved_out(mlp(wide), inside)
    secret = tmp_path / "secret.bin"
    (inside / "data.bin").rename(secret)
    made: dict[str, Callable[[], object]] = {
        "link": lambda: (inside / "odd").symlink_to(secret),
        "hard link": lambda: (inside / "odd").hardlink_to(secret),
        "linked folder": lambda: (inside / "linked").symlink_to(tmp_path),
        "pipe": lambda: os.mkfifo(inside / "odd"),
    }
    made.get(where, lambda: None)()
    location = {
        "absolute": str(secret),
        "up": "../secret.bin",
        "linked folder": "linked/secret.bin",
        "folder": ".",
        "empty": "",
        "long": "long" * 1000,
        "nul": "odd\0.bin",
        "home": "~/data.bin",
    }.get(where, "odd")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    path = write(proto, path)
    before = sorted(p.name for p in inside.iterdir())
    missing = where in ("empty", "long", "nul", "home")
    check_refused(shrink(path), path, "tensor 'w1'", "is missing" if missing else "is not a plain file")
    assert sorted(p.name for p in inside.iterdir()) == before


def test_the_last_location_counts(tmp_path: Path) -> None:
    """As in onnx and onnxruntime: what is checked is what is read."""
    inside = tmp_path / "inside"
    path = moved_out(mlp(), inside)
    (tmp_path / "secret.bin").write_bytes((inside / "data.bin").read_bytes()[::-1])
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data.add(key="location", value="../secret.bin")
    refused(write(proto, path), "'../secret.bin' of tensor 'w1' is not a plain file")


def test_locations_that_are_no_text(tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"data.bin", b"data\xff\xfe\xfd\xfc"))
    refused(path, "UTF-8")


def test_values_beside_a_location_do_not_count(tmp_path: Path) -> None:
    for folder, wide in ((tmp_path / "large", WIDE), (tmp_path / "small", 20)):
        path = moved_out(mlp(wide), folder)
        proto = onnx.load(path, load_external_data=False)
        first = numpy_helper.to_array(mlp(wide).graph.initializer[0])
        proto.graph.initializer[0].raw_data = (2 * first).tobytes()
        proto.graph.initializer[1].float_data.append(7.0)
        write(proto, path)
        assert load(path).digest() == load(write(mlp(wide), folder / "plain.onnx")).digest()
        assert shrink(path).exit_code == 0
        assert np.isin(load(folder / "model.pruned.onnx").array("w1"), first).all()


def test_private_entries_are_not_believed(tmp_path: Path) -> None:
    """Entries that look like the package's own name no other file."""
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(2 * SIZE))
    path = moved_out(mlp(), tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for stem in ("", "onnxprune.", "0" * 32 + "."):
            said = {"file": other, "offset": 0, "type": 1, "dims": "64 9", "kept.0": "1 2"}
            for key, value in said.items():
                if stem or key != "offset":
                    tensor.external_data.add(key=stem + key, value=str(value))
    write(proto, path)
    assert load(path).digest() == plain_digest(tmp_path)
    assert shrink(path).exit_code == 0
    assert np.all(load(tmp_path / "model.pruned.onnx").array("w2") != 0)


def test_a_data_file_that_may_not_be_read(
    tmp_path: Path, powerless: Callable[[], AbstractContextManager[None]]
) -> None:
    path = moved_out(mlp(), tmp_path)
    (tmp_path / "data.bin").chmod(0)
    with powerless():
        check_refused(shrink(path), "'data.bin' of tensor 'w1' cannot be read (Permission denied)")


def test_a_read_only_data_file_is_left_alone(tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path)
    (tmp_path / "data.bin").chmod(0o444)
    before = listing(tmp_path)
    assert shrink(path).exit_code == 0
    after = listing(tmp_path)
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == ["model.pruned.onnx", "model.pruned.onnx.data"]


LAYOUTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "one file": ({}, ["small.onnx.data"]),
    "a file per tensor": ({"w1": "w1.bin", "w2": "w2.bin"}, ["small.onnx.w1.bin", "small.onnx.w2.bin"]),
    "a folder": ({"w1": "deep/data.bin", "w2": "deep/data.bin"}, ["small.onnx.data"]),
    "two of one name": ({"w1": "a/w", "w2": "b/w"}, ["small.onnx.w", "small.onnx.w_1"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_kept(name: str, tmp_path: Path) -> None:
    files, written = LAYOUTS[name]
    path = moved_out(mlp(), tmp_path / "in", files)
    out = tmp_path / "out"
    out.mkdir()
    assert shrink(path, "-o", out / "small.onnx").exit_code == 0
    made = sorted(listing(out))
    assert made[0] == "small.onnx"
    assert len(made) == 1 + len(written)
    if name != "two of one name":
        assert made[1:] == written
    plain = write(mlp(), tmp_path / "plain.onnx")
    assert shrink(plain, "-o", tmp_path / "plain.small.onnx").exit_code == 0
    assert load(out / "small.onnx").digest() == load(tmp_path / "plain.small.onnx").digest()
    feed = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}
    one, other = (onnxruntime.InferenceSession(str(p)) for p in (out / "small.onnx", tmp_path / "plain.small.onnx"))
    np.testing.assert_array_equal(one.run(None, feed)[0], other.run(None, feed)[0])


def test_a_model_is_found_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved_out(mlp(), tmp_path, {"w1": "deep/data.bin", "w2": "deep/data.bin"})
    monkeypatch.chdir(tmp_path)
    assert shrink(Path("model.onnx")).exit_code == 0
    monkeypatch.chdir(tmp_path / "deep")
    assert shrink(Path("../model.onnx"), "-o", "small.onnx").exit_code == 0
    assert (tmp_path / "deep" / "small.onnx.data").read_bytes() == (
        tmp_path / "model.pruned.onnx.data"
    ).read_bytes()


def test_outputs_over_the_data_file(tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path)
    plan = plan_of(path)
    (tmp_path / "link.json").hardlink_to(tmp_path / "good.json")
    before = listing(tmp_path)
    data, small = tmp_path / "data.bin", tmp_path / "small.onnx"
    for command in (
        ("shrink", path, "--channels", 0.5, "--align", 1, "-o", data),
        ("shrink", path, "--channels", 0.5, "--align", 1, "-o", small, "--plan-out", data),
        ("shrink", path, "--channels", 0.5, "--align", 1, "-o", small, "--json", data),
        ("plan", path, "--channels", 0.5, "--align", 1, "-o", data),
        ("apply", path, tmp_path / "good.json", "-o", data),
        ("apply", path, tmp_path / "good.json", "-o", small, "--json", data),
    ):
        check_refused(run(*command), data, "input")
    moved_out(mlp(), tmp_path / "other", {"w1": "small.onnx.data", "w2": "small.onnx.data"})
    check_refused(
        shrink(tmp_path / "other" / "model.onnx", "-o", tmp_path / "other" / "small.onnx"),
        "overwrite the input (small.onnx.data)",
    )
    assert plan["edits"]
    assert {name: value for name, value in listing(tmp_path).items() if name in before} == before
    assert not small.exists()


@pytest.mark.parametrize("option", ["--json", "--plan-out"])
def test_a_report_in_the_place_of_the_data(option: str, tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path)
    before = listing(tmp_path)
    small = tmp_path / "small.onnx"
    check_refused(shrink(path, "-o", small, option, f"{small}.data"), "two outputs have the same path")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("room", "files"), [(200, {}), (1_000_000, {"w2": "w2.bin"})])
def test_a_limit_on_data_files(room: int, files: dict[str, str], tmp_path: Path) -> None:
    """The model fits and its data does not, or neither does."""
    path = moved_out(mlp(2 * WIDE), tmp_path, files)
    (tmp_path / "small.onnx.data").write_bytes(b"yesterday")
    before = listing(tmp_path)
    done = _command(
        "shrink", path, "--channels", 0.5, "--align", 1, "-o", tmp_path / "small.onnx", file_size=room
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "the disk is full" in done.stderr
    assert listing(tmp_path) == before


STAGES: dict[str, Callable[[int, Path], bool]] = {
    "read": lambda pid, folder: b"data.bin" in Path(f"/proc/{pid}/maps").read_bytes(),
    "written": lambda pid, folder: any(".part" in p.name for p in folder.iterdir()),
}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_leaves_nothing(
    stage: str, stop: signal.Signals, tmp_path: Path, temporary: Path
) -> None:
    path = moved_out(mlp(100_000), tmp_path)
    before = {p.name: p.stat() for p in tmp_path.iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxprune", "shrink", str(path), "--channels", "0.1", "--align", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    while process.poll() is None and not STAGES[stage](process.pid, tmp_path):
        time.sleep(0.001)
    process.send_signal(stop)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "onnxprune: interrupted; nothing was written\n"
    assert output == ""
    assert {p.name: p.stat() for p in tmp_path.iterdir()}.keys() == before.keys()
    assert (tmp_path / "data.bin").stat().st_mtime_ns == before["data.bin"].st_mtime_ns


def test_plans_and_repetitions_give_the_same_bytes(tmp_path: Path) -> None:
    path = moved_out(mlp(), tmp_path, {"w2": "w2.bin"})
    out = [tmp_path / name for name in ("one", "two", "three")]
    for folder in out:
        folder.mkdir()
    plan = tmp_path / "plan.json"
    assert shrink(path, "-o", out[0] / "small.onnx", "--plan-out", plan).exit_code == 0
    assert shrink(path, "-o", out[1] / "small.onnx").exit_code == 0
    assert run("apply", path, plan, "-o", out[2] / "small.onnx").exit_code == 0
    assert listing(out[0]) == listing(out[1]) == listing(out[2])
    assert len(listing(out[0])) == 3


SMALL_TYPES: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8": ml_dtypes.float8_e4m3fn,
    "int4": ml_dtypes.int4,
}


@pytest.mark.parametrize("name", SMALL_TYPES)
def test_small_types_outside_the_file(name: str, tmp_path: Path) -> None:
    """A megabyte of each: through a Cast or a scale to float, as such weights are stored."""
    proto = mlp(2 * 2**20 // 64 + 64)
    rng = np.random.default_rng(0)
    quantised = name == "int4"
    opset = 21
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", opset))
    proto.ir_version = 10
    array = rng.integers(-8, 8, size=(64, 2 * 2**20 // 64 + 64)).astype(np.float32).astype(SMALL_TYPES[name])
    replaced(proto, numpy_helper.from_array(array, "w1"))
    proto.graph.node[0].input[1] = "real"
    op = (
        node("DequantizeLinear", ["w1", "scale"], ["real"])
        if quantised
        else node("Cast", ["w1"], ["real"], to=TensorProto.FLOAT)
    )
    proto.graph.node.insert(0, op)
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    path = moved_out(proto, tmp_path)
    if quantised:
        for held in (proto, whole):
            held.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "scale"))
        write(proto, path)
    model = load(path)
    np.testing.assert_array_equal(model.array("w1").astype(np.float32), array.astype(np.float32))
    write(whole, tmp_path / "plain.onnx")
    assert model.digest() == load(tmp_path / "plain.onnx").digest()
    result = shrink(path, "-o", tmp_path / "small.onnx")
    assert result.exit_code == 0, result.output
    assert shrink(tmp_path / "plain.onnx", "-o", tmp_path / "small.plain.onnx").exit_code == 0
    assert load(tmp_path / "small.onnx").digest() == load(tmp_path / "small.plain.onnx").digest()
    assert load(tmp_path / "small.onnx").array("w1").shape == (64, array.shape[1] // 2)


def test_text_outside_the_file(tmp_path: Path) -> None:
    proto = net()
    text = proto.graph.initializer.add(name="words", data_type=TensorProto.STRING, dims=[3])
    text.data_location = TensorProto.EXTERNAL
    text.external_data.add(key="location", value="words.bin")
    (tmp_path / "words.bin").write_bytes(bytes(24))
    refused(write(proto, tmp_path / "model.onnx"), "'words.bin' of tensor 'words' is text")
