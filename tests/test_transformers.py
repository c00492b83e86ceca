"""Transformers as exporters write them: which parts they have, and that heads, widths, neurons, features and
whole blocks can go, alone and together."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxprune
from models.transformers import HEADS, HIDDEN, NEURONS, TRANSFORMERS, WIDTH
from onnxprune import passes
from onnxprune.blocks import Blocks
from onnxprune.errors import UserError
from onnxprune.passes import Options
from onnxprune.plan import Plan, Remove
from onnxprune.surgery import apply
from tests.reference import (
    Array,
    error,
    feeds,
    graph_of,
    parameters,
    run,
    stored_tensors,
)
from tests.reference_blocks import assert_equal, branch_of
from tests.small import check_refused, write
from tests.small import run as command

# Groups by role: heads | head-width | ffn | hidden; ~ where a statistic is taken over the units.
PARTS = {
    "torchscript": "4 | 6 6 | 40 | 24~",
    "dynamo": "4 | 6 6 | 40 | 24~",
    "einsum": "4 | 6 6 | 40 | 24~",
    "keras_einsum": "4 | 6 6 | 40 | 24~",
    "keras_tensordot": "4 | 6 6 | 40 | 24~",
    "scale_from_shape": "4 | 6 6 | 40 | 24~",
    # a single width: the matrix is (3 heads width) for all three
    "fused_gather": "4 | 6 | 40 | 24~",
    "fused_unbind": "4 | 6 | 40 | 24~",
    "fused_strided": "4 | 6 | 40 | 24~",
    "interleaved_gather": "4 | 6 | 40 | 24~",
    "paddle": "4 | 6 | 40 | 24~",
    "torch_module": "4 | 6 | 40 | 24~",
    # cut apart in front of the heads
    "fused_split": "4 | 6 6 | 40 | 24~",
    "fused_slices": "4 | 6 6 | 40 | 24~",
    "interleaved_split": "4 | 6 6 | 40 | 24~",
    "causal": "4 | 6 6 | 40 | 24~",
    "sliding_window": "4 | 6 6 | 40 | 24~",
    "padding_mask": "4 4 | 6 6 6 6 | 40 40 | 24~",
    "position_buckets": "4 | 6 6 6 6 | 40 40 | 24~",  # one bias for the heads of both layers
    "alibi": "4 | 6 6 | 40 | 24~",
    "rotary_halves": "4 | 3 6 | 40 | 24~",  # 3 pairs
    "rotary_pairs": "4 | 3 6 | 40 | 24~",
    "rotary_tables": "4 | 3 6 | 40 | 24~",
    "query_key_norm": "4 | 6 6~ | 40 | 24~",
    "grouped_query": "2 3 | 4 4 | 40 | 24~",
    "grouped_einsum": "2 3 | 4 4 | 40 | 24~",
    "multi_query": "4 | 6 6 | 40 | 24~",
    "multi_query_tiled": "4 | 6 6 | 40 | 24~",
    "cached": " | | 40 | 24~",
    "cross_attention": "4 4 4 4 | 6 6 6 6 6 6 6 6 | 40 40 | 24~",
    "linear_attention": "4 | 6 6 | 40 | 24~",
    "performer": "4 | 6 6 10 | 40 | 24~",
    "cosine_attention": "4 | 6 6~ | 40 | 24~",
    "talking_heads": "3 4 | 6 6 | 5 40 | 24~",  # 5 heads between two matrices
    "tanh_gelu": "4 | 6 6 | 40 | 24~",
    "gated": "4 | 6 6 | 40 | 24~",
    "gated_fused": "4 | 6 6 | 40 | 24~",
    "convolved": "4 | 6 6 | 40 | 24~",
    "mixed": "4 | 6 6 | 40 | 24~",
    "experts": "4 | 6 6 | 40 40 40 | 24~",
    "parallel": "4 4 | 6 6 6 6 | 40 40 | 24~",
    "parallel_sum": "4 | 6 6 | 40 | 24~",
    "layer_scale": "4 | 6 6 | 40 | 24~",
    "post_norm": "4 4 | 6 6 6 6 | 40 40 | 24~",
    "mask_of_first_block": "4 4 | 6 6 6 6 | 40 40 | 24~",
    "inner_outputs": "4 | 6 6 6 6 | 40 40 | ",  # the first heads and the stream are outputs
    "bert": "4 4 | 6 6 6 6 | 14 40 40 | 24~",
    "gpt2": "4 4 | 6 6 6 6 | 40 40 | 24~",
    "llama": "2 2 3 3 | 2 4 4 | 40 40 | 24~",  # one table of cosines for the pairs of both layers
    "t5": "4 4 4 4 4 | 6 6 6 6 6 6 6 6 6 6 6 6 | 40 40 40 40 | 24~",
    "whisper": "4 4 4 | 6 6 6 6 6 6 | 40 40 | 24~ 24~",
    "vit": "4 4 | 6 6 | 40 40 | 24~",
    "deit": "4 | 6 | 40 | 24~",
    "swin": "4 4 | 6 6 | 40 40 40 | 24~ 36~",
    "convnext": " | | 40 40 | 20~",
    "svtr": "4 4 | 6 6 | 40 40 | 24~",
    "mixer": " | | 14 14 40 40 | 24~",
    "clip": "4 4 | 6 6 6 18~ | 40 40 | 24~ 24~",  # both towers meet in a product over 18
    "messages": " | | 40 40 | 24",
    "vocoder": " | | | 14 18",
    "speech": "4 | 6 6 | 18 40 40 | 24~",
    "batch_and_heads": "4 | 6 6 | 40 | 24~",
    "batch_and_heads_einsum": "4 | 6 6 | 40 | 24~",
    "latent_queries": "4 4 | 6 6 6 6 | 40 | 24~",
    "heads_one_by_one": " | 5 5 5 5 | 40 | 24~",
    "grouped_fused": "2 3 | 4 4 | 40 | 24~",
    "grouped_interleaved": "2 3 | 4 | 40 | 24~",
    "rotary_part": "4 | 2 2 6 | 40 | 24~",  # 2 pairs, and 2 that are not turned
    "latent_attention": "4 | 2 5 6 | 14~ 40 | 24~",
    "sinks": "4 | 6 6 | 40 | 24~",
    "sandwich": "4 | 6 6 | 40 | 24~",
    "scaled_stream": "4 4 | 6 6 6 6 | 40 40 | 24~",
    "long_skip": "4 4 4 | 6 6 6 6 6 6 | 40 40 40 | 24~ 24~",
    "retention": "4 | 6 6~ | 40 | 24~",
    "disentangled": "4 | 6 6 | 40 | 24~",
    "shifted_distances": "4 | 6 6 | 40 | 24~",
    "sentence": "4 | 6 6 | 40 | 24~",
    "cross_covariance": "4 | 6 | 40 | 24~",  # keys and values: a softmax is taken over them
    "reduced_keys": "4 | 6 | 40 | 24~",
    "pooled_keys": "4 | 6~ | 40 | 24~",
    "convolved_projections": "4 | 6 6 | 40 | 24~",
    "computed_bias": "4 | 6 6 | 14 40 | 24~",
    "decomposed_bias": "4 | 6 | 40 | 24~",
    "levit": "4 | 4 6 | 40 | 24",
    "resized_positions": "4 | 6 | 40 | 24~",
    "spatial_gate": " | | 18~ 18~ | 24~",
    "grouped_positions": "4 | 6 6 | 40 | 4~ 6~",  # 4 groups of 6 channels
    "pixels": " | 18 18 | | 4 6~",  # a norm over groups of 6
    "one_layer_twice": "4 | 6 6 | 40 | 24~",
    "keys_of_first_layer": "4 | 6 6 | 40 40 | 24~",
    "class_attention": "4 4 | 6 6 6 | 40 40 | 24~",
    "pair_bias": "4 | 6 6 | 40 | 24~",
    "head_gates": "4 | 6 6 | 40 | 24~",
    "long_convolution": " | | 18 40 | 24~",
    "quantised_weights": "4 | 6 6 | 40 | 24~",
    "low_rank": "4 | 6 6 | 7 7 40 | 24~",
    "flows": " | | | ",  # the stream is turned round: each of its channels is two
    "norm_in_double": "4 | 6 6 | 40 | 24~",
}
ROLES = ("heads", "head-width", "ffn", "hidden")
NO_BLOCKS = {
    "whisper": {"attention_join_3"},  # the only reader of the encoder, whose blocks would go with it
    "latent_queries": {"attention_join_1"},  # added to what no input decides
}
# Why else than by position, position by position: a softmax over experts, over classes or over latent queries
PINNED = {
    "experts": {"Softmax: softmax axis"},
    "svtr": {"Softmax: softmax axis"},
    "latent_queries": {"Softmax: softmax axis"},
    "disentangled": {"GatherElements: picked by position"},
    "shifted_distances": {"Reshape: reshape (15, 8) -> (8, 15) has no common layout"},
    "resized_positions": {"Resize: resized"},
}
WISHES = {
    "heads": Options(heads=0.25, align=1),
    "head-width": Options(head_width=0.3, align=1),
    "ffn": Options(ffn=0.3, align=1),
    "hidden": Options(hidden=0.25, allow_lossy=True, align=1),
    "layers": Options(layers="1"),
    "together": Options(
        heads=0.25, head_width=0.3, ffn=0.3, hidden=0.25, layers="1", allow_lossy=True, align=1
    ),
}
SINGLE = sorted(name for name, parts in PARTS.items() if parts == "4 | 6 6 | 40 | 24~")
names = pytest.mark.parametrize("name", TRANSFORMERS)


@functools.cache
def network(name: str) -> Blocks:
    return Blocks(graph_of(TRANSFORMERS[name]()))


def parts(blocks: Blocks) -> str:
    found: dict[str, list[tuple[int, str]]] = {role: [] for role in (*ROLES, "channels")}
    for group in blocks.graph.groups:
        found[blocks.role(group)].append((group.size, "~" if group.kind == "lossy" else ""))
    return " | ".join(" ".join(f"{size}{mark}" for size, mark in sorted(found[role])) for role in ROLES)


def pruned(blocks: Blocks, options: Options) -> tuple[Plan, onnx.ModelProto]:
    """What these options make of a model, equal to the reference."""
    plan = passes.plan(blocks, options, blocks.graph.model.digest())
    result = apply(blocks.graph, plan, blocks)
    assert_equal(blocks.graph, plan, result)
    return plan, result


def without(name: str, *joins: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network and the same less some blocks."""
    graph = network(name).graph
    plan = Plan(graph.model.digest(), tuple(Remove(join) for join in joins))
    result = apply(graph, plan, network(name))
    assert_equal(graph, plan, result)
    return graph.model.proto, result


