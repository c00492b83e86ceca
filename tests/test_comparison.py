"""Both models on a target: what is accepted, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from models.architectures import ARCHITECTURES
from models.builder import Graph
from onnxprune import comparison, latency, shrink
from onnxprune.comparison import OnTarget, Reference
from onnxprune.errors import NotFaster, UserError, WrongOnTarget
from onnxprune.latency import Piece, Table
from onnxprune.model import save
from onnxprune.runtime import Feeds
from onnxprune.targets import TARGETS, Engine, State, Target, TargetError, target
from onnxprune.targets.cpu import Cpu
from tests.reference import graph_of
from tests.small import floats, net, weight, write

PLAIN: dict[str, Any] = {"criterion": "l2", "allocation": "uniform", "repair": "none"}


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    return ARCHITECTURES["mobilenet_v2"](width=0.5, image=32, classes=10)


@pytest.fixture
def paths(proto: onnx.ModelProto, tmp_path: Path) -> tuple[Path, Path]:
    result = shrink(proto, 0.5, **PLAIN)
    both = tmp_path / "original.onnx", tmp_path / "small.onnx"
    onnx.save(proto, both[0])
    result.save(both[1])
    return both


def compared(where: Target, paths: Sequence[Path], feeds: Sequence[Feeds]) -> OnTarget:
    return comparison.compare(where, *(Reference(path, feeds) for path in paths))


class Wrapped(Engine):
    """The CPU's engine, and what a back end does to its outputs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.nodes, self.settings = engine.nodes, engine.settings

    def run(self, feeds: Feeds) -> dict[str, Any]:
        return {name: self.change(value) for name, value in self.engine.run(feeds).items()}

    def change(self, value: Any) -> Any:
        return value


class Zeros(Wrapped):
    def change(self, value: Any) -> Any:
        return np.zeros_like(value)


class Coarse(Wrapped):
    def change(self, value: Any) -> Any:
        return value + 0.01 * np.abs(value).max()


class Elsewhere(Wrapped):
    place = "SomeNpuExecutionProvider"


def on(kind: type[Wrapped], when: str = "") -> Target:
    """The CPU with that engine for models of this name."""

    class Wrong(Cpu):
        timed = False

        def load(self, path: Path, threads: int = 1) -> Engine:
            engine = super().load(path, threads)
            return kind(engine) if when in path.name else engine

    return Wrong()


def test_the_same_on_the_cpu(paths: tuple[Path, Path], proto: onnx.ModelProto) -> None:
    feeds = comparison.inputs(graph_of(proto))
    assert not np.array_equal(*(next(iter(feed.values())) for feed in feeds))
    found = compared(target("cpu"), paths, feeds)
    assert found.agrees
    assert not found.broken
    assert set(found.nodes) == {"CPUExecutionProvider"}
    assert max(found.errors.values()) < 1e-5
    assert found.timing is not None
    assert len(found.timing.engines) == 2


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Zeros, "candidate fails: returned the same values for different inputs"),
        (Elsewhere, "candidate fails: fell back"),
    ],
)
def test_what_only_looks_like_a_run(
    kind: type[Wrapped], why: str, paths: tuple[Path, Path], proto: onnx.ModelProto
) -> None:
    feeds = comparison.inputs(graph_of(proto))
    found = compared(on(kind, "small"), paths, feeds)
    assert found.broken
    assert found.agrees is None
    assert why in found.failed


def test_what_a_target_does_to_any_model_is_no_fault_of_the_cut(
    paths: tuple[Path, Path], proto: onnx.ModelProto
) -> None:
    feeds = comparison.inputs(graph_of(proto))
    assert compared(on(Coarse), paths, feeds).agrees
    wrong = compared(on(Coarse, "small"), paths, feeds)
    assert wrong.agrees is False
    assert wrong.broken


def test_a_target_that_computes_the_original_wrong(paths: tuple[Path, Path], proto: onnx.ModelProto) -> None:
    """It would be a poor standard for the candidate."""

    class Far(Wrapped):
        def change(self, value: Any) -> Any:
            return value + 0.5 * np.abs(value).max()

    found = compared(on(Far), paths, comparison.inputs(graph_of(proto)))
    assert found.agrees is None
    assert not found.broken
    assert "original is computed wrong there" in found.failed
    wrong = compared(on(Far, "small"), paths, comparison.inputs(graph_of(proto)))
    assert wrong.agrees is False


def test_what_runs_elsewhere_is_said(paths: tuple[Path, Path], proto: onnx.ModelProto) -> None:
    class Partly(Wrapped):
        place = "SomeNpuExecutionProvider"

        def __init__(self, engine: Engine) -> None:
            super().__init__(engine)
            self.nodes = {"SomeNpuExecutionProvider": 1, "CPUExecutionProvider": 73}

    found = compared(on(Partly), paths, comparison.inputs(graph_of(proto)))
    assert found.agrees
    assert "1 of 74 nodes ran on SomeNpuExecutionProvider" in f"{found}"


