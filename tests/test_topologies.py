"""The fixture networks, one by one: what the channel pass removes, what stays pinned, and why."""

from __future__ import annotations

import onnx
import pytest

from models.architectures import ARCHITECTURES
from models.topologies import NOT_RUNNABLE, TOPOLOGIES
from onnxprune import passes
from onnxprune.axes import free_vars
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.passes import Options
from onnxprune.surgery import apply
from tests.reference import assert_equal_to_masked, graph_of, parameters

# Weight axes that are pinned by something else than the graph's inputs and outputs.
PINNED = {
    "softmax_channel_gate": "a softmax over channels: their sum is one however many there are",
    "shufflenet_v1_units": "groups of 3 shuffled into groups of 4: (3 4) and (4 3) have no common units",
    "grouped_two_sizes": "convolutions of 3 and of 4 groups: (3 8) and (4 6) have no common units",
    "dynamic_conv": "a softmax over the kernels that are mixed",
    "gather_channels": "a Gather of one position by number",
}
# Groups that a statistic is taken over: cut only where that is allowed.
LOSSY = {
    "cbam": "mean and maximum over channels",
    "cbam_spatial": "mean and maximum over channels",
    "expand_channels": "a mean over channels",
    "group_norm_21": "positions inside the groups of a normalisation",
    "group_norm_spelled": "positions inside the groups of a normalisation",
    "layer_norm_channels": "a normalisation over channels",
    "layer_norm_spelled": "a normalisation over channels",
    "local_response_norm": "a window over neighbouring channels",
    "mean_over_channels": "a mean over channels",
    "reduce_negative_axes": "a mean over channels",
    "rms_norm_spelled": "a normalisation over channels",
    "tile_channels": "a mean over channels",
    "two_towers_dot": "a norm over the embedding",
    "weight_normalised": "a norm over each filter",
    "weight_standardised": "a mean over each filter",
}
MINIATURES = {name: {"width": 0.125, "image": 32, "classes": 4} for name in ARCHITECTURES}


def cut(graph: DependencyGraph, ratio: float) -> tuple[onnx.ModelProto, int]:
    """The model less a share of every group, equal to the masked original; and the units removed."""
    plan = passes.plan(Blocks(graph), Options(channels=ratio, align=1), graph.model.digest())
    pruned = apply(graph, plan)
    onnx.checker.check_model(pruned, full_check=True)
    assert_equal_to_masked(graph, plan, pruned)
    return pruned, sum(edit.removed for edit in plan.keeps)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_topology_shrinks_and_stays_right(name: str, ratio: float) -> None:
    proto = TOPOLOGIES[name]()
    pruned, removed = cut(graph_of(proto), ratio)
    assert removed
    assert parameters(pruned) < parameters(proto)


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_only_what_must_be_is_pinned_or_lossy(name: str) -> None:
    graph = graph_of(TOPOLOGIES[name]())
    inner = [pinned for pinned in graph.pinned if pinned.reason.kind != "interface"]
    assert bool(inner) == (name in PINNED)
    assert any(group.kind == "lossy" for group in graph.groups) == (name in LOSSY)


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_every_free_unit_of_a_filter_or_matrix_has_a_group(name: str) -> None:
    graph = graph_of(TOPOLOGIES[name]())
    known = {group.var for group in graph.groups}
    for link in graph.links:
        for i, typed in enumerate(link.inputs):
            extents = [axis.extent for axis in typed or ()]
            if graph.is_parameter(link.node.inputs[i]) and sum(size > 1 for size in extents) > 1:
                assert {var for axis in typed or () for var in free_vars(axis)} <= known


@pytest.mark.parametrize("name", sorted(NOT_RUNNABLE))
def test_networks_that_cannot_run_are_still_understood(name: str) -> None:
    graph = graph_of(NOT_RUNNABLE[name]())
    assert graph.groups or graph.opaque


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architecture_shrinks_and_stays_right(name: str) -> None:
    proto = ARCHITECTURES[name](**MINIATURES[name])
    pruned, removed = cut(graph_of(proto), 0.5)
    assert removed
    assert parameters(pruned) < 0.55 * parameters(proto)