# -------------------------------------------------------------------------------------------- what there is


def test_every_network_is_listed() -> None:
    assert TRANSFORMERS.keys() == PARTS.keys()


@names
def test_parts_are_found(name: str) -> None:
    wanted = [sorted(part.split()) for part in PARTS[name].split("|")]
    assert [sorted(part.split()) for part in parts(network(name)).split("|")] == wanted


@names
def test_residual_blocks_are_the_joins(name: str) -> None:
    blocks = network(name)
    joins = {node.label for node in blocks.graph.model.nodes if "_join_" in node.label} - NO_BLOCKS.get(
        name, set()
    )
    assert {(block.name, block.kind, block.branch) for block in blocks.residual} == {
        (join, join.partition("_")[0], branch_of(join)) for join in joins
    }


@names
def test_nothing_inside_is_pinned_but_rows_of_tables(name: str) -> None:
    graph = network(name).graph
    found = {pinned.reason.text for pinned in graph.pinned if pinned.reason.kind == "operator"}
    assert found - {"Gather: picked by position"} == PINNED.get(name, set())


# ------------------------------------------------------------------------------------------------- what goes


@names
@pytest.mark.parametrize("wish", WISHES)
def test_parts_go_and_the_rest_computes_the_same(name: str, wish: str) -> None:
    blocks = network(name)
    graph = blocks.graph
    plan, result = pruned(blocks, WISHES[wish])
    roles = {group.name: blocks.role(group) for group in graph.groups}
    touched = {roles[edit.group] for edit in plan.keeps} | ({"layers"} if plan.removals else set())
    if wish in ROLES:
        there = bool(PARTS[name].split("|")[ROLES.index(wish)].strip(" ~"))
        assert touched <= {wish}
        if wish == "hidden" or "~" not in PARTS[name].split("|")[ROLES.index(wish)]:
            assert bool(touched) == there
    else:
        assert len(plan.removals) == 1
    if touched:
        assert parameters(result) < parameters(graph.model.proto)


