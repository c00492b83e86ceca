"""The hand-off to onnxruntime's static quantiser: a model with QuantizeLinear and DequantizeLinear (QDQ) around what a
target computes in integers, with ranges from the data that pruning calibrates on.

Ranges are the least and the largest value of every tensor over the data; weights have a scale for each output channel
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference").
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config
from onnxruntime.quantization.operators.conv import QDQConv
from onnxruntime.quantization.registry import QDQRegistry
from rich.console import Console
from rich.table import Table

from onnxprune import flow, metrics, outcome, pipeline
from onnxprune.cost import CostModel
from onnxprune.data import Data, Preprocess, Spec, open_data
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import InternalError, NothingToPrune, UserError, printable
from onnxprune.job import SAMPLES, Judge, Made, Progress, Source, described, open_model, quiet
from onnxprune.metrics import Agreement
from onnxprune.model import (
    DEFAULT_DOMAINS,
    FLOATS,
    INSIDE,
    QUANTISED,
    WEIGHTS,
    Layout,
    Model,
    Node,
    constant_tensor,
    copied,
    copied_node,
    expected_bytes,
    materialised,
    save,
)
from onnxprune.report import TITLES
from onnxprune.runtime import EXTERNAL_BYTES, Feeds, Session
from onnxprune.targets import TARGETS, Scheme, Target, TargetError, target
from onnxprune.validation import structure
from onnxprune.validation.difference import difference

BATCH = 16  # samples that are run at a time, where the batch is open
CHANNELS = 13  # the first opset with a scale for each channel
UNLISTED = 4  # the first IR version whose weights need not be listed among the inputs
ROUNDING = 1e-4  # of scale, that a conversion to another opset may change outputs by
SMALL = 0.5  # share of the MACs in integers below which the user is told
POOR = 10.0  # dB of signal over noise below which the user is told
BORDERS = ("QuantizeLinear", "DequantizeLinear")
INTEGER_ONLY = ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "MatMulNBits", "QGemm", "QAttention")
# What onnxruntime's CPU provider computes, or moves, in 8 bits between two borders, besides convolutions.
COMPANIONS = {
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Relu",
    "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


QUANTISED_FOR = tuple(name for name, kind in TARGETS.items() if kind.scheme is not None)
_TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8, "uint16": QuantType.QUInt16}


@dataclass(frozen=True)
class Stage:
    """What a model takes: MACs of one inference, elements and bytes of the weights (scales and zero points are no
    parameters), bytes of its files, and what it scores where a metric was measured."""

    macs: int
    params: int
    bytes: int
    file_bytes: int
    quality: float | None = None


@dataclass(frozen=True)
class Report:
    """What quantising came to.

    stages      `original` (where one was given), `model` and `quantised`, in this order
    share       of the MACs that read integers
    left        operators with MACs that stay in float: how many
    agreement   of each output with the float model's, on the data of the metric, else on that of the calibration
    metric      what `quality` of the stages is, where it was measured
    built       what the target's compiler made of it, where it is here and has one
    objections  that the target is known to have
    data        what it was calibrated on
    """

    model: str
    target: str
    scheme: Mapping[str, Any]
    stages: Mapping[str, Stage]
    share: float
    left: Mapping[str, int]
    agreement: tuple[Agreement, ...]
    agreed_on: str
    metric: str | None
    built: Mapping[str, Any]
    objections: tuple[str, ...]
    data: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "target": self.target,
            "scheme": dict(self.scheme),
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "quantised_macs": round(self.share, 6),
            "left_in_float": dict(self.left),
            "agreement": [asdict(one) for one in self.agreement],
            "agreed_on": self.agreed_on,
            "metric": self.metric,
            "built": dict(self.built),
            "objections": list(self.objections),
            "data": dict(self.data),
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }

    def print(self, console: Console) -> None:
        """One column for each stage, and what is known about the result."""
        console.print(self.model, soft_wrap=True)
        table = Table()
        table.add_column("")
        for name in self.stages:
            cut = name == "model" and "original" in self.stages
            table.add_column("pruned" if cut else name, justify="right")
        stages = list(self.stages.values())
        first = stages[0]
        for key, title in (
            *((c, TITLES[c]) for c in ("params", "macs", "bytes")),
            ("file_bytes", "file bytes"),
        ):
            cells = [f"{getattr(first, key):,}"]
            for stage in stages[1:]:
                value = getattr(stage, key)
                cells.append(f"{value:,} ({value / max(getattr(first, key), 1):.1%})")
            table.add_row(title, *cells)
        if self.metric is not None:
            table.add_row(self.metric, *(f"{stage.quality:.4g}" for stage in stages))
        console.print(table)
        scheme = self.scheme
        even = ", symmetric" if scheme["symmetric"] else ""
        console.print(
            f"{self.target}: {self.share:.1%} of the MACs in integers, activations {scheme['activations']}{even}, weights "
            f"int8 by channel, biases {scheme['biases']}",
            soft_wrap=True,
        )
        if self.left:
            named = ", ".join(f"{count} {op}" for op, count in self.left.items())
            console.print(f"left in float: {named}", soft_wrap=True)
        for one in self.agreement:
            console.print(f"{_agreed(one)}, on {self.agreed_on}", soft_wrap=True)
        if self.built:
            console.print(f"{self.target} builds it ({self.built.get('version', '')})", soft_wrap=True)
        for line in (*self.objections, *self.notes):
            console.print(f"note: {line}", soft_wrap=True)


def _agreed(one: Agreement) -> str:
    parts = []
    if one.top1 is not None:
        parts.append(f"same class {one.top1:.2%}")
    if one.cosine is not None:
        parts.append(f"cosine {one.cosine:.4f}")
    if one.snr is not None:
        parts.append(f"SNR {one.snr:.1f} dB")
    return f"{one.output}: " + (", ".join(parts) or "nothing to compare") + " with the float model"


@dataclass(frozen=True)
class Quantised(Made):
    """A quantised model and its report."""

    report: Report


def quantise(
    source: Source,
    data: Spec,
    where: str = "cpu",
    *,
    samples: int = SAMPLES,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    judge: Spec | None = None,
    metric: str | None = None,
    original: Source | None = None,
    progress: Progress | None = None,
) -> Quantised:
    """A float32 model in integers as a target wants them.

    `samples` of data give the ranges. `exclude` are patterns on names of nodes and weights that stay in float. `judge`
    is data for `metric` (default: data), of which both models, and `original` where it is given, are measured if
    either is named.

    Raises `UserError` for models that are quantised already, that are of another float type, and that the quantiser,
    or the target's compiler where it is here, refuses; `NothingToPrune` where nothing can be quantised;
    `InternalError` for a result that is not sound.
    """
    told = progress or quiet
    place, scheme = _target(where)
    told("load", None)
    model = open_model(source)
    _refuse_quantised(model)
    told("fold", None)
    graph = DependencyGraph(model)
    inputs = open_data(data, model, graph.shapes, samples=samples, seed=seed, preprocess=preprocess)
    first = None if original is None else open_model(original)
    if first is not None and (changed := structure.interface(first, model)):
        raise UserError(
            f"--original {first.name}: {model.name} is not made of it ({changed[0]}); give the right one"
        )
    measured, name = _judged(first or model, judge, data, metric, preprocess, seed)
    prepared = _Prepared(model, inputs)
    told("calibrate", None)
    chosen = prepared.chosen(scheme, exclude)
    if any(link.rule.lossy for link in prepared.graph.links) and scheme.wide is not None:
        scheme = replace(scheme, activations=scheme.wide)
    made = prepared.restored(_static(prepared, scheme, chosen, inputs))
    told("check", None)
    external = _layout(model, made)
    result = Model(made)
    feeds = [batch.feeds for batch in inputs.subset(2 * BATCH).batches(BATCH)][:2]
    _sound(model, result, feeds)
    agreed = measured.data if measured is not None else inputs
    agreement = tuple(metrics.compare(model, made, agreed, BATCH))
    built, objections = _accepted(place, made, external, model.name)
    told("report", None)
    stages = _stages(first, model, result, measured, name)
    share, left = _reached(result)
    report = Report(
        model.name, f"{place}", scheme.as_dict(), stages, share, left, agreement, agreed.source, name, built, tuple(objections), described(inputs),
        (*inputs.notes, *prepared.notes, *_notes(share, agreement, place)),
        {
            **outcome.versions(), "model_sha256": model.digest(), "opset": result.opset(), "exclude": list(exclude),
        },
    )  # fmt: skip
    return Quantised(made, external, model.files | (first.files if first else frozenset()), report)


def _target(text: str) -> tuple[Target, Scheme]:
    """The target, at its precision of 8 bits where it has one, and how it wants models."""
    place = target(text)
    scheme = place.scheme
    if scheme is None:
        known = ", ".join(QUANTISED_FOR)
        raise UserError(
            f"--target {text}: nothing is known about quantising for {place.name}; choose one of {known}"
        )
    if "int8" in place.precisions:
        if ":" in text and place.precision != "int8":
            raise UserError(f"--target {text}: a quantised model is of int8; ask for {place.name}")
        place = target(f"{place.name}:int8")
    return place, scheme


def _refuse_quantised(model: Model) -> None:
    """Raises `UserError` for a model with integers in it."""
    for node in model.nodes:
        integer = node.op in BORDERS or node.op in INTEGER_ONLY or node.op.startswith("QLinear")
        stored = [name for name in node.inputs if name in model.constants]
        weights = [name for name in stored if model.constants[name].data_type in QUANTISED]
        if integer or any(len(model.constants[name].dims) > 1 for name in weights):
            raise UserError(
                f"{model.name}: is quantised already ({node}); give the float model that it was made from"
            )


def _judged(
    model: Model,
    judge: Spec | None,
    data: Spec,
    metric: str | None,
    preprocess: Preprocess | None,
    seed: int,
) -> tuple[Judge | None, str | None]:
    """The metric on its data and its name, where one is asked for."""
    if judge is None and metric is None:
        return None, None
    spec = data if judge is None else judge
    opened = open_data(
        spec, model, DependencyGraph(model).shapes, samples=None, seed=seed, preprocess=preprocess
    )
    found = Judge(model, opened, metric)
    return found, found.metric


class _Prepared:
    """A model made ready for the quantiser, and the way back.

    BatchNorm goes into weights, constants become initializers, every node gets a name of its own and every tensor a
    type; scales by channel need opset 13.
    """

    def __init__(self, model: Model, data: Data) -> None:
        self.model = model
        self.notes: list[str] = []
        folded = pipeline.fold(model)
        proto = copied(materialised(flow.nest(folded.proto)))
        if model.opset() < CHANNELS:
            proto = self._converted(proto, next(iter(data.batches(BATCH))).feeds)
        _hoist_constants(proto.graph)
        self.labels = [node.name for node in proto.graph.node]
        for i, node in enumerate(proto.graph.node):
            node.name = f"node {i}"
        self.graph = DependencyGraph(Model(copied(proto)))
        elements = self.graph.shapes.elements
        known = {value.name for value in proto.graph.value_info}
        known |= {value.name for value in (*proto.graph.input, *proto.graph.output)}
        for node in proto.graph.node:
            for name in node.output:
                if elements.get(name) and name not in known:
                    value = proto.graph.value_info.add(name=name)
                    value.type.tensor_type.elem_type = elements[name]
        self.proto = proto

    def _converted(self, proto: onnx.ModelProto, feeds: Feeds) -> onnx.ModelProto:
        """In opset 13. Raises `UserError` where that cannot be done, or computes something else."""
        name, opset = self.model.name, self.model.opset()
        advice = f"scales by channel need opset {CHANNELS}; export the model with that or a later one"
        try:
            found = version_converter.convert_version(proto, CHANNELS)
            error = difference(Session(proto).run(feeds), Session(found).run(feeds))
        except Exception as failure:  # onnx's converter raises classes of its own
            text = printable(" ".join(str(failure).split()))[:160]
            raise UserError(f"{name}: cannot be converted from opset {opset} ({text}); {advice}") from None
        if error > ROUNDING:
            raise UserError(
                f"{name}: converting it from opset {opset} changes its outputs by {error:.1e}; {advice}"
            )
        self.notes.append(f"converted from opset {opset} to {CHANNELS}, for scales by channel")
        return found

    def chosen(self, scheme: Scheme, exclude: Sequence[str]) -> list[onnx.NodeProto]:
        """The nodes to quantise. Raises `NothingToPrune` where there are none."""
        graph = self.graph
        view = graph.model
        work = CostModel(graph).work()
        top = {
            node.name: (node, label) for node, label in zip(self.proto.graph.node, self.labels, strict=True)
        }
        held = {name for node in self.proto.graph.node for name in flow.captured(node)}
        elements = graph.shapes.elements
        products, others, kinds, spared = [], [], set[str](), set[str]()
        for node in view.nodes:
            if node.proto.name not in top or node.domain != "" or node.captured or node.op == "Cast":
                continue
            label = top[node.proto.name][1]
            names = [label or node.outputs[0], *(name for name in node.inputs if name in view.constants)]
            matched = [pattern for pattern in exclude if any(fnmatch.fnmatchcase(n, pattern) for n in names)]
            spared.update(matched)
            if matched:
                continue
            if work.get(node.index) and node.op in QDQRegistry:
                types = {_element(view, elements, name) for name in node.inputs[:2]}
                if types == {onnx.TensorProto.FLOAT} and not _beyond(view, node, scheme):
                    _finite(self.model, view, node)
                    products.append(node)
                else:
                    kinds |= {onnx.TensorProto.DataType.Name(kind).lower() for kind in types if kind}
            elif not held & set(node.outputs):  # a Relu that a border makes up for is missed by bodies
                others.append(node)
        if unused := next((pattern for pattern in exclude if pattern not in spared), None):
            raise UserError(f"--exclude {unused}: matches no node or weight that could be quantised")
        if not products:
            raise NothingToPrune(
                f"{self.model.name}: {self._why(kinds, bool(work), bool(exclude))}; no file was written"
            )
        found = products + (_companions(view, products, others) if scheme.reach == "chains" else [])
        if scheme.reach == "whole":
            found += others
        names_of = {node.proto.name for node in found}
        return [node for node in self.proto.graph.node if node.name in names_of]

    @staticmethod
    def _why(kinds: set[str], work: bool, excluded: bool) -> str:
        """Why nothing is quantised."""
        other = kinds & {onnx.TensorProto.DataType.Name(kind).lower() for kind in FLOATS} - {"float"}
        if other:
            return (
                f"computes in {', '.join(sorted(other))}, and ranges are taken of float32 models: quantise the model "
                "that it was converted from"
            )
        if excluded:
            return "everything that could be quantised is excluded"
        if work:
            return "nothing can be quantised: the quantiser takes convolutions and matrix products outside of bodies"
        return "nothing can be quantised: it holds no convolution and no matrix product"

    def restored(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """What the quantiser has changed besides: names, descriptions, versions, and the domains that it imports."""
        before = self.model.source
        for node in proto.graph.node:
            number = node.name.removeprefix("node ")
            if number.isdecimal() and node.name == f"node {number}":
                node.name = self.labels[int(number)]
        del proto.metadata_props[:]
        proto.metadata_props.extend(before.metadata_props)
        proto.producer_name, proto.producer_version = before.producer_name, before.producer_version
        proto.domain, proto.model_version, proto.doc_string = (
            before.domain,
            before.model_version,
            before.doc_string,
        )
        proto.graph.name, proto.graph.doc_string = before.graph.name, before.graph.doc_string
        stored = {tensor.name for tensor in proto.graph.initializer}
        given = {value.name for value in self.model.inputs}
        inputs = [value for value in before.graph.input if value.name in given | stored]
        for listed, values in ((proto.graph.input, inputs), (proto.graph.output, list(before.graph.output))):
            del listed[:]
            listed.extend(values)
        used = {node.domain for graph in flow.graphs(proto) for node in graph.node}
        used |= {node.domain for function in proto.functions for node in function.node}
        kept = [opset for opset in proto.opset_import if opset.domain in {*used, *DEFAULT_DOMAINS}]
        least = UNLISTED
        if _opset(proto) > _opset(before):
            least = onnx.helper.find_min_ir_version_for(kept, ignore_unknown=True)
        proto.ir_version = max(before.ir_version, least)
        del proto.opset_import[:]
        proto.opset_import.extend(kept)
        del proto.graph.value_info[:]
        made = {name for node in proto.graph.node for name in node.output}
        proto.graph.value_info.extend(value for value in before.graph.value_info if value.name in made)
        return proto


def _opset(proto: onnx.ModelProto) -> int:
    return max((o.version for o in proto.opset_import if o.domain in DEFAULT_DOMAINS), default=1)


def _hoist_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become initializers, which alone the quantiser takes for weights."""
    kept = []
    for i, proto in enumerate(graph.node):
        node = Node(proto, i)
        tensor = constant_tensor(node) if node.op == "Constant" and node.domain == "" else None
        if tensor is None:
            kept.append(copied_node(proto))
            continue
        stored = graph.initializer.add()
        stored.CopyFrom(tensor)
        stored.name = node.outputs[0]
    del graph.node[:]
    graph.node.extend(kept)


