"""Measuring engines, and what must not pass for a measurement."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from rich.console import Console

from onnxprune import model, timing
from onnxprune.runtime import Feeds
from onnxprune.targets import Engine, TargetError
from onnxprune.targets.cpu import PROVIDER, Cpu, CpuEngine
from onnxprune.timing import Measured, Start, Timing, compare, verdict
from tests.small import floats, net, weight, write

X = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
FEEDS: Feeds = {"x": X}
OTHER: Feeds = {"x": X[..., ::-1].copy()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(net(), tmp_path / "model.onnx")


class Noted(CpuEngine):
    """Writes its name down whenever it runs."""

    def __init__(self, path: Path, name: str, log: list[str]) -> None:
        super().__init__(path, 1)
        self._name, self._log = name, log

    def run(self, feeds: Feeds) -> dict[str, Any]:
        self._log.append(self._name)
        return super().run(feeds)


class Held(CpuEngine):
    """Waits for somebody else in every run, as on a machine that is busy with other work."""

    def run(self, feeds: Feeds) -> dict[str, Any]:
        time.sleep(0.01)
        return super().run(feeds)


class Elsewhere(Held):
    """Waits for a device that computes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 1)
        self.settings = {**self.settings, "on_cpu": False}


class Spinning(CpuEngine):
    """Needs two milliseconds of CPU time for every run."""

    def run(self, feeds: Feeds) -> dict[str, Any]:
        until = time.process_time() + 0.002
        while time.process_time() < until:
            pass
        return super().run(feeds)


class Uneven(CpuEngine):
    """Works a tenth of a second longer in every other run."""

    _odd = False

    def run(self, feeds: Feeds) -> dict[str, Any]:
        self._odd = not self._odd
        until = time.process_time() + 0.1 * self._odd
        while time.process_time() < until:
            pass
        return super().run(feeds)


class Crashing(CpuEngine):
    def run(self, feeds: Feeds) -> dict[str, Any]:
        raise TargetError("the device is gone")


class FellBack(Engine):
    """Asked for a provider that comes with every onnxruntime and takes no node; what onnxruntime does then is silent."""

    def __init__(self, path: Path) -> None:
        self.settings = {"provider": "AzureExecutionProvider"}
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._session = ort.InferenceSession(
            str(path), options, providers=["AzureExecutionProvider", PROVIDER]
        )
        assert self._session.get_providers()[0] == "AzureExecutionProvider"  # which says nothing
        parts = self._session.get_provider_graph_assignment_info()
        self.nodes = {
            name: sum(len(p.get_nodes()) for p in parts if p.ep_name == name) for name in (PROVIDER,)
        }

    def run(self, feeds: Feeds) -> dict[str, Any]:
        return {"y": self._session.run(None, feeds)[0]}


class Saver(CpuEngine):
    """Looks at the model and at the inputs, and returns zeros of the right shape."""

    def run(self, feeds: Feeds) -> dict[str, Any]:
        return {name: np.zeros_like(value) for name, value in super().run(feeds).items()}


class Stuck(CpuEngine):
    """Returns what it returned before."""

    _first: dict[str, Any] | None = None

    def run(self, feeds: Feeds) -> dict[str, Any]:
        self._first = self._first or super().run(feeds)
        return self._first


class Killed(Cpu):
    """Takes the process along."""

    def load(self, path: Path, threads: int = 1) -> Engine:
        if path.name != "nothing.onnx":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(path, threads)


class Confused(Cpu):
    """Raises what no target should."""

    def load(self, path: Path, threads: int = 1) -> Engine:
        raise ValueError("what now?\x1b[2J")


# Measuring


