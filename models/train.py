"""Small networks of usual kinds, trained with PyTorch on Fashion-MNIST and exported to ONNX.

    python -m models.train NAME DATA OUTPUT

`models.fetch` runs this in an environment that has PyTorch. DATA is the folder of the data set; OUTPUT gets
NAME.onnx (as torch exports by default: batch normalisation folded into the convolutions), NAME-bn.onnx (not
folded) and NAME.pt, the state dict of the network. Input: pixels / 255, [N, 1, 28, 28]; output: [N, 10] logits.
Seeded, on one thread: the same build of PyTorch on the same kind of processor gives the same weights.
"""

# mypy: disable-error-code="misc,no-any-return,no-untyped-call"

from __future__ import annotations

import argparse
import gzip
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
from torch import nn
from torch.nn import functional as F  # type: ignore[import-not-found, unused-ignore]  # noqa: N812

Tensor = Any
BATCH = 128
CLASSES = 10


# Layers


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = None
) -> Any:
    """Convolution, batch normalisation and, if given, an activation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Pooled(nn.Module):
    """Features, their mean over all places, and a linear classifier."""

    def __init__(self, features: Any, width: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


class Residual(nn.Module):
    """The basic block of ResNet (He et al., 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, outputs, 3, stride, act=nn.ReLU), conv(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al., 2018) as in MobileNetV3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // 4, 1)
        self.excite = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


class Inverted(nn.Module):
    """The block of MobileNetV3: expand, filter each channel, gate, project (Howard et al., 2019)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 3) -> None:
        super().__init__()
        inner = expansion * inputs
        self.body = nn.Sequential(
            conv(inputs, inner, 1, act=nn.Hardswish),
            conv(inner, inner, 3, stride, groups=inner, act=nn.Hardswish),
            Gate(inner),
            conv(inner, outputs, 1),
        )
        self.skip = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.skip else y


class Dense(nn.Module):
    """A layer of DenseNet: what it computes is appended to what it reads (Huang et al., 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        inner = 3 * growth
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            conv(inputs, inner, 1, act=nn.ReLU),
            nn.Conv2d(inner, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Encoder(nn.Module):
    """A pre-norm transformer layer with queries, keys and values in one product."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        parts = self.qkv(x).reshape(-1, length, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.head), -1) @ v
        return self.merge(mixed.transpose(1, 2).reshape(-1, length, self.heads * self.head))


# Networks


def resnet() -> Any:
    """Three stages of 24, 48 and 96 channels."""
    plan = ((24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1))
    return Pooled(nn.Sequential(conv(1, 24, act=nn.ReLU), *(Residual(*block) for block in plan)), 96)


def mobilenet_se() -> Any:
    """MobileNetV3 in small: depthwise convolutions, gates, HardSwish."""
    plan = ((16, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 64, 1), (64, 64, 1))
    stem, head = conv(1, 16, 3, 2, act=nn.Hardswish), conv(64, 160, 1, act=nn.Hardswish)
    return Pooled(nn.Sequential(stem, *(Inverted(*block) for block in plan), head), 160)


def vgg() -> Any:
    """Pairs of convolutions, pooling, two dense layers behind Flatten."""
    layers: list[Any] = []
    for inputs, outputs in ((1, 24), (24, 48), (48, 96)):
        layers += [conv(inputs, outputs, act=nn.ReLU), conv(outputs, outputs, act=nn.ReLU), nn.MaxPool2d(2)]
    dense = [nn.Flatten(), nn.Linear(96 * 9, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, CLASSES)]
    return nn.Sequential(*layers, *dense)


def densenet() -> Any:
    """Two dense blocks with bottlenecks; normalisation before the activation, where it cannot be folded."""
    width, growth = 32, 16
    layers: list[Any] = [nn.Conv2d(1, width, 5, 2, 2, bias=False)]
    for count, last in ((4, False), (6, True)):
        for _ in range(count):
            layers.append(Dense(width, growth))
            width += growth
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if not last:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return Pooled(nn.Sequential(*layers), width)


class Vit(nn.Module):
    """Four transformer layers of four heads over 16 patches (Dosovitskiy et al., 2021), averaged at the end."""

    def __init__(self, width: int = 96, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Encoder(width, heads, 3 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.layers(x)).mean(1))


class Rows(nn.Module):
    """Two GRU layers that read a picture row by row, and a classifier on the last state."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.gru = nn.GRU(28, width, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x.squeeze(1))
        return self.classifier(states[:, -1])


@dataclass(frozen=True)
class Training:
    """How a network is made and trained: AdamW, the rate rising to `rate` and falling along a cosine."""

    network: Callable[[], Any]
    epochs: int
    rate: float = 3e-3
    decay: float = 0.02


NETWORKS = {
    "fashion-resnet": Training(resnet, 6),
    "fashion-mobilenet-se": Training(mobilenet_se, 8),
    "fashion-vgg": Training(vgg, 5),
    "fashion-densenet": Training(densenet, 6),
    "fashion-vit": Training(Vit, 10, rate=1.5e-3, decay=0.05),
    "fashion-gru": Training(Rows, 8),
}
"""Networks by name."""


# Data


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures [N, 1, 28, 28] in [0, 1] and labels [N] of a part: "train" or "t10k"."""
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    return torch.from_numpy(images), torch.from_numpy(
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    )


def augmented(images: Tensor, generator: Any) -> Tensor:
    """Each picture moved by up to two pixels, every other one mirrored."""
    count = len(images)
    down, right = (torch.randint(0, 5, (count, 1, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand((count, 1, 1), generator=generator) < 0.5
    rows = torch.arange(28).view(1, 28, 1) + down
    columns = torch.arange(28).view(1, 1, 28)
    columns = torch.where(mirrored, 27 - columns, columns) + right
    padded = F.pad(images[:, 0], (2, 2, 2, 2))
    return padded[torch.arange(count).view(-1, 1, 1), rows, columns].unsqueeze(1)


# Training


def train(training: Training, images: Tensor, labels: Tensor) -> Any:
    """A trained network, ready to evaluate."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = training.network().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), training.rate, weight_decay=training.decay)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.rate, total_steps=steps * training.epochs, pct_start=0.2
    )
    for epoch in range(training.epochs):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(images), generator=generator)[: steps * BATCH].view(steps, BATCH):
            loss = F.cross_entropy(network(augmented(images[batch], generator)), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / steps:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return network.to(memory_format=torch.contiguous_format).eval()


def accuracy(network: Any, images: Tensor, labels: Tensor) -> float:
    """The share of pictures that are classified right."""
    with torch.no_grad():
        answers = torch.cat([network(part).argmax(1) for part in images.split(500)])
    return float((answers == labels).float().mean())


def export(network: Any, path: Path, *, fold: bool = True) -> None:
    """Write a network with a dynamic batch, by the TorchScript exporter."""
    torch.onnx.export(
        network,
        (torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
        training=torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE,
    )


def main() -> int:
    """Train one network and write it."""
    parser = argparse.ArgumentParser(prog="python -m models.train", description=main.__doc__)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("data", type=Path, help="the folder of the data set")
    parser.add_argument("output", type=Path, help="an existing folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    network = train(NETWORKS[arguments.name], *read(arguments.data, "train"))
    print(f"{arguments.name}: test accuracy {accuracy(network, *read(arguments.data, 't10k')):.4f}")
    root = arguments.output / arguments.name
    torch.save(network.state_dict(), root.with_suffix(".pt"))
    export(network, root.with_suffix(".onnx"))
    export(network, root.with_name(f"{root.name}-bn.onnx"), fold=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