@names
def test_a_later_operator_set_and_weights_as_nodes_are_the_same(name: str) -> None:
    """Axes are inputs rather than attributes, and weights are made by Constant nodes."""
    proto = TRANSFORMERS[name](opset=20, storage="constant")
    assert {tensor.name for tensor in proto.graph.initializer} == set()
    blocks = Blocks(graph_of(proto))
    assert parts(blocks) == parts(network(name))
    pruned(blocks, WISHES["together"])


def matrices(proto: onnx.ModelProto) -> list[Array]:
    """The weights of matrix products in their order."""
    stored = stored_tensors(proto)
    return [
        numpy_helper.to_array(stored[node.input[1]])
        for node in proto.graph.node
        if node.op_type in ("MatMul", "Gemm", "Einsum") and node.input[1] in stored
    ]


def shapes(proto: onnx.ModelProto) -> list[tuple[int, ...]]:
    return [array.shape for array in matrices(proto)]


def units(plan: Plan, size: int) -> list[tuple[int, ...]]:
    """What the plan keeps of its groups of this size."""
    return [edit.units for edit in plan.keeps if edit.size == size]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("torchscript", [(24, 18)] * 3 + [(18, 24)]),
        ("einsum", [(24, 18)] * 3 + [(18, 24)]),
        ("keras_einsum", [(24, 3, 6)] * 3 + [(3, 6, 24)]),
        ("keras_tensordot", [(24, 18)] * 3 + [(18, 24)]),
        ("fused_gather", [(24, 54), (18, 24)]),
        ("fused_split", [(24, 54), (18, 24)]),
        ("fused_slices", [(24, 54), (18, 24)]),
        ("fused_strided", [(24, 54), (18, 24)]),
        ("interleaved_split", [(24, 54), (18, 24)]),
        ("torch_module", [(24, 54), (24, 18)]),
        ("multi_query", [(24, 18), (24, 6), (24, 6), (18, 24)]),
        ("multi_query_tiled", [(24, 6), (24, 6), (24, 18), (18, 24)]),
        ("grouped_query", [(24, 16), (24, 8), (24, 8), (16, 24)]),  # 2 of 3 groups; repeats stay
        ("grouped_einsum", [(24, 16), (24, 8), (24, 8), (16, 24)]),
        ("linear_attention", [(24, 18)] * 3 + [(18, 24)]),
        ("talking_heads", [(24, 18), (24, 18), (24, 12), (3, 5), (5, 2), (12, 24)]),  # 2 of 3 for values
    ],
)
def test_a_quarter_of_the_heads_is_gone_from_every_matrix(name: str, wanted: list[tuple[int, ...]]) -> None:
    _, result = pruned(network(name), Options(heads=0.25, align=1))
    assert shapes(result)[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("torchscript", [(24, 30), (30, 24)]),
        ("gated", [(24, 30), (24, 30), (30, 24)]),
        ("gated_fused", [(24, 60), (30, 24)]),
        ("fused_split", [(24, 30), (30, 24)]),
        ("experts", [(24, 3), *[(24, 30), (24, 30), (30, 24)] * 3]),
    ],
)
def test_a_quarter_of_the_neurons_is_gone_from_every_matrix(name: str, wanted: list[tuple[int, ...]]) -> None:
    _, result = pruned(network(name), Options(ffn=0.25, align=1))
    assert shapes(result)[-1 - len(wanted) : -1] == wanted


