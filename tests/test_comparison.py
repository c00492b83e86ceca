"""Both models on a target: what is accepted, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxprune
from models.architectures import ARCHITECTURES
from models.builder import Graph
from onnxprune import comparison, latency, shrink
from onnxprune.comparison import OnTarget
from onnxprune.errors import NotFaster, UserError, WrongOnTarget
from onnxprune.latency import Piece, Table
from onnxprune.model import save
from onnxprune.reference import Reference
from onnxprune.runtime import Feeds
from onnxprune.targets import TARGETS, Engine, State, Target, TargetError, target
from onnxprune.targets.cpu import Cpu
from onnxprune.timing import Measured, Timing
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

    def attending(*bias: str) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Conv", ["x", "w1"], ["a"]),
            helper.make_node("Reshape", ["a", "rows"], ["b"]),
            helper.make_node("Attention", ["b", "w", *bias], ["c"], domain="com.microsoft", num_heads=2),
        ]
        shape = numpy_helper.from_array(np.array([1, 36, 8]), "rows")
        weights = [weight("w1", 8, 3, 3, 3), weight("w", 8, 24), weight("bias", 24), shape]
        graph = helper.make_graph(nodes, "crash", [floats("x", 1, 3, 8, 8)], [floats("c", 1, 36, 8)], weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    original = attending("bias")
    paths = [write(original, tmp_path / "a.onnx"), write(attending(), tmp_path / "b.onnx")]
    found = compared(target("cpu"), paths, comparison.inputs(graph_of(original)))
    assert found.broken
    assert found.failed.startswith("candidate refused: its Attention without a bias crashes")


def on_the_way(kind: type[Engine], aim: Target) -> Target:
    """Another target whose engines are wrapped."""

    class Wrong(Cpu):
        timed = False

        def load(self, path: Path, threads: int = 1) -> Engine:
            return kind(super().load(path, threads))  # type: ignore[call-arg]

        @property
        def tolerance(self) -> float:
            return aim.tolerance

    return Wrong()


def classifier(last: str, bias: float = 0.0) -> onnx.ModelProto:
    """100 classes whose scores are all but equal, or, with a bias, all but 0."""
    g = Graph("classes", seed=0)
    value = g.relu(g.conv(g.input("batch", 3, 8, 8, name="image"), 16))
    value = g.gemm(g.flatten(g.gap(value)), 100)
    proto = g.model(value)
    for node in proto.graph.node:
        node.output[:] = ["scores" if name == proto.graph.output[0].name else name for name in node.output]
    if bias:
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(bias), "shift"))
        proto.graph.node.append(helper.make_node("Add", ["scores", "shift"], ["shifted"]))
    source = "shifted" if bias else "scores"
    proto.graph.node.append(helper.make_node(last, [source], [proto.graph.output[0].name]))
    return proto


@pytest.mark.parametrize("where", ["cpu", "qnn", "openvino:bf16"])
@pytest.mark.parametrize(("last", "bias"), [("Softmax", 0.0), ("Sigmoid", -16.0)])
def test_zeros_behind_a_saturating_function(where: str, last: str, bias: float, tmp_path: Path) -> None:
    """Shares are next to nothing, and zeros within any tolerance of them."""
    proto = classifier(last, bias)
    path = write(proto, tmp_path / "model.onnx")
    feeds = comparison.inputs(graph_of(proto))
    zeros = compared(on_the_way(Zeros, target(where)), [path, path], feeds)
    assert zeros.agrees is None
    assert zeros.failed.startswith("original fails: returned ")
    honest = compared(on_the_way(Wrapped, target(where)), [path, path], feeds)
    assert honest.agrees
    assert proto.graph.output[0].name in honest.errors


def test_an_original_that_is_far_off_excuses_no_candidate(
    paths: tuple[Path, Path], proto: onnx.ModelProto
) -> None:
    """Three times 0.19 of the scale is nearly 0.6."""

    class Off(Wrapped):
        by = 0.19

        def change(self, value: Any) -> Any:
            return value + self.by * np.abs(value).max()

    class FarOff(Off):
        by = 0.55

    class Both(Cpu):
        timed = False

        def load(self, path: Path, threads: int = 1) -> Engine:
            kind = FarOff if "small" in path.name else Off
            return kind(super().load(path, threads))

    found = compared(Both(), paths, comparison.inputs(graph_of(proto)))
    assert max(found.original.values()) == pytest.approx(0.19, abs=0.01)
    assert found.agrees is False
    assert found.limit == comparison.WRONG


def test_where_the_cpu_contradicts_itself_nothing_is_said(tmp_path: Path) -> None:
    """A convolution overflows unless the normalisation behind it is fused into it."""
    weights = [numpy_helper.from_array(np.full((4, 3, 1, 1), 3e38, np.float32), "w")]
    for name, value in (("scale", 1e-38), ("bias", 0.0), ("mean", 0.0), ("variance", 1.0)):
        weights.append(numpy_helper.from_array(np.full(4, value, np.float32), name))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node(
            "BatchNormalization", ["a", "scale", "bias", "mean", "variance"], ["y"], epsilon=0.0
        ),
    ]
    graph = helper.make_graph(nodes, "huge", [floats("x", 1, 3, 8, 8)], [floats("y", 1, 4, 8, 8)], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = write(proto, tmp_path / "model.onnx")
    found = compared(on(Wrapped), [path, path], [{"x": np.full((1, 3, 8, 8), v, np.float32)} for v in (1, 2)])
    assert found.agrees is None
    assert not found.broken
    assert "nothing can be said" in found.failed


@pytest.mark.parametrize("role", ["original", "candidate"])
def test_a_model_that_the_cpu_runs_with_optimisations_only(role: str, tmp_path: Path) -> None:
    """It has no kernel for a Dropout of bfloat16, which optimisations take away."""

    def cast(*between: onnx.NodeProto) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Cast", ["x"], ["a"], to=onnx.TensorProto.BFLOAT16),
            *between,
            helper.make_node("Cast", ["b" if between else "a"], ["y"], to=onnx.TensorProto.FLOAT),
        ]
        graph = helper.make_graph(nodes, "cast", [floats("x", 2, 8)], [floats("y", 2, 8)])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    plain, strange = write(cast(), tmp_path / "a.onnx"), tmp_path / "b.onnx"
    write(cast(helper.make_node("Dropout", ["a"], ["b"])), strange)
    generator = np.random.default_rng(0)
    feeds = [{"x": generator.standard_normal((2, 8), dtype=np.float32)} for _ in range(2)]
    assert compared(on(Wrapped), [plain, plain], feeds).agrees
    found = compared(on(Wrapped), [strange, plain] if role == "original" else [plain, strange], feeds)
    assert found.failed.startswith(f"{role} fails: ")
    assert "Dropout" in found.failed
    assert found.broken is (role == "candidate")


def test_texts_and_members_of_sequences_are_compared(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("SplitToSequence", ["a"], ["parts"], axis=1, keepdims=1),
        helper.make_node("ArgMax", ["a"], ["place"], axis=1),
        helper.make_node("Cast", ["place"], ["text"], to=onnx.TensorProto.STRING),
    ]
    kind = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    outputs = [
        helper.make_value_info("parts", helper.make_sequence_type_proto(kind)),
        helper.make_tensor_value_info("place", onnx.TensorProto.INT64, None),
        helper.make_tensor_value_info("text", onnx.TensorProto.STRING, None),
    ]
    weights = [weight("w1", 8, 3, 3, 3)]
    graph = helper.make_graph(nodes, "kinds", [floats("x", 1, 3, 8, 8)], outputs, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = write(proto, tmp_path / "model.onnx")

    class Reordered(Wrapped):
        def change(self, value: Any) -> Any:
            return value[::-1] if isinstance(value, list) else value

    class Next(Wrapped):
        """Every class is another one, though not by much of the largest."""

        def change(self, value: Any) -> Any:
            return value + 1 if getattr(value, "dtype", None) == np.int64 else value

    feeds = comparison.inputs(graph_of(proto))
    same = compared(target("cpu"), [path, path], feeds)
    assert same.agrees
    assert {"parts[0]", "parts[7]", "place", "text"} <= set(same.errors)
    for kind_of, name in ((Reordered, "parts[0]"), (Next, "place")):
        wrong = compared(on(kind_of), [path, path], feeds)
        assert wrong.original[name] > comparison.WRONG
        assert not wrong.agrees


def test_what_is_slower_in_every_round_is_slower_on_a_contended_machine_too() -> None:
    """An engine that waits has no processor for most of its time."""

    def measured(ratios: list[float]) -> OnTarget:
        ones = (1.0,) * len(ratios)
        original = Measured("original", ones, ones, ones, 1.0, 9, 1, {}, {})
        waits = replace(original, name="candidate", rounds=tuple(ratios), ratios=tuple(ratios), share=0.2)
        return OnTarget("cpu", "", State("runs"), timing=Timing((original, waits), 0.1, 0))

    assert measured([10.6, 10.9, 11.3]).timing.contended  # type: ignore[union-attr]
    assert measured([10.6, 10.9, 11.3]).slower
    assert measured([0.99, 1.01, 1.01]).slower
    assert not measured([0.9, 0.95, 1.05]).slower  # as far as can be seen
    assert not measured([0.4, 0.5, 0.6]).slower


def test_targets_are_fed_from_the_data_and_judged_on_it(tmp_path: Path) -> None:
    """On inputs that a back end cuts off at 1 it is wrong, on others it is not."""

    class Cut(Wrapped):
        def run(self, feeds: Feeds) -> dict[str, Any]:
            return self.engine.run({name: np.minimum(value, 1) for name, value in feeds.items()})

    class Cutting(Cpu):
        name = "cutting"
        timed = False

        def load(self, path: Path, threads: int = 1) -> Engine:
            return Cut(super().load(path, threads))

    path = write(net(), tmp_path / "model.onnx")
    values = np.random.default_rng(0).standard_normal((12, 3, 8, 8), dtype=np.float32)
    labels = np.arange(12) % 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "cutting", Cutting)
        for scale, right in ((0.01, True), (10.0, False)):
            np.savez(tmp_path / "val.npz", x=np.abs(values) * scale, labels=labels)
            found = onnxprune.validate(
                path, path, data=tmp_path / "val.npz", metric="top1", targets=["cutting", "cpu"]
            )
            cutting, cpu = found.targets
            assert (cutting.agrees is True) is right
            assert cpu.agrees
            assert found.quality is not None
            if right:
                assert cutting.quality == cpu.quality == (found.quality.before, found.quality.after)
            assert cpu.settings["threads"] == 1


def test_a_target_that_is_named_and_not_here(tmp_path: Path) -> None:
    class Absent(Cpu):
        name = "absent"

        def state(self) -> State:
            return State("absent", missing="pip install it")

    path = write(net(), tmp_path / "model.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "absent", Absent)
        for act in (onnxprune.validate, onnxprune.bench):
            given = path if act is onnxprune.validate else [path]
            with pytest.raises(UserError, match=r"^--target absent: not here: pip install it$"):
                act(path, given, targets=["absent"])  # type: ignore[operator]


def test_a_candidate_that_is_not_finite_is_broken(tmp_path: Path) -> None:
    """It agrees with itself on every target."""
    original = net()
    candidate = net()
    values = numpy_helper.to_array(candidate.graph.initializer[1]).copy()
    values[0, 0] = np.nan
    candidate.graph.initializer[1].CopyFrom(numpy_helper.from_array(values, "w2"))
    paths = [write(original, tmp_path / "a.onnx"), write(candidate, tmp_path / "b.onnx")]
    (found,) = [one for _, one in onnxprune.bench(paths[0], paths[1:])]
    assert found.broken
    assert "output 'y' is NaN or infinite" in found.failed
    judged = onnxprune.validate(*paths)
    assert not judged.passed
    assert "output 'y' is NaN or infinite, the original's is not" in judged.problems[0]
    assert onnxprune.validate(paths[1], paths[1]).passed


def test_a_candidate_of_another_interface_is_another_function(tmp_path: Path) -> None:
    paths = [write(net(), tmp_path / "a.onnx"), tmp_path / "b.onnx"]
    other = net()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "z"
    write(other, paths[1])
    (found,) = [one for _, one in onnxprune.bench(paths[0], paths[1:])]
    assert found.broken
    assert found.failed.startswith("candidate is another function: outputs changed: y")
