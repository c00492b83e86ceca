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
from onnxprune import runtime
from onnxprune.model import load
from onnxprune.sizes import assignments
from tests.mutations import mutate
from tests.small import check_refused, floats, net, run, shrink, weight, write
from tests.test_bad_input import _command, apply, listing, plan_of, refused, temporary

__all__ = ["temporary"]  # a fixture
node = helper.make_node
QUICK = ("--channels", "0.5", "--align", "1", "--criterion", "l2", "--repair", "none")
WIDE = 4200  # neurons, so that either weight takes more than a megabyte
Edit = Callable[[onnx.ModelProto, onnx.NodeProto], object]


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
    **said: Any,
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
def test_places_that_hold_no_such_tensor(said: dict[str, Any], tmp_path: Path) -> None:
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
    [
        "absolute",
        "up",
        "link",
        "hard link",
        "linked folder",
        "folder",
        "pipe",
        "empty",
        "long",
        "nul",
        "home",
    ],
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
    tmp_path.chmod(0o777)
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
    one, other = (
        onnxruntime.InferenceSession(str(p)) for p in (out / "small.onnx", tmp_path / "plain.small.onnx")
    )
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
        ("shrink", path, *QUICK, "-o", data),
        ("shrink", path, *QUICK, "-o", small, "--plan-out", data),
        ("shrink", path, *QUICK, "-o", small, "--json", data),
        ("plan", path, *QUICK, "-o", data),
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
        [sys.executable, "-m", "onnxprune", "shrink", str(path), *QUICK],
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
            held.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "scale"))
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


# ------------------------------------------------------------------------------------------- single nodes


def put(**values: object) -> Edit:
    """Attributes set, or taken away by None."""

    def change(proto: onnx.ModelProto, held: onnx.NodeProto) -> None:
        for name, value in values.items():
            kept = [a for a in held.attribute if a.name != name]
            copies = onnx.NodeProto()
            copies.attribute.extend(kept)
            del held.attribute[:]
            held.attribute.extend(copies.attribute)
            if value is not None:
                held.attribute.append(helper.make_attribute(name, value))

    return change


def without(i: int) -> Edit:
    return lambda proto, held: held.input.__setitem__(i, "")


def less(i: int) -> Edit:
    """Without the operands from i on."""
    return lambda proto, held: held.input.__delitem__(slice(i, None))


def turned(i: int, change: Callable[[Any], Any]) -> Edit:
    """A stored operand, changed."""

    def edit(proto: onnx.ModelProto, held: onnx.NodeProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == held.input[i])
        values = change(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(np.array(values, order="C"), tensor.name))

    return edit


def given(i: int, values: Any) -> Edit:
    """A stored operand where there was none."""

    def edit(proto: onnx.ModelProto, held: onnx.NodeProto) -> None:
        held.input.extend([""] * (i + 1 - len(held.input)))
        held.input[i] = "given"
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), "given"))

    return edit


def nothing(values: Any) -> Any:
    return np.full_like(values, np.nan)


def infinite(values: Any) -> Any:
    return np.where(np.arange(values.size).reshape(values.shape) == 3, np.inf, values).astype(values.dtype)


def first_of(build: Callable[..., onnx.ModelProto], op: str, change: Edit) -> onnx.ModelProto:
    """A network with its first node of this kind changed."""
    proto = build()
    change(proto, next(held for held in proto.graph.node if held.op_type == op))
    return proto


CRASH = "crash"  # onnxruntime would take the process along
Words = tuple[str, ...]
Case = tuple[Edit, int, Words]


def listed(cases: dict[tuple[str, str], dict[str, Case]]) -> dict[str, tuple[str, str, Case]]:
    """The cases of each network and operator under one name."""
    return {
        f"{name}: {what}": (name, op, case) for (name, op), own in cases.items() for what, case in own.items()
    }


