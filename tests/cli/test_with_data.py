"""Commands that are given data: what they report, what they refuse, and that a plan replays on the same data."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from models.topologies import TOPOLOGIES
from onnxprune import search
from onnxprune.model import Array
from tests.small import check_refused, even_classes, net, run, write

HALF = ("--channels", 0.5, "--align", 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Residual blocks; image [batch, 3, 8, 8] to 5 classes."""
    return write(even_classes(TOPOLOGIES["residual_projection_stage"](), images()), tmp_path / "model.onnx")


def outputs(path: Path, feeds: Array, name: str = "image") -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {name: feeds})[0]
    return result


def images(count: int = 40, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8), dtype=np.float32)


@pytest.fixture
def data(model: Path, tmp_path: Path) -> Path:
    """Inputs, with what the model says about them as labels."""
    feeds = images()
    np.savez(tmp_path / "data.npz", image=feeds, labels=outputs(model, feeds).argmax(axis=1))
    return tmp_path / "data.npz"


def document(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# ------------------------------------------------------------------------------------------------ reports


def test_the_report_remembers_data_and_repair(model: Path, data: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    report = document("shrink", model, *HALF, "--data", data, "--plan-out", plan, "--samples", 32)
    assert {name: report["data"][name] for name in ("kind", "samples", "available", "measured", "seed")} == {
        "kind": "npz", "samples": 32, "available": 40, "measured": True, "seed": 0,
    }  # fmt: skip
    options = json.loads(plan.read_text())["options"]
    assert options["data"]["sha256"] == report["data"]["sha256"]
    assert (options["criterion"], options["strategy"], options["repair"]) == ("obs", "uniform", "sequential")
    repair = report["repair"]
    assert repair["errors"][repair["chosen"]] == min(repair["errors"].values())
    assert repair["errors"][repair["chosen"]] < repair["errors"]["none"]
    assert {layer["node"] for layer in repair["layers"]} <= {n.name for n in onnx.load(model).graph.node}
    assert all(layer["after"] <= layer["before"] for layer in repair["layers"] if layer["method"] != "mean")
    assert report["equivalence"]["passed"] is True
    assert not any("measured on data" in note for note in report["notes"])
    assert report["quality"] is None


def test_the_printed_report_names_what_errors_were_measured_on(model: Path, data: Path) -> None:
    with_data = run("shrink", model, *HALF, "--data", data).stdout
    assert f"of their energy, on {data} (40 samples)" in with_data
    assert "no data was given" not in with_data
    without = run("shrink", model, *HALF, "--samples", 16).stdout
    assert without.count("nothing was measured on data") == 1
    assert "of their energy, on made-up inputs" in without
    plain = run("shrink", model, *HALF, "--repair", "none", "--criterion", "l2", "--allocation", "uniform")
    assert "repair" not in plain.stdout
    assert "data" not in plain.stdout


def test_a_target_without_data_is_met_by_a_budget_on_made_up_inputs(model: Path) -> None:
    report = document("shrink", model, "--macs", 0.7, "--align", 1, "--samples", 16)
    assert report["kept"]["macs"] <= 0.7
    options = report["provenance"]["options"]
    assert (options["criterion"], options["strategy"], options["repair"]) == ("obs", "budget", "sequential")
    assert report["data"]["kind"] == "synthetic"
    assert report["data"]["measured"] is False


def test_the_preprocessing_is_remembered(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(33):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    report = document("shrink", model, *HALF, "--data", folder, "--preprocess", "-1-1,bgr")
    assert report["data"]["preprocess"]["preset"] == "-1-1"
    assert report["data"]["preprocess"]["colour"] == "bgr"
    assert report["data"]["preprocess"]["size"] == [8, 8]
    plan = report["provenance"]["options"]["data"]
    assert plan["preprocess"] == report["data"]["preprocess"]
    guessed = document("shrink", model, *HALF, "--data", folder)
    assert any("a guess: see --preprocess" in note for note in guessed["notes"])
    assert guessed["data"]["sha256"] != report["data"]["sha256"]


# ------------------------------------------------------------------------------------------------- metrics


def test_the_metric_is_that_of_the_files(model: Path, data: Path, tmp_path: Path) -> None:
    small, other = tmp_path / "small.onnx", tmp_path / "other.npz"
    feeds = images(30, seed=1)
    labels = np.random.default_rng(2).integers(0, 5, 30)
    np.savez(other, image=feeds, labels=labels)
    unlabelled = tmp_path / "unlabelled.npz"
    np.savez(unlabelled, image=images())
    options = ("--data", unlabelled, "--eval", other, "-o", small)
    quality = document("shrink", model, "--channels", 0.7, "--align", 1, *options)["quality"]
    assert quality["metric"] == "top1"
    assert quality["before"] == np.mean(outputs(model, feeds).argmax(axis=1) == labels)
    assert quality["after"] == np.mean(outputs(small, feeds).argmax(axis=1) == labels)
    assert quality["provenance"]["samples"] == 30
    said = run("shrink", model, *HALF, "--repair", "none", "--eval", other, "--metric", "agreement")
    assert f"agreement on {other} (30 samples): 1 -> " in said.stdout


@pytest.mark.parametrize("limit", [0.25, 0.6])
def test_max_drop_is_kept(limit: float, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TRIALS", 4)
    report = document("shrink", model, "--max-drop", limit, "--data", data, "--align", 1)
    quality = report["quality"]
    assert quality["metric"] == "top1"
    assert quality["before"] == 1
    assert quality["before"] - quality["after"] <= limit
    assert report["provenance"]["options"]["max_drop"] == limit
    assert report["kept"]["macs"] < 1


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "{}/none.npz"], ["none.npz", "does not exist"]),
        (["--data", " "], ["--data", "give a path"]),
        (["--data", "{}/model.onnx"], ["is not data"]),
        (["--data", "{}/one.npz"], ["holds 1", "at least 2"]),
        (["--data", "{}/wide.npz"], ["wide.npz", "'image'", "float32[3, 8, 8]"]),
        (["--data", "{}/nan.npz"], ["NaN"]),
        (["--data", "{}/same.npz"], ["identical"]),
        (["--data", "{}/data.npz", "--samples", "1"], ["--samples", "1"]),
        (["--data", "{}/data.npz", "--preprocess", "best"], ["best"]),
        (["--metric", "top1"], ["--metric needs data", "--eval or --data"]),
        (["--data", "{}/plain.npz", "--metric", "top1"], ["top1 needs labels", "plain.npz"]),
        (["--data", "{}/data.npz", "--metric", "best"], ["'best' is not known", "top1"]),
        (["--data", "{}/data.npz", "--metric", "nowhere:function"], ["nowhere"]),
        (["--data", "{}/plain.npz", "--eval", "{}/none.npz"], ["none.npz", "does not exist"]),
        (["--repair", "best"], ["best"]),
        (["--steps", "0"], ["--steps"]),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_data_is_said_before_any_work(
    options: Sequence[str], words: Sequence[str], model: Path, data: Path, tmp_path: Path
) -> None:
    nan = images()
    nan[3, 0, 0, 0] = np.nan
    for name, arrays in {
        "one": {"image": images(1)},
        "wide": {"image": images()[:, :, :4]},
        "nan": {"image": nan},
        "same": {"image": np.repeat(images(1), 40, axis=0)},
        "plain": {"image": images()},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run("shrink", model, *HALF, *(option.format(tmp_path) for option in options))
    check_refused(result, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_max_drop_needs_something_to_measure(model: Path, data: Path, tmp_path: Path) -> None:
    check_refused(run("shrink", model, "--max-drop", 0.1), "--max-drop needs data", "--eval or --data")
    check_refused(run("shrink", model, "--max-drop", 0.1, "--data", data, *HALF), "--max-drop searches")
    check_refused(run("shrink", model, "--max-drop", -1, "--data", data), "--max-drop -1.0")
    check_refused(run("shrink", model, "--max-drop", 0.1, "--data", data, "--dry-run"), "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "model.onnx"]


def test_images_without_pillow(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(2):
        (folder / f"{seed}.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = run("shrink", model, *HALF, "--data", folder)
    check_refused(result, "images need Pillow: pip install 'onnxprune[images]'")


# ---------------------------------------------------------------------------------------------------- apply


def test_a_plan_that_repairs_replays_on_the_same_data_only(model: Path, data: Path, tmp_path: Path) -> None:
    plan, small, again = tmp_path / "plan.json", tmp_path / "small.onnx", tmp_path / "again.onnx"
    shrink = ("shrink", model, *HALF, "--data", data, "--samples", 36, "--seed", 3)
    assert run(*shrink, "-o", small, "--plan-out", plan).exit_code == 0
    apply = ("apply", model, plan, "-o", again)
    assert run(*apply, "--data", data).exit_code == 0
    assert again.read_bytes() == small.read_bytes()
    again.unlink()

    check_refused(run(*apply), "the plan repairs on data", "--data (36 samples", "--repair none")
    other = tmp_path / "other.npz"
    np.savez(other, image=images(seed=9), labels=np.zeros(40, int))
    check_refused(run(*apply, "--data", other), "made with other data", "--repair none")
    assert not again.exists()

    assert run(*apply, "--repair", "none").exit_code == 0
    cut = tmp_path / "cut.onnx"
    document = json.loads(plan.read_text())
    document["options"]["repair"] = "none"
    (tmp_path / "cut.json").write_text(json.dumps(document))
    assert run("apply", model, tmp_path / "cut.json", "-o", cut).exit_code == 0
    assert again.read_bytes() == cut.read_bytes() != small.read_bytes()


def test_a_plan_that_repairs_on_made_up_inputs_replays_by_itself(model: Path, tmp_path: Path) -> None:
    plan, small, again = tmp_path / "plan.json", tmp_path / "small.onnx", tmp_path / "again.onnx"
    assert run("plan", model, *HALF, "--samples", 16, "-o", plan).exit_code == 0
    assert run("shrink", model, *HALF, "--samples", 16, "-o", small).exit_code == 0
    assert run("apply", model, plan, "-o", again).exit_code == 0
    assert again.read_bytes() == small.read_bytes()


@pytest.mark.parametrize(
    "change", [{"repair": "best"}, {"seed": "x"}, {"data": {"kind": "npz", "samples": 1}}, {"data": {}}]
)
def test_plans_that_ask_for_nonsense(change: dict[str, Any], model: Path, data: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert run("plan", model, *HALF, "--data", data, "-o", plan).exit_code == 0
    document = json.loads(plan.read_text())
    document["options"].update(change)
    plan.write_text(json.dumps(document))
    check_refused(run("apply", model, plan, "--data", data, "-o", tmp_path / "small.onnx"))
    assert not (tmp_path / "small.onnx").exists()


# ------------------------------------------------------------------------------------------------- validate


def test_validate_on_data(model: Path, data: Path, tmp_path: Path, short_rounds: None) -> None:
    small, plan = tmp_path / "small.onnx", tmp_path / "plan.json"
    options = ("--data", data, "-o", small, "--plan-out", plan)
    assert run("shrink", model, "--channels", 0.7, "--align", 1, *options).exit_code == 0
    found = document_of(run("validate", model, small, "--plan", plan, "--data", data, "--json"))
    feeds = np.load(data)["image"]
    before, after = outputs(model, feeds).astype(np.float64), outputs(small, feeds).astype(np.float64)
    (agreement,) = found["agreement"]
    assert agreement["top1"] == np.mean(before.argmax(axis=1) == after.argmax(axis=1))
    noise = np.square(before - after).sum() / np.square(before).sum()
    assert agreement["snr"] == pytest.approx(-10 * np.log10(noise), abs=1e-3)
    assert found["quality"]["metric"] == "top1"
    assert found["quality"]["before"] == 1
    assert found["quality"]["after"] == agreement["top1"]
    assert found["data"]["samples"] == 40
    assert found["passed"] is True

    said = run("validate", model, small, "--data", data, "--samples", 20, "--metric", "cosine").stdout
    assert f"agreement with the original on {data} (20 samples):" in said
    assert f"cosine on {data} (20 samples): 1 -> 0." in said
    assert "note: only 20 samples: statistics of so few are rough" in said
    assert "note: only" not in run("validate", model, small, "--data", data).stdout
    plain = tmp_path / "plain.npy"
    np.save(plain, feeds)
    assert document_of(run("validate", model, small, "--data", plain, "--json"))["quality"] is None
    for options, words in (
        (("--metric", "top1"), "--metric needs data"),
        (("--data", plain, "--metric", "top1"), "needs labels"),
        (("--data", tmp_path / "none.npz"), "does not exist"),
    ):
        check_refused(run("validate", model, small, *options), words)


def document_of(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_validate_says_what_is_proven_of_a_repaired_model(
    model: Path, data: Path, tmp_path: Path, short_rounds: None
) -> None:
    small, plan = tmp_path / "small.onnx", tmp_path / "plan.json"
    assert run("shrink", model, *HALF, "--data", data, "-o", small, "--plan-out", plan).exit_code == 0
    said = run("validate", model, small, "--plan", plan)
    assert said.exit_code == 0
    for words in (
        "repaired: what the plan cuts equals the masked original",
        "the candidate is that cut with",
        "nothing else differs",
        "cannot be proven",
    ):
        assert words in said.stdout
    found = document_of(run("validate", model, small, "--plan", plan, "--json"))
    assert found["equivalence"]["passed"] is found["repair"]["passed"] is True
    assert 0 < found["repair"]["repaired"] <= found["repair"]["repairable"]

    cut = tmp_path / "cut.onnx"
    assert run("apply", model, plan, "--repair", "none", "-o", cut).exit_code == 0
    said = run("validate", model, cut, "--plan", plan)
    assert said.exit_code == 0
    assert "equals the masked original" in said.stdout
    assert "repaired" not in said.stdout

    proto = onnx.load(small)
    variance = next(t for t in proto.graph.initializer if t.name.endswith("var"))
    scaled = onnx.numpy_helper.to_array(variance) * np.float32(2)
    variance.CopyFrom(onnx.numpy_helper.from_array(scaled, variance.name))
    write(proto, small)
    said = run("validate", model, small, "--plan", plan)
    assert said.exit_code == 1
    assert "the candidate is NOT that cut with other weights:" in said.stdout
    assert f"constant '{variance.name}' has other values" in said.stdout


def test_a_model_of_another_shape_is_not_called_repaired(tmp_path: Path, short_rounds: None) -> None:
    """The same plan on paper, another cut in the file: sound, and not what the plan says."""
    model = write(net(), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", images())
    plan, small = tmp_path / "plan.json", tmp_path / "small.onnx"
    for ratio, where in ((0.5, plan), (0.25, tmp_path / "other.json")):
        options = ("--channels", ratio, "--align", 1, "--data", tmp_path / "x.npy", "-o", small)
        assert run("shrink", model, *options, "--plan-out", where).exit_code == 0
    said = run("validate", model, small, "--plan", plan)
    assert said.exit_code == 1
    assert "structure: sound" in said.stdout
    assert "has other shape" in said.stdout
