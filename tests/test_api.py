"""The Python interface: the same results as the command line, and no surprise for the caller."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxprune
from models.architectures import resnet18
from onnxprune import Keep, NothingToPrune, OnnxPruneError, Options, Plan, UserError
from tests.small import net, run, write

PLAIN: dict[str, Any] = {
    "criterion": "l2",
    "allocation": "uniform",
    "repair": "none",
}  # looks at weights alone


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return resnet18(width=0.125, image=32, classes=10)


def test_shrink_from_memory_and_from_a_path_agree(tmp_path: Path) -> None:
    path = write(net(), tmp_path / "model.onnx")
    memory = onnxprune.shrink(net(), channels=0.3, align=1)
    assert memory.report.repair is not None
    for source in (path, str(path)):
        result = onnxprune.shrink(source, channels=0.3, align=1)
        assert result.model == memory.model
        assert result.plan == memory.plan
    assert run("shrink", path, "--channels", 0.3, "--align", 1).exit_code == 0
    result.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").read_bytes() == (tmp_path / "model.pruned.onnx").read_bytes()


def test_the_callers_model_is_not_touched(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    result = onnxprune.shrink(model, channels=0.5, align=1, **PLAIN)
    result.model.graph.initializer[0].name = "mine now"
    result.model.graph.node[0].name = "mine now"
    onnxprune.fold(model)
    onnxprune.inspect(model).as_dict()
    assert model.SerializeToString(deterministic=True) == before


def test_the_report_is_data(model: onnx.ModelProto) -> None:
    report = onnxprune.shrink(model, channels=0.5, align=1, **PLAIN).report
    assert report.before.params > report.after.params
    assert report.before.macs > report.after.macs
    assert report.before.bytes > report.after.bytes
    assert report.before.channels > report.after.channels
    assert report.kept["channels"] == pytest.approx(0.5, abs=0.01)
    assert report.equivalence is not None
    assert report.equivalence.passed
    assert json.loads(json.dumps(report.as_dict()))["kept"] == report.as_dict()["kept"]


def test_plans_are_made_edited_and_applied(model: onnx.ModelProto, tmp_path: Path) -> None:
    plan = onnxprune.make_plan(model, Options(channels=0.3, align=1))
    result = onnxprune.apply(model, plan)
    assert result.model == onnxprune.shrink(model, channels=0.3, align=1, **PLAIN).model
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert Plan.load(path) == plan
    assert onnxprune.apply(model, path).model == onnxprune.apply(model, str(path)).model == result.model
    first = plan.keeps[0]
    own = Plan(plan.model, (Keep(first.group, first.size, (0, 2)),))
    small = onnxprune.apply(model, own)
    assert small.report.cut == 1
    with pytest.raises(UserError, match="another model"):
        onnxprune.apply(small.model, plan)
    with pytest.raises(NothingToPrune):
        onnxprune.apply(model, Plan(plan.model, ()))


def test_shrink_takes_every_option_of_the_pass(model: onnx.ModelProto) -> None:
    renamed = {"strategy": "allocation", "minimum": "min_channels"}
    options = {renamed.get(name, name) for name in inspect.signature(Options).parameters}
    about_data = {"data", "samples", "preprocess", "judge", "metric"}
    about_time = {"latency_table", "allow_slower"}
    asked = options | about_data | about_time | {"model"}
    assert set(inspect.signature(onnxprune.shrink).parameters) == asked
    result = onnxprune.shrink(
        model, macs=0.6, criterion="fpgm", allocation="global", align=2, min_channels=3, include=["layer*"],
        exclude=["layer4*"], allow_lossy=True, seed=5, repair="none",
    )  # fmt: skip
    stated = dict(result.plan.options)
    assert (stated["macs"], stated["criterion"], stated["strategy"]) == (0.6, "fpgm", "global")
    assert (stated["align"], stated["minimum"], stated["seed"], stated["allow_lossy"]) == (2, 3, 5, True)
    assert all(len(edit.units) >= 3 for edit in result.plan.keeps)
    assert result.report.kept["macs"] <= 0.6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 1.0},
        {"channels": -0.1},
        {"channels": float("nan")},
        {"channels": 0.3, "macs": 0.5},
        {"macs": 0.0},
        {"params": 1.1},
        {"channels": 0.3, "align": 0},
        {"latency": 0.0},
        {"latency": 0.5, "macs": 0.5},
        {"latency": 0.5, "max_drop": 0.1},
        {"channels": 0.3, "min_channels": 0},
        {"channels": 0.3, "criterion": "best"},
        {"channels": 0.3, "allocation": "fair"},
        {"channels": 0.3, "criterion": "random", "seed": -1},
        {"heads": 1.0},
        {"head_width": -0.5},
        {"ffn": 2},
        {"hidden": float("nan")},
        {"heads": 0.3, "params": 0.5},
        {"layers": 0},
        {"layers": 1.5},
        {"layers": -1},
        {"layers": "nan"},
        {"layers": 1, "layer_criterion": "best"},
        {"bytes": 0.0},
        {"channels": 0.3, "repair": "best"},
        {"channels": 0.3, "steps": 0},
        {"channels": 0.3, "samples": 1},
        {"channels": 0.3, "metric": "top1"},
        {"channels": 0.3, "preprocess": "best"},
        {"max_drop": 0.1},
        {"max_drop": -0.1, "data": []},
        {"max_drop": 0.1, "macs": 0.5, "data": []},
    ],
    ids=str,
)
def test_options_are_checked_here_too(options: dict[str, object], model: onnx.ModelProto) -> None:
    with pytest.raises(UserError):
        onnxprune.shrink(model, **options)  # type: ignore[arg-type]


def test_results_do_not_overwrite_their_model(tmp_path: Path) -> None:
    path = write(net(), tmp_path / "model.onnx")
    before = path.read_bytes()
    for result in (onnxprune.shrink(path, channels=0.5, align=1, **PLAIN), onnxprune.fold(path)):
        with pytest.raises(UserError, match="overwrite the input"):
            result.save(path)
    assert path.read_bytes() == before


def test_weights_left_outside_are_asked_for(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    with pytest.raises(UserError, match="give the path of the model"):
        onnxprune.shrink(proto, channels=0.5)
    assert onnxprune.shrink(tmp_path / "model.onnx", channels=0.5, align=1, **PLAIN).report.cut == 1


def test_validate_from_python(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.timing.SECONDS", 0.01)
    result = onnxprune.shrink(model, channels=0.5, align=1, **PLAIN)
    verdict = onnxprune.validate(model, result.model, result.plan)
    assert verdict.passed
    assert verdict.latency is not None
    assert verdict.drift[0].cosine < 1
    same = onnxprune.validate(model, model)
    assert same.drift[0].error == 0
    assert same.drift[0].cosine == pytest.approx(1)
    assert not onnxprune.validate(model, net()).passed


def test_fold_then_shrink(model: onnx.ModelProto) -> None:
    folded = onnxprune.fold(model)
    assert len(folded.model.graph.node) < len(model.graph.node)
    names = {t.name for t in model.graph.initializer}
    assert {t.name for t in folded.model.graph.initializer if t.name.endswith("conv_1.weight")} <= names
    assert onnxprune.shrink(folded.model, channels=0.3, align=1, **PLAIN).report.equivalence is not None


def test_every_public_name_is_there_and_documented() -> None:
    for name in onnxprune.__all__:
        thing = getattr(onnxprune, name)
        assert name == "__version__" or thing.__doc__
    assert issubclass(NothingToPrune, OnnxPruneError)


def test_nodes_in_any_order(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Converters write graphs that onnxruntime sorts; they are sorted here, too."""
    turned = onnx.ModelProto()
    turned.CopyFrom(model)
    del turned.graph.node[:]
    turned.graph.node.extend(reversed(model.graph.node))
    given = turned.SerializeToString()
    wanted = onnxprune.shrink(model, channels=0.3, align=1, **PLAIN)
    result = onnxprune.shrink(turned, channels=0.3, align=1, **PLAIN)
    assert turned.SerializeToString() == given
    assert result.plan.edits == wanted.plan.edits
    onnx.checker.check_model(result.model, full_check=True)
    onnx.save(turned, tmp_path / "turned.onnx")
    assert onnxprune.shrink(tmp_path / "turned.onnx", channels=0.3, align=1, **PLAIN).model == result.model