def _beyond(model: Model, node: Node, scheme: Scheme) -> bool:
    """Whether the quantiser goes wrong: with transposed convolutions in groups, whose scales are not those of the output
    channels, with weights on the left, whose channels it takes for rows, and with biases that are not one number for
    each channel."""
    if node.inputs[0] in model.constants:
        return True
    if (
        issubclass(QDQRegistry[node.op], QDQConv)
        and "Transpose" in node.op
        and node.attributes.get("group", 1) > 1
    ):
        return True
    bias = model.constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
    weight = model.constants.get(node.inputs[1])
    if not scheme.biases or bias is None or weight is None:
        return False
    return len(bias.dims) != 1 or bias.dims[0] not in weight.dims[:2]


def _element(model: Model, elements: Mapping[str, int], name: str) -> int:
    constant = model.constants.get(name)
    return constant.data_type if constant is not None else elements.get(name, 0)


def _finite(model: Model, view: Model, node: Node) -> None:
    """Raises `UserError` for weights that have no range."""
    for name in node.inputs:
        if name in view.constants and view.constants[name].data_type in FLOATS:
            if not np.isfinite(view.array(name)).all():
                raise UserError(
                    f"{model.name}: weight '{printable(name)}' holds NaN or Inf, which have no range; repair the model "
                    "or pass --exclude for that weight"
                )


