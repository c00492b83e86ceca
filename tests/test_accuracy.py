"""The accuracy benchmark: what scores mean, how peers are driven and met at equal MACs, and how figures follow."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import accuracy, tasks
from benchmarks.accuracy import COLUMNS, TARGETS, loss, wins
from benchmarks.serving import HIGHEST, NEAR, Peer, PeerError, nearest
from models import fetch
from models.minilm import HEADS, minilm
from models.safetensors import read_safetensors
from onnxprune.runtime import Session

WORDS = st.text("abc", max_size=6)

# Scores


@given(WORDS, WORDS)
def test_edit_distance_is_the_length_of_the_shortest_path(a: str, b: str) -> None:
    def shortest(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return shortest(a[1:], b[1:])
        return 1 + min(shortest(a[1:], b), shortest(a, b[1:]), shortest(a[1:], b[1:]))

    assert tasks.distance(a, b) == shortest(a, b)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_area_counts_the_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([score for score, _ in rows]), np.array([label for _, label in rows])
    if labels.all() or not labels.any():
        return
    pairs = np.sign(scores[labels][:, None] - scores[~labels])
    assert tasks.area(scores, labels) == pytest.approx((pairs + 1).mean() / 2)


def test_fidelity_of_a_known_distortion() -> None:
    times = np.arange(1600) / 16_000
    clean, other = (
        np.sin(2 * np.pi * 100 * times),
        np.cos(2 * np.pi * 100 * times),
    )  # orthogonal, equal energy
    assert tasks.fidelity(clean + 0.1 * other, clean) == pytest.approx(20)
    assert tasks.fidelity(7 * (clean + 0.1 * other) + 3, clean) == pytest.approx(
        20
    )  # scale and offset are free


def test_words_in_their_longest_known_pieces() -> None:
    known = {
        piece: i
        for i, piece in enumerate(["[UNK]", "[CLS]", "[SEP]", "un", "##cut", "##c", "##ut", "tree", ","])
    }
    numbers = tasks.word_numbers("Uncut tree, ucut", known)
    assert [list(known)[i] for i in numbers] == ["[CLS]", "un", "##cut", "tree", ",", "[UNK]", "[SEP]"]


def test_the_bytes_of_a_file_start_and_end_at_what_is_no_space() -> None:
    row = tasks.file_bytes(b"  begin" + b"x" * 5000 + b"end\n\n")
    assert bytes(row[:5].tolist()) == b"begin"
    assert bytes(row[-3:].tolist()) == b"end"
    short = tasks.file_bytes(b" ab ")  # white space at the other end stays
    assert bytes(short[:3].tolist()) == b"ab "
    assert bytes(short[-3:].tolist()) == b" ab"
    assert set(short[3:-3].tolist()) == {tasks.PADDING}


@pytest.mark.parametrize("apart", [False, True])
def test_calibration_is_stored_by_sample(apart: bool, tmp_path: Path) -> None:
    feeds = [{"x": np.full((1, 2), i)} for i in range(3)]
    task = tasks.Task("t", "wide", "", Path, lambda: feeds, lambda _: tasks.Score(0, 1), apart)
    task.write_calibration(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as stored:
        assert stored["x"].shape == ((3, 1, 2) if apart else (3, 2))
        assert stored["x"].reshape(3, 2)[:, 0].tolist() == [0, 1, 2]


# The ratio of a peer


@given(st.floats(0.3, 3.0), st.sampled_from(TARGETS))
def test_bisection_meets_the_target(power: float, target: float) -> None:
    shares: dict[str, float] = {}

    def at(ratio: float) -> tuple[Path, float]:
        shares[str(ratio)] = (1 - ratio) ** power
        return Path(str(ratio)), shares[str(ratio)]

    if (1 - HIGHEST) ** power > target + NEAR:
        with pytest.raises(PeerError, match="keeps"):
            nearest(at, target)
    else:
        assert abs(shares[str(nearest(at, target))] - target) <= NEAR


@given(st.floats(0.05, 0.9), st.sampled_from(TARGETS))
def test_a_leap_over_the_target_is_met_from_below(edge: float, target: float) -> None:
    path = nearest(lambda ratio: (Path(str(ratio)), 1.0 if ratio < edge else 0.2), target)
    assert edge <= float(str(path)) <= edge + 0.002


def test_a_ratio_that_is_too_much_for_a_peer_is_not_its_end() -> None:
    def at(ratio: float) -> tuple[Path, float]:
        if ratio > 0.4:
            raise PeerError("index out of range")
        return Path(str(ratio)), 1 - ratio

    assert float(str(nearest(at, 0.8))) == pytest.approx(0.2, abs=2 * NEAR)
    with pytest.raises(
        PeerError, match=r"keeps 0.60 of the MACs at a ratio of 0.40, and then: index out of range"
    ):
        nearest(at, 0.5)


def test_what_a_peer_says_and_cannot_do(tmp_path: Path) -> None:
    with Peer(Path(sys.executable), "tests.peer", ["text"], tmp_path) as peer:
        assert peer.prune(0.25).read_text(encoding="utf-8") == "text 0.25"
        assert peer.prune(0.5).name == "0.5000.onnx"
        with pytest.raises(PeerError, match="ValueError: too much"):
            peer.prune(0.9)
        assert peer.prune(0.25).exists()  # it goes on


def test_a_peer_that_cannot_start(tmp_path: Path) -> None:
    with (
        Peer(Path(sys.executable), "tests.no_such_peer", [], tmp_path) as peer,
        pytest.raises(PeerError, match="No module"),
    ):
        peer.prune(0.1)


# Figures


def _results(points: dict[str, float], original: float = 90.0, kind: str = "wide") -> dict[str, Any]:
    """A row in which every column has the same points at every target."""
    cells = {
        name: {f"{t}": {"macs": t, "points": value, "samples": 10, "beside": {}} for t in TARGETS}
        for name, value in points.items()
    }
    return {
        "kind": kind,
        "measure": "",
        "original": {"points": original, "samples": 10, "beside": {}},
        "cells": cells,
    }


OURS = [column.name for column in COLUMNS if column.ours]
PEERS = [column.name for column in COLUMNS if not column.ours]


def test_a_third_of_the_best_peer() -> None:
    row = _results({PEERS[0]: 60.0, PEERS[1]: 81.0, OURS[0]: 87.1, OURS[1]: 87.0})
    assert wins(row, OURS[0], 0.5)
    assert not wins(row, OURS[1], 0.5)  # a third is not less than a third
    assert wins(_results({OURS[0]: 89.0}), OURS[0], 0.5)  # no peer has a model there
    assert wins(_results({PEERS[0]: 90.5, OURS[0]: 90.0}), OURS[0], 0.5)  # nothing is lost
    assert not wins(_results({PEERS[0]: 90.5, OURS[0]: 89.9}), OURS[0], 0.5)
    assert loss(_results({}), OURS[0], 0.5) == math.inf


def test_figures_and_tables_of_known_results() -> None:
    rows = {
        "a": _results({PEERS[0]: 10.0, OURS[0]: 80.0, OURS[1]: 89.6}),
        "b": _results({PEERS[0]: 10.0, OURS[0]: 20.0, OURS[1]: 88.0}, kind="compact"),
    }
    rows["a"]["cells"][PEERS[1]] = {"0.8": {"failed": "keeps 0.99"}}
    figures = {figure.name: figure for figure in accuracy.figures({"rows": rows})}
    values = [figure.measured for figure in figures.values()]
    assert values == pytest.approx(
        [0.4, 0.4, 2.0, 2.0, 0.4, 3, 0]
    )  # no data: 'b' loses 70 of 80 at three targets
    assert [figure.passed for figure in figures.values()] == [True] * 5 + [False, True]
    provenance = dict.fromkeys(("date", "machine", "python", "onnxprune", "onnx", "onnxruntime", "numpy"), "")
    text = accuracy.render({"measured": provenance, "rows": rows})
    assert f"* a, {PEERS[1]}: keeps 0.99 (at 0.8)" in text
    assert text.count("| a |") == text.count("| b |") == len(TARGETS)


# Models and data


def test_safetensors_as_written(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.int64)}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for (name, array), kind in zip(arrays.items(), ("F32", "I64"), strict=True):
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}  # type: ignore[dict-item]
        data += array.tobytes()
    head = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(len(head).to_bytes(8, "little") + head + data)
    read = read_safetensors(tmp_path / "t")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


def test_a_folder_has_a_checksum_of_names_and_contents(tmp_path: Path) -> None:
    def checksum(files: dict[str, str]) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content, encoding="utf-8")
        return fetch.sha256(root)

    base = {"b/c": "1", "a": "2"}
    assert checksum(base) == checksum(dict(reversed(base.items())))
    others = ({**base, "a": "3"}, {"b/d": "1", "a": "2"}, {**base, "e": ""})
    assert len({checksum(files) for files in (base, *others)}) == 4


def test_folders_and_files_of_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        for name in ("p/data/a", "p/data/b/c", "p/dataset", "p/x", "p/y"):
            wheel.writestr(name, name)
    fetch.unzip(tmp_path / "w.whl", {"p/data/": "", "p/x": ""}, tmp_path / "to")
    found = sorted(path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*"))
    assert found == ["p", "p/data", "p/data/a", "p/data/b", "p/data/b/c", "p/x"]


def test_a_sentence_does_not_depend_on_its_padding() -> None:
    rng = np.random.default_rng(0)
    width, words = 2 * HEADS, 20

    def some(*shape: int) -> Any:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    state = {
        "embeddings.word_embeddings.weight": some(words, width),
        "embeddings.position_embeddings.weight": some(9, width),
        "embeddings.token_type_embeddings.weight": some(2, width),
    }
    root = "encoder.layer.0"
    dense = [f"{root}.attention.self.{part}" for part in ("query", "key", "value")] + [
        f"{root}.attention.output.dense"
    ]
    norms = ["embeddings.LayerNorm", f"{root}.attention.output.LayerNorm", f"{root}.output.LayerNorm"]
    shapes = dict.fromkeys(dense, (width, width))
    shapes |= {f"{root}.intermediate.dense": (3 * width, width), f"{root}.output.dense": (width, 3 * width)}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": some(*shape), f"{name}.bias": some(shape[0])}
    for name in norms:
        state |= {f"{name}.weight": some(width), f"{name}.bias": some(width)}
    session = Session(minilm(state))
    ids = rng.integers(0, words, (2, 5))
    alone = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["embedding"]
    padded = {
        "input_ids": np.pad(ids, ((0, 0), (0, 3)), constant_values=7),
        "attention_mask": np.pad(np.ones_like(ids), ((0, 0), (0, 3))),
    }
    beside = session.run(padded)["embedding"]
    np.testing.assert_allclose(alone, beside, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.01