RECURRENCE: dict[str, Case] = {
    "hidden size too large": (put(hidden_size=7), 2, ("Incompatible dimensions",)),
    "hidden size too small": (put(hidden_size=3), 2, ("Incompatible dimensions",)),
    "hidden size of 2^40": (put(hidden_size=2**40), 2, ("Incompatible dimensions",)),
    "no hidden units": (put(hidden_size=0), 4, ("nothing is prunable",)),
    "less than none": (put(hidden_size=-6), 4, ("nothing is prunable",)),
    "no hidden size": (put(hidden_size=None), 4, ("nothing is prunable",)),
    "sideways": (put(direction="sideways"), 4, ("nothing is prunable",)),
    "one direction too many": (put(direction="bidirectional"), 2, ("must be 1 instead of 2",)),
    "a direction that is no text": (put(direction=b"\xff\xfe"), 4, ("nothing is prunable",)),
    "a gate is missing": (turned(1, lambda w: w[:, 3:]), 2, ("shapes contradict", "(GRU)")),
    "a gate of the state is missing": (turned(2, lambda r: r[:, 6:]), 2, ("shapes contradict",)),
    "input weights of rank 2": (turned(1, lambda w: w[0]), 4, ("has 2 axes",)),
    "state weights of rank 4": (turned(2, lambda r: r[None]), 4, ("nothing is prunable",)),
    "a bias of rank 1": (turned(3, lambda b: b[0]), 4, ("has 1 axes",)),
    "a short bias": (turned(3, lambda b: b[:, :-1]), 2, ("extents 35 and 36",)),
    "state weights on their side": (turned(2, lambda r: r.transpose(0, 2, 1)), 2, ("shapes contradict",)),
    "no state weights": (without(2), 2, ("input 2",)),
    "no operands": (less(2), 2, ("has 2 inputs and takes 3 to 6",)),
    "no bias": (without(3), 0, ()),
    "lengths that are floats": (given(4, np.ones(7, np.float32)), 2, ("tensor(float)",)),
    "lengths of 64 bits": (given(4, np.ones(7, np.int64)), 2, ("tensor(int64)",)),
    "lengths of another batch": (given(4, np.ones(3, np.int32)), 2, ("extents 3 and 7",)),
    "a first state of another size": (given(5, np.ones((1, 7, 5), np.float32)), 2, ("extents 5 and 6",)),
    "layout 2": (put(layout=2), 0, ()),
    "one activation": (put(activations=["Tanh"]), 2, ("activation_func_names",)),
    "an unknown activation": (put(activations=["Tanh", "Odd"]), 2, ("Odd",)),
    "clipped at NaN": (put(clip=float("nan")), 2, ("clip_",)),
    "no features": (turned(1, lambda w: w[:, :, :0]), 2, ("extents 0 and 9",)),
    "empty state weights": (turned(2, lambda r: r[:, :0, :0]), 2, ("extents 0 and 18",)),
    "NaN": (turned(1, nothing), 2, ("holds NaN or Inf", "gru_1.weight", "--exclude")),
    "infinity": (turned(2, infinite), 2, ("holds NaN or Inf", "gru_1.recurrence")),
}
HEADS = listed(
    {
        ("onnx_flat", "Attention"): {
            "no heads": (put(q_num_heads=None), 2, ("q_num_heads",)),
            "0 heads": (put(q_num_heads=0), 4, (CRASH, "kv_num_heads 4 and q_num_heads 0")),
            "-4 heads": (put(q_num_heads=-4), 4, (CRASH,)),
            "3 heads of a width of 24": (put(q_num_heads=3), 2, ("Incompatible dimensions",)),
            "7 heads of a width of 24": (put(q_num_heads=7), 2, ("Incompatible dimensions",)),
            "3 heads of keys": (put(kv_num_heads=3), 2, ("Incompatible dimensions",)),
            "no head of keys": (put(kv_num_heads=0), 4, (CRASH, "kv_num_heads 0")),
            "2^40 heads of keys": (put(kv_num_heads=2**40), 4, (CRASH,)),
            "scaled by NaN": (put(scale=float("nan")), 0, ()),
            "scaled by 0": (put(scale=0.0), 2, ("scale must be greater than 0",)),
            "a mask of rank 0": (given(3, np.float32(0)), 2, ("attn_mask",)),
            "a mask of rank 1": (given(3, np.zeros(8, np.float32)), 2, ("attn_mask",)),
            "a mask of rank 5": (
                given(3, np.zeros((1, 1, 1, 8, 8), np.float32)),
                2,
                ("'attention_1' (Attention)",),
            ),
            "a mask of another length": (given(3, np.zeros((5, 5), np.float32)), 2, ("attn_mask",)),
            "keys without values": (given(4, np.zeros((1, 4, 2, 5), np.float32)), 2, ("shapes contradict",)),
            "no keys": (without(1), 2, ("input 1",)),
        },
        ("onnx_rotary_part", "RotaryEmbedding"): {
            "an odd width": (put(rotary_embedding_dim=5), 0, ()),
            "a table too narrow": (turned(1, lambda c: c[:, :-1]), 2, ()),
            "a table too short": (turned(1, lambda c: c[:1]), 2, ()),
        },
        ("microsoft_attention", "Attention"): {
            "no heads": (put(num_heads=None), 2, ("'attention_1' (Attention)",)),
            "0 heads": (put(num_heads=0), 4, ("does not hold 0 heads",)),
            "-4 heads": (put(num_heads=-4), 4, (CRASH, "num_heads -4")),
            "no bias": (without(2), 4, (CRASH, "'attention_1'", "give it one of zeros")),
            "no operand for a bias": (less(2), 4, (CRASH, "give it one of zeros")),
            "a short bias": (turned(2, lambda b: b[:-3]), 4, ("nothing is prunable",)),
            "packed weights too narrow": (turned(1, lambda w: w[:, :-1]), 4, ("71 does not hold 3 heads",)),
            "packed weights on their side": (turned(1, np.transpose), 4, ("nothing is prunable",)),
            "two widths": (put(qkv_hidden_sizes=[8, 8]), 2, ("'attention_1' (Attention)",)),
            "widths of 0": (put(qkv_hidden_sizes=[0, 0, 0]), 4, ("nothing is prunable",)),
            "scaled by NaN": (put(scale=float("nan")), 0, ()),
            "past without present": (given(4, np.zeros((2, 3, 4, 2, 5), np.float32)), 4, ()),
            "a mask of rank 5": (given(3, np.zeros((1,) * 5, np.int32)), 2, ("'attention_1' (Attention)",)),
        },
        ("multi_head", "MultiHeadAttention"): {
            "no heads": (put(num_heads=None), 2, ("(MultiHeadAttention)",)),
            "5 heads of a width of 24": (put(num_heads=5), 4, ("does not hold 5 heads",)),
            "no values": (without(2), 2, ("packed kv",)),
        },
        ("group_query", "GroupQueryAttention"): {
            "0 heads": (put(num_heads=0), 4, (CRASH,)),
            "2^40 heads of keys": (put(kv_num_heads=2**40), 4, (CRASH,)),
            "3 heads of keys": (put(kv_num_heads=3), 4, ("nothing is prunable",)),
            "past keys without values": (given(3, np.zeros((3, 2, 2, 8), np.float32)), 4, ()),
            "turned without a table": (put(do_rotary=1), 4, ()),
            "no lengths": (without(5), 4, ()),
        },
        ("group_query_rotary", "GroupQueryAttention"): {
            "a table too short": (turned(7, lambda c: c[:1]), 4, ()),
            "a table too narrow": (turned(7, lambda c: c[:, :-1]), 4, ()),
            "no sines": (without(8), 4, ()),
        },
    }
)
INTEGERS = listed(
    {
        ("qdq_by_channel", "DequantizeLinear"): {
            "a scale too short": (turned(1, lambda s: np.resize(s, 2)), 2, ("extents 2 and 11",)),
            "an empty scale": (turned(1, lambda s: s[:0]), 2, ("extents 0 and 11",)),
            "a scale of rank 3": (turned(1, lambda s: s.reshape(1, 1, -1)), 2, ("scale",)),
            "a scale of integers": (turned(1, lambda s: s.astype(np.int32)), 2, ("tensor(int32)",)),
            "a scale of 0": (turned(1, lambda s: 0 * s), 0, ()),
            "a scale of NaN": (turned(1, nothing), 0, ()),
            "a zero point of another type": (given(2, np.zeros(1, np.int32)), 2, ("different types",)),
            "a zero point too long": (given(2, np.zeros(99, np.int8)), 2, ("extents 99 and 11",)),
            "axis 9": (put(axis=9), 2, ("shapes contradict",)),
            "an axis that is text": (put(axis="x"), 2, ("(DequantizeLinear)",)),
            "no scale": (without(1), 2, ("input 1",)),
        },
        ("blocked_weights", "DequantizeLinear"): {
            "blocks of 3": (put(block_size=3), 2, ("quant_block_siz",)),
            "blocks of -1": (put(block_size=-1), 2, ("block_size",)),
            "an axis too far": (put(axis=9), 2, ("shapes contradict",)),
            "a scale of rank 1": (turned(1, np.ravel), 4, ("has 1 axes",)),
            "NaN": (turned(1, nothing), 2, ("holds NaN or Inf",)),
            "an odd number of nibbles": (turned(0, lambda w: w[:-1, :-1]), 2, ()),
        },
        ("ffn_of_4_bits", "MatMulNBits"): {
            "K of 5": (put(K=5), 4, ("nothing is prunable",)),
            "no K": (put(K=None), 4, ("nothing is prunable",)),
            "N of 7": (put(N=7), 4, ("nothing is prunable",)),
            "no N": (put(N=None), 2, ("(MatMulNBits)",)),
            "3 bits": (put(bits=3), 4, ("nothing is prunable",)),
            "0 bits": (put(bits=0), 4, ("nothing is prunable",)),
            "blocks of 7": (put(block_size=7), 4, ("nothing is prunable",)),
            "a short blob": (turned(1, lambda w: w[:, :, :-1]), 4, ("nothing is prunable",)),
            "few blocks": (turned(1, lambda w: w[:, :-1]), 4, ("nothing is prunable",)),
            "few rows": (turned(1, lambda w: w[:-1]), 4, ("nothing is prunable",)),
            "a short scale": (turned(2, lambda s: s[:-1]), 4, ("nothing is prunable",)),
            "no scale": (without(2), 4, ("nothing is prunable",)),
            "a zero point of 3 bytes": (given(3, np.zeros(3, np.uint8)), 4, ("nothing is prunable",)),
        },
        ("residual_of_qlinear", "QLinearConv"): {
            "no bias": (less(8), 0, ()),
            "a short bias": (given(8, np.zeros(3, np.int32)), 2, ("extents 3 and 11",)),
            "a bias of floats": (given(8, np.zeros(11, np.float32)), 2, ("tensor(float)",)),
            "ten operands": (lambda proto, held: held.input.append(held.input[0]), 2, ("takes 8 to 9",)),
            "a short scale": (turned(4, lambda s: np.resize(s, 3)), 2, ("extents 3 and 11",)),
            "no zero point": (without(2), 2, ("INVALID_GRAPH",)),
            "a zero point of another type": (turned(5, lambda z: z.astype(np.int32)), 2, ("tensor(int32)",)),
            "an output of another type": (
                turned(7, lambda z: (z // 2).astype(np.int8)),
                2,
                ("different types",),
            ),
            "0 groups": (put(group=0), 2, ("shapes contradict",)),
            "no filters": (turned(3, lambda w: w[:0]), 2, ("extents 11 and 0",)),
        },
        ("branches_of_qlinear", "QLinearConcat"): {
            "an operand is left out": (without(3), 4, (CRASH,)),
        },
    }
)


def judged(proto: onnx.ModelProto, folder: Path, code: int, words: Words) -> None:
    """`shrink` ends as said; what it writes runs."""
    path = write(proto, folder / "model.onnx")
    if code:
        refused(path, *words, code=code)
        return
    result = shrink(path)
    assert result.exit_code == 0, result.output
    assert loads(path.with_name("model.pruned.onnx")) or not loads(path)


@pytest.mark.parametrize("name", RECURRENCE)
def test_broken_recurrence(name: str, tmp_path: Path) -> None:
    change, code, words = RECURRENCE[name]
    judged(first_of(RECURRENT["gru"], "GRU", change), tmp_path, code, words)


@pytest.mark.parametrize("name", HEADS)
def test_broken_attention(name: str, tmp_path: Path) -> None:
    network, op, (change, code, words) = HEADS[name]
    judged(first_of(ATTENTION[network], op, change), tmp_path, code, words)


@pytest.mark.parametrize("name", ["residual", "lstm_quantized"])
def test_a_recurrence_over_nothing(name: str, tmp_path: Path) -> None:
    """A stated extent of 0 aborts the process in onnxruntime."""
    proto = RECURRENT[name]()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    path = write(proto, tmp_path / "model.onnx")
    before = listing(tmp_path)
    result = shrink(path)
    check_refused(result, "crashes on nothing", "input 'sequence'", code=result.exit_code)
    assert result.exit_code in (2, 4)
    assert listing(tmp_path) == before


def test_a_loop_with_an_output_that_has_no_name(tmp_path: Path) -> None:
    """Such a node, which may be no more than careless, takes the process along in onnxruntime."""
    proto = CONTROL_FLOW["loop_until"]()
    next(held for held in proto.graph.node if held.op_type == "Loop").output[1] = ""
    refused(write(proto, tmp_path / "model.onnx"), CRASH, "name it")


def test_a_loop_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "ENDLESS", 1)
    values = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
    values += [helper.make_tensor_value_info("go", TensorProto.BOOL, []), floats("s", "n", 8, 8, 8)]
    nodes = [node("Identity", ["go"], ["on"]), node("Relu", ["s"], ["r"])]
    results = [helper.make_tensor_value_info("on", TensorProto.BOOL, []), floats("r", "n", 8, 8, 8)]
    body = helper.make_graph(nodes, "body", values, results)
    loop = node("Loop", ["", "yes", "a"], ["b"], name="loop", body=body)
    path = write(net([loop], [numpy_helper.from_array(np.array(True), "yes")]), tmp_path / "model.onnx")
    refused(path, "a loop of the model did not end in 1 seconds")


ODD: dict[str, tuple[Callable[..., onnx.ModelProto], str, Edit, int, Words]] = {
    "a squeeze of no axes": (RECURRENT["lstm"], "Squeeze", turned(1, lambda a: a[:0]), 0, ()),
    "a cast to nothing": (QUANTISED["cast_weights"], "Cast", put(to=0), 4, ("nothing is prunable",)),
    "angles that do not turn": (
        ATTENTION["onnx_rotary_part"],
        "RotaryEmbedding",
        put(rotary_embedding_dim=64),
        2,
        ("RotaryEmbedding",),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_operands(name: str, tmp_path: Path) -> None:
    build, op, change, code, words = ODD[name]
    judged(first_of(build, op, change), tmp_path, code, words)


def test_branches_that_broadcast_in_two_ways(tmp_path: Path) -> None:
    """One gives a vector and one a number: what multiplies with either keeps its channels."""
    proto = CONTROL_FLOW["if_gives_a_weight"]()
    choice = next(held for held in proto.graph.node if held.op_type == "If")
    other = next(t for a in choice.attribute for t in a.g.initializer if t.name == "other")
    other.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "other"))
    refused(write(proto, tmp_path / "model.onnx"), "Mul: the shape of input 1 is unknown", code=4)


@pytest.mark.parametrize("name", INTEGERS)
def test_broken_quantisation(name: str, tmp_path: Path) -> None:
    network, op, (change, code, words) = INTEGERS[name]
    judged(first_of(QUANTISED[network], op, change), tmp_path, code, words)


@pytest.mark.parametrize("name", ["residual_of_qlinear", "branches_of_qlinear"])
def test_an_input_of_no_shape_is_not_taken_for_a_number(name: str, tmp_path: Path) -> None:
    """Convolutions of integers over a number abort the process in onnxruntime."""
    proto = QUANTISED[name]()
    for value in proto.graph.input:
        value.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    refused(write(proto, tmp_path / "model.onnx"), "nothing is prunable (the shape of", code=4)


def test_results_that_are_nothing_say_little(tmp_path: Path) -> None:
    proto = first_of(QUANTISED["qdq_by_channel"], "DequantizeLinear", turned(1, nothing))
    path = write(proto, tmp_path / "model.onnx")
    result = shrink(path, "--json", "-")
    notes = json.loads(result.stdout)["equivalence"]["notes"]
    assert any("constant or not finite" in note for note in notes)


# ---------------------------------------------------------------------------------------- layers and plans


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return write(TRANSFORMERS["gpt2"](), tmp_path / "model.onnx")


@pytest.mark.parametrize("wish", ["", ",", ",,", "-0.5", "-1", "0", "0.0", "1.5", "1e309", "nan", "-inf"])
def test_layers_that_cannot_be_meant(wish: str, deep: Path) -> None:
    before = listing(deep.parent)
    check_refused(run("shrink", deep, "--channels", 0.5, "--layers", wish), "--layers", "a whole number")
    assert listing(deep.parent) == before


@pytest.mark.parametrize(
    "wish", [" ", "0x10", "1,5", "ghost", "\x1b[2J", "ffn\n", "[", "é" * 300, "99", "1e300"]
)
def test_layers_that_are_not_there(wish: str, deep: Path) -> None:
    before = listing(deep.parent)
    check_refused(run("shrink", deep, "--layers", wish), deep, "--layers", "residual block")
    assert listing(deep.parent) == before


def test_all_layers_by_a_pattern(deep: Path) -> None:
    result = run("shrink", deep, "--layers", "*", "--json", "-")
    assert result.exit_code in (0, 4), result.output
    if result.exit_code == 0:
        assert json.loads(result.stdout)["changes"]["layers"]["after"] == 0


def removals(deep: Path) -> dict[str, Any]:
    plan = deep.with_name("good.json")
    done = run("plan", deep, "--layers", 1, "--layer-criterion", "last", "-o", plan)
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(plan.read_text())
    return document


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown block": lambda edit: [{"remove": "ghost"}],
    "a node that is no block": lambda edit: [{"remove": "x\x1b[2J"}],
    "the same twice": lambda edit: [edit, edit],
    "a number": lambda edit: [{"remove": 7}],
    "a list": lambda edit: [{"remove": [edit["remove"]]}],
    "nothing": lambda edit: [{"remove": None}],
    "an empty name": lambda edit: [{"remove": ""}],
    "half a surrogate": lambda edit: [{"remove": "\ud800"}],
    "thousands": lambda edit: [{"remove": f"block {i}"} for i in range(5000)],
    "one among thousands": lambda edit: [edit, *({"remove": f"block {i}"} for i in range(5000))],
}


