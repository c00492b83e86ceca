"""Fused attention, form by form: which heads, widths and neurons can go, and what the nodes state afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from models.attention import ATTENTION
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.ops import NodeView, Pinned, lookup
from onnxprune.plan import Keep, Plan
from onnxprune.surgery import apply, keep_masks
from onnxprune.validation.masked import masked
from tests.reference import TOLERANCE, assert_equal_to_masked, error, feeds, graph_of, random_plan, run

# Sizes of the groups that can be cut exactly: neurons of the feed-forward part, and by name
# h: heads of keys and values, r: query heads that share one, d: width of queries and keys, e: of values,
# p: pairs that are turned, x: what is not turned
GROUPS = {
    "group_query": {"h": 2, "r": 3},
    "group_query_cached": {"r": 3},
    "group_query_packed": {"h": 2, "r": 3},
    "group_query_rotary": {"h": 2, "r": 2},
    "microsoft_attention": {"h": 4, "d": 6, "e": 6},
    "microsoft_attention_cached": {},
    "microsoft_attention_values": {"h": 4, "d": 6, "e": 7},
    "multi_head": {"h": 4, "d": 6, "e": 5},
    "multi_head_biased": {"h": 4, "d": 6, "e": 6},
    "multi_head_cached": {},
    "onnx_biased": {"h": 3, "r": 2, "d": 6, "e": 6},
    "onnx_cached": {"r": 3},
    "onnx_flat": {"h": 4, "d": 6, "e": 5},
    "onnx_grouped": {"h": 2, "r": 3, "d": 6, "e": 6},
    "onnx_masked": {"h": 4, "d": 6, "e": 6},
    "onnx_multi_query": {"r": 4, "d": 6, "e": 6},
    "onnx_rotary": {"h": 2, "r": 2, "p": 3, "e": 6},
    "onnx_rotary_part": {"h": 4, "p": 2, "x": 3, "e": 6},
    "onnx_split": {"h": 4, "d": 6, "e": 7},
}
NEURONS = 28
FUSED = ("Attention", "MultiHeadAttention", "GroupQueryAttention")


def labelled(graph: DependencyGraph, name: str) -> Group:
    """The group behind a label of the attention (or rotary) node."""
    for link in graph.links:
        if link.node.op in (*FUSED, "RotaryEmbedding"):
            label = "rest" if name == "x" else name
            axis = link.labels.get(label)
            found = [group for group in graph.groups if axis is not None and group.var is _resolved(axis)]
            if found:
                return found[0]
    raise AssertionError(f"no group {name}")


def _resolved(axis: Any) -> Any:
    while getattr(axis, "bound", None) is not None:
        axis = axis.bound
    return axis


def pruned(graph: DependencyGraph, counts: dict[str, int], seed: int = 0) -> onnx.ModelProto:
    """The model with so many random units of each label left, equal to the masked original."""
    rng = np.random.default_rng(seed)
    edits = []
    for name, count in counts.items():
        group = labelled(graph, name)
        units = tuple(int(u) for u in np.sort(rng.permutation(group.size)[:count]))
        edits.append(Keep(group.name, group.size, units, group.kind))
    return checked(graph, Plan(graph.model.digest(), tuple(edits)))


def checked(graph: DependencyGraph, plan: Plan, lossy: bool = False) -> onnx.ModelProto:
    """The pruned model, equal to the masked original: the package's own, and where exact the tests' as well."""
    result = apply(graph, plan)
    onnx.checker.check_model(result, full_check=True)
    inputs = feeds(graph.model.proto)
    assert error(run(result, inputs), run(masked(graph, keep_masks(graph, plan)), inputs)) < TOLERANCE
    if not lossy:
        assert_equal_to_masked(graph, plan, result)
    return result


def stated(model: onnx.ModelProto, *ops: str) -> dict[str, Any]:
    """The attributes of the (last) node of these operators."""
    node = next(node for node in reversed(model.graph.node) if node.op_type in (ops or FUSED))
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_every_network_is_listed() -> None:
    assert sorted(ATTENTION) == sorted(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_heads_widths_and_neurons_are_groups(name: str) -> None:
    graph = graph_of(ATTENTION[name]())
    exact = [group for group in graph.groups if group.kind == "exact"]
    assert sorted(group.size for group in exact) == sorted([*GROUPS[name].values(), NEURONS])
    for label, size in GROUPS[name].items():
        assert labelled(graph, label).size == size


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", GROUPS)
def test_any_units_can_go(name: str, seed: int) -> None:
    graph = graph_of(ATTENTION[name]())
    checked(graph, random_plan(graph, graph.model.digest(), seed))


@pytest.mark.parametrize(("name", "label"), [(n, label) for n, labels in GROUPS.items() for label in labels])
def test_each_group_can_go_alone(name: str, label: str) -> None:
    graph = graph_of(ATTENTION[name]())
    size = GROUPS[name][label]
    for count in sorted({1, size // 2, size - 1}):
        pruned(graph, {label: count}, seed=count)


@pytest.mark.parametrize("name", GROUPS)
def test_hidden_width_can_go_too(name: str) -> None:
    graph = graph_of(ATTENTION[name]())
    checked(graph, random_plan(graph, graph.model.digest(), 5, lossy=True), lossy=True)


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("onnx_flat", {"h": 3}, {"q_num_heads": 3, "kv_num_heads": 3}),
        ("onnx_flat", {"e": 2}, {"q_num_heads": 4, "kv_num_heads": 4}),
        ("onnx_flat", {"d": 4}, {"q_num_heads": 4, "kv_num_heads": 4, "scale": 6**-0.5}),
        ("onnx_grouped", {"h": 1}, {"q_num_heads": 3, "kv_num_heads": 1, "softcap": 3.0}),
        ("onnx_grouped", {"r": 1}, {"q_num_heads": 2, "kv_num_heads": 2, "softcap": 3.0}),
        ("onnx_multi_query", {"r": 3, "d": 1}, {"scale": 6**-0.5}),
        ("onnx_split", {"h": 3, "d": 1}, {"is_causal": 1, "scale": 0.5}),
        ("onnx_cached", {"r": 2}, {"q_num_heads": 4, "kv_num_heads": 2}),
        (
            "onnx_rotary",
            {"h": 1, "p": 2},
            {"q_num_heads": 2, "kv_num_heads": 1, "is_causal": 1, "scale": 6**-0.5},
        ),
        ("microsoft_attention", {"h": 3}, {"num_heads": 3}),
        ("microsoft_attention", {"h": 3, "e": 2}, {"num_heads": 3, "qkv_hidden_sizes": [18, 18, 6]}),
        ("microsoft_attention_values", {"h": 2}, {"num_heads": 2, "qkv_hidden_sizes": [12, 12, 14]}),
        ("multi_head", {"h": 2, "e": 3}, {"num_heads": 2}),
        ("multi_head", {"d": 3}, {"num_heads": 4, "scale": 6**-0.5}),
        ("multi_head_biased", {"e": 3}, {"num_heads": 4}),
        ("multi_head_biased", {"d": 3}, {"num_heads": 4, "scale": 6**-0.5}),
        (
            "microsoft_attention",
            {"d": 3},
            {"num_heads": 4, "qkv_hidden_sizes": [12, 12, 24], "scale": 6**-0.5},
        ),
        ("group_query", {"h": 1, "r": 2}, {"num_heads": 2, "kv_num_heads": 1}),
        ("group_query_packed", {"r": 1}, {"num_heads": 2, "kv_num_heads": 2}),
    ],
)
def test_attributes_state_what_is_left(name: str, counts: dict[str, int], expected: dict[str, Any]) -> None:
    found = stated(pruned(graph_of(ATTENTION[name]()), counts))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("onnx_rotary", {"h": 1}, {"num_heads": 1}),
        ("onnx_rotary_part", {"p": 1}, {"rotary_embedding_dim": 2, "interleaved": 1}),
        ("onnx_rotary_part", {"x": 1}, {"rotary_embedding_dim": 4, "interleaved": 1}),
    ],
)
def test_rotations_state_what_is_left(name: str, counts: dict[str, int], expected: dict[str, int]) -> None:
    assert stated(pruned(graph_of(ATTENTION[name]()), counts), "RotaryEmbedding") == expected


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("onnx_cached", "past_key"),
        ("multi_head_cached", "past_key"),
        ("microsoft_attention_cached", "past"),
        ("group_query_cached", "past_key"),
    ],
)
def test_a_cache_from_outside_pins_its_heads(name: str, source: str) -> None:
    graph = graph_of(ATTENTION[name]())
    reasons = [pinned.reason.text for pinned in graph.pinned if pinned.reason.kind == "interface"]
    assert f"graph input '{source}'" in reasons


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "outputs"),
    [
        ("Attention", [(2, 3, 6), (6, 36), (36,)], {"num_heads": 3, "do_rotary": 1}, 1),
        ("Attention", [(2, 3, 6), (6, 36), (36,)], {"num_heads": 3, "past_present_share_buffer": 1}, 2),
        ("Attention", [(2, 3, 6), (6, 36), (36,), (2, 1, 3, 3)], {"num_heads": 3}, 1),
        ("MultiHeadAttention", [(2, 3, 4, 3, 6)], {"num_heads": 4}, 1),
        ("MultiHeadAttention", [(2, 3, 24), (2, 3, 4, 2, 6)], {"num_heads": 4}, 1),
        ("MultiHeadAttention", [(2, 3, 24)] * 3 + [None] * 5 + [(1,)], {"num_heads": 4}, 1),
        ("MultiHeadAttention", [(2, 3, 24)] * 3, {"num_heads": 4}, 4),
        ("DecoderMaskedMultiHeadAttention", [(2, 1, 24)] * 3, {"num_heads": 4}, 1),
        (
            "GroupQueryAttention",
            [(2, 3, 32)] * 3 + [None] * 9 + [(1,)],
            {"num_heads": 4, "kv_num_heads": 4},
            1,
        ),
        ("GroupQueryAttention", [(2, 3, 32)] * 3, {"num_heads": 4, "kv_num_heads": 4}, 4),
        ("RotaryEmbedding", [(2, 3, 24), (2, 3), (5, 4), (5, 4)], {"is_packed_batching": 1}, 1),
    ],
)
def test_forms_that_are_not_explained_are_pinned(
    op: str, shapes: list[Any], attributes: dict[str, int], outputs: int
) -> None:
    spec = lookup("com.microsoft", op, 1)
    assert spec is not None
    made = tuple((1,) for _ in range(outputs))
    rule = spec.declare(NodeView(op, 1, attributes, tuple(shapes), made, lambda _: None))
    assert isinstance(rule, Pinned)
