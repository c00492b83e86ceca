"""Graphs of onnx-graphsurgeon in and out, loaders of Polygraphy and TensorRT, and the pass for Olive."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

import onnxprune
from models.environments import NotInstallable, environment
from models.fetch import TORCH, default_cache
from onnxprune import UserError, graphsurgeon, job
from onnxprune.data import synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.runtime import Session
from tests.docs.test_integration import blocks
from tests.small import floats, net, weight, write

ROOT = Path(__file__).parents[1]
PLAIN: dict[str, Any] = {
    "channels": 0.5, "align": 1, "criterion": "l2", "allocation": "uniform", "repair": "none",
}  # fmt: skip


def outputs(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)}
    return Session(model).run(feeds)["y"]


# ------------------------------------------------------------------------------------- onnx-graphsurgeon


def test_a_graph_is_as_good_as_its_model() -> None:
    graph = gs.import_onnx(net())
    before = gs.export_onnx(graph)
    result = onnxprune.shrink(graph, **PLAIN)
    assert result.model == onnxprune.shrink(before, **PLAIN).model
    assert gs.export_onnx(graph) == before, "the caller's graph is as it was"
    back = gs.export_onnx(result.graph())
    assert {t.name: list(t.dims) for t in back.graph.initializer} == {"w1": [4, 3, 3, 3], "w2": [4, 4, 1, 1]}
    np.testing.assert_array_equal(outputs(back), outputs(result.model))


def test_what_was_edited_is_what_is_pruned() -> None:
    graph = gs.import_onnx(net())
    relu = next(node for node in graph.nodes if node.op == "Relu")
    relu.op = "Sigmoid"
    result = onnxprune.shrink(graph, **PLAIN)
    assert [node.op_type for node in result.model.graph.node].count("Sigmoid") == 1
    assert not np.array_equal(outputs(result.model), outputs(onnxprune.shrink(net(), **PLAIN).model))


def test_the_graph_of_a_result_is_not_tied_to_it() -> None:
    result = onnxprune.shrink(net(), **PLAIN)
    before = result.model.SerializeToString(deterministic=True)
    graph = result.graph()
    graph.tensors()["w1"].name = "mine now"
    graph.tensors()["w2"].values *= 2
    renamed = gs.export_onnx(graph)
    assert "mine now" in {tensor.name for tensor in renamed.graph.initializer}
    assert result.model.SerializeToString(deterministic=True) == before


def test_every_function_takes_a_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("onnxprune.timing.SECONDS", 0.01)
    graph = gs.import_onnx(net())
    plan = onnxprune.make_plan(graph, onnxprune.Options(channels=0.5, align=1))
    result = onnxprune.apply(graph, plan)
    assert result.report.cut == 1
    assert onnxprune.inspect(graph).as_dict() == onnxprune.inspect(gs.export_onnx(graph)).as_dict()
    assert onnxprune.validate(graph, result.graph(), plan).passed
    assert onnxprune.fold(graph).graph().nodes
    inputs = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32)
    assert onnxprune.sensitivities(graph, inputs, ratios=(0.5,)).as_dict()
    assert len(list(onnxprune.calibration_data(graph, inputs))) == 4


def built() -> gs.Graph:
    """A graph that was never a model: no IR version, no imports, and nodes of two domains of its own."""
    ends = [
        gs.Variable(name, np.float32, ("n", *shape)) for name, shape in (("x", (3, 8, 8)), ("y", (4, 8, 8)))
    ]
    a, b, c, d = (gs.Variable(name) for name in "abcd")
    arrays = [
        onnx.numpy_helper.to_array(weight(name, *shape))
        for name, shape in (("w1", (8, 3, 1, 1)), ("w2", (4, 8, 1, 1)))
    ]
    w1, w2 = (gs.Constant(f"w{i + 1}", array.copy()) for i, array in enumerate(arrays))
    nodes = [
        gs.Node("Conv", inputs=[ends[0], w1], outputs=[a]),
        gs.Node("Gelu", inputs=[a], outputs=[b], domain="com.microsoft"),
        gs.Node("Conv", inputs=[b, w2], outputs=[c]),
        gs.Node("Trilu", inputs=[c], outputs=[d], domain="com.microsoft"),
        gs.Node("Inverse", inputs=[d], outputs=[ends[1]], domain="a.domain"),
    ]  # fmt: skip
    return gs.Graph(nodes, [ends[0]], [ends[1]], opset=17)


def test_a_graph_that_was_never_a_model() -> None:
    graph = built()
    graph.nodes[-1].op, graph.nodes[-1].domain = "FastGelu", "com.microsoft"
    result = onnxprune.shrink(graph, **PLAIN)
    assert result.report.kept["channels"] == 0.5
    assert result.model.ir_version == 8, (
        "the least for opset 17: onnx's newest is one that onnxruntime may not know"
    )
    assert graph.import_domains is None, "the caller's graph is as it was"


def test_domains_are_imported_in_order() -> None:
    """onnx-graphsurgeon adds them in the order of a set, which changes from process to process."""
    model = graphsurgeon.exported(built())
    assert [one.domain for one in model.opset_import] == ["", "a.domain", "com.microsoft"]


def spoilt(graph: gs.Graph, how: Callable[[gs.Graph], Any]) -> gs.Graph:
    how(graph)
    return graph


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda g: setattr(g.outputs[0], "dtype", None), "cannot be exported: .*dtype"),
        (lambda g: g.nodes.append(g), "cannot be exported: .*recursion"),
        (lambda g: setattr(g, "opset", "new") or setattr(g, "import_domains", None), "cannot be exported"),
        (lambda g: g.nodes.clear(), "'y' is produced by no node"),
        (lambda g: g.nodes[0].inputs.clear(), "'conv1' .* has 0 inputs"),
        (lambda g: g.nodes[0].attrs.update(pads=object()), "cannot be exported: .* attribute value"),
    ],
    ids=range(6),
)  # fmt: skip
def test_broken_graphs_are_refused(broken: Callable[[gs.Graph], Any], why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        onnxprune.shrink(spoilt(gs.import_onnx(net()), broken), **PLAIN)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("thing", [None, 3, b"model.onnx", net().graph])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(UserError, match="a path, a ModelProto or an onnx_graphsurgeon"):
        onnxprune.inspect(thing)


def test_weights_left_outside_do_not_pass(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = gs.import_onnx(onnx.load(tmp_path / "model.onnx", load_external_data=False))
    with pytest.raises(UserError, match="give the path of the model"):
        onnxprune.shrink(graph, **PLAIN)


def test_what_a_graph_loses() -> None:
    """As docs/integration.md says; a newer onnx-graphsurgeon that keeps it makes that text wrong."""
    model = net()
    model.metadata_props.add(key="author", value="me")
    model.graph.node[0].doc_string = "first"
    model.graph.quantization_annotation.add(tensor_name="w1")
    result = onnxprune.shrink(model, **PLAIN)
    assert result.model.metadata_props
    assert result.model.graph.node[0].doc_string == "first"
    exported = gs.export_onnx(result.graph())
    assert not exported.metadata_props
    assert not exported.graph.node[0].doc_string
    assert not exported.graph.quantization_annotation


def test_overloads_are_refused() -> None:
    """onnx-graphsurgeon would make two functions of one name of them, and calls of both calls of one."""
    imports = [helper.make_opsetid("", 17)]
    functions = [
        helper.make_function(
            "own", "F", ["p"], ["q"], [helper.make_node(op, ["p"], ["q"])], imports, overload=op
        )
        for op in ("Relu", "Sigmoid")
    ]
    call = helper.make_node("F", ["x"], ["y"], domain="own", overload="Sigmoid")
    graph = helper.make_graph([call], "g", [floats("x", 2)], [floats("y", 2)])
    model = helper.make_model(
        graph, functions=functions, opset_imports=[*imports, helper.make_opsetid("own", 1)], ir_version=10
    )
    lost = gs.export_onnx(gs.import_onnx(model))
    assert not lost.graph.node[0].overload, "else there is nothing to refuse"
    with pytest.raises(UserError, match=r"overloads of functions.*\.model"):
        graphsurgeon.imported(model)


def test_optional_inputs_do_not_come_out_again() -> None:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    node = helper.make_node("OptionalGetElement", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [helper.make_value_info("x", kind)], [floats("y", 2)])
    with pytest.raises(UserError, match="cannot be exported"):
        onnxprune.inspect(gs.import_onnx(helper.make_model(graph)))


def test_without_onnx_graphsurgeon() -> None:
    """It is an extra: nothing imports it before it is asked for, and then the error names it."""
    code = (
        "import sys; sys.modules['onnx_graphsurgeon'] = None\n"
        "import onnxprune\n"
        "from tests.small import net\n"
        "made = onnxprune.fold(net())\n"
        "try: made.graph()\n"
        "except onnxprune.UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'onnxprune[graphsurgeon]'" in done.stdout
    code = "import sys, onnxprune; print('onnx_graphsurgeon' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---------------------------------------------------------------------- calibration data, Polygraphy, TensorRT


def test_calibration_data_are_the_inputs_that_shrink_sees(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((24, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "calib.npz", x=images)
    settings = {"channels": 0.5, "align": 1, "seed": 3}
    wanted = onnxprune.shrink(net(), **settings, data=tmp_path / "calib.npz", samples=8)
    drawn = list(onnxprune.calibration_data(net(), tmp_path / "calib.npz", samples=8, seed=3))
    assert [feeds["x"].shape for feeds in drawn] == [(1, 3, 8, 8)] * 8
    assert not np.array_equal(drawn[0]["x"], images[:1]), "drawn, not the first"
    again = onnxprune.shrink(net(), **settings, data=[{"x": feeds["x"][0]} for feeds in drawn])
    assert again.model == wanted.model
    assert [feeds["x"].shape[0] for feeds in onnxprune.calibration_data(net(), images, batch=16)] == [16, 8]


def test_calibration_data_are_made_up_where_there_are_none() -> None:
    first, second = (list(onnxprune.calibration_data(net(), samples=6)) for _ in range(2))
    assert [list(feeds) for feeds in first] == [["x"]] * 6
    np.testing.assert_equal(first, second)
    model = job.open_model(net())
    made = synthetic(model, DependencyGraph(model).shapes, samples=6, seed=0)
    report = onnxprune.shrink(net(), channels=0.5, align=1, samples=6).report
    assert (report.data or {})["sha256"] == made.provenance["sha256"], "what shrink makes up"
    np.testing.assert_equal(first, [one.feeds for one in made.batches(1)])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"samples": 1}, "too few"),
        ({"data": "missing.npz"}, "missing.npz"),
        ({"data": np.zeros((4, 3, 8, 8), np.float32)}, "identical"),
        ({"preprocess": "best", "data": "missing"}, "best"),
    ],
)
def test_calibration_data_are_checked_when_asked_for(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        onnxprune.calibration_data(net(), **options)


CONFIG = """
import tensorrt_rtx as trt

