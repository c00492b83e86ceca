"""Targets on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from models.architectures import ARCHITECTURES
from onnxprune import UserError, api
from onnxprune.targets import TARGETS
from tests.small import check_refused, run, shrink


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    onnx.save(ARCHITECTURES["mobilenet_v2"](width=0.5, image=32, classes=10), path)
    return path


@pytest.fixture(scope="module")
def small(model: Path) -> Path:
    path = model.with_name("small.onnx")
    assert shrink(model, "-o", path).exit_code == 0
    return path


def test_every_target_says_what_it_can_do_here() -> None:
    found = json.loads(run("targets", "--json").stdout)
    assert {one["target"].partition(":")[0] for one in found} == set(TARGETS)
    for one in found:
        assert one["reach"] in ("runs", "builds", "absent")
        assert bool(one["missing"]) or one["reach"] == "runs"
        assert one["alignment"].pop("whole") in (True, False)
        assert all(block >= 1 for block in one["alignment"].values())
    table = run("targets").stdout
    assert "cpu" in table


def test_bench_measures_both(model: Path, small: Path) -> None:
    done = run("bench", model, small, "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert found["candidate"] == f"{small}"
    assert found["agrees"] is True
    timing = found["timing"]
    assert len(timing["ratios"]) == len(timing["rounds"])
    assert timing["settings"]["threads"] == 1
    assert all(before > 0 and after > 0 for before, after in timing["rounds"])
    assert "outputs agree" in run("bench", model, small).stdout


def test_validate_takes_targets(model: Path, small: Path) -> None:
    done = run("validate", model, small, "--target", "cpu", "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["targets"]
    assert (found["target"], found["agrees"]) == ("cpu", True)
    assert found["nodes"].keys() == {"CPUExecutionProvider"}


def test_validate_writes_a_page(model: Path, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert run("validate", model, small, "--target", "cpu", "--html", path).exit_code == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "small.onnx" in text
    check_refused(run("validate", model, small, "--html", small), "the output is the input")


@pytest.mark.parametrize("threads", [-1, 0, 100_000])
def test_threads_that_cannot_be(threads: int, model: Path, small: Path) -> None:
    """Before any is started: a runtime takes memory for each of them."""
    check_refused(run("bench", model, small, "--threads", threads), "--threads", "1024")
    with pytest.raises(UserError, match=f"--threads {threads}: give a number from 1 to 1024"):
        api.bench(model, [small], threads=threads)


def test_targets_that_are_unknown(model: Path, small: Path) -> None:
    check_refused(run("bench", model, small, "--target", "abacus"), "--target abacus", "cpu")
    check_refused(run("bench", model, small, "--target", "cpu:int3"), "cpu knows fp32")
    check_refused(shrink(model, "--target", "abacus"), "--target abacus")


def test_a_plan_says_what_it_was_aligned_to(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plain = ("--channels", 0.5, "--criterion", "l2", "--repair", "none")
    assert run("plan", model, *plain, "--target", "cpu", "-o", plan).exit_code == 0
    options = json.loads(plan.read_text())["options"]
    assert options["targets"] == ["cpu"]
    assert options["align"] in (8, 16)
    assert run("plan", model, *plain, "--target", "cpu", "--align", 2, "-o", plan).exit_code == 0
    assert json.loads(plan.read_text())["options"]["align"] == 2


def test_build_writes_an_engine(small: Path, tmp_path: Path) -> None:
    engine = tmp_path / "small.engine"
    done = run("build", small, "--target", "tensorrt", "-o", engine, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert engine.stat().st_size > 10_000
    assert found["target"] == "tensorrt"
    assert any(f"--onnx={small}" in command for command in found["commands"])
    assert "trtexec" in run("build", small, "--target", "tensorrt").stdout


def test_what_cannot_be_built(small: Path, tmp_path: Path) -> None:
    check_refused(run("build", small, "--target", "cpu", "-o", tmp_path / "engine"), "no engine files")
    check_refused(run("build", small, "--target", "tensorrt:int8"), "does not build it")
    check_refused(run("build", small, "--target", "tensorrt", "-o", small), "the output is the input")
    check_refused(run("build", tmp_path / "no.onnx", "--target", "tensorrt"), "no.onnx")


def test_a_page_of_what_was_cut(model: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "small.onnx", tmp_path / "page.html"
    assert shrink(model, "-o", out, "--html", page, "--plan-out", tmp_path / "plan.json").exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "Groups in the order of the graph" in text
    again = tmp_path / "again.html"
    done = run("apply", model, tmp_path / "plan.json", "-o", tmp_path / "b.onnx", "--html", again)
    assert done.exit_code == 0, done.output
    assert "Groups in the order of the graph" in again.read_text(encoding="utf-8")
    shown = shrink(model, "-o", out, "--html", "-")
    assert shown.stdout.startswith("<!DOCTYPE html>")
    assert shown.stdout.rstrip().endswith("</html>")


def test_a_page_overwrites_no_input(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    check_refused(shrink(model, "-o", tmp_path / "a.onnx", "--html", model), "the output is the input")
    check_refused(shrink(model, "-o", tmp_path / "a.onnx", "--html", tmp_path / "a.onnx"), "same path")
    assert model.read_bytes() == before
    assert list(tmp_path.iterdir()) == []
