"""Sizes for dynamic dimensions: what each is taken for, and in what order sizes are tried."""

from __future__ import annotations

import itertools

import onnx
from onnx import TensorProto, helper

from onnxprune.model import Model
from onnxprune.sizes import assignments, dynamic_dims

Dims = list[int | str | None]


def model(**inputs: Dims) -> Model:
    """A graph with these inputs, none of which it computes with."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
    nodes = [helper.make_node("Identity", [value.name], [f"{value.name}.out"]) for value in values]
    outputs = [onnx.ValueInfoProto(name=node.output[0]) for node in nodes]
    graph = helper.make_graph(nodes, "inputs", values, outputs)
    return Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def kinds(*dims: int | str | None) -> dict[str, str]:
    return dynamic_dims(model(x=list(dims)))


def test_kinds_follow_from_rank_and_place() -> None:
    assert kinds("n", "words") == {"n": "batch", "words": "length"}
    assert kinds("n", "frames", 80) == {"n": "batch", "frames": "length"}
    assert kinds("n", 3, "height", "width") == {"n": "batch", "height": "space", "width": "space"}
    assert kinds("n", 1, "d", "h", "w") == {"n": "batch", "d": "space", "h": "space", "w": "space"}
    assert kinds(1, 3, 8, 8) == {}


def test_the_length_of_a_cache_is_no_space() -> None:
    assert kinds("n", 8, "past", 64) == {"n": "batch", "past": "length"}
    assert kinds(2, "n", 8, "past", 64) == {"n": "space", "past": "length"}
    assert kinds("n", "h", "w", 3) == {"n": "batch", "h": "space", "w": "length"}  # channels last


def test_dimensions_without_a_name_are_told_apart() -> None:
    proto = model(x=["n", 3, None, None], y=["n", None])
    assert dynamic_dims(proto) == {"n": "batch", "x.2": "space", "x.3": "space", "y.1": "length"}


def test_an_extent_of_minus_one_is_open_and_of_zero_is_not() -> None:
    assert kinds(-1, 0, 4) == {"x.0": "batch"}


def test_a_name_seen_first_as_batch_stays_one() -> None:
    assert dynamic_dims(model(x=["n", "k"], y=["k", "n"])) == {"n": "batch", "k": "length"}


def test_first_sizes_differ_by_dimension_and_between_assignments() -> None:
    keys = {"n": "batch", "h": "space", "w": "space", "a": "length", "b": "length"}
    first, second = itertools.islice(assignments(keys), 2)
    assert len(set(first.values())) == len(first)
    assert all(first[key] != second[key] for key in keys)


def test_named_sums_are_sums_in_every_assignment() -> None:
    keys = {
        "n": "batch",
        "past + length": "length",
        "past": "length",
        "length": "length",
        "past_1": "length",
        "past_1+1": "length",
        "1 + past + length": "length",
    }
    tried = list(assignments(keys))
    assert len({(sizes["past"], sizes["length"]) for sizes in tried}) > 4
    for sizes in tried:
        assert sizes.keys() == keys.keys()
        assert sizes["past + length"] == sizes["past"] + sizes["length"]
        assert sizes["past_1+1"] == sizes["past_1"] + 1
        assert sizes["1 + past + length"] == sizes["past"] + sizes["length"] + 1


def test_a_sum_of_unknown_terms_is_a_dimension_of_its_own() -> None:
    keys = {"n": "batch", "length": "length", "length + other": "length", "length - 1": "length"}
    sizes = next(assignments(keys))
    assert len(set(sizes.values())) == 4


def test_a_sum_that_its_name_does_not_tell_is_guessed() -> None:
    """Tokens, what a cache holds, and a mask over both, by names that say nothing of it."""
    keys = {"n": "batch", "mask": "length", "new": "length", "kept": "length"}
    tried = list(assignments(keys))
    assert tried[0]["mask"] != tried[0]["new"] + tried[0]["kept"]
    for total in ("mask", "new", "kept"):
        a, b = {"mask", "new", "kept"} - {total}
        fitting = [sizes for sizes in tried if sizes[total] == sizes[a] + sizes[b] and sizes[a] != sizes[b]]
        assert len({(sizes[a], sizes[b]) for sizes in fitting}) > 1  # so that static extents can be told


def test_a_sum_is_guessed_beside_a_fourth_length() -> None:
    keys = {"a": "length", "b": "length", "c": "length", "d": "length"}
    first = list(itertools.islice(assignments(keys), 1 + 4 * 3))
    found = {
        (total, x, y)
        for sizes in first[1:]
        for total in keys
        for x, y in itertools.combinations([key for key in keys if key != total], 2)
        if sizes[total] == sizes[x] + sizes[y]
    }
    assert len(found) >= 12


def test_two_lengths_are_not_guessed_to_be_sums() -> None:
    keys = {"n": "batch", "a": "length", "b": "length"}
    assert len(list(assignments(keys))) == len(list(assignments({"n": "batch"})))


def test_small_and_large_sizes_are_tried() -> None:
    tried = list(assignments({"n": "batch", "side": "space", "steps": "length"}))
    assert {28, 32, 224, 320} <= {sizes["side"] for sizes in tried}
    assert min(sizes["steps"] for sizes in tried) == 1
    assert max(sizes["steps"] for sizes in tried) >= 4000


def test_no_dimension_gives_empty_sizes() -> None:
    assert next(assignments({})) == {}
