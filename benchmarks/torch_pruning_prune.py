"""Prunes a network of `models/train.py` with Torch-Pruning; run by `benchmarks.accuracy` where both are installed.

    python -m benchmarks.torch_pruning_prune NAME WEIGHTS.pt CRITERION CALIBRATION.npz FOLDER

Answers ratios on its standard input (`benchmarks/serving.py`). All options are its defaults; the last layer is left
out, and the heads of an attention are told apart, as its documentation asks. Taylor and Hessian take gradients of the
loss on the calibration pictures and their labels (`image` and `label` in the .npz).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
import torch_pruning as tp  # type: ignore[import-not-found, unused-ignore]
from torch.nn import functional as F  # type: ignore[import-not-found, unused-ignore]  # noqa: N812

from benchmarks.serving import serve
from models.train import NETWORKS, Encoder, export

CRITERIA = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "bn-scale": tp.importance.BNScaleImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
}


def main(name: str, weights: str, criterion: str, calibration: str, folder: str) -> None:
    torch.set_num_threads(1)
    trained = NETWORKS[name].network()
    trained.load_state_dict(torch.load(weights, weights_only=True))
    with np.load(calibration) as stored:
        images, labels = torch.from_numpy(stored["image"]), torch.from_numpy(stored["label"])

    def prune(ratio: float, path: Path) -> None:
        network = copy.deepcopy(trained).eval()
        importance = CRITERIA[criterion]()
        kind = tp.pruner.BNScalePruner if criterion == "bn-scale" else tp.pruner.BasePruner
        heads = {layer.qkv: layer.heads for layer in _encoders(network)}
        pruner = kind(
            network,
            images[:1],
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=[_classifier(network)],
            num_heads=heads,
        )
        if criterion == "taylor":
            F.cross_entropy(network(images), labels).backward()
        if criterion == "hessian":
            importance.zero_grad()
            for image, label in zip(images.split(1), labels.split(1), strict=True):
                network.zero_grad()
                F.cross_entropy(network(image), label).backward()
                importance.accumulate_grad(network)
        pruner.step()
        for layer in _encoders(network):
            layer.heads = pruner.num_heads[layer.qkv]
            layer.head = layer.qkv.out_features // (3 * layer.heads)
        export(network.eval(), path)

    serve(prune, Path(folder))


def _encoders(network: Any) -> list[Any]:
    return [layer for layer in network.modules() if isinstance(layer, Encoder)]


def _classifier(network: Any) -> Any:
    """The last dense layer."""
    return [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)][-1]


if __name__ == "__main__":
    main(*sys.argv[1:])
