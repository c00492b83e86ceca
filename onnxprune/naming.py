"""Names of groups for people: the layer that makes the units, what they are, and how many.

`encoder/layer.3/attention/self/query heads (12)`. Plans and JSON keep `Group.name`, which never changes with the order
of nodes; these names are for tables.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import takewhile

from onnxprune.blocks import Blocks
from onnxprune.dependency import Group, Occurrence

PARAMETER = re.compile(r"(.+)\.(?:weight|bias)(?:_\w+)?")  # exporters append _quantized and the like


def group_names(blocks: Blocks) -> dict[Group, str]:
    """A name for each group, in the order of their layers, unique in the model: layer, role, count, and where that is
    not enough a slice of the layer's units, or a number.

    The layer is a part of the name of its node, less what all layers of the model have in front. Nodes without a
    scope (`node_linear_7`) are named after a parameter of theirs that has one.
    """
    groups = sorted(blocks.graph.groups, key=lambda group: (_order(group)[0].node.index, group.name))
    layers = {group: _layer(group) for group in groups}
    paths = [path for _, path in layers.values()]
    scopes = zip(*(path[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, scopes))
    while shared and any(path[shared].isdecimal() for path in paths):
        shared -= 1  # `layer.0`, not `0`
    plain = {
        group: f"{separator.join(path[shared:])} {blocks.role(group)} ({group.size:,})"
        for group, (separator, path) in layers.items()
    }
    found: dict[Group, str] = {}
    often = Counter(plain.values())
    taken = set(often)
    for group, name in plain.items():
        if often[name] > 1:
            name = _other(name, re.findall(r"\[[0-9:]+\]", group.name)[-1:], taken)
            taken.add(name)
        found[group] = name
    return found


def _other(name: str, slices: list[str], taken: set[str]) -> str:
    """A name that is not taken: with a slice, or else with the first number that is free."""
    if slices and f"{name} {slices[0]}" not in taken:
        return f"{name} {slices[0]}"
    number = 1
    while f"{name} #{number}" in taken:
        number += 1
    return f"{name} #{number}"


def _order(group: Group) -> list[Occurrence]:
    """What makes the units, in the order of the graph, and then the other places where they occur."""
    return sorted(group.occurrences, key=lambda o: (o.role != "produce", o.node.index, o.input))


def _layer(group: Group) -> tuple[str, list[str]]:
    """The scopes of the first node that makes the units, and what stands between them."""
    order = _order(group)
    first = order[0].node
    if "/" in first.label.strip("/"):
        path = [part for part in first.label.split("/") if part]
        return "/", path[:-1] if path[-1] == first.op and len(path) > 1 else path
    if "." in first.label:
        match = PARAMETER.fullmatch(first.label)
        return ".", (match[1] if match else first.label).split(".")
    for occurrence in order:
        match = PARAMETER.fullmatch(occurrence.tensor)
        if match is not None and occurrence.role != "consume":
            return ".", match[1].split(".")
    return ".", [first.label.strip("/")]
