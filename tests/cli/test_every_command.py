"""Every command: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import numpy_helper

from models.architectures import resnet18
from models.topologies import TOPOLOGIES
from onnxprune import __version__, surgery
from onnxprune.blocks import Blocks
from onnxprune.criteria import NAMES
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model, load
from onnxprune.plan import Plan
from tests.reference import assert_equal_to_masked
from tests.small import check_refused, floats, net, run, weight, write

PLAIN = ("--criterion", "l2", "--allocation", "uniform", "--repair", "none")  # looks at weights alone
THIRD = ("--channels", 0.3, "--align", 1, *PLAIN)


def report(result: Result) -> dict[str, object]:
    """The JSON on stdout, alone."""
    assert result.exit_code == 0, result.output
    document: dict[str, object] = json.loads(result.stdout)
    return document


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in onnx.load(path).graph.initializer}


# --------------------------------------------------------------------------------------------------- help


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    for arguments in (["--help"], ["-h"]):
        result = run(*arguments)
        assert result.exit_code == 0
        for word in (
            "shrink",
            "inspect",
            "plan",
            "apply",
            "fold",
            "validate",
            "sensitivity",
            "Exit codes",
            "4 nothing to prune",
        ):
            assert word in result.output


@pytest.mark.parametrize("command", ["shrink", "inspect", "plan", "apply", "fold", "validate", "sensitivity"])
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: onnxprune {command} ")
    for line in result.output.splitlines():
        assert not line.rstrip().endswith((" FILE", " TEXT", " FLOAT")), f"an option without help: {line}"


def test_every_option_is_there() -> None:
    words = run("shrink", "--help").output
    for option in (
        "--channels", "--macs", "--params", "--align", "--min-channels", "--include", "--exclude", "--criterion",
        "--allocation", "--seed", "--allow-lossy", "--plan-out", "--json", "--dry-run", "--repair", "-o,", "--data",
        "--samples", "--preprocess", "--steps", "--max-drop", "--eval", "--metric", "--bytes",
    ):  # fmt: skip
        assert option in words


def test_version() -> None:
    assert run("--version").output == f"onnxprune, version {__version__}\n"


def test_usage_errors_are_one_line() -> None:
    for arguments in (
        ["shrink"],
        ["shrink", "--frob"],
        ["frob"],
        ["plan", "x.onnx"],
        ["apply", "a", "b", "c"],
    ):
        check_refused(run(*arguments), "--help'")


def test_folders_that_cannot_be_written_to(
    model: Path, tmp_path: Path, powerless: Callable[[], AbstractContextManager[None]]
) -> None:
    """Said before any work: this data would be refused as constant."""
    closed, data = tmp_path / "closed", tmp_path / "x.npy"
    closed.mkdir(mode=0o500)
    np.save(data, np.zeros((4, 3, 32, 32), np.float32))
    with powerless():
        for command in (
            ("shrink", model, *THIRD, "--data", data),
            ("plan", model, *THIRD, "--data", data),
            ("sensitivity", model, "--data", data),
            ("fold", model),
        ):
            words = f"{closed / 'out'}: cannot write to the folder {closed} (Permission denied)"
            check_refused(run(*command, "-o", closed / "out"), words)


# ------------------------------------------------------------------------------------------------- shrink


def test_shrink_writes_beside_the_model_and_prints_the_table(model: Path) -> None:
    before = model.read_bytes()
    result = run("shrink", model, *THIRD)
    target = model.with_name("model.pruned.onnx")
    assert result.exit_code == 0
    assert result.stderr == ""
    for words in (
        "channels",
        "parameters",
        "MACs",
        "weight bytes",
        "kept",
        "groups cut",
        "equals the masked original",
    ):
        assert words in result.stdout
    assert f"wrote {target} ({target.stat().st_size:,} bytes)" in result.stdout
    assert model.read_bytes() == before
    assert sorted(p.name for p in model.parent.iterdir()) == ["model.onnx", "model.pruned.onnx"]
    onnx.checker.check_model(onnx.load(target), full_check=True)


def test_what_shrink_writes_equals_the_masked_original(model: Path) -> None:
    plan = model.with_name("plan.json")
    small = model.with_name("small.onnx")
    assert run("shrink", model, *THIRD, "-o", small, "--plan-out", plan).exit_code == 0
    assert_equal_to_masked(DependencyGraph(load(model)), Plan.load(plan), onnx.load(small))


def test_the_table_states_what_is_in_the_file(model: Path) -> None:
    document = report(run("shrink", model, *THIRD, "--json", "-"))
    sizes = shapes(model.with_name("model.pruned.onnx"))
    assert document["after"]["params"] == sum(int(np.prod(s)) for n, s in sizes.items() if _counted(n))  # type: ignore[index]
    assert document["file_bytes"] == model.with_name("model.pruned.onnx").stat().st_size
    assert document["equivalence"]["passed"] is True  # type: ignore[index]


def _counted(name: str) -> bool:
    return not name.endswith(("shape", "axes"))


def test_dry_run_prints_the_plan_and_writes_nothing(model: Path) -> None:
    result = run("shrink", model, *THIRD, "--dry-run")
    assert list(model.parent.iterdir()) == [model]
    target = model.with_name("plan.json")
    assert run("plan", model, *THIRD, "-o", target).exit_code == 0
    assert result.stdout == target.read_text()
    assert result.stderr == ""


def test_shrink_again_overwrites_its_own_output(model: Path) -> None:
    assert run("shrink", model, *THIRD).exit_code == 0
    once = model.with_name("model.pruned.onnx").read_bytes()
    assert run("shrink", model, "--channels", 0.6, "--align", 1, *PLAIN).exit_code == 0
    assert model.with_name("model.pruned.onnx").read_bytes() != once
    assert run("shrink", model, *THIRD).exit_code == 0
    assert model.with_name("model.pruned.onnx").read_bytes() == once


def test_plan_then_apply_is_shrink_bit_for_bit(model: Path) -> None:
    folder = model.parent
    assert (
        run("shrink", model, *THIRD, "-o", folder / "a.onnx", "--plan-out", folder / "a.json").exit_code == 0
    )
    assert run("plan", model, *THIRD, "-o", folder / "b.json").exit_code == 0
    assert run("apply", model, folder / "b.json", "-o", folder / "b.onnx").exit_code == 0
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


def test_plan_to_standard_output(model: Path) -> None:
    document = report(run("plan", model, *THIRD, "-o", "-"))
    assert document["model"] == load(model).digest()
    assert {e["kind"] for e in document["edits"]} == {"exact"}  # type: ignore[attr-defined]


def test_json_goes_to_a_file_or_alone_to_standard_output(model: Path) -> None:
    target = model.with_name("report.json")
    result = run("shrink", model, *THIRD, "--json", target)
    assert "wrote" in result.stdout
    written = json.loads(target.read_text())
    printed = report(run("shrink", model, *THIRD, "--json", "-"))
    for document in (written, printed):
        document.pop("seconds")
    assert written == printed
    plan = model.with_name("plan.json")
    assert run("plan", model, *THIRD, "-o", plan).exit_code == 0
    applied = report(run("apply", model, plan, "-o", model.with_name("small.onnx"), "--json", "-"))
    assert applied["after"] == printed["after"]


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("criterion", NAMES)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_criteria_and_allocations(criterion: str, allocation: str, model: Path) -> None:
    options = ("--criterion", criterion, "--allocation", allocation, "--samples", 4)
    document = report(run("shrink", model, *THIRD, *options, "--json", "-"))
    kept = document["kept"]
    assert kept["channels"] == pytest.approx(0.7, abs=0.05)  # type: ignore[index]
    assert document["provenance"]["options"]["criterion"] == criterion  # type: ignore[index]


def test_criteria_choose_differently(model: Path) -> None:
    plans = {
        options: run("plan", model, *THIRD, "--samples", 8, "-o", "-", *options).stdout
        for options in [
            *(("--criterion", name) for name in NAMES),
            ("--criterion", "random", "--seed", 1),
            ("--allocation", "global"),
        ]
    }
    units = [[e["units"] for e in json.loads(text)["edits"]] for text in plans.values()]
    assert len({str(u) for u in units}) == len(units)


@pytest.mark.parametrize(("option", "column"), [("--macs", "macs"), ("--params", "params")])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_targets_are_reached(option: str, column: str, share: float, model: Path) -> None:
    document = report(run("shrink", model, option, share, "--align", 1, *PLAIN, "--json", "-"))
    assert document["kept"][column] <= share  # type: ignore[index]
    assert document["kept"][column] > share - 0.15  # type: ignore[index]


def test_min_channels(model: Path) -> None:
    document = report(
        run("plan", model, "--channels", 0.9, "--align", 1, *PLAIN, "--min-channels", 6, "-o", "-")
    )
    kept = [len(e.units) for e in Plan.from_json(json.dumps(document)).keeps]
    assert kept
    assert min(kept) == 6


def test_align(tmp_path: Path) -> None:
    model = write(resnet18(width=0.5, image=32, classes=10), tmp_path / "model.onnx")
    for align in (1, 4, 8, 16, 32):
        text = run("plan", model, "--channels", 0.4, "--align", align, *PLAIN, "-o", "-").stdout
        edits = Plan.from_json(text).keeps
        assert edits
        assert all(len(e.units) % min(align, e.size // 2) == 0 for e in edits)


def test_include_and_exclude(model: Path) -> None:
    def cut(*options: object) -> set[str]:
        return {e["keep"] for e in report(run("plan", model, *THIRD, "-o", "-", *options))["edits"]}  # type: ignore[attr-defined]

    everything = cut()
    third = cut("--include", "layer3.*")
    assert third
    assert third < everything
    assert cut("--exclude", "layer3.*") == everything - third
    assert cut("--include", "layer3.*", "--include", "layer4.*") > third
    assert cut("--include", "layer3.*", "--exclude", "layer3.0.conv_1") < third
    assert cut("--include", "layer2.0.conv_1.weight") < everything  # by the name of a weight


def test_lossy_groups_wait_for_permission(tmp_path: Path) -> None:
    model = write(TOPOLOGIES["layer_norm_channels"](), tmp_path / "model.onnx")
    careful = report(run("shrink", model, *THIRD, "--json", "-", "-o", tmp_path / "a.onnx"))
    assert careful["skipped"]["lossy"]  # type: ignore[index]
    bold = report(run("shrink", model, *THIRD, "--allow-lossy", "--json", "-", "-o", tmp_path / "b.onnx"))
    assert "lossy" not in bold["skipped"]  # type: ignore[operator]
    assert any("lossy" in note for note in bold["notes"])  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------ file layouts


def test_external_data_comes_back_in_the_same_layout(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    proto = resnet18(width=0.25, image=32, classes=10)
    onnx.save(proto, model, save_as_external_data=True, location="weights.bin", size_threshold=2000)
    outside = {
        t.name for t in onnx.load(model, load_external_data=False).graph.initializer if t.external_data
    }
    assert run("shrink", model, *THIRD, "-o", tmp_path / "small.onnx").exit_code == 0
    plain = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    assert {t.name for t in plain.graph.initializer if t.external_data} == outside
    assert {e.value for t in plain.graph.initializer for e in t.external_data if e.key == "location"} == {
        "small.onnx.data"
    }
    onnx.checker.check_model(str(tmp_path / "small.onnx"))
    write(proto, tmp_path / "single.onnx")
    assert run("shrink", tmp_path / "single.onnx", *THIRD).exit_code == 0
    assert load(tmp_path / "small.onnx").digest() == load(tmp_path / "single.pruned.onnx").digest()


def test_weights_that_are_inputs_stay_inputs(tmp_path: Path) -> None:
    """IR version 3: every initializer is listed as a graph input, and both must shrink."""
    model = write(TOPOLOGIES["weights_are_inputs"](), tmp_path / "model.onnx")
    assert run("shrink", model, *THIRD).exit_code == 0
    small = onnx.load(tmp_path / "model.pruned.onnx")
    assert small.ir_version == 3
    stated = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in small.graph.input}
    assert {t.name for t in small.graph.initializer} < set(stated)
    assert all(stated[t.name] == list(t.dims) for t in small.graph.initializer)
    assert [i.name for i in small.graph.input] == [i.name for i in onnx.load(model).graph.input]


def test_everything_else_in_the_file_survives(model: Path) -> None:
    proto = onnx.load(model)
    proto.producer_name, proto.model_version, proto.doc_string = "me", 7, "a model"
    onnx.helper.set_model_props(proto, {"classes": "cat,dog"})
    proto.graph.doc_string = "a graph"
    proto.graph.node[0].doc_string = "a node"
    write(proto, model)
    assert run("shrink", model, *THIRD).exit_code == 0
    small = onnx.load(model.with_name("model.pruned.onnx"))
    assert (small.producer_name, small.model_version, small.doc_string) == ("me", 7, "a model")
    assert small.metadata_props == proto.metadata_props
    assert small.opset_import == proto.opset_import
    assert small.ir_version == proto.ir_version
    assert (small.graph.name, small.graph.doc_string) == (proto.graph.name, "a graph")
    assert small.graph.input == proto.graph.input
    assert small.graph.output == proto.graph.output
    assert small.graph.node == proto.graph.node


# ---------------------------------------------------------------------------------------- inspect and fold


def test_inspect_shows_groups_and_pins(model: Path) -> None:
    result = run("inspect", model)
    assert result.exit_code == 0
    for words in ("layer1.0.conv_1 channels (8)", "exact", "12 groups", "pinned: graph input 'image'"):
        assert words in result.stdout
    assert ":0 " not in result.stdout
    document = report(run("inspect", model, "--json"))
    assert len(document["groups"]) == 12  # type: ignore[arg-type]
    named = {group["name"]: group["label"] for group in document["groups"]}  # type: ignore[attr-defined]
    assert named["layer1.0.conv_1.weight:0"] == "layer1.0.conv_1 channels (8)"
    shown = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
    assert sorted(shown) == sorted(named.values())
    assert {p["reason"] for p in document["pinned"]} == {"graph input 'image'", "graph output 'logits'"}  # type: ignore[attr-defined]
    assert 0.9 < document["prunable"]["params"] <= 1  # type: ignore[index]


def test_inspect_why(model: Path) -> None:
    named = run("inspect", model, "--why", "layer1.0.conv_1")
    assert named.exit_code == 0
    text = "is group layer1.0.conv_1 channels (8) [exact; layer1.0.conv_1.weight:0 in plans], coupled to:"
    assert text in named.stdout
    assert "layer1.0.bn_1" in named.stdout
    assert "is pinned: graph input 'image'" in run("inspect", model, "--why", "stem.conv_1").stdout
    assert "head.gemm_1.weight" in run("inspect", model, "--why", "head.gemm_1.weight").stdout
    assert set(json.loads(run("inspect", model, "--why", "stem*", "--json").stdout)) == set(
        run("inspect", model, "--why", "stem*").stdout.splitlines()
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("conv_1", "did you mean"),
        ("layer1.0.conv1", "layer1.0.conv_1"),
        ("CONV", "did you mean"),
        ("zzz", "patterns"),
    ],
)
def test_inspect_why_of_nothing(name: str, hint: str, model: Path) -> None:
    check_refused(run("inspect", model, "--why", name), f"no node or tensor is called '{name}'", hint)


def test_fold_writes_and_is_idempotent(model: Path) -> None:
    once, twice = model.with_name("once.onnx"), model.with_name("twice.onnx")
    result = run("fold", model, "-o", once)
    assert result.exit_code == 0
    assert "nodes folded away" in result.stdout
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(once).graph.node}
    assert run("fold", once, "-o", twice).exit_code == 0
    assert load(twice).digest() == load(once).digest()


# ------------------------------------------------------------------------------------------------ validate


def shrunk(model: Path) -> tuple[Path, Path]:
    small, plan = model.with_name("small.onnx"), model.with_name("plan.json")
    assert run("shrink", model, *THIRD, "-o", small, "--plan-out", plan).exit_code == 0
    return small, plan


def test_validate_a_good_model(model: Path, short_rounds: None) -> None:
    small, plan = shrunk(model)
    result = run("validate", model, small, "--plan", plan)
    assert result.exit_code == 0
    for words in ("structure: sound", "equals the masked original", "output drift", "cosine", "latency"):
        assert words in result.stdout
    without = run("validate", model, small)
    assert without.exit_code == 0
    assert "equivalence: not checked (give --plan)" in without.stdout
    document = report(run("validate", model, small, "--plan", plan, "--json"))
    assert document["passed"] is True
    assert document["latency"]["ratio"] > 0  # type: ignore[index]


def test_validate_finds_a_wrong_weight(model: Path, short_rounds: None) -> None:
    small, plan = shrunk(model)
    proto = onnx.load(small)
    tensor = next(t for t in proto.graph.initializer if t.name == "layer2.0.conv_1.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[[0, 1]] = values[[1, 0]]  # two filters swapped: sound, and another network
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    write(proto, small)
    assert run("validate", model, small).exit_code == 0
    result = run("validate", model, small, "--plan", plan)
    assert result.exit_code == 1
    assert "DIFFERS FROM the masked original" in result.stdout
    document = json.loads(run("validate", model, small, "--plan", plan, "--json").stdout)
    assert document["passed"] is False


@pytest.mark.parametrize("change", ["name", "type", "shape", "missing", "weight"])
def test_validate_finds_a_broken_model(change: str, model: Path, short_rounds: None) -> None:
    small, plan = shrunk(model)
    proto = onnx.load(small)
    output = proto.graph.output[0]
    if change == "name":
        proto.graph.node[-1].output[0] = output.name = "scores"
    elif change == "type":
        output.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    elif change == "shape":
        output.type.tensor_type.shape.dim[1].dim_value = 11
    elif change == "missing":
        proto.graph.output.append(onnx.helper.make_tensor_value_info(proto.graph.node[0].output[0], 1, None))
    else:
        tensor = next(t for t in proto.graph.initializer if t.name == "layer2.0.conv_1.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, 1:], tensor.name))
    write(proto, small)
    for options in ((), ("--plan", plan)):
        result = run("validate", model, small, *options)
        assert result.exit_code == 1, result.output
        assert "structure: BROKEN" in result.stdout
        assert ("outputs changed" in result.stdout) == (change != "weight")


def test_validate_refuses_what_it_cannot_read(model: Path) -> None:
    check_refused(run("validate", model, model.with_name("none.onnx")), "none.onnx", "No such file")
    bad = write(b"text", model.with_name("bad.onnx"))
    check_refused(run("validate", bad, model), "bad.onnx", "not an ONNX model")
    check_refused(run("validate", model, model, "--plan", bad), "bad.onnx", "not a plan")


# ------------------------------------------------------------------------------------------ exit 3 and 4


def test_a_wrong_result_is_never_written(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Surgery that scales one weight: the check sees it, nothing is written, and the evidence is kept."""
    right = surgery.apply

    def wrong(graph: DependencyGraph, plan: Plan, blocks: Blocks) -> onnx.ModelProto:
        proto = right(graph, plan, blocks)
        tensor = next(t for t in proto.graph.initializer if t.name == "layer2.0.conv_1.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
        return proto

    folder = tmp_path_factory.mktemp("kept")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(surgery, "apply", wrong)
    plan = model.with_name("plan.json")
    assert run("plan", model, *THIRD, "-o", plan).exit_code == 0
    for command in (("shrink", model, *THIRD), ("apply", model, plan, "-o", model.with_name("small.onnx"))):
        result = run(*command)
        check_refused(result, model, "the pruned model is wrong", "please report it", code=3)
        (kept,) = folder.iterdir()
        assert str(kept) in result.stderr
        assert sorted(p.name for p in kept.iterdir()) == ["plan.json", "rejected.onnx"]
        assert Plan.load(kept / "plan.json").model == load(model).digest()
        onnx.load(kept / "rejected.onnx")
        for path in kept.iterdir():
            path.unlink()
        kept.rmdir()
        assert sorted(p.name for p in model.parent.iterdir()) == ["model.onnx", "plan.json"]


def test_an_unforeseen_error_is_no_traceback(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(surgery, "apply", fail)
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    result = run("shrink", model, *THIRD)
    check_refused(result, "internal error (ZeroDivisionError: oops)", "please report it", code=3)
    (kept,) = folder.iterdir()
    assert "in fail" in (kept / "traceback.txt").read_text()


def _alone() -> onnx.ModelProto:
    conv = onnx.helper.make_node("Conv", ["x", "w1"], ["y"], name="conv")
    return _graph([conv], [weight("w1", 4, 3, 3, 3)])


def _foreign() -> onnx.ModelProto:
    return net([onnx.helper.make_node("Mystery", ["a"], ["b"], name="mystery", domain="acme")])


def _weightless() -> onnx.ModelProto:
    return _graph([onnx.helper.make_node("Relu", ["x"], ["y"], name="relu")], [])


def _graph(nodes: list[onnx.NodeProto], stored: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        nodes, "g", [floats("x", 1, 3, 8, 8)], [floats("y", 1, None, None, None)], stored
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_alone, "1 axis: graph input 'x'; 1 axis: graph output 'y'"),
        (_foreign, "operator acme.Mystery has no declaration"),
        (_weightless, "it holds no weights"),
    ],
)
def test_nothing_to_prune_is_said_in_one_sentence(
    build: Callable[[], onnx.ModelProto], words: str, tmp_path: Path
) -> None:
    proto = build()
    proto.opset_import.add(domain="acme", version=1)
    model = write(proto, tmp_path / "model.onnx")
    for command in (
        ("shrink", model),
        ("plan", model, "-o", tmp_path / "plan.json"),
        ("shrink", model, "--dry-run"),
    ):
        check_refused(run(*command, *THIRD), "nothing is prunable", words, "no file was written", code=4)
    assert list(tmp_path.iterdir()) == [model]


def test_too_small_for_the_alignment_is_advice(tmp_path: Path) -> None:
    model = write(net(), tmp_path / "model.onnx")
    result = run("shrink", model, "--channels", 0.1)
    check_refused(result, "1 group", "--align 1", code=4)


def test_a_model_from_memory_has_a_name() -> None:
    assert Model(net()).name == "net"
