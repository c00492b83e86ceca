"""What a model consists of: groups, what is pinned and why, and the story of a single axis."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from onnxprune import axes
from onnxprune.blocks import Blocks
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph, Group, PinnedAxis
from onnxprune.errors import UserError
from onnxprune.model import Node
from onnxprune.naming import group_names

SHOWN = 8  # members listed per group in the explanation of an axis


@dataclass(frozen=True)
class Inspection:
    """Groups and pinned axes of a model, with the shares of parameters and MACs they touch."""

    blocks: Blocks

    @property
    def graph(self) -> DependencyGraph:
        return self.blocks.graph

    def as_dict(self) -> dict[str, Any]:
        cost = CostModel(self.graph)
        labels = group_names(self.blocks)
        return {
            "model": self.graph.model.name,
            "prunable": {name: round(share, 6) for name, share in cost.prunable_share().items()},
            "groups": [
                {
                    "name": group.name,
                    "label": labels[group],
                    "size": group.size,
                    "role": self.blocks.role(group),
                    "channels_per_unit": group.stride,
                    "kind": group.kind,
                    "reasons": [str(reason) for reason in group.lossy],
                    "nodes": [node.label for node in group.nodes],
                    "other_factors": [sibling.name for sibling in group.siblings],
                    **{f"share_{k}": round(v, 6) for k, v in cost.of_group(group.var).items()},
                }
                for group in self.graph.groups
            ],
            "residual_blocks": [
                {"name": block.name, "kind": block.kind, "nodes": [node.label for node in block.nodes]}
                for block in self.blocks.residual
            ],
            "pinned": [
                {
                    "tensor": p.tensor,
                    "axis": p.axis,
                    "extent": p.extent,
                    "node": p.node.label,
                    "reason": str(p.reason),
                }
                for p in self.graph.pinned
            ],
            "undeclared_operators": dict(sorted(self.graph.opaque.items())),
        }

    def print(self, console: Console) -> None:
        cost = CostModel(self.graph)
        labels = group_names(self.blocks)
        shares = cost.prunable_share()
        console.print(self.graph.model.name, soft_wrap=True)
        table = Table()
        for name in ("group", "channels", "kind", "nodes", "params", "MACs"):
            justify: Literal["left", "right"] = "left" if name in ("group", "kind", "nodes") else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for group, label in labels.items():
            share = cost.of_group(group.var)
            table.add_row(
                label,
                f"{group.size * group.stride:,}",
                group.kind,
                _listed(group),
                f"{share['params']:.1%}",
                f"{share['macs']:.1%}",
            )
        console.print(table)
        console.print(
            f"{len(self.graph.groups)} groups; they touch {shares['params']:.1%} of the parameters and "
            f"{shares['macs']:.1%} of the MACs"
        )
        if self.blocks.residual:
            kinds = Counter(block.kind for block in self.blocks.residual)
            named = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            console.print(f"{len(self.blocks.residual)} residual blocks that --layers can remove ({named})")
        if self.blocks.cached:
            cached = ", ".join(self.blocks.cached)
            console.print(f"attention heads are pinned by a key/value cache: {cached}", soft_wrap=True)
        for text, found in sorted(_by_reason(self.graph.pinned).items()):
            names = ", ".join(dict.fromkeys(f"{p.tensor}:{p.axis}" for p in found[:3]))
            console.print(f"pinned: {text}: {names}{' ...' if len(found) > 3 else ''}", soft_wrap=True)
        for group, label in labels.items():
            for reason in group.lossy[:1]:
                console.print(f"lossy: {label}: {reason}", soft_wrap=True)


def _listed(group: Group) -> str:
    names = [node.label for node in group.nodes]
    return ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")


def _by_reason(pinned: list[PinnedAxis]) -> dict[str, list[PinnedAxis]]:
    result: dict[str, list[PinnedAxis]] = {}
    for axis in pinned:
        result.setdefault(str(axis.reason), []).append(axis)
    return result


def why(blocks: Blocks, name: str) -> list[str]:
    """For each axis of what a node reads and makes (or of a tensor): its group and what is coupled to it,
    or why it is pinned.

    `name` is a node's or a tensor's name, or a pattern. Raises `UserError` if nothing matches.
    """
    lines: list[str] = []
    graph = blocks.graph
    groups = {group.var: (group, label) for group, label in group_names(blocks).items()}
    for node in graph.model.nodes:
        tensors = [t for t in (*node.inputs, *node.outputs) if t]
        if fnmatch.fnmatchcase(node.label, name):
            wanted = tensors
        else:
            wanted = [t for t in tensors if fnmatch.fnmatchcase(t, name)]
        for tensor, typed in _typed(graph, node):
            if tensor in wanted:
                lines += _explain(node, tensor, typed, groups)
    if not lines:
        labels = [node.label for node in graph.model.nodes]
        near = [label for label in labels if name.lower() in label.lower()]
        near = near[:3] or difflib.get_close_matches(name, labels, 3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; patterns such as '*conv*' find more"
        raise UserError(f"{graph.model.name}: no node or tensor is called '{name}'{hint}")
    return list(dict.fromkeys(lines))


def _typed(graph: DependencyGraph, node: Node) -> Iterator[tuple[str, list[axes.Axis]]]:
    for i, tensor in enumerate(node.inputs):
        if tensor and (typed := graph.axes_of(node, i)) is not None:
            yield tensor, typed
    for tensor in node.outputs:
        if tensor and (typed := graph.types.get(tensor)) is not None:
            yield tensor, typed


def _explain(
    node: Node, tensor: str, typed: list[axes.Axis], groups: Mapping[axes.Var, tuple[Group, str]]
) -> Iterator[str]:
    for number, axis in enumerate(typed):
        where = f"{node.op} '{node.label}': axis {number} of '{tensor}' ({axis.extent})"
        free = [groups[var] for var in axes.free_vars(axis) if var in groups]
        for group, label in free:
            kind = f"{group.kind}: {group.lossy[0]}" if group.lossy else group.kind
            others = [n.label for n in group.nodes if n is not node]
            coupled = ", ".join(others[:SHOWN]) + (
                f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
            )
            part = " in part" if axes.resolve(axis) is not group.var else ""
            yield f"{where}{part} is group {label} [{kind}; {group.name} in plans], coupled to: {coupled or 'nothing else'}"
        reasons = dict.fromkeys(
            leaf.reason
            for leaf in axes.leaves(axes.resolve(axis))
            if isinstance(leaf, axes.Const) and leaf.extent > 1
        )
        for reason in reasons:
            yield f"{where} is {'partly ' if free else ''}pinned: {reason}"