def _companions(model: Model, products: Sequence[Node], others: Sequence[Node]) -> list[Node]:
    """What follows convolutions, in integers too: nodes all of whose inputs come from quantised outputs.

    A matrix product gives floats (its kernel adds a bias in float and needs no output range), so chains end there. A
    node that makes an output of the model stays in float: nothing is gained behind it.
    """
    ends = {output.name for output in model.outputs}
    waiting = {id(node) for node in others if node.op in COMPANIONS and not ends & set(node.outputs)}
    roots = {id(node) for node in products if _needs_output_border(node.op)}
    whole: set[str] = set()
    found = []
    for node in model.nodes:
        if id(node) in roots:
            whole.update(node.outputs)
        elif id(node) in waiting:
            data = [name for name in node.inputs if name and name not in model.constants]
            if data and whole.issuperset(data):
                whole.update(node.outputs)
                found.append(node)
    return found


def _needs_output_border(op: str) -> bool:
    """Whether onnxruntime computes it in integers only if its output is quantised: convolutions."""
    return issubclass(QDQRegistry[op], QDQConv)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches of the data, once."""

    def __init__(self, data: Data) -> None:
        self._batches = iter(data.batches(BATCH))

    def get_next(self) -> Feeds | None:
        batch = next(self._batches, None)
        return None if batch is None else batch.feeds


def _static(
    prepared: _Prepared, scheme: Scheme, chosen: Sequence[onnx.NodeProto], data: Data
) -> onnx.ModelProto:
    """What the quantiser makes. Raises `UserError` with its words."""
    ops = sorted({node.op_type for node in chosen})
    options: dict[str, Any] = {
        "ActivationSymmetric": scheme.symmetric,
        "WeightSymmetric": True,
        "QuantizeBias": scheme.biases,
        "OpTypesToExcludeOutputQuantization": [
            op for op in ops if scheme.reach == "inputs" or (scheme.reach == "chains" and _bare(op))
        ],
    }
    deep = _deep(prepared, chosen)
    size = sum(map(expected_bytes, prepared.proto.graph.initializer))
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder, _quiet():
        path = Path(folder) / "quantised.onnx"
        try:
            if scheme.reach == "whole":  # QNN's rules for single operators
                config = get_qnn_qdq_config(
                    prepared.proto, _Reader(data), activation_type=_TYPES[scheme.activations],
                    weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=ops,
                )  # fmt: skip
                options |= config.extra_options
            options["TensorQuantOverrides"] = deep | options.get("TensorQuantOverrides", {})
            quantize_static(
                copied(prepared.proto), path, _Reader(data), op_types_to_quantize=ops, per_channel=True,
                activation_type=_TYPES[scheme.activations], weight_type=QuantType.QInt8,
                nodes_to_quantize=[node.name for node in chosen], use_external_data_format=size > INSIDE,
                extra_options=options,
            )  # fmt: skip
            return onnx.load(path)
        except Exception as error:  # of the quantiser, and of onnxruntime in it
            text = printable(" ".join(str(error).split()))[:300]
            raise UserError(
                f"{prepared.model.name}: onnxruntime's quantiser refuses it ({type(error).__name__}: {text}); "
                "--exclude leaves a node in float"
            ) from None


def _deep(prepared: _Prepared, chosen: Sequence[onnx.NodeProto]) -> dict[str, Any]:
    """Matrices in stacks: one scale each, since the quantiser takes their rows for channels."""
    dims = {t.name: len(t.dims) for t in prepared.proto.graph.initializer}
    whole = {"quant_type": QuantType.QInt8, "symmetric": True}
    bare = [node for node in chosen if node.op_type in QDQRegistry and _bare(node.op_type)]
    return {name: [whole] for node in bare for name in node.input[1:2] if dims.get(name, 2) > 2}


def _bare(op: str) -> bool:
    """Whether it gives floats: products that are no convolutions."""
    return op not in COMPANIONS and not _needs_output_border(op)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the quantiser logs, and without the handler that logging sets up for it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.manager.disable
    logging.disable(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # as it is when nobody has set it; it cannot be asked for
        logging.disable(level)
        root.handlers[:] = handlers


def _layout(model: Model, made: onnx.ModelProto) -> Layout:
    """Weights go to a data file where the model's do."""
    if not model.external:
        return {}
    place = next(iter(model.external.values()))
    return {t.name: place for t in made.graph.initializer if expected_bytes(t) > EXTERNAL_BYTES}