def load_config(builder, network):
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return config
"""
LOADED = """
import sys
from polygraphy.backend.common import InvokeFromScript

builder, network, parser = InvokeFromScript(sys.argv[1], "load_network")()
model = InvokeFromScript(sys.argv[1], "load_onnx")()
layers = [network.get_layer(i) for i in range(network.num_layers)]
print(["CONVOLUTION" in str(one.type) and one.get_output(0).shape[1] for one in layers], model.graph.initializer[0].dims)
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_polygraphy_gives_tensorrt_the_pruned_network(tmp_path: Path) -> None:
    """As on a machine with a GPU, but for the configuration, which has to name one where there is none."""
    model = net(weights=[weight("wide1", 32, 3, 3, 3), weight("wide2", 4, 32, 1, 1)])
    for node, name in zip((model.graph.node[0], model.graph.node[2]), ("wide1", "wide2"), strict=True):
        node.input[1] = name
    del model.graph.initializer[:2]
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    script = tmp_path / "polygraphy_pruned.py"
    shutil.copy(ROOT / "docs/examples" / script.name, script)
    (tmp_path / "config.py").write_text(CONFIG)
    env = {
        **os.environ,
        "MODEL": str(write(model, tmp_path / "net.onnx")),
        "POLYGRAPHY_USE_TENSORRT_RTX": "1",
    }
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED, script], env=env, capture_output=True, text=True, check=False
    )
    assert "[16, 3, 3, 3]" in loaded.stdout.splitlines()[-1], loaded.stdout + loaded.stderr
    assert loaded.stdout.splitlines()[-1].startswith("[16, False, 4"), "filters of both convolutions"
    polygraphy = [Path(sys.executable).with_name("polygraphy"), "convert", script]
    command = [*polygraphy, "-o", tmp_path / "small.engine", "--trt-config-script", tmp_path / "config.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "small.engine").stat().st_size > 0


# --------------------------------------------------------------------------------------------------- Olive


@pytest.fixture(scope="module")
def olive() -> Path:
    """The interpreter of an environment with Olive and the versions of what onnxprune needs that are in use here."""
    needs = [
        re.split(r"[><=;\s]", one)[0]
        for one in importlib.metadata.requires("onnxprune") or ()
        if "extra" not in one
    ]
    same = [f"{name}=={importlib.metadata.version(name)}" for name in needs]
    try:
        return environment(default_cache(), ("olive-ai==0.13.0", TORCH[0], "requests==2.34.2", *same))
    except NotInstallable as error:
        pytest.skip(str(error))


def run_olive(interpreter: Path, folder: Path, code: str) -> str:
    """What is printed by a shell that finds Olive."""
    path = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OLIVE_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        ["bash", "-e", "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_workflow(interpreter: Path, folder: Path, config: dict[str, Any]) -> str:
    """What Olive says, which exits with 0 even where a pass has failed."""
    (folder / "workflow.json").write_text(json.dumps({"output_dir": "out", "cache_dir": "cache", **config}))
    packages = "python -m onnxprune.plugins.olive > packages.json"
    return run_olive(
        interpreter, folder, f"{packages}\nolive run --config workflow.json --package-config packages.json"
    )


def source(name: str, **settings: Any) -> dict[str, Any]:
    return {"type": "OnnxModel", "model_path": name, **settings}


def filters(path: Path) -> int:
    return next(tensor.dims[0] for tensor in onnx.load(path).graph.initializer if tensor.name == "w1")


@pytest.mark.targets
def test_olive_prunes_and_goes_on(olive: Path, tmp_path: Path) -> None:
    model = net(weights=[weight("w3", 32, 3, 3, 3), weight("w4", 4, 32, 1, 1)])
    model.graph.node[0].input[1], model.graph.node[2].input[1] = "w3", "w4"
    del model.graph.initializer[:2]
    write(model, tmp_path / "net.onnx")
    images = np.random.default_rng(0).standard_normal((24, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "calib.npz", x=images)
    shutil.copy(ROOT / "docs/examples/olive.json", tmp_path)
    ((_, code),) = blocks("Olive")
    run_olive(olive, tmp_path, code)
    quantised = onnx.load(tmp_path / "optimised/model.onnx")
    stored = {tensor.name: tensor for tensor in quantised.graph.initializer}
    assert stored["w3_quantized"].data_type in (TensorProto.INT8, TensorProto.UINT8)
    assert list(stored["w3_quantized"].dims) == [16, 3, 3, 3]
    config = json.loads((tmp_path / "optimised/model_config.json").read_text())["config"]
    wanted = onnxprune.shrink(tmp_path / "net.onnx", macs=0.5, data=tmp_path / "calib.npz")
    report = config["model_attributes"]["onnxprune"]
    assert report["kept"] == wanted.report.as_dict()["kept"]
    assert report["equivalence"]["passed"]
    (pruned,) = (
        found
        for found in map(onnx.load, tmp_path.glob("cache/*/runs/*/models/model.onnx"))
        if "w3" in {tensor.name for tensor in found.graph.initializer}
    )
    assert pruned == wanted.model


@pytest.mark.targets
def test_olive_says_what_is_wrong(olive: Path, tmp_path: Path) -> None:
    write(net(), tmp_path / "net.onnx")
    said = run_workflow(
        olive,
        tmp_path,
        {"input_model": source("net.onnx"), "passes": {"p": {"type": "OnnxPrune", "channels": 1.5}}},
    )
    assert "--channels 1.5: the share to remove lies in [0, 1)" in said
    assert "No output model produced" in said
    assert not (tmp_path / "out/model.onnx").exists()


@pytest.mark.targets
def test_olive_searches(olive: Path, tmp_path: Path) -> None:
    write(net(), tmp_path / "net.onnx")
    data = {
        "type": "dummy_dataset",
        "input_names": ["x"],
        "input_shapes": [[1, 3, 8, 8]],
        "input_types": ["float32"],
    }
    latency = {
        "name": "latency",
        "type": "latency",
        "sub_types": [{"name": "avg", "priority": 1}],
        "data_config": "d",
    }
    config = {
        "input_model": source("net.onnx"),
        "data_configs": [{"name": "d", "type": "DummyDataContainer", "load_dataset_config": data}],
        "evaluators": {"time": {"type": "OnnxEvaluator", "metrics": [latency]}},
        "evaluator": "time",
        "search_strategy": {"execution_order": "joint", "sampler": "sequential"},
        "passes": {
            "p": {
                "type": "OnnxPrune",
                "channels": [0.25, 0.5],
                "align": 1,
                "include": ["conv*"],
                "layers": None,
            }
        },
    }
    run_workflow(olive, tmp_path, config)
    tried = {filters(path) for path in tmp_path.glob("cache/*/runs/*/models/model.onnx")}
    assert tried == {6, 4}
    assert filters(tmp_path / "out/model.onnx") in tried


@pytest.mark.targets
def test_olive_and_weights_in_data_files(olive: Path, tmp_path: Path) -> None:
    """Also what comes of a `model.onnx` in the working directory, which Olive takes for the one of any folder."""
    (tmp_path / "net").mkdir()
    onnx.save(
        net(), tmp_path / "net/model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    prune = {"type": "OnnxPrune", "channels": 0.25, "align": 1}
    fix = {
        "type": "DynamicToFixedShape",
        "dim_param": ["n"],
        "dim_value": [1],
        "save_as_external_data": True,
        "size_threshold": 0,
    }
    passes = {"first": prune, "fix": fix, "second": prune | {"seed": 1}}
    config = {"input_model": source("net", onnx_file_name="model.onnx"), "passes": passes}
    run_workflow(olive, tmp_path, config)
    assert filters(tmp_path / "out/model.onnx") == 4, "8 -> 6 -> 4"
    assert onnx.load(tmp_path / "out/model.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    write(net(), tmp_path / "model.onnx")
    said = run_workflow(olive, tmp_path, config | {"cache_dir": "other", "output_dir": "none"})
    assert "Olive mistakes it for a file of" in said
    assert not (tmp_path / "none/model.onnx").exists()


SETTINGS = """
import inspect, sys
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from onnxprune import api
from onnxprune.plugins.olive import OnnxPrune

made = OnnxPrune.generate_config(DEFAULT_CPU_ACCELERATOR, {"layers": 2, "targets": ["cpu"]}, disable_search=True)
defaults = {one.name: one.default for one in list(inspect.signature(api.shrink).parameters.values())[1:]}
found = {name: getattr(made, name) for name in defaults}
assert found == defaults | {"layers": 2, "targets": ["cpu"]}, found
assert isinstance(found["layers"], int)
"""


@pytest.mark.targets
def test_settings_of_the_pass_are_the_arguments_of_shrink(olive: Path) -> None:
    env = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [olive, "-c", SETTINGS], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