def test_a_result_that_is_wrong_on_its_target(
    proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy(Cpu):
        name = "lossy"
        timed = False

        def load(self, path: Path, threads: int = 1) -> Engine:
            engine = super().load(path, threads)
            return Coarse(engine) if "candidate" in path.name else engine

        def objections(self, model: Any) -> list[str]:
            return ["it rounds"]

    monkeypatch.setitem(TARGETS, "lossy", Lossy)
    with pytest.raises(WrongOnTarget, match="known of it: it rounds") as refused:
        shrink(proto, 0.5, targets=["lossy"], **PLAIN)
    assert refused.value.exit_code == 6


def test_a_target_that_refuses(paths: tuple[Path, Path], proto: onnx.ModelProto, tmp_path: Path) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(proto)
    broken.graph.node[0].input[1] = broken.graph.node[2].input[1]
    save(broken, tmp_path / "broken.onnx", {})
    broken_paths = (paths[0], tmp_path / "broken.onnx")
    found = compared(target("cpu"), broken_paths, comparison.inputs(graph_of(proto)))
    assert found.broken
    assert found.failed.startswith("candidate ")


def test_a_target_that_is_not_here(paths: tuple[Path, Path], proto: onnx.ModelProto) -> None:
    class Absent(Cpu):
        def state(self) -> State:
            return State("absent", missing="pip install it")

    found = compared(Absent(), paths, comparison.inputs(graph_of(proto)))
    assert found.failed == "not here: pip install it"
    assert not found.broken
    with pytest.raises(TargetError):
        Target.load(Absent(), paths[0])


def test_all_is_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(Cpu):
        name = "absent"

        def state(self) -> State:
            return State("absent", missing="pip install it")

    monkeypatch.setitem(TARGETS, "absent", Absent)
    here = [f"{one}" for one in comparison.chosen(["all"])]
    assert "cpu" in here
    assert "absent" not in here
    assert [f"{one}" for one in comparison.chosen(["absent", "absent"])] == ["absent"]


@pytest.mark.parametrize("name", ["nowhere", "cpu:int3", ""])
def test_targets_that_are_unknown(name: str, proto: onnx.ModelProto) -> None:
    with pytest.raises(UserError, match="--target"):
        shrink(proto, 0.5, targets=[name])


def test_a_result_that_is_slower_is_refused(proto: onnx.ModelProto) -> None:
    """Depthwise convolutions off a multiple of four run on the slow path, whatever the machine."""
    from onnxprune.passes import Options
    from onnxprune.pipeline import Inputs, prune

    class Slow(Wrapped):
        def run(self, feeds: Feeds) -> dict[str, Any]:
            for _ in range(3):
                self.engine.run(feeds)
            return self.engine.run(feeds)

    class Sluggish(Cpu):
        name = "sluggish"

        def load(self, path: Path, threads: int = 1) -> Engine:
            engine = super().load(path, threads)
            return Slow(engine) if "candidate" in path.name else engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "sluggish", Sluggish)
        options = Options(0.05, align=1, targets=("sluggish",))
        with pytest.raises(NotFaster, match="allow-slower") as refused:
            prune(proto, options)
        assert refused.value.exit_code == 5
        result = prune(proto, options, inputs=Inputs(allow_slower=True))
    assert result.report.targets[0].slower


def known_times(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
    """A CPU that is elsewhere, whose pieces take as long as their multiply-accumulates say."""

    def known(self: Table, piece: Piece) -> float:
        return seconds(latency.CostModel(graph_of(piece.proto)).work().popitem()[1])

    class There(Cpu):
        def state(self) -> State:
            return State("absent", missing="it is elsewhere")

    monkeypatch.setitem(TARGETS, "cpu", There)
    monkeypatch.setattr(Table, "time", known)


def test_a_share_of_the_time(proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose times are known, a slope and an offset for each piece, the share is met."""
    known_times(monkeypatch, lambda macs: 1e-3 + 1e-6 * macs)
    feeds = comparison.inputs(graph_of(proto))[0]
    for share in (0.8, 0.6):
        result = shrink(proto, latency=share, latency_table=tmp_path / "t.json", align=1, **PLAIN)
        assert result.plan.options["latency"] == share
        table = Table(target("cpu"), 1, tmp_path / "t.json")
        before = latency.predict(graph_of(proto), feeds, table).total
        after = latency.predict(graph_of(result.proto), feeds, table).total
        assert share - 0.04 <= after / before <= share + 0.01
    with pytest.raises(UserError, match="cannot be reached"):
        shrink(proto, latency=0.001, latency_table=tmp_path / "t.json", **PLAIN)


def test_a_share_that_prices_call_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time falls with the square of the work, half the work is a quarter of the time, which no price of a
    multiply-accumulate tells before a cut was timed."""
    known_times(monkeypatch, lambda macs: 1e-12 * macs**2)
    graph = Graph(seed=0)
    value = graph.input(1, 8, 8, 8)
    for _ in range(3):
        value = graph.relu(graph.conv(value, 64))
    proto = graph.model(value)
    feeds = comparison.inputs(graph_of(proto))[0]
    options: dict[str, Any] = {**PLAIN, "align": 1, "min_channels": 44}
    with pytest.raises(UserError, match="cannot be reached"):
        shrink(proto, macs=0.45, **options)
    result = shrink(proto, latency=0.4, latency_table=tmp_path / "t.json", **options)
    table = Table(target("cpu"), 1, tmp_path / "t.json")
    times = [latency.predict(graph_of(one), feeds, table).total for one in (proto, result.proto)]
    assert 0.36 <= times[1] / times[0] <= 0.41


def test_a_candidate_that_would_take_the_process_along_is_refused(tmp_path: Path) -> None:
    """onnxruntime dereferences the bias that this Attention does not have."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Reshape", ["a", "rows"], ["b"]),
        helper.make_node("Attention", ["b", "w"], ["c"], domain="com.microsoft", num_heads=2),
    ]
    shape = numpy_helper.from_array(np.array([1, 36, 8]), "rows")
    weights = [weight("w1", 8, 3, 3, 3), weight("w", 8, 24), shape]
    graph = helper.make_graph(nodes, "crash", [floats("x", 1, 3, 8, 8)], [floats("c", 1, 36, 8)], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    original = net()
    paths = [write(original, tmp_path / "a.onnx")]
    paths.append(write(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "b.onnx"))
    found = compared(target("cpu"), paths, comparison.inputs(graph_of(original)))
    assert found.broken
    assert found.failed.startswith("candidate refused: its Attention without a bias crashes")