def _sound(model: Model, result: Model, feeds: Sequence[Feeds]) -> None:
    """Raises `InternalError` for a result that is not well formed, does not run, or gives what is not finite."""
    problems = structure.check(model, result, feeds)
    if not problems:
        before, after = Session(model.proto), Session(result.proto)
        for feed in feeds:
            wanted, made = before.run(feed), after.run(feed)
            problems += [
                f"output '{printable(name)}' is not finite"
                for name, value in wanted.items()
                if isinstance(value, np.ndarray)
                and value.dtype.kind == "f"
                and (np.isfinite(value) & ~np.isfinite(made[name])).any()
            ]
    if problems:
        raise InternalError(
            f"{model.name}: the quantised model is wrong ({problems[0]}) and was not written; please report it"
        )


def _accepted(
    place: Target, made: onnx.ModelProto, external: Layout, name: str
) -> tuple[Mapping[str, Any], list[str]]:
    """What the target says, where it has a compiler and that is here. Raises `UserError` where it refuses the model."""
    objections = place.objections(Model(made))
    if type(place).build is Target.build:
        return {}, objections
    if (state := place.state()).reach == "absent":
        return {}, [*objections, f"not checked by {place}: {state.missing}"]
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder) / "quantised.onnx"
        save(made, path, external)
        try:
            return place.build(path), objections
        except TargetError as error:
            why = f" ({'; '.join(objections)})" if objections else ""
            raise UserError(
                f"{name}: {place} does not build what came out: {error}{why}; nothing was written, --exclude leaves a "
                "node in float"
            ) from None


