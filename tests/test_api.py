"""The Python interface: the same results as the command line, and no surprise for the caller."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import onnx
import pytest

import onnxprune
from models.architectures import resnet18
from onnxprune import Keep, NothingToPrune, OnnxPruneError, Options, Plan, UserError
from tests.small import net, run, write


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return resnet18(width=0.125, image=32, classes=10)


def test_shrink_from_memory_and_from_a_path_agree(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = write(model, tmp_path / "model.onnx")
    memory = onnxprune.shrink(model, channels=0.3, align=1)
    for source in (path, str(path)):
        result = onnxprune.shrink(source, channels=0.3, align=1)
        assert result.model == memory.model
        assert result.plan == memory.plan
    assert run("shrink", path, "--channels", 0.3, "--align", 1).exit_code == 0
    result.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").read_bytes() == (tmp_path / "model.pruned.onnx").read_bytes()


def test_the_callers_model_is_not_touched(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    result = onnxprune.shrink(model, channels=0.5, align=1)
    result.model.graph.initializer[0].name = "mine now"
    result.model.graph.node[0].name = "mine now"
    onnxprune.fold(model)
    onnxprune.inspect(model).as_dict()
    assert model.SerializeToString(deterministic=True) == before


def test_the_report_is_data(model: onnx.ModelProto) -> None:
    report = onnxprune.shrink(model, channels=0.5, align=1).report
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
    assert result.model == onnxprune.shrink(model, channels=0.3, align=1).model
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
    options = [renamed.get(name, name) for name in inspect.signature(Options).parameters]
    assert [p for p in inspect.signature(onnxprune.shrink).parameters if p != "model"] == options
    result = onnxprune.shrink(
        model, macs=0.6, criterion="fpgm", allocation="global", align=2, min_channels=3, include=["layer*"],
        exclude=["layer4*"], allow_lossy=True, seed=5,
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
    ],
    ids=str,
)
def test_options_are_checked_here_too(options: dict[str, object], model: onnx.ModelProto) -> None:
    with pytest.raises(UserError):
        onnxprune.shrink(model, **options)  # type: ignore[arg-type]


def test_results_do_not_overwrite_their_model(tmp_path: Path) -> None:
    path = write(net(), tmp_path / "model.onnx")
    before = path.read_bytes()
    for result in (onnxprune.shrink(path, channels=0.5, align=1), onnxprune.fold(path)):
        with pytest.raises(UserError, match="overwrite the input"):
            result.save(path)
    assert path.read_bytes() == before


def test_weights_left_outside_are_asked_for(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    with pytest.raises(UserError, match="give the path of the model"):
        onnxprune.shrink(proto, channels=0.5)
    assert onnxprune.shrink(tmp_path / "model.onnx", channels=0.5, align=1).report.cut == 1


def test_validate_from_python(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.validation.drift.ROUND_SECONDS", 0.01)
    result = onnxprune.shrink(model, channels=0.5, align=1)
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
    assert onnxprune.shrink(folded.model, channels=0.3, align=1).report.equivalence is not None


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
    wanted = onnxprune.shrink(model, channels=0.3, align=1)
    result = onnxprune.shrink(turned, channels=0.3, align=1)
    assert turned.SerializeToString() == given
    assert result.plan.edits == wanted.plan.edits
    onnx.checker.check_model(result.model, full_check=True)
    onnx.save(turned, tmp_path / "turned.onnx")
    assert onnxprune.shrink(tmp_path / "turned.onnx", channels=0.3, align=1).model == result.model