@pytest.mark.parametrize("name", SPOILT)
def test_removals_that_cannot_be(name: str, deep: Path) -> None:
    document = removals(deep)
    document["edits"] = SPOILT[name](document["edits"][0])
    check_refused(apply(deep, document), "make")
    assert not deep.with_name("small.onnx").exists()


def test_keys_that_a_plan_does_not_know_are_passed_over(deep: Path) -> None:
    document = removals(deep)
    assert apply(deep, document).exit_code == 0
    expected = deep.with_name("small.onnx").read_bytes()
    document["edits"][0] |= {"colour": "red", "units": [], "of": None}
    document["more"] = {"nested": [1]}
    assert apply(deep, document).exit_code == 0
    assert deep.with_name("small.onnx").read_bytes() == expected


def test_a_block_of_another_model(deep: Path) -> None:
    """A plan names the model it was made for; with that changed by hand, the block is not found."""
    other = write(RECURRENT["residual"](), deep.with_name("other.onnx"))
    document = removals(deep)
    check_refused(apply(other, document), "made for another model")
    check_refused(apply(other, {**document, "model": load(other).digest()}), "make")


def test_heads_of_a_model_without(tmp_path: Path) -> None:
    path = write(net(), tmp_path / "model.onnx")
    before = listing(tmp_path)
    check_refused(run("shrink", path, "--heads", 0.5), path, "no heads", code=4)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["multi_head_cached", "microsoft_attention_cached"])