def _stages(
    original: Model | None, model: Model, result: Model, judge: Judge | None, metric: str | None
) -> dict[str, Stage]:
    found = {}
    named = {"original": original, "model": model, "quantised": result}
    for name, one in named.items():
        if one is None:
            continue
        cost = CostModel(DependencyGraph(one))()
        quality = None
        if judge is not None and metric is not None:
            quality = judge.before if one is (original or model) else judge(one.proto)
        found[name] = Stage(cost.macs, cost.params + _beside(one), cost.bytes, _file_bytes(one), quality)
    return found


def _beside(model: Model) -> int:
    """What borders add to the parameters that are counted by type: biases of int32, less scales and zero points."""
    borders = [node for node in model.nodes if node.op in BORDERS]
    ranges = dict.fromkeys(name for node in borders for name in node.inputs[1:])
    tensors = [model.constants[name] for name in ranges if name in model.constants]
    counted = sum(math.prod(t.dims) for t in tensors if t.dims and t.data_type in WEIGHTS)
    stored = dict.fromkeys(node.inputs[0] for node in borders if node.inputs[0] in model.constants)
    biases = [t for t in map(model.constants.__getitem__, stored) if t.data_type == onnx.TensorProto.INT32]
    return sum(math.prod(t.dims) for t in biases) - counted