def test_queries_keys_values_and_output_lose_the_same_heads() -> None:
    proto = TRANSFORMERS["torchscript"]()
    plan, result = pruned(Blocks(graph_of(proto)), Options(heads=0.5, align=1))
    [heads] = units(plan, HEADS)
    here = np.concatenate([np.arange(head * WIDTH, (head + 1) * WIDTH) for head in heads])
    before, after = matrices(proto), matrices(result)
    for i in range(3):
        assert np.array_equal(after[i], before[i][:, here])
    assert np.array_equal(after[3], before[3][here])


def test_queries_lose_width_with_keys_and_values_with_the_output() -> None:
    proto = TRANSFORMERS["torchscript"]()
    plan, result = pruned(Blocks(graph_of(proto)), Options(head_width=0.5, align=1))
    before, after = matrices(proto), matrices(result)
    places = np.arange(HEADS * WIDTH).reshape(HEADS, WIDTH)
    kept = {edit.group: places[:, list(edit.units)].ravel() for edit in plan.keeps}
    query, value = (next(here for name, here in kept.items() if f"matmul_{i}." in name) for i in (1, 3))
    for i, here in enumerate((query, query, value)):
        assert np.array_equal(after[i], before[i][:, here])
    assert np.array_equal(after[3], before[3][value])
    assert all(array.shape == shape for array, shape in zip(after, [(24, 12)] * 3 + [(12, 24)], strict=False))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("fused_gather", lambda i, head, d: i * HIDDEN + head * WIDTH + d),
        ("fused_slices", lambda i, head, d: i * HIDDEN + head * WIDTH + d),
        ("fused_strided", lambda i, head, d: (head * WIDTH + d) * 3 + i),
        ("interleaved_split", lambda i, head, d: (head * 3 + i) * WIDTH + d),
        ("interleaved_gather", lambda i, head, d: (head * 3 + i) * WIDTH + d),
    ],
)
def test_a_fused_matrix_loses_each_head_three_times(name: str, place: Callable[[int, int, int], int]) -> None:
    proto = TRANSFORMERS[name]()
    plan, result = pruned(Blocks(graph_of(proto)), Options(heads=0.5, align=1))
    [heads] = units(plan, HEADS)
    here = sorted(place(i, head, d) for i in range(3) for head in heads for d in range(WIDTH))
    assert np.array_equal(matrices(result)[0], matrices(proto)[0][:, here])