def test_heads_that_a_cache_holds(name: str, tmp_path: Path) -> None:
    path = write(ATTENTION[name](), tmp_path / "model.onnx")
    before = listing(tmp_path)
    check_refused(run("shrink", path, "--heads", 0.5, "--align", 1), path, "cache", "past", code=4)
    assert listing(tmp_path) == before


# ------------------------------------------------------------------------------------------- sizes by name


def named(*dims: str | int) -> onnx.ModelProto:
    """The net with dimensions named like this, on an input of its own each."""
    proto = net()
    for i, dim in enumerate(dims):
        proto.graph.input.append(floats(f"p{i}", dim))
        proto.graph.output.append(floats(f"q{i}", dim))
        proto.graph.node.append(node("Relu", [f"p{i}"], [f"q{i}"]))
    return proto


@pytest.mark.parametrize(
    "dims",
    [
        ("a+b+c", "a", "b", "c"),
        ("a + a", "a"),
        ("a", "a + b", "b", "b + a"),
        ("a + b", "b + a"),
        ("a + b", "a", "b", "a + b + a"),
        ("+", "++", " + "),
        ("a", "a + ", "+ a"),
        ("a", "a + ²", "a + ٣", "a + -1", "a + 0x3", "a + 1e3"),
        ("a", "a + " + "9" * 30, "a + " + "9" * 5000),
        ("größe", "größe + größe", "🙂"),
        ("", "", " "),
        ("n + 1", "n + 1 + 1"),
        ("n + 999999999", "n + 99999999 + 99999999 + 99999999"),
    ],
    ids=lambda dims: ",".join(dims)[:24],
)
def test_dimensions_named_as_sums(dims: tuple[str, ...], tmp_path: Path) -> None:
    result = shrink(write(named(*dims), tmp_path / "model.onnx"))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("dim", [2**33, 2**40, 2**62])
