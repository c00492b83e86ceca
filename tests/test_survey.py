"""Sensitivity surveys: what an entry says against cutting for real, and interrupted surveys that go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxprune
from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune import Keep, Plan, UserError, survey
from onnxprune.allocation import kept_units
from onnxprune.blocks import Blocks
from onnxprune.criteria import Evidence, score
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Array, Model
from onnxprune.naming import group_names
from onnxprune.plan import Remove
from onnxprune.survey import Asked, Entry, Survey
from tests.small import check_refused, even_classes, net, run, write

RATIOS = (0.25, 0.5)


def images(count: int = 40, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8), dtype=np.float32)


def outputs(model: onnx.ModelProto, feeds: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"image": feeds})[0]
    return result


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return even_classes(TOPOLOGIES["residual_projection_stage"](), images())


@pytest.fixture(scope="module")
def labels(model: onnx.ModelProto) -> Array:
    return outputs(model, images()).argmax(axis=1)


@pytest.fixture(scope="module")
def plain(model: onnx.ModelProto) -> Survey:
    """By the error of the outputs, units ranked by magnitude."""
    return onnxprune.sensitivities(model, images(), ratios=RATIOS, criterion="l2")


@pytest.fixture(scope="module")
def accuracy(model: onnx.ModelProto, labels: Array) -> Survey:
    return onnxprune.sensitivities(model, {"image": images(), "label": labels}, ratios=RATIOS, criterion="l2")


def cut(
    model: onnx.ModelProto, entry: Entry, data: dict[str, Array] | Array, repair: str = "ridge"
) -> onnxprune.Result:
    """The cut of an entry made for real, by a plan of its own, and repaired in one shot."""
    graph = DependencyGraph(Model(model))
    options = {"repair": repair, "seed": 0}
    if entry.role == "layer":
        plan = Plan(graph.model.digest(), (Remove(entry.part),), options)
    else:
        (group,) = (group for group in graph.groups if group.name == entry.part)
        scores = score(Evidence.of(graph), [group], "l2")[group]
        units = tuple(sorted(int(u) for u in kept_units(scores, entry.kept)))
        plan = Plan(graph.model.digest(), (Keep(group.name, group.size, units),), options)
    return onnxprune.apply(model, plan, data)


def test_every_group_and_block_is_there_once_for_each_share(model: onnx.ModelProto, plain: Survey) -> None:
    blocks = Blocks(DependencyGraph(Model(model)))
    groups = {(blocks.role(g), g.name, r, g.size) for g in blocks.graph.groups for r in RATIOS}
    layers = {("layer", block.name, None, 1) for block in blocks.residual}
    named = {g.name: name for g, name in group_names(blocks).items()}
    named |= {block.name: f"{block.name} ({block.kind} block)" for block in blocks.residual}
    assert all(entry.label == named[entry.part] for entry in plain.entries)
    assert len(layers) == 2
    found = [(e.role, e.part, e.ratio, e.units) for e in plain.entries]
    assert len(found) == len(set(found))
    assert set(found) == groups | layers
    assert plain.complete


def test_costs_are_those_of_the_cut_model(model: onnx.ModelProto, plain: Survey) -> None:
    assert (plain.macs, plain.params) == _costs(cut(model, plain.entries[0], images()), "before")
    for entry in plain.entries:
        assert (entry.macs, entry.params) == _costs(cut(model, entry, images(), "none"), "after"), entry


def _costs(result: onnxprune.Result, when: str) -> tuple[int, int]:
    cost = getattr(result.report, when)
    return cost.macs, cost.params


def test_errors_are_those_of_the_cut_and_repaired_model(model: onnx.ModelProto, plain: Survey) -> None:
    """The probe masks and repairs on the original; the pipeline cuts and repairs the pruned graph."""
    whole = outputs(model, images()).astype(np.float64)
    energy = np.square(whole - whole.mean()).sum()
    compared = 0
    for entry in plain.entries:
        result = cut(model, entry, images())
        repair = result.report.repair
        assert repair is not None
        if repair.chosen == "none" and entry.role != "layer":
            continue  # the probe does not look whether repair helps
        lost = np.square(outputs(result.model, images()) - whole).sum() / energy
        assert entry.drop == pytest.approx(lost, rel=0.02, abs=1e-4), entry
        compared += 1
    assert compared >= 4


def test_drops_are_in_the_unit_of_the_metric(model: onnx.ModelProto, accuracy: Survey, labels: Array) -> None:
    assert accuracy.metric == "top1"
    assert accuracy.before == 1
    assert len(set(labels)) > 2
    assert len({entry.drop for entry in accuracy.entries}) > 2
    data = {"image": images(), "label": labels}
    compared = 0
    for entry in accuracy.entries:
        assert entry.drop is not None
        assert round(entry.drop * 40, 6) == round(entry.drop * 40), "whole samples of 40"
        result = cut(model, entry, data)
        repair = result.report.repair
        assert repair is not None
        if repair.chosen == "none" and entry.role != "layer":
            continue
        right = np.mean(outputs(result.model, images()).argmax(axis=1) == labels)
        assert entry.drop == pytest.approx(1 - right, abs=1 / 40 + 1e-9), "one sample may be on the edge"
        compared += 1
    assert compared >= 4


def test_a_metric_that_falls_counts_the_other_way(model: onnx.ModelProto) -> None:
    """KL is better the lower: a drop is what it rises by, from nothing."""
    found = onnxprune.sensitivities(model, images(), ratios=(0.5,), metric="kl")
    assert found.before == pytest.approx(0, abs=1e-9)
    assert all(entry.drop is not None and entry.drop > 0 for entry in found.entries)


def test_entries_are_sorted_and_written_as_json(plain: Survey) -> None:
    document = json.loads(plain.to_json())
    drops = [entry["drop"] for entry in document["entries"]]
    assert drops == sorted(drops)
    assert document["before"] == {"metric": None, "macs": plain.macs, "params": plain.params}
    assert document["data"]["samples"] == 40
    assert document["options"] == {"ratios": [0.25, 0.5], "criterion": "l2", "seed": 0}


def test_heads_and_neurons_are_measured_too() -> None:
    model = TRANSFORMERS[min(TRANSFORMERS)]()
    blocks = Blocks(DependencyGraph(Model(model)))
    found = onnxprune.sensitivities(model, _made_up(model), ratios=(0.5,))
    roles = {blocks.role(g) for g in blocks.graph.groups if g.kind == "exact" and g.size > 1}
    assert {entry.role for entry in found.entries} == roles | ({"layer"} if blocks.residual else set())


def _made_up(model: onnx.ModelProto) -> list[dict[str, Array]]:
    from onnxprune.data import synthetic

    opened = Model(model)
    data = synthetic(opened, DependencyGraph(opened).shapes, samples=6, seed=0)
    return [dict(batch.feeds) for batch in data.batches(1)]


# -------------------------------------------------------------------------------------------- going on


class Stop(Exception):
    """An interruption."""


def stopped(model: onnx.ModelProto, path: Path, after: int) -> int:
    """Run a survey until so many cuts are measured; returns how many were, None stops it."""
    measured = 0

    def progress(stage: str, _share: float | None) -> None:
        nonlocal measured
        measured += stage == "measure"
        if measured == after:
            raise Stop

    asked = Asked(RATIOS, "l2")
    with contextlib.suppress(Stop):
        survey.survey(Model(model), images(), asked, None, path, progress)
    return measured


@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_survey_is_taken_up(
    stop: int, model: onnx.ModelProto, plain: Survey, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    assert stopped(model, path, stop) == stop
    partial = json.loads(path.read_text())
    assert partial["complete"] is False
    assert len(partial["entries"]) == stop
    assert stopped(model, path, 1000) == len(plain.entries) - stop
    assert path.read_text() == plain.to_json()
    before = path.stat().st_mtime_ns
    assert stopped(model, path, 1000) == 0, "nothing is left to measure"
    assert path.stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def test_the_file_is_written_while_the_survey_goes_on(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "SAVED", 0.0)
    path, seen = tmp_path / "found.json", []

    def progress(stage: str, _share: float | None) -> None:
        if stage == "measure" and path.exists():
            seen.append(json.loads(path.read_text()))

    survey.survey(Model(model), images(), Asked(RATIOS, "l2"), None, path, progress)
    counts = [len(document["entries"]) for document in seen]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(document["complete"] for document in seen)
    assert json.loads(path.read_text())["complete"] is True


def test_notes_on_the_data_are_told(model: onnx.ModelProto, labels: Array, tmp_path: Path) -> None:
    path, found = write(model, tmp_path / "model.onnx"), tmp_path / "found.json"
    np.savez(tmp_path / "data.npz", image=images(20), label=labels[:20], names=np.arange(20))
    command = ("sensitivity", path, "--data", tmp_path / "data.npz", "--ratios", 0.5, "-o", found)
    notes = json.loads(run(*command[:-1], "-").stdout)["notes"]
    assert [note.split(":")[0] for note in notes] == [
        "not used, being neither inputs nor labels",
        "only 20 samples",
    ]
    for _ in range(2):  # the second time from the file
        said = [line for line in run(*command).stdout.splitlines() if line.startswith("note: ")]
        assert said == [f"note: {note}" for note in notes]


def test_the_metric_of_the_whole_survives_a_second_run(
    accuracy: Survey, model: onnx.ModelProto, labels: Array, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    path.write_text(accuracy.to_json())
    data = {"image": images(), "label": labels}
    again = onnxprune.sensitivities(model, data, ratios=RATIOS, criterion="l2", path=path)
    assert again.before == accuracy.before
    assert again.entries == accuracy.entries


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": net()}, "survey of another model"),
        ({"data": images(seed=1)}, "survey of other data"),
        ({"ratios": (0.5,)}, "survey of other options"),
        ({"criterion": "l1"}, "survey of other options"),
        ({"metric": "cosine"}, "survey by another metric"),
    ],
    ids=["model", "data", "ratios", "criterion", "metric"],
)
def test_a_survey_of_something_else_is_not_overwritten(
    change: dict[str, Any], words: str, model: onnx.ModelProto, plain: Survey, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    path.write_text(plain.to_json())
    given = {"model": model, "data": images(), "ratios": RATIOS, "criterion": "l2", **change}
    with pytest.raises(UserError, match=words):
        onnxprune.sensitivities(**given, path=path)
    assert path.read_text() == plain.to_json()


@pytest.mark.parametrize("change", ["text", "list", "entry", "types", "nested"])
def test_hostile_files_are_refused(
    change: str, model: onnx.ModelProto, plain: Survey, tmp_path: Path
) -> None:
    document: Any = plain.as_dict()
    if change == "list":
        document = [1]
    elif change == "entry":
        document["entries"][0]["more"] = 1
    elif change == "types":
        document["entries"][0]["drop"] = "none"
    text = {"text": "not JSON", "nested": "[" * 100_000}.get(change, json.dumps(document))
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is no survey of sensitivity"):
        onnxprune.sensitivities(model, images(), ratios=RATIOS, criterion="l2", path=path)
    assert path.read_text() == text


def test_what_is_asked_is_checked(model: onnx.ModelProto) -> None:
    for wrong in ({"ratios": ()}, {"ratios": (0.5, 1.0)}, {"criterion": "best"}, {"metric": "best"}, {"seed": -1},
                  {"metric": "top1"}, {"samples": 1}):  # fmt: skip
        with pytest.raises(UserError):
            onnxprune.sensitivities(model, images(), **wrong)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- command


def test_the_command_prints_a_table_and_writes_the_file(
    model: onnx.ModelProto, labels: Array, accuracy: Survey, tmp_path: Path
) -> None:
    path, data, found = write(model, tmp_path / "model.onnx"), tmp_path / "data.npz", tmp_path / "found.json"
    np.savez(data, image=images(), label=labels)
    options = ("--data", data, "--ratios", "0.5,0.25", "--criterion", "l2")
    said = run("sensitivity", path, *options, "-o", found)
    assert said.exit_code == 0, said.output
    assert said.stderr == ""
    for words in (
        "what top1 (1 for the whole) loses",
        "-25%",
        "-50%",
        "-100%",
        "MACs left",
        f"wrote {found} (12 cuts measured)",
    ):
        assert words in said.stdout
    shown = [line.split("│")[1].strip() for line in said.stdout.splitlines() if line.startswith("│")]
    assert len(shown) == len(set(shown)) == len({(entry.role, entry.part) for entry in accuracy.entries})
    assert set(shown) == {entry.label for entry in accuracy.entries}
    for row in (line.split("│") for line in said.stdout.splitlines() if line.startswith("│")):
        is_block = row[1].strip().endswith(" block)")
        assert [bool(cell.strip()) for cell in row[2:5]] == [not is_block, not is_block, is_block]
    document = json.loads(found.read_text())
    assert document["entries"] == [dataclasses.asdict(entry) for entry in accuracy.entries]
    alone = run("sensitivity", path, *options, "-o", "-")
    assert {**json.loads(alone.stdout), "data": None} == {**document, "data": None}


def test_the_command_refuses(model: onnx.ModelProto, tmp_path: Path) -> None:
    path, data = write(model, tmp_path / "model.onnx"), tmp_path / "x.npy"
    np.save(data, images())
    found = tmp_path / "found.json"
    for options, words in (
        (("-o", found), "--data"),
        (("--data", data), "-o"),
        (("--data", data, "-o", path), "the output is the input"),
        (("--data", data, "-o", tmp_path / "none" / "found.json"), "does not exist"),
        (("--data", data, "-o", found, "--ratios", "half"), "--ratios half"),
        (("--data", data, "-o", found, "--ratios", "0"), "--ratios 0.0"),
        (("--data", data, "-o", found, "--metric", "top1"), "top1 needs labels"),
        (("--data", tmp_path / "none.npy", "-o", found), "does not exist"),
    ):
        check_refused(run("sensitivity", path, *options), words)
    assert not found.exists()
    alone = net()
    del alone.graph.node[1:3]
    alone.graph.node[1].input[0] = "a"
    alone.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    lone = write(alone, tmp_path / "alone.onnx")
    check_refused(run("sensitivity", lone, "--data", data, "-o", found), "no group and no residual block")