def feeds(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8), dtype=np.float32)


def test_data_repair_and_replay_from_python() -> None:
    result = onnxprune.shrink(net(), channels=0.5, align=1, data=feeds())
    report = result.report
    assert report.repair is not None
    assert report.repair.errors[report.repair.chosen] < report.repair.errors["none"]
    assert report.data is not None
    assert (report.data["kind"], report.data["samples"], report.data["measured"]) == ("arrays", 8, True)
    stored = sum(int(np.prod(tensor.dims)) for tensor in result.model.graph.initializer)
    assert report.after.params == stored == 4 * 27 + 4 * 4 + 4, "two filters, and the bias that repair adds"
    assert report.after.bytes == 4 * stored
    assert onnxprune.apply(net(), result.plan, feeds()).model == result.model
    with pytest.raises(UserError, match="--repair none"):
        onnxprune.apply(net(), result.plan)
    cut = onnxprune.apply(net(), result.plan, cut_only=True)
    assert cut.model != result.model
    assert cut.plan.options["repair"] == "none"
    assert cut.report.repair is None
    assert onnxprune.apply(net(), cut.plan).model == cut.model


def test_a_drop_is_no_plan() -> None:
    with pytest.raises(UserError, match="use shrink"):
        onnxprune.make_plan(net(), Options(max_drop=0.1))


def test_validate_with_data_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.timing.SECONDS", 0.01)
    result = onnxprune.shrink(net(), channels=0.5, align=1, data=feeds())
    verdict = onnxprune.validate(net(), result.model, result.plan, data=feeds(), metric="snr")
    assert verdict.passed
    assert verdict.mending is not None
    assert verdict.mending.repaired + verdict.mending.added > 0
    assert verdict.quality is not None
    assert verdict.quality.before == float("inf")
    assert verdict.quality.after == verdict.agreement[0].snr
    assert json.loads(json.dumps(verdict.as_dict()["repair"]))["passed"] is True
