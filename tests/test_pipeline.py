"""The search for the smallest model that a metric allows, and what the report says of targets and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune
from models.builder import Graph
from onnxprune import NothingToPrune, Result, UserError
from onnxprune.model import Array
from onnxprune.repair import repair
from onnxprune.runtime import Session
from onnxprune.search import NEAR, TRIALS, descent
from onnxprune.statistics import collect
from tests.small import even_classes

# -------------------------------------------------------------------------------------------------- search


def searched(
    holds: Callable[[float], bool], floor: float = 0.0, most: int = 500
) -> tuple[float, list[float]]:
    """The least share that holds (1: none) of `most` that exist, and all that were proposed; below `floor` none exists."""
    shares, best, made = descent(), 1.0, 0
    share = next(shares)
    asked = [share]
    while made < most:
        outcome = None if share < floor else holds(share)
        made += outcome is not None
        best = share if outcome and share < best else best
        try:
            share = shares.send(outcome)
        except StopIteration:
            break
        asked.append(share)
    return best, asked


def halved(holds: Callable[[float], bool], floor: float) -> float:
    """Plain bisection, seven times."""
    low, high = 0.0, 1.0
    for _ in range(7):
        share = (low + high) / 2
        low, high = (low, share) if share >= floor and holds(share) else (share, high)
    return high


@given(st.floats(0, 1), st.floats(0, 1))
def test_an_edge_is_found(edge: float, floor: float) -> None:
    """Where everything from an edge upwards holds."""
    best, asked = searched(lambda share: share >= edge, floor)
    assert len(asked) <= 20
    assert max(edge, floor) <= best <= max(edge, floor) + NEAR


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 0.5))
def test_no_worse_than_bisection_whatever_holds(seed: int, chance: float, floor: float) -> None:
    """With as many models as a search may make."""

    def holds(share: float) -> bool:
        return bool(np.random.default_rng([seed, round(share * 2**40)]).random() < chance)

    best, _ = searched(holds, floor, TRIALS)
    assert best <= halved(holds, floor)


@given(st.floats(0.2, 0.9), st.floats(0, 0.04))
def test_a_bad_place_does_not_end_the_search(place: float, width: float) -> None:
    """Everything from 0.1 upwards holds but for one narrow stretch, which stops bisection where it falls into it."""
    best, _ = searched(lambda share: share >= 0.1 and not place <= share <= place + width)
    assert best <= 0.1 + NEAR


# ------------------------------------------------------------------------------------------ the largest drop


OPTIONS: dict[str, Any] = {"align": 1, "repair": "ridge"}


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    g = Graph(seed=2)
    x = g.relu(g.conv(g.input("batch", 3, 8, 8, name="image"), 8))
    x = g.relu(g.add(x, g.conv(g.relu(g.conv(x, 8)), 8)))
    return even_classes(g.model(g.gemm(g.flatten(g.gap(x)), 5)), images())


def images() -> Array:
    return np.random.default_rng(0).standard_normal((64, 3, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def data(model: onnx.ModelProto) -> dict[str, Array]:
    """Inputs, with what the model says about them as labels."""
    return {"image": images(), "labels": classes(model)}


def classes(model: onnx.ModelProto) -> Array:
    found: Array = Session(model).run({"image": images()})["output"].argmax(axis=1)
    return found


def bisected(model: onnx.ModelProto, data: dict[str, Array], most: float) -> float:
    """The share of the MACs that plain bisection comes to with seven models, one after the other."""
    low, high, least = 0.0, 1.0, 1.0
    for _ in range(7):
        share = (low + high) / 2
        try:
            result = onnxprune.shrink(model, macs=share, data=data, judge=data, **OPTIONS)
        except UserError:
            low = share
            continue
        if drop(result) <= most:
            high, least = share, result.report.kept["macs"]
        else:
            low = share
    return least


def drop(result: Result) -> float:
    quality = result.report.quality
    assert quality is not None
    return quality.before - quality.after


def test_the_drop_is_kept_with_no_more_than_bisection_leaves(
    model: onnx.ModelProto, data: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the result itself; no cut is repaired twice, and no activation looked at twice."""
    most = 0.3
    cuts: list[bytes] = []
    looked: list[object] = []

    def counted(
        method: str, blocks: Any, keep: Any, removed: Any, pruned: onnx.ModelProto, *rest: Any
    ) -> Any:
        cuts.append(pruned.SerializeToString(deterministic=True))
        return repair(method, blocks, keep, removed, pruned, *rest)

    def seen(*given: Any) -> Any:
        looked.append(given)
        return collect(*given)

    monkeypatch.setattr("onnxprune.job.repair", counted)
    monkeypatch.setattr("onnxprune.calibration.collect", seen)
    result = onnxprune.shrink(model, max_drop=most, data=data, **OPTIONS)
    monkeypatch.undo()
    assert 4 < len(cuts) == len(set(cuts)) <= TRIALS
    assert len(looked) == 1
    assert 1 - (classes(result.model) == data["labels"]).mean() == pytest.approx(drop(result))
    assert 0 < drop(result) <= most
    assert result.report.kept["macs"] <= bisected(model, data, most) < 1
    found, quality = result.report.candidates, result.report.quality
    assert found is not None
    assert quality is not None
    assert len(found.points) == len(cuts)
    assert [p[:2] for p in found.points if p[2]] == [
        (pytest.approx(result.report.kept["macs"]), quality.after)
    ]
    assert found.limit == pytest.approx(quality.before - most)
    held = [cost for cost, score, _ in found.points if quality.before - score <= most]
    assert min(held) == pytest.approx(result.report.kept["macs"])
    again = onnxprune.apply(model, result.plan, data=data)
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_agreement_runs_the_original_once(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs serve every trial."""
    sessions: list[bool] = []
    whole = model.SerializeToString()

    def counted(proto: Any, **options: Any) -> Session:
        sessions.append(proto.SerializeToString() == whole)
        return Session(proto, **options)

    monkeypatch.setattr("onnxprune.metrics.Session", counted)
    result = onnxprune.shrink(model, max_drop=0.2, data=images(), metric="agreement", **OPTIONS)
    assert sum(sessions) == 1 < len(sessions)
    same = (classes(result.model) == classes(model)).mean()
    quality = result.report.quality
    assert quality is not None
    assert quality.before == 1
    assert quality.after == pytest.approx(same)


def test_no_drop_from_an_endless_score(model: onnx.ModelProto) -> None:
    with pytest.raises(UserError, match="snr of the original is inf"):
        onnxprune.shrink(model, max_drop=1, data=images(), metric="snr", **OPTIONS)


def test_nothing_that_could_be_cut() -> None:
    g = Graph(seed=0)
    whole = g.model(g.op("MatMul", g.input("batch", 4, name="x"), g.store("w", g.normal(4, 3))))
    rows = np.random.default_rng(0).standard_normal((32, 4), dtype=np.float32)
    with pytest.raises(NothingToPrune, match="nothing is prunable"):
        onnxprune.shrink(whole, max_drop=0.1, data=rows)


def test_every_cut_loses_too_much(model: onnx.ModelProto) -> None:
    outputs = Session(model).run({"image": images()})["output"]
    given = {"image": images(), "labels": outputs}
    with pytest.raises(NothingToPrune, match="every cut that was tried loses more than 0 of mse"):
        onnxprune.shrink(model, max_drop=0, data=given, metric="mse", **OPTIONS)


# ------------------------------------------------------------------------------------------------- notes


def notes(model: onnx.ModelProto, **options: Any) -> tuple[str, ...]:
    """Without what blocks of channels cost, which the small networks here are full of."""
    found = onnxprune.shrink(model, **options).report.notes
    return tuple(note for note in found if not note.startswith("kernels that fill"))


def test_a_target_that_blocks_of_channels_overshoot() -> None:
    g = Graph(seed=0)
    x = g.input("batch", 3, 8, 8, name="image")
    for _ in range(3):
        x = g.relu(g.conv(x, 32))
    model = g.model(g.gemm(g.flatten(g.gap(x)), 5))
    options: dict[str, Any] = {"allocation": "uniform", "criterion": "l2", "repair": "none"}
    result = onnxprune.shrink(model, macs=0.6, **options)
    kept = result.report.kept["macs"]
    assert kept < 0.5
    assert result.report.notes == (
        f"--macs 0.6 could not be met exactly: {kept:.3f} is kept (counts are rounded to 16, a smaller --align comes nearer)",
    )
    assert notes(model, macs=kept + 0.001, **options) == ()
    assert notes(model, macs=0.58, align=1, **options) == ()
    assert onnxprune.apply(model, result.plan).report.notes == result.report.notes


def test_a_score_says_what_repair_has_seen(
    model: onnx.ModelProto, data: dict[str, Array], tmp_path: Path
) -> None:
    half: dict[str, Any] = {"channels": 0.5, "align": 1}
    path, other = tmp_path / "data.npz", tmp_path / "other.npz"
    for place in (path, other):
        np.savez(place, **data)  # type: ignore[arg-type]
    seen = "top1 was measured on inputs that scores and repair have seen (40 of 64); give others with --eval"
    made_up = "scores and repair saw made-up inputs only; give some like those of --eval with --data"
    assert notes(model, **half, data=path, samples=40, metric="top1") == (seen,)
    assert notes(model, **half, data=path, samples=40, judge=f"{tmp_path}/./data.npz") == (seen,)
    assert notes(model, **half, data=path, samples=40, judge=other) == ()
    assert notes(model, **half, data=path, samples=40) == ()
    plain = {"criterion": "l2", "repair": "none", "allocation": "uniform"}
    assert notes(model, **half, **plain, data=path, samples=40, metric="top1") == ()
    without = notes(model, **half, judge=path, samples=16)
    assert made_up in without
    assert not any("nothing was measured" in note for note in without)
    assert any("no data was given" in note for note in without)
    assert notes(model, **half, **plain, judge=path) == ()
    assert made_up not in notes(model, **half, samples=16)
