"""The dependency graph as a networkx graph."""

from __future__ import annotations

import networkx as nx

from models.architectures import resnet18
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model


def test_groups_and_operators_are_nodes_and_occurrences_edges() -> None:
    graph = DependencyGraph(Model(resnet18(width=0.125, image=32)))
    public = graph.to_networkx()
    groups = [name for name, data in public.nodes(data=True) if data["kind"] != "operator"]
    assert len(groups) == len(graph.groups)
    for group in graph.groups:
        edges = public.edges(f"group:{group.name}", data=True)
        found = sorted((b, d["tensor"], d["axis"], d["role"]) for _, b, d in edges)
        assert found == sorted((f"node:{o.node.label}", o.tensor, o.axis, o.role) for o in group.occurrences)
    assert nx.is_bipartite(nx.Graph(public))
    assert nx.is_connected(nx.Graph(public))  # each weight reads one group and makes another
