"""The benchmark of times: its rows beside peers, and cuts to a peer's share of the MACs. Nothing here is timed."""

from __future__ import annotations

import ast
from pathlib import Path

import onnx
import pytest

from benchmarks import latency
from benchmarks.common import kept
from benchmarks.peers import share_of
from benchmarks.serving import NEAR
from models.architectures import resnet18


def test_kept_rows_are_those_that_are_measured() -> None:
    results = kept("latency")
    assert results is not None
    assert list(results["rows"]) == list(latency.SUBJECTS)
    assert list(results["beside"]) == [key for name in latency.NAMES for key in latency.duels(name)]


def test_every_network_of_pytorch_has_its_recipe() -> None:
    """Read, not imported: PyTorch is in an environment of its own."""
    source = Path(latency.__file__).with_name("torch_networks.py").read_text(encoding="utf-8")
    (recipes,) = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "NETWORKS"
    ]
    assert isinstance(recipes, ast.Dict)
    assert [ast.literal_eval(key) for key in recipes.keys if key] == list(latency.IN_PYTORCH)


@pytest.mark.parametrize("share", [0.4, 0.55, 0.7])
def test_ours_has_no_fewer_macs_than_a_peer(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(latency.PLAIN, "targets", ())  # times take the most time, and decide nothing here
    path = tmp_path / "resnet18.onnx"
    onnx.save(resnet18(width=0.5, image=32, classes=10), path)
    result = latency._as_many(path, share)
    onnx.save(result.model, tmp_path / "cut.onnx")
    macs = share_of(path)(tmp_path / "cut.onnx")
    assert macs == pytest.approx(result.report.kept["macs"])
    assert share - NEAR <= macs <= 1


def test_a_refusal_is_shown_in_the_peers_words() -> None:
    assert latency._duel("net, peer", {"failed": "cannot"}) == ("net, peer", "cannot", "", "", "", "")