def test_numbers_hang_together(path: Path) -> None:
    shares: list[float] = []
    engines = [CpuEngine(path, 1) for _ in range(3)]
    found = compare(engines, FEEDS, rounds=4, seconds=0.005, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert [one.name for one in found.engines] == ["original", "candidate 1", "candidate 2"]
    original = found.engines[0]
    assert original.ratios == (1.0,) * 4
    for one in found.engines:
        assert len(one.rounds) == len(one.work) == 4
        assert one.ratios == tuple(a / b for a, b in zip(one.rounds, original.rounds, strict=True))
        assert (one.ratio, one.milliseconds) == (median(one.ratios), median(one.rounds))
        assert one.runs == original.runs >= 4  # in turns
        assert one.share is not None
        assert one.share > 0
        assert one.settings == {**engines[0].settings}
        assert one.nodes == {PROVIDER: sum(engines[0].nodes.values())}
    assert found.ratio == found.engines[2].ratio
    assert found.range == (min(found.engines[2].ratios), max(found.engines[2].ratios))


def test_report_and_table(path: Path) -> None:
    starts = [Start(2.0, 1.0, 2**21, 2**20), Start(3.0, 4.0, None, None)]
    engines = [CpuEngine(path, 1), CpuEngine(path, 1)]
    found = compare(engines, FEEDS, rounds=3, seconds=0, starts=starts)
    stated = json.loads(json.dumps(found.as_dict()))
    assert stated["ratio"] == found.ratio
    assert stated["rounds"] == [list(row) for row in zip(*(one.rounds for one in found.engines), strict=True)]
    assert (stated["before"], stated["after"]) == tuple(one.milliseconds for one in found.engines)
    assert stated["engines"][0]["start"] == {"load": 2.0, "first": 1.0, "peak": 2**21, "resident": 2**20}
    assert stated["engines"][1]["settings"]["threads"] == 1
    assert stated["engines"][1]["nodes"] == dict(engines[1].nodes)
    assert stated["engines"][1]["cpu_rounds"] == list(found.candidate.work)
    console = Console(width=140)
    with console.capture() as capture:
        console.print(found.table())
    for words in ("original", "candidate", f"{found.ratio:.3f}", "2.0 MiB", "first run", "load"):
        assert words in capture.get()
    plain = compare(engines, FEEDS, rounds=1, seconds=0)
    assert [column.header for column in plain.table().columns] == [
        "",
        "ms",
        "rounds",
        "ratio",
        "rounds",
        "CPU",
    ]


def runs(path: Path, seed: int, rounds: int = 12) -> list[str]:
    log: list[str] = []
    compare([Noted(path, name, log) for name in "ABC"], FEEDS, rounds=rounds, seconds=0, seed=seed)
    return log


def test_engines_take_turns_in_an_order_that_is_drawn(path: Path) -> None:
    log = runs(path, 0)
    warm, timed = log[: 3 * timing.WARM], log[3 * timing.WARM :]
    assert timing.WARM >= 5
    assert "".join(warm) == "".join(name * timing.WARM for name in "ABC")
    assert len(timed) == 3 * 12
    orders = ["".join(timed[place : place + 3]) for place in range(0, len(timed), 3)]
    assert all(sorted(order) == ["A", "B", "C"] for order in orders)
    assert len(set(orders)) > 2
    assert runs(path, 0) == log
    assert runs(path, 1) != log


def test_within_a_round_runs_alternate(path: Path) -> None:
    log: list[str] = []
    compare([Noted(path, name, log) for name in "AB"], FEEDS, rounds=1, seconds=0.02)
    timed = "".join(log[2 * timing.WARM :])
    assert len(timed) > 4
    assert timed in ("AB" * (len(timed) // 2), "BA" * (len(timed) // 2))


def test_the_least_of_a_round_counts(path: Path) -> None:
    engine = Uneven(path, 1)
    (found,) = compare([engine], FEEDS, rounds=1, seconds=0.25).engines
    assert found.runs > 1
    assert found.rounds[0] < 100
    assert found.work[0] < 100


def test_models_in_memory_are_loaded_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.002)
    assert len(timing.compare_models(Cpu(), [net(), net()], FEEDS).candidate.ratios) == timing.ROUNDS
    monkeypatch.setattr(model, "INSIDE", 100)  # weights go beside the model
    monkeypatch.setattr(model, "ALIGNMENT", 64)
    assert timing.compare_models(Cpu(), [net(), net()], FEEDS).engines[0].nodes
    broken = net([helper.make_node("NoSuchOperator", ["a"], ["b"])])
    with pytest.raises(TargetError, match=r"^the candidate does not load: .*NoSuchOperator"):
        timing.compare_models(Cpu(), [net(), broken], FEEDS)


# A contended machine


def test_an_engine_that_is_held_up_is_contended(path: Path) -> None:
    found = compare([CpuEngine(path, 1), Held(path, 1)], FEEDS, rounds=3, seconds=0.02)
    share = found.candidate.share
    assert share is not None
    assert share < timing.SHARE
    assert f"the candidate had a processor for {share:.0%} of its time" in found.contended
    assert found.as_dict()["contended"] == found.contended
    assert f"contended: {found.contended}" in verdict(found).text


def test_what_only_looks_faster_is_not(path: Path) -> None:
    """The original waited, the candidate worked: by the wall clock it is faster."""
    found = compare([Held(path, 1), Spinning(path, 1)], FEEDS, rounds=3, seconds=0.03)
    assert min(found.candidate.work) > max(found.engines[0].work)
    judged = verdict(found)
    assert judged.outcome == "cannot tell"
    assert "the ratio of CPU times is" in judged.text


def test_waiting_for_a_device_is_no_contention(path: Path) -> None:
    found = compare([Elsewhere(path), Elsewhere(path)], FEEDS, rounds=2, seconds=0)
    assert found.candidate.share is None
    assert found.candidate.work == ()
    assert "processor" not in found.contended
    assert found.as_dict()["cpu"] == {"before": None, "after": None}


def made(
    ratios: Sequence[float], work: Sequence[float] | None = None, share: float | None = 1.0, threads: int = 1
) -> Timing:
    """A measurement in which the original takes a millisecond in every round."""
    ones = (1.0,) * len(ratios)
    original = Measured("original", ones, ones, ones, 1.0, 9, 1, {}, {})
    spent = tuple(work or ratios)
    candidate = replace(
        original, name="candidate", rounds=tuple(ratios), ratios=tuple(ratios), work=spent, share=share
    )
    return Timing((original, replace(candidate, threads=threads)), 0.1, 0)


@pytest.mark.parametrize(
    ("share", "threads", "busy"),
    [(0.95, 1, False), (0.89, 1, True), (0.5, 2, False), (0.4, 2, True), (0.3, 4, False), (None, 1, False)],
)
def test_one_thread_at_least_has_a_processor(share: float | None, threads: int, busy: bool) -> None:
    assert ("had a processor" in made([0.5] * 7, share=share, threads=threads).contended) is busy


def test_rounds_that_spread_are_contended_and_one_bad_round_is_not() -> None:
    assert made([0.5, 0.5, 0.5, 0.5, 0.5, 0.51, 0.9]).contended == ""
    wide = made([0.4, 0.4, 0.45, 0.5, 0.55, 0.6, 0.6])
    assert wide.contended == "ratios of the candidate spread by 30% between rounds"
    assert made([0.5]).contended == ""


# Verdicts


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [
        ([0.7, 0.75, 0.8], "faster"),
        ([1.2, 1.3, 1.25], "not faster"),
        ([0.9, 0.95, 1.01], "cannot tell"),
        ([1.0, 1.0, 1.0], "cannot tell"),
        ([0.993, 0.995, 0.999], "cannot tell"),  # as between two sessions of one file
        ([1.001, 1.005, 1.007], "cannot tell"),
        ([0.97, 0.98, 0.999], "faster"),
    ],
)
def test_verdict(ratios: list[float], outcome: str) -> None:
    judged = verdict(made(ratios))
    assert judged.outcome == outcome
    assert judged.text.startswith(f"{outcome}, 1 ms -> ")
    assert f"(rounds {min(ratios):.3f} to {max(ratios):.3f})" in judged.text


def test_on_a_contended_machine_cpu_time_has_to_agree() -> None:
    ratios = [0.7, 0.75, 0.8]
    assert verdict(made(ratios, work=[1.1, 1.1, 1.1])).outcome == "faster"  # not contended
    assert verdict(made(ratios, work=[0.7, 0.7, 0.7], share=0.5)).outcome == "faster"
    assert verdict(made(ratios, work=[1.1, 1.1, 1.1], share=0.5)).outcome == "cannot tell"
    assert verdict(made(ratios, work=[0.7, 0.7, 1.1], share=0.5)).outcome == "cannot tell"
    slower = [1 / ratio for ratio in ratios]
    assert verdict(made(slower, work=[0.9, 0.9, 0.9], share=0.5)).outcome == "cannot tell"
    assert verdict(made(slower, work=[1.2, 1.2, 1.2], share=0.5)).outcome == "not faster"


# Guards


def test_a_silent_fall_back_is_seen(path: Path) -> None:
    engine = FellBack(path)
    np.testing.assert_array_equal(
        engine.run(FEEDS)["y"], CpuEngine(path, 1).run(FEEDS)["y"]
    )  # all seems well
    placed = timing.placement(engine, "AzureExecutionProvider")
    assert placed.fell_back
    assert placed.share == 0
    total = engine.nodes[PROVIDER]
    assert total > 0
    assert placed.text == (
        f"fell back: none of {total} nodes ran on AzureExecutionProvider ({total} on {PROVIDER})"
    )


def test_placement_of_engines_that_did_not_fall_back(path: Path) -> None:
    engine = CpuEngine(path, 1)
    whole = timing.placement(engine, PROVIDER)
    assert (whole.share, whole.fell_back, whole.text) == (1.0, False, "")
    engine.nodes = {"GPU": 3, PROVIDER: 1, "Idle": 0}
    part = timing.placement(engine, "GPU")
    assert (part.share, part.fell_back) == (0.75, False)
    assert part.text == f"3 of 4 nodes ran on GPU (1 on {PROVIDER})"
    engine.nodes = {}  # the target does not say
    silent = timing.placement(engine, "GPU")
    assert (silent.share, silent.fell_back, silent.text) == (None, False, "")


def outputs(engine: Engine) -> list[dict[str, Any]]:
    return [engine.run(FEEDS), engine.run(OTHER)]


@pytest.mark.parametrize("kind", [Saver, Stuck])
def test_constants_are_seen(path: Path, kind: type[CpuEngine]) -> None:
    expected = outputs(CpuEngine(path, 1))
    why = timing.unresponsive(expected, outputs(kind(path, 1)))
    assert why == "returned the same values for different inputs: output 'y'"


def test_engines_that_compute_pass(path: Path, tmp_path: Path) -> None:
    expected = outputs(CpuEngine(path, 1))
    assert timing.unresponsive(expected, expected) == ""
    half = [{"y": run["y"].astype(np.float16)} for run in expected]
    assert timing.unresponsive(expected, half) == ""
    deaf = net([helper.make_node("Mul", ["a", "none"], ["b"])], [constant("none", 0.0)])
    still = outputs(CpuEngine(write(deaf, tmp_path / "deaf.onnx"), 1))
    assert timing.unresponsive(still, still) == ""  # the model gives constants
    assert timing.unresponsive(expected, still) != ""  # in place of another that does not


def constant(name: str, value: float) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.full((1, 8, 1, 1), value, dtype=np.float32), name)


