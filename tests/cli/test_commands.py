"""The command line as its users meet it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxprune
from models.architectures import resnet18
from onnxprune import criteria
from tests.small import run as cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "resnet.onnx"
    onnx.save(resnet18(width=0.25, image=32, classes=10), path)
    return path


def test_help_names_every_command() -> None:
    text = cli("--help").output
    for command in ("shrink", "plan", "apply", "inspect", "fold", "validate"):
        assert command in text
        assert cli(command, "--help").exit_code == 0
    assert onnxprune.__version__ in cli("--version").output


def test_shrink_writes_the_model_and_prints_the_table(original: Path, tmp_path: Path) -> None:
    target, report = tmp_path / "small.onnx", tmp_path / "report.json"
    run = cli("shrink", original, "-o", target, "--channels", "0.5", "--align", "1", "--json", report)
    assert run.exit_code == 0, run.output
    assert "parameters" in run.stdout
    assert "equals the masked original" in run.stdout
    document = json.loads(report.read_text())
    assert document["equivalence"]["passed"]
    assert document["file_bytes"] == target.stat().st_size < original.stat().st_size
    stored = sum(
        int(np.prod(t.dims))
        for t in onnx.load(target).graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    )
    assert document["after"]["params"] == stored


def test_the_default_name_stands_beside_the_model(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "net.onnx"
    copy.write_bytes(original.read_bytes())
    assert cli("shrink", copy, "--channels", "0.3").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.pruned.onnx"]


def test_plan_and_apply_equal_shrink_bit_for_bit(original: Path, tmp_path: Path) -> None:
    small, again, plan, other = (tmp_path / n for n in ("a.onnx", "b.onnx", "p.json", "q.json"))
    assert cli("shrink", original, "-o", small, "--channels", "0.3", "--plan-out", plan).exit_code == 0
    assert cli("plan", original, "--channels", "0.3", "-o", other).exit_code == 0
    assert plan.read_bytes() == other.read_bytes()
    assert cli("apply", original, plan, "-o", again).exit_code == 0
    assert small.read_bytes() == again.read_bytes()


def test_dry_run_prints_the_plan_and_writes_nothing(original: Path, tmp_path: Path) -> None:
    run = cli("shrink", original, "-o", tmp_path / "x.onnx", "--channels", "0.3", "--dry-run")
    assert json.loads(run.stdout)["edits"]
    assert not list(tmp_path.iterdir())


def test_json_on_stdout_is_json_alone(original: Path, tmp_path: Path) -> None:
    run = cli("shrink", original, "-o", tmp_path / "x.onnx", "--channels", "0.3", "--json", "-")
    assert json.loads(run.stdout)["kept"]["channels"] < 1


def test_python_and_the_command_line_agree(original: Path, tmp_path: Path) -> None:
    assert cli("shrink", original, "-o", tmp_path / "a.onnx", "--channels", "0.3").exit_code == 0
    onnxprune.shrink(original, channels=0.3).save(tmp_path / "b.onnx")
    onnxprune.shrink(onnx.load(original), channels=0.3).save(tmp_path / "c.onnx")
    assert len({(tmp_path / f"{n}.onnx").read_bytes() for n in "abc"}) == 1


@pytest.mark.parametrize("seed", ["0", "1"])
def test_same_bytes_whatever_the_hash_seed(original: Path, tmp_path: Path, seed: str) -> None:
    target = tmp_path / "x.onnx"
    command = [sys.executable, "-m", "onnxprune", "shrink", original, "-o", target, "--channels", "0.3"]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # no progress in a pipe
    assert "\x1b" not in run.stdout
    expected = onnxprune.shrink(original, channels=0.3).model
    assert target.read_bytes() == expected.SerializeToString(deterministic=True)


def test_progress_shows_on_a_terminal(original: Path, tmp_path: Path) -> None:
    primary, secondary = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "onnxprune",
        "shrink",
        original,
        "-o",
        tmp_path / "x.onnx",
        "--channels",
        "0.3",
    ]
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=secondary, env={**os.environ, "TERM": "xterm"}
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            chunk = os.read(primary, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(primary)
    assert run.wait() == 0
    assert b"prove" in shown


@pytest.mark.parametrize("criterion", criteria.NAMES)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_criterion_and_allocation(original: Path, criterion: str, allocation: str) -> None:
    result = onnxprune.shrink(original, channels=0.4, align=1, criterion=criterion, allocation=allocation)
    assert result.report.kept["channels"] == pytest.approx(0.6, abs=0.02)


def test_criteria_choose_differently_and_seeds_matter(original: Path) -> None:
    def units(criterion: str, seed: int = 0) -> list[tuple[int, ...]]:
        options = onnxprune.Channels(0.4, align=1, criterion=criterion, seed=seed)
        return [edit.units for edit in onnxprune.make_plan(original, options).edits]

    assert units("l2") != units("fpgm")
    assert units("l2") != units("bn")
    assert units("random", 1) != units("random", 2)
    assert units("random", 1) == units("random", 1)


@pytest.mark.parametrize("target", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_targets_are_met_and_not_missed_by_far(
    original: Path, what: str, target: float, allocation: str
) -> None:
    options = {what: target}
    result = onnxprune.shrink(original, align=1, allocation=allocation, **options)  # type: ignore[arg-type]
    assert target - 0.04 < result.report.kept[what] <= target


def test_alignment_rounds_to_blocks_and_never_up(original: Path) -> None:
    for edit in onnxprune.make_plan(original, onnxprune.Channels(0.3, align=8)).edits:
        assert len(edit.units) % 8 == 0
        assert len(edit.units) < edit.size


def test_minimum_include_and_exclude(original: Path) -> None:
    def plan(**options: object) -> dict[str, int]:
        made = onnxprune.make_plan(original, onnxprune.Channels(0.9, align=1, **options))  # type: ignore[arg-type]
        return {edit.group: len(edit.units) for edit in made.edits}

    assert min(plan(minimum=5).values()) == 5
    everything = plan()
    first = next(iter(everything))
    weight = first.split(":")[0]
    inside, outside = set(plan(include=(weight,))), set(plan(exclude=(weight,)))
    assert first in inside
    assert not inside & outside
    assert inside | outside == set(everything)


def test_inspect_says_what_is_pinned_and_why(original: Path) -> None:
    text = cli("inspect", original).stdout
    assert "graph output 'logits'" in text
    document = json.loads(cli("inspect", original, "--json").stdout)
    assert document["prunable"]["macs"] == 1
    node = document["groups"][0]["nodes"][0]
    explained = cli("inspect", original, "--why", node).stdout
    assert document["groups"][0]["name"] in explained
    unknown = cli("inspect", original, "--why", node[:-2])
    assert unknown.exit_code == 2
    assert "did you mean" in unknown.stderr


def test_fold_takes_batch_normalisation_out_and_is_idempotent(original: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    assert cli("fold", original, "-o", once).exit_code == 0
    assert cli("fold", once, "-o", twice).exit_code == 0
    assert once.read_bytes() == twice.read_bytes()
    assert not [n for n in onnx.load(once).graph.node if n.op_type == "BatchNormalization"]


def test_validate_tells_sound_from_broken(original: Path, tmp_path: Path) -> None:
    small, plan, broken = tmp_path / "small.onnx", tmp_path / "plan.json", tmp_path / "broken.onnx"
    cli("shrink", original, "-o", small, "--channels", "0.3", "--plan-out", plan)
    good = cli("validate", original, small, "--plan", plan, "--json")
    assert good.exit_code == 0, good.output
    document = json.loads(good.stdout)
    assert document["passed"]
    assert document["equivalence"]["passed"]
    assert document["latency"]["ratio"] > 0

    wrong = onnx.load(small)
    weight = max(wrong.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(weight) * 1.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(wrong, broken)
    bad = cli("validate", original, broken, "--plan", plan)
    assert bad.exit_code == 1
    assert "DIFFERS" in bad.stdout

    renamed = onnx.load(small)
    renamed.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11
    onnx.save(renamed, broken)
    changed = cli("validate", original, broken)
    assert changed.exit_code == 1
    assert "outputs changed" in changed.stdout


def test_nothing_to_prune_is_said_and_exits_4(tmp_path: Path) -> None:
    from models.topologies import TOPOLOGIES

    path = tmp_path / "flat.onnx"
    onnx.save(TOPOLOGIES["conv_is_output"](), path)
    run = cli("shrink", path, "--channels", "0.3", "--include", "no such weight")
    assert run.exit_code == 4
    assert "not included" in run.stderr
    assert not (tmp_path / "flat.pruned.onnx").exists()


def test_a_wrong_result_is_never_written(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxprune import surgery

    apply = surgery.apply

    def spoiled(*args: object) -> onnx.ModelProto:
        model = apply(*args)  # type: ignore[arg-type]
        weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        weight.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[::-1].copy(), weight.name)
        )
        return model

    monkeypatch.setattr(surgery, "apply", spoiled)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = cli("shrink", original, "-o", tmp_path / "x.onnx", "--channels", "0.3")
    assert run.exit_code == 3
    assert "was not written" in run.stderr
    assert not (tmp_path / "x.onnx").exists()
    (folder,) = tmp_path.glob("onnxprune-report-*")
    assert sorted(p.name for p in folder.iterdir()) == ["plan.json", "rejected.onnx"]
