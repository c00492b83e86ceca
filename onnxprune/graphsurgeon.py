"""Graphs of onnx-graphsurgeon, in and out: a format to exchange, which holds less than a model does.

It has no metadata, no doc strings of nodes, no quantisation annotations and no overloads of functions; a tensor of
more than 2 GB cannot be exported from it once its values were changed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import onnx

from onnxprune.errors import UserError, printable


class Graph(Protocol):
    """What is used of an `onnx_graphsurgeon.Graph`."""

    nodes: Any
    opset: int
    import_domains: Sequence[onnx.OperatorSetIdProto] | None

    def subgraphs(self, recursive: bool = False) -> Any: ...


def exported(graph: Graph) -> onnx.ModelProto:
    """The model that a graph stands for; the graph stays as it is.

    Domains of nodes that it does not import come after those that it does, by name, and a graph that was not read from
    a model gets the least IR version that holds its operators. Raises `UserError` for what cannot be exported, and for
    what is no graph.
    """
    package = sys.modules.get("onnx_graphsurgeon")  # nobody has a graph who has not imported it
    if package is None or not isinstance(graph, package.Graph):
        kind = type(graph).__name__
        raise UserError(f"a model is a path, a ModelProto or an onnx_graphsurgeon.Graph, and not a {kind}")
    try:
        imports = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
        used = {node.domain for body in (graph, *graph.subgraphs(recursive=True)) for node in body.nodes}
        missing = used - {one.domain for one in imports} - {None}
        imports += [onnx.helper.make_opsetid(domain, 1) for domain in sorted(missing)]
        version = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)
        model: onnx.ModelProto = package.export_onnx(graph, opset_imports=imports, ir_version=version)
    except Exception as error:  # of a graph that somebody has put together
        raise UserError(f"this onnx_graphsurgeon.Graph cannot be exported: {_said(error)}") from None
    return model


def imported(proto: onnx.ModelProto) -> Any:
    """An `onnx_graphsurgeon.Graph` of its own for a model whose weights are in memory.

    Raises `UserError` where onnx-graphsurgeon is not installed, and for overloads of functions, which it mixes up.
    """
    try:
        package = importlib.import_module("onnx_graphsurgeon")
    except ImportError:
        raise UserError("onnx-graphsurgeon is not installed: pip install 'onnxprune[graphsurgeon]'") from None
    if any(function.overload for function in proto.functions):
        raise UserError(
            "onnx-graphsurgeon does not keep overloads of functions, and this model has some; use the ModelProto (.model)"
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)  # it renames tensors in what it has read
    return package.import_onnx(copy)


def _said(error: Exception) -> str:
    return printable(" ".join(f"{error}".split())[:200]) or type(error).__name__