def test_what_hardly_changes_may_be_constant() -> None:
    expected = [{"y": np.array([1.0, 2.0])}, {"y": np.array([1.0, 2.001])}]
    still = [{"y": np.array([1, 2])}] * 2
    assert timing.unresponsive(expected, still, tolerance=0.01) == ""
    assert timing.unresponsive(expected, still, tolerance=0.0001) != ""


def test_one_output_that_follows_its_input_is_enough() -> None:
    a, b = np.zeros(3), np.ones(3)
    moves, still = [{"p": a, "q": a}, {"p": b, "q": b}], [{"p": a, "q": a}] * 2
    assert timing.unresponsive(moves, [{"p": a, "q": a}, {"p": a, "q": b}]) == ""
    assert "'p'" in timing.unresponsive(moves, still)
    missing = [{"p": a}, {"p": a}]
    assert timing.unresponsive(moves, missing) != ""
    infinite = [{"p": a, "q": a}, {"p": a * np.nan, "q": a}]
    assert timing.unresponsive(infinite, still) != ""
    assert timing.unresponsive([{"p": a * np.nan}] * 2, [{"p": a}] * 2) == ""


def test_refusals_are_in_the_engines_own_words(path: Path, tmp_path: Path) -> None:
    assert timing.refusal(Cpu(), path, FEEDS) == ""
    broken = write(b"no model", tmp_path / "broken.onnx")
    assert "protobuf" in timing.refusal(Cpu(), broken, FEEDS).lower()
    wrong = net([helper.make_node("Conv", ["a", "w3"], ["b"], name="narrow")], [weight("w3", 8, 5, 1, 1)])
    loads = write(wrong, tmp_path / "wrong.onnx")
    CpuEngine(loads, 1)  # is accepted; the channels are found to be wrong when it runs
    assert "kernel channels: 5" in timing.refusal(Cpu(), loads, FEEDS)


