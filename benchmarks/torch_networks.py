"""Prunes well-known PyTorch networks with Torch-Pruning; run by `benchmarks.latency` where all of them are installed.

    python -m benchmarks.torch_networks NAME ORIGINAL.onnx
    python -m benchmarks.torch_networks NAME ROUND_TO FOLDER

The first form exports a network whole, with random weights. The second answers ratios on its standard input
(`benchmarks/serving.py`), counts being multiples of ROUND_TO. Options are those of Torch-Pruning's own examples
(README.md, examples/transformers/prune_timm_vit.py and prune_hf_bert.py); the last layer is left out.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
import torch_pruning as tp  # type: ignore[import-not-found, unused-ignore]
from torch import nn

from benchmarks.serving import serve

PICTURE = {"image": (torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)), ("batch",))}
WORDS = {name: (torch.ones(1, 128, dtype=torch.int64), ("batch", "length")) for name in ("ids", "mask")}


@dataclass(frozen=True)
class Network:
    """A network and what its pruner is told.

    inputs  tensors, and the names of their open leading extents
    last    the layer that keeps its outputs
    heads   the numbers of heads, by the projections that make them
    whole   heads are removed whole, by as large a share as channels are
    resize  puts right what the modules keep about their heads
    """

    module: Any
    inputs: Mapping[str, tuple[Any, tuple[str, ...]]]
    last: Any
    heads: dict[Any, int] = field(default_factory=dict)
    whole: bool = False
    resize: Callable[[dict[Any, int]], None] = lambda _: None


class Pooled(nn.Module):  # type: ignore[misc, unused-ignore]
    """A BERT as a function of words and a mask, in this order, to the output of its pooler."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Any, mask: Any) -> Any:
        return self.bert(input_ids=ids, attention_mask=mask).pooler_output


def _torchvision(name: str, last: Callable[[Any], Any]) -> Network:
    _declare_operators()
    import torchvision  # type: ignore[import-not-found, unused-ignore]

    module = getattr(torchvision.models, name)()
    return Network(module, PICTURE, last(module))


def _timm(name: str) -> Network:
    _declare_operators()
    import timm  # type: ignore[import-not-found, unused-ignore]
    from timm.layers import Attention  # type: ignore[import-not-found, unused-ignore]

    module = timm.create_model(name)
    found = [layer for layer in module.modules() if isinstance(layer, Attention)]

    def resize(heads: dict[Any, int]) -> None:
        for layer in found:
            layer.num_heads = heads[layer.qkv]
            layer.attn_dim = layer.qkv.out_features // 3
            layer.head_dim = layer.attn_dim // layer.num_heads

    heads = {layer.qkv: layer.num_heads for layer in found}
    return Network(module, PICTURE, module.get_classifier(), heads, resize=resize)


def _minilm() -> Network:
    _declare_operators()
    from transformers import BertConfig, BertModel  # type: ignore[import-not-found, unused-ignore]
    from transformers.models.bert import (  # type: ignore[import-not-found, unused-ignore]
        modeling_bert,
    )

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    module = Pooled(BertModel(config))
    found = [layer for layer in module.modules() if isinstance(layer, modeling_bert.BertSelfAttention)]

    def resize(heads: dict[Any, int]) -> None:
        for layer in found:
            layer.num_attention_heads = heads[layer.query]
            layer.all_head_size = layer.query.out_features
            layer.attention_head_size = layer.all_head_size // layer.num_attention_heads

    heads = {
        each: layer.num_attention_heads for layer in found for each in (layer.query, layer.key, layer.value)
    }
    return Network(module, WORDS, module.bert.pooler, heads, whole=True, resize=resize)


NETWORKS: dict[str, Callable[[], Network]] = {
    "mobilenet_v2": lambda: _torchvision("mobilenet_v2", lambda module: module.classifier[-1]),
    "efficientnet-lite0": lambda: _timm("tf_efficientnet_lite0"),
    "resnet50": lambda: _torchvision("resnet50", lambda module: module.fc),
    "minilm": _minilm,
    "vit-small": lambda: _timm("vit_small_patch16_224"),
}


@functools.cache  # what is declared lasts as long as its library
def _declare_operators() -> Any:
    """torchvision is importable only where its compiled operators load; built for CUDA, as the package index has them,
    they do not on PyTorch for the CPU. Nothing here calls them."""
    spec = find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    try:
        ctypes.CDLL(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def build(name: str) -> Network:
    """The same weights each time."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    network.module.eval()
    return network


def export(network: Network, path: Path) -> None:
    """Write a network with an open batch, by the TorchScript exporter."""
    torch.onnx.export(
        network.module,
        tuple(tensor for tensor, _ in network.inputs.values()),
        str(path),
        input_names=list(network.inputs),
        output_names=["output"],
        dynamic_axes={name: dict(enumerate(extents)) for name, (_, extents) in network.inputs.items()},
        opset_version=17,
        dynamo=False,
    )


def main(name: str, round_to: str, folder: str) -> None:
    torch.set_num_threads(1)

    def prune(ratio: float, path: Path) -> None:
        network = build(name)
        pruner = tp.pruner.BasePruner(
            network.module,
            tuple(tensor for tensor, _ in network.inputs.values()),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[network.last],
            round_to=int(round_to),
            num_heads=network.heads,
            prune_num_heads=network.whole,
            prune_head_dims=not network.whole,
            head_pruning_ratio=ratio if network.whole else 0.0,
        )
        pruner.step()
        network.resize(pruner.num_heads)
        export(network, path)

    serve(prune, Path(folder))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        export(build(sys.argv[1]), Path(sys.argv[2]))
    else:
        main(*sys.argv[1:])