@pytest.mark.parametrize("name", ["rotary_halves", "rotary_tables", "rotary_pairs"])
def test_rotary_pairs_stay_pairs(name: str) -> None:
    proto = TRANSFORMERS[name]()
    plan, result = pruned(Blocks(graph_of(proto)), Options(head_width=0.3, align=1))
    [pairs] = units(plan, WIDTH // 2)
    assert len(pairs) == 2
    one = sorted(2 * p + i if name == "rotary_pairs" else p + 3 * i for p in pairs for i in (0, 1))
    here = [head * WIDTH + d for head in range(HEADS) for d in one]
    for before, after in list(zip(matrices(proto), matrices(result), strict=True))[:2]:
        assert np.array_equal(after, before[:, here])


def test_a_cache_pins_heads_and_says_so() -> None:
    blocks = network("cached")
    reasons = {pinned.reason.text for pinned in blocks.graph.pinned if pinned.reason.kind == "interface"}
    assert any("past_key" in reason or "past_value" in reason for reason in reasons)
    assert blocks.cached
    assert reasons.issuperset(blocks.cached)


def test_a_scale_from_a_shape_stays_what_it_was() -> None:
    """The width of a head is 6 before the cut and 3 after it, the scale the root of 6 in both."""
    proto = TRANSFORMERS["scale_from_shape"]()
    plan, result = pruned(Blocks(graph_of(proto)), Options(head_width=0.5, align=1))
    assert units(plan, WIDTH)
    inputs = feeds(proto)
    root = next(node.output[0] for node in result.graph.node if node.op_type == "Sqrt")
    probe = onnx.ModelProto()
    probe.CopyFrom(result)
    probe.graph.output.append(helper.make_tensor_value_info(root, onnx.TensorProto.FLOAT, [1]))
    assert run(probe, inputs)[-1] == pytest.approx([math.sqrt(6)])


# -------------------------------------------------------------------------------------- whole blocks


def labels(proto: onnx.ModelProto) -> set[str]:
    return {node.name for node in proto.graph.node}


def test_all_of_a_block_goes_and_nothing_else() -> None:
    """Dropout and scale too; what is left of two blocks is words, norm and classes."""
    before, after = without("layer_scale", "attention_join_1", "ffn_join_1")
    assert [node.op_type for node in after.graph.node] == ["Gather", "LayerNormalization", "MatMul"]
    assert any(node.op_type == "Dropout" for node in before.graph.node)
    assert len(after.graph.initializer) == 4  # words, scale, shift, classes


def test_norms_behind_the_sum_stay() -> None:
    before, after = without("bert", "attention_join_1_swapped", "ffn_join_2_swapped")
    norms = [
        sum(node.op_type == "LayerNormalization" for node in proto.graph.node) for proto in (before, after)
    ]
    assert norms == [5, 5]


@pytest.mark.parametrize("going", [["attention_join_1"], ["ffn_join_1"], ["attention_join_1", "ffn_join_1"]])
def test_a_mask_that_other_blocks_read_stays(going: list[str]) -> None:
    _, after = without("mask_of_first_block", *going)
    assert any(node.op_type == "Trilu" for node in after.graph.node)


def test_a_mask_that_nobody_reads_goes() -> None:
    _, after = without("mask_of_first_block", "attention_join_1", "attention_join_2")
    assert not {"Trilu", "Where", "Range"} & {node.op_type for node in after.graph.node}


def test_what_is_an_output_stays() -> None:
    """Attention weights of a removed block, and sums that are outputs under their own names."""
    before, after = without("inner_outputs", "attention_join_1", "ffn_join_1", "attention_join_2")
    assert [output.name for output in after.graph.output] == [output.name for output in before.graph.output]
    _, weights, first, second = run(after, feeds(before))
    assert weights == pytest.approx(run(before, feeds(before))[1], abs=1e-6)
    assert np.array_equal(first, second)


def test_an_encoder_lives_as_long_as_someone_reads_it() -> None:
    """The decoder's two layers read it in the second and the fourth of its blocks of attention."""
    encoder = {node.name for node in TRANSFORMERS["t5"]().graph.node[:60]} & {
        "ffn_join_1",
        "attention_join_1",
    }
    before, after = without("t5", "attention_join_4")
    assert encoder <= labels(after)
    before, after = without("t5", "attention_join_4", "attention_join_6")
    assert not encoder & labels(after)
    assert [i.name for i in after.graph.input] == [i.name for i in before.graph.input]
    changed = feeds(before) | {"ids": feeds(before, seed=7)["ids"]}
    assert error(run(after, changed), run(after, feeds(before))) == 0
    assert error(run(before, changed), run(before, feeds(before))) > 0.01


@pytest.mark.parametrize(
    "name", ["parallel", "parallel_sum", "vocoder", "swin", "post_norm", "speech", "one_layer_twice"]
)
def test_every_block_can_go_alone_and_all_together(name: str) -> None:
    every = [block.name for block in network(name).residual]
    for join in every:
        without(name, join)
    _, after = without(name, *every)
    assert not any("_join_" in label for label in labels(after))


def test_keys_that_a_later_layer_reads_stay() -> None:
    before, after = without("keys_of_first_layer", "attention_join_1")
    assert [sum(node.op_type == "Softmax" for node in proto.graph.node) for proto in (before, after)] == [
        2,
        1,
    ]
    assert len(matrices(before)) - len(matrices(after)) == 2  # queries and output; keys and values stay


def test_a_matrix_of_two_layers_stays_with_one_of_them() -> None:
    before, after = without("one_layer_twice", "ffn_join_1")
    assert parameters(before) - parameters(after) == 2 * HIDDEN  # the norm in front
    _, after = without("one_layer_twice", "ffn_join_1", "ffn_join_2")
    assert parameters(before) - parameters(after) == 4 * HIDDEN + 2 * HIDDEN * NEURONS


def removed(proto: onnx.ModelProto, layers: str, criterion: str = "last", **options: Any) -> list[str]:
    wish = Options(layers=layers, layer_criterion=criterion, **options)
    return [edit.block for edit in passes.plan(Blocks(graph_of(proto)), wish, "").removals]


def test_blocks_by_count_share_and_name() -> None:
    proto = TRANSFORMERS["gpt2"]()
    assert removed(proto, "1") == ["ffn_join_2"]
    assert removed(proto, "3") == ["ffn_join_1", "attention_join_2", "ffn_join_2"]
    assert removed(proto, "0.5") == ["attention_join_2", "ffn_join_2"]
    assert removed(proto, "attention_*") == ["attention_join_1", "attention_join_2"]
    assert removed(proto, "softmax_1,tanh_2") == ["attention_join_1", "ffn_join_2"]
    assert removed(proto, "2", exclude=("ffn_*",)) == ["attention_join_1", "attention_join_2"]


@pytest.mark.parametrize("layers", ["5", "nothing_*", "softmax_1,nothing"])
def test_blocks_that_are_not_there_are_refused(layers: str) -> None:
    with pytest.raises(UserError, match="onnxprune inspect"):
        removed(TRANSFORMERS["gpt2"](), layers)


def test_the_block_that_does_least_goes_first() -> None:
    proto = TRANSFORMERS["gpt2"]()
    weight = next(node for node in proto.graph.node if node.name == "attention_join_1").input[1]
    maker = next(node for node in proto.graph.node if weight in node.output)
    product = next(node for node in proto.graph.node if set(node.output) & set(maker.input))
    going = {*maker.input, *product.input}
    for tensor in proto.graph.initializer:
        if tensor.name in going:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-4), tensor.name)
            )
    assert removed(proto, "1", "influence") == ["attention_join_1"]
    assert removed(proto, "2", "influence") == removed(proto, "2", "influence")