def test_compare_names_the_engine_that_fails(path: Path) -> None:
    good, bad = CpuEngine(path, 1), Crashing(path, 1)
    with pytest.raises(TargetError, match=r"^the candidate does not run: the device is gone$"):
        compare([good, bad], FEEDS, rounds=1, seconds=0)
    with pytest.raises(TargetError, match=r"^the original does not run: "):
        compare([bad, good], FEEDS, rounds=1, seconds=0)


# Starts


def wide(units: int) -> onnx.ModelProto:
    """One matrix product with as many times as many weights."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "wide",
        [floats("x", 1, units)],
        [floats("y", 1, units)],
        [weight("w", units, units)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is only counted on Linux")
def test_memory_of_a_start_holds_the_weights(tmp_path: Path) -> None:
    small, large = (
        timing.startup(
            Cpu(), write(wide(n), tmp_path / f"{n}.onnx"), {"x": np.ones((1, n), dtype=np.float32)}
        )
        for n in (16, 2048)
    )
    weights = 2048 * 2048 * 4
    assert small.peak is not None
    assert large.peak is not None
    assert large.resident is not None
    assert large.peak >= large.resident
    assert large.peak >= weights > small.peak
    assert min(small.load, small.first, large.load, large.first) > 0


def test_a_start_that_fails_says_why(path: Path, tmp_path: Path) -> None:
    broken = write(b"no model", tmp_path / "broken.onnx")
    with pytest.raises(TargetError, match=r"(?i)protobuf"):
        timing.startup(Cpu(), broken, FEEDS)
    with pytest.raises(TargetError, match=r"^cpu took the process along \(SIGKILL\)$"):
        timing.startup(Killed(), path, FEEDS)
    with pytest.raises(TargetError, match=r"\(exit code 1\): ValueError: what now\?\\x1b\[2J$"):
        timing.startup(Confused(), path, FEEDS)


def test_a_start_that_takes_too_long_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    with pytest.raises(TargetError, match=r"^cpu did not load and run the model in 0.01 seconds$"):
        timing.startup(Cpu(), path, FEEDS)