def _file_bytes(model: Model) -> int:
    """Of the files that it was read from, or would be one of."""
    if model.files:
        return sum(path.stat().st_size for path in model.files)
    return int(flow.nest(model.proto).ByteSize())


def _reached(model: Model) -> tuple[float, dict[str, int]]:
    """The share of the MACs whose operands come out of a border, and the other nodes with MACs, by operator."""
    work = CostModel(DependencyGraph(model)).work()
    inside, left = 0, Counter[str]()
    for node in model.nodes:
        if not work.get(node.index):
            continue
        operands = [model.producers.get(name) for name in node.inputs[:2]]
        if all(one is not None and one.op == BORDERS[1] for one in operands):
            inside += work[node.index]
        else:
            left[node.op] += 1
    return inside / max(sum(work.values()), 1), dict(sorted(left.items()))


def _notes(share: float, agreement: Sequence[Agreement], place: Target) -> list[str]:
    found = []
    if share < SMALL:
        found.append(f"most of the work stays in float ({1 - share:.1%} of the MACs)")
    far = [one.output for one in agreement if one.snr is not None and one.snr < POOR]
    if far:
        found.append(
            f"output '{far[0]}' is far from the float model's; give data like what {place} will see, or --exclude the "
            "layers that lose most"
        )
    return found