def test_random_blocks_depend_on_the_seed_alone() -> None:
    proto = TRANSFORMERS["t5"]()
    drawn = [removed(proto, "3", "random", seed=seed) for seed in range(6)]
    assert drawn == [removed(proto, "3", "random", seed=seed) for seed in range(6)]
    assert len({tuple(blocks) for blocks in drawn}) > 1


# ------------------------------------------------------------------------------------ plans, reports, files


@pytest.mark.parametrize(
    "name", ["torchscript", "fused_gather", "grouped_query", "t5", "vit", "swin", "whisper", "cached"]
)
def test_the_report_counts_what_is_there(name: str) -> None:
    proto = TRANSFORMERS[name]()
    result = onnxprune.shrink(
        proto,
        heads=0.25,
        head_width=0.3,
        ffn=0.3,
        hidden=0.25,
        layers=1,
        allow_lossy=True,
        align=1,
        repair="none",
    )
    report = result.report
    assert (report.before.params, report.after.params) == (parameters(proto), parameters(result.model))
    assert report.changes["layers"].before - report.changes["layers"].after == 1
    assert report.equivalence is not None
    assert report.equivalence.passed
    assert_equal(graph_of(proto), result.plan, result.model)


@pytest.mark.parametrize("target", ["params", "macs"])
def test_a_target_counts_what_goes_with_blocks(target: str) -> None:
    """Blocks go first; units make up for the rest, and none are taken from what went."""
    proto = TRANSFORMERS["gpt2"]()
    kept: dict[str, Any] = {target: 0.7}
    result = onnxprune.shrink(proto, layers=1, layer_criterion="last", align=1, **kept)
    [gone] = result.plan.removals
    assert gone.block == "ffn_join_2"
    assert 0.6 < result.report.kept[target] <= 0.7
    assert parameters(result.model) == result.report.after.params
    assert result.report.skipped["in a removed layer"] == 1
    if target == "params":
        assert parameters(result.model) <= 0.7 * parameters(proto)