def test_sizes_that_do_not_fit(dim: int, tmp_path: Path) -> None:
    refused(write(named(dim), tmp_path / "model.onnx"), "input 'p0'", "too large")


def test_sums_of_thousands(tmp_path: Path) -> None:
    proto = named(" + ".join(["n"] * 3000))
    start = time.perf_counter()
    assert shrink(write(proto, tmp_path / "model.onnx")).exit_code == 0
    assert time.perf_counter() - start < 20


def test_sums_are_taken_where_their_terms_are_known() -> None:
    keys = {"n": "batch", "a": "length", "n + a": "length", "a + 2": "length", "a + ²": "length"}
    sizes = next(assignments(keys))
    assert sizes["n + a"] == sizes["n"] + sizes["a"]
    assert sizes["a + 2"] == sizes["a"] + 2


# ----------------------------------------------------------------------------------------- random mutation

NEVER_ENDING = {"loop_until"}  # a change to its condition makes a loop that onnxruntime never leaves
FAMILIES: dict[str, Mapping[str, Callable[..., onnx.ModelProto]]] = {
    "attention": ATTENTION,
    "recurrent": RECURRENT | BATCH_FIRST,
    "quantised": QUANTISED,
    "control flow": {k: v for k, v in CONTROL_FLOW.items() if k not in NEVER_ENDING},
    "transformers": TRANSFORMERS,
}
CHOICES = [
    ("--channels", 0.5),
    ("--heads", 0.5),
    ("--head-width", 0.4),
    ("--layers", 1, "--layer-criterion", "last"),
]


def loads(path: Path) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(str(path), options, enable_fallback=0)
    except Exception:  # onnxruntime has classes of its own
        return False
    return True


@pytest.mark.parametrize("start", range(0, 30, 10))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_changes(family: str, start: int, tmp_path: Path) -> None:
    """Pruned, left alone or refused: never a crash, an internal error, or a file that does not load."""
    path, target = tmp_path / "model.onnx", tmp_path / "small.onnx"
    for seed in range(start, start + 10):
        rng = np.random.default_rng([len(family), seed])
        names = sorted(FAMILIES[family])
        name = names[int(rng.integers(len(names)))]
        proto = FAMILIES[family][name]()
        what = f"{name}, {mutate(proto, rng)}"
        choices = CHOICES if family in ("attention", "transformers") else CHOICES[:1]
        options = choices[int(rng.integers(len(choices)))]
        write(proto, path)
        target.unlink(missing_ok=True)
        result = run("shrink", path, *options, "--align", 1, "-o", target)
        if result.exit_code == 0:
            assert loads(target) or not loads(path), what
        else:
            assert result.exit_code in (2, 4), f"{what}: {result.output}"
            check_refused(result, code=result.exit_code)
            assert list(listing(tmp_path)) == ["model.onnx"], what