@names
def test_the_library_proves_what_it_makes(name: str) -> None:
    result = onnxprune.shrink(
        TRANSFORMERS[name](), channels=0.4, layers="0.3", layer_criterion="last", align=1, samples=8
    )
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed


def test_a_plan_with_blocks_survives_a_file_and_makes_the_same_bytes(tmp_path: Path) -> None:
    source = write(TRANSFORMERS["llama"](), tmp_path / "llama.onnx")
    wish = ("--heads", 0.25, "--ffn", 0.3, "--layers", 2, "--align", 1)
    plan, first, second = tmp_path / "plan.json", tmp_path / "first.onnx", tmp_path / "second.onnx"
    assert command("shrink", source, *wish, "-o", first).exit_code == 0
    assert command("plan", source, *wish, "-o", plan).exit_code == 0
    assert command("apply", source, plan, "-o", second).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    read = Plan.load(plan)
    assert len(read.removals) == 2
    assert read.keeps
    assert Plan.from_json(read.to_json()) == read


def test_a_plan_that_names_an_unknown_block_is_refused(tmp_path: Path) -> None:
    source = write(TRANSFORMERS["gpt2"](), tmp_path / "gpt2.onnx")
    plan = tmp_path / "plan.json"
    assert command("plan", source, "--layers", 1, "-o", plan).exit_code == 0
    document = json.loads(plan.read_text())
    document["edits"][0]["remove"] = "somewhere"
    plan.write_text(json.dumps(document))
    check_refused(command("apply", source, plan, "-o", tmp_path / "out.onnx"), "somewhere")
    document["edits"] = [{"remove": "ffn_join_1"}, {"remove": "ffn_join_1"}]
    plan.write_text(json.dumps(document))
    check_refused(command("apply", source, plan, "-o", tmp_path / "out.onnx"), "ffn_join_1")
    assert not (tmp_path / "out.onnx").exists()
