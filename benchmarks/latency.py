"""How much faster pruned models are on the CPU, beside those of other pruners, and whether a share of the time is met.

    python -m benchmarks.latency [--only NAME ...] [--update]

Target cpu, one thread, original and result in turns in one process (docs/measuring.md); ratios mean more than any
number of milliseconds. Counts are chosen by magnitude and the same share everywhere, without repair, which changes no
shape; but a share of the time is solved for as a user would, with channels, heads, neurons and layers in one budget
(64 made-up samples). *Speed-up* is set against MACs before over MACs after. The ladder cuts every network by many
shares. Peers are asked for half the MACs (`benchmarks/serving.py`), and onnxprune for no fewer than they then have: all
three run in turns. Torch-Pruning cuts networks that are trained here, and well-known ones of PyTorch
(`benchmarks/torch_networks.py`), which are exported before and after.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxprune
from benchmarks.common import (
    ROOT,
    Benchmark,
    Figure,
    NotHereError,
    Results,
    isolated,
    kept,
    run,
    stamp,
    table,
)
from benchmarks.peers import peer_environment, share_of
from benchmarks.serving import NEAR, PeerError, bisected
from benchmarks.subjects import subject
from benchmarks.tasks import TASKS, fashion_calibration
from models.environments import NotInstallable, environment
from models.exported import EXPORTED, Sizes
from models.fetch import TORCH, TORCH_NETWORKS, default_cache
from onnxprune import comparison, latency, timing
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import OnnxPruneError
from onnxprune.model import Model
from onnxprune.targets import target

SHARE = 0.6  # of the time
VIT = Sizes(384, 6, 1536, layers=12, positions=196)  # ViT-S/16
HALF = 0.5  # of the MACs
STEP = 0.02  # of the MACs, to come up to a peer's
LADDER = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SUBJECTS: dict[str, Callable[[Path], Path]] = {
    **{
        name: lambda folder, name=name: subject(name, folder)  # type: ignore[misc]
        for name in ("mobilenet_v2", "efficientnet-lite0", "resnet50", "yolov8n", "ppocr-det", "ppocr-rec")
    },
    "minilm": lambda _: TASKS["minilm"].model(),
    "vit-small": lambda folder: _vit(folder / "vit-small.onnx"),
    "fashion-vit": lambda _: TASKS["fashion-vit"].model(),
}
FASHION = ("fashion-resnet", "fashion-vgg", "fashion-densenet", "fashion-vit", "fashion-mobilenet-se")
IN_PYTORCH = ("mobilenet_v2", "efficientnet-lite0", "resnet50", "minilm", "vit-small")
NAMES = (*SUBJECTS, *(name for name in FASHION if name not in SUBJECTS))
PLAIN: dict[str, Any] = {
    "criterion": "l2", "allocation": "uniform", "repair": "none", "targets": ("cpu",), "allow_slower": True,
}  # fmt: skip
SEARCH: dict[str, Any] = {"criterion": "auto", "allocation": "auto", "samples": 64}


def measure(names: Sequence[str] = NAMES) -> Results:
    """The networks named, each in a process of its own; the others as they were kept."""
    known = kept("latency") or {"rows": {}, "beside": {}}
    rows, beside = dict(known["rows"]), dict(known["beside"])
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            if name in SUBJECTS:
                rows[name] = isolated(_row, name, Path(folder))
            for key, peer in duels(name).items():
                beside[key] = isolated(_beside, name, peer, Path(folder))
    return {
        "rows": {name: rows[name] for name in SUBJECTS if name in rows},
        "beside": {key: beside[key] for name in NAMES for key in duels(name) if key in beside},
    }


def duels(name: str) -> dict[str, str]:
    """The rows of a network beside peers, and their peers."""
    return {f"{name}, {peer}": peer for peer, (_, names) in PEERS.items() if name in names}


def _row(name: str, folder: Path) -> dict[str, Any]:
    path = SUBJECTS[name](folder)
    os.environ["ONNXPRUNE_CACHE"] = str(folder / "tables")  # times of today
    result = onnxprune.shrink(path, macs=HALF, **PLAIN)
    half = _timed(result)
    return {
        "half": half,
        "share": _shrunk(path, latency=SHARE, **SEARCH),
        "ladder": {f"{ratio}": _shrunk(path, channels=ratio) for ratio in LADDER},
        "predicted": _predicted(path, result, half),
    }


def _vit(path: Path) -> Path:
    """Random weights, as times do not depend on them."""
    if not path.exists():
        onnx.save(EXPORTED["vit"](VIT), path)
    return path


def _shrunk(path: Path, **options: Any) -> dict[str, Any]:
    """MACs kept and the time; or why there is no result."""
    try:
        return _timed(onnxprune.shrink(path, **{**PLAIN, **options}))
    except OnnxPruneError as error:
        return {"failed": f"{error}"}


def _timed(result: onnxprune.Result) -> dict[str, Any]:
    (found,) = result.report.targets
    assert found.timing is not None
    given = found.timing.as_dict()
    return {
        "macs": result.report.kept["macs"],
        "error": max(found.errors.values()),
        **{key: given[key] for key in ("before", "after", "ratio", "range", "contended")},
    }


def _predicted(path: Path, result: onnxprune.Result, timed: dict[str, Any]) -> dict[str, float]:
    """The ratio that the times of pieces predict for a result, and the one that was measured."""
    graph = DependencyGraph(Model(onnx.load(path)))
    feeds = comparison.inputs(graph)[0]
    times = latency.Table(target("cpu"), 1)
    whole = latency.predict(graph, feeds, times).total
    after = latency.predict(DependencyGraph(Model(result.model)), feeds, times).total
    return {"sum": whole / timed["before"], "predicted": after / whole, "measured": timed["ratio"]}


# Peers: a network's original, and a cut of it to a share of the MACs

Opened = tuple[Path, Callable[[float], Path]]


@contextmanager
def _onnxsim(name: str, folder: Path) -> Iterator[Opened]:
    path = SUBJECTS[name](folder)
    feeds = comparison.inputs(DependencyGraph(Model(onnx.load(path))))[0]
    given = folder / "feeds.npz"
    np.savez(given, **feeds)  # type: ignore[arg-type]
    arguments: list[str | Path] = [path, "l2", given, "together"]
    with bisected(peer_environment(), "benchmarks.onnxsim_prune", arguments, share_of(path)) as cut:
        yield path, cut


@contextmanager
def _torch_pruning(name: str, folder: Path, round_to: int = 1) -> Iterator[Opened]:
    interpreter = _interpreter(TORCH if name in FASHION else TORCH_NETWORKS)
    arguments: list[str | Path]
    if name in FASHION:
        path = TASKS[name].model()
        images, labels = fashion_calibration()
        given = folder / "labelled.npz"
        np.savez(given, image=images, label=labels)
        module, arguments = "torch_pruning_prune", [name, path.with_suffix(".pt"), "magnitude", given]
    else:
        path = folder / f"{name}-pytorch.onnx"
        module, arguments = "torch_networks", [name, f"{round_to}"]
        command = [str(interpreter), "-W", "ignore", "-m", f"benchmarks.{module}", name, str(path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with bisected(interpreter, f"benchmarks.{module}", arguments, share_of(path)) as cut:
        yield path, cut


def _interpreter(requirements: Sequence[str]) -> Path:
    try:
        return environment(default_cache(), requirements)
    except NotInstallable as error:
        raise NotHereError(str(error)) from error


def _rounded(name: str, folder: Path) -> AbstractContextManager[Opened]:
    """As its README recommends for speed."""
    return _torch_pruning(name, folder, 8)


PEERS: dict[str, tuple[Callable[[str, Path], AbstractContextManager[Opened]], tuple[str, ...]]] = {
    "onnxsim": (_onnxsim, tuple(SUBJECTS)),
    "Torch-Pruning": (_torch_pruning, (*IN_PYTORCH, *FASHION)),
    "Torch-Pruning to multiples of 8": (_rounded, IN_PYTORCH),
}
"""How they are opened, and on which networks."""


def _beside(name: str, peer: str, folder: Path) -> dict[str, Any]:
    """A peer's model of half the MACs, ours of as many, and the original, in turns; or why there is none."""
    try:
        with PEERS[peer][0](name, folder) as (path, cut):
            theirs = cut(HALF)
            share = share_of(path)(theirs)
            ours = _as_many(path, share)
            models = (onnx.load(path), onnx.load(theirs), ours.model)
    except (PeerError, OnnxPruneError) as error:
        return {"failed": f"{error}"}
    feeds = comparison.inputs(DependencyGraph(Model(models[0])))[0]
    found = timing.compare_models(target("cpu"), models, feeds).engines
    ratios = [mine / other for mine, other in zip(found[2].rounds, found[1].rounds, strict=True)]
    return {
        "macs": {"theirs": share, "ours": ours.report.kept["macs"]},
        "theirs": found[1].ratio,
        "ours": found[2].ratio,
        "ratio": float(np.median(ratios)),
        "range": [min(ratios), max(ratios)],
    }


def _as_many(path: Path, share: float) -> onnxprune.Result:
    """Our model of a share of the MACs or, where blocks of channels leap over it, of the least that is more."""
    wish = share
    while True:
        result = onnxprune.shrink(path, macs=min(wish, 1.0), **PLAIN)
        if result.report.kept["macs"] >= share - NEAR or wish >= 1:
            return result
        wish += STEP


def render(results: Results) -> str:
    """One row for each network, the ladder, and the peers."""
    rows, steps = [], []
    for name, row in results["rows"].items():
        half, share, told = row["half"], row["share"], row["predicted"]
        rows.append(
            (
                name,
                f"{half['macs']:.3f}",
                f"{half['ratio']:.3f} ({half['range'][0]:.2f} to {half['range'][1]:.2f})",
                f"{_yield(half):.2f}",
                _time(share),
                f"{share['macs']:.3f}" if "macs" in share else "",
                f"{told['predicted'] / told['measured'] - 1:+.0%}",
            )
        )
        steps.append((name, *(_time(row["ladder"][f"{ratio}"]) for ratio in LADDER)))
    header = (
        "network", "MACs", "time at `--macs 0.5` (rounds)", "speed-up over MACs", f"time at `--latency {SHARE}`",
        "MACs", "ratio of sums",
    )  # fmt: skip
    beside = [_duel(name, found) for name, found in results["beside"].items()]
    compared = ("network, peer", "MACs", "ours", "peer's time", "ours", "ours over peer's (rounds)")
    return "\n\n".join(
        (
            stamp(results),
            table(header, rows),
            "Times over the original's, at `--channels`:",
            table(("network", *map(str, LADDER)), steps),
            "Beside other pruners, at no fewer MACs; times over the original's:",
            table(compared, beside),
        )
    )


def _duel(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in found:
        return name, found["failed"], "", "", "", ""
    low, high = found["range"]
    return (
        name,
        f"{found['macs']['theirs']:.3f}",
        f"{found['macs']['ours']:.3f}",
        f"{found['theirs']:.3f}",
        f"{found['ours']:.3f}",
        f"{found['ratio']:.3f} ({low:.2f} to {high:.2f})",
    )


def _time(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.3f}" if "ratio" in found else "refused"


def _yield(half: dict[str, Any]) -> float:
    """Speed-up over MACs before / MACs after."""
    return float(half["macs"] / half["ratio"])


def figures(results: Results) -> list[Figure]:
    """What was promised."""
    rows = results["rows"]
    found = []
    for name, row in rows.items():
        found.append(
            Figure(f"{name}: MACs before / after over the speed-up", 1 / _yield(row["half"]), 1 / 0.85)
        )
    times = [step["ratio"] for row in rows.values() for step in row["ladder"].values() if "ratio" in step]
    found.append(
        Figure("time at any ratio from 0.05 to 0.9 over the original's", max(times, default=math.inf), 1.0)
    )
    shares = [row["share"]["ratio"] for row in rows.values() if "ratio" in row["share"]]
    found.append(Figure(f"--latency {SHARE}: largest time", max(shares, default=math.inf), 0.62))
    found.append(
        Figure(
            f"--latency {SHARE}: how far the smallest is below 0.62", 0.62 - min(shares, default=0.0), 0.07
        )
    )
    found.append(Figure("networks that --latency refuses", len(rows) - len(shares), 0))
    wrong = [abs(row["predicted"]["predicted"] / row["predicted"]["measured"] - 1) for row in rows.values()]
    found.append(Figure("error of predicted ratios", max(wrong), 0.15))
    off = [abs(row["predicted"]["sum"] - 1) for row in rows.values()]
    found.append(Figure("sum of the pieces' times over the whole, less 1", max(off), 0.15))
    duels = [one["ratio"] for one in results["beside"].values() if "ratio" in one]
    found.append(
        Figure(
            "time over that of another pruner's model of as many MACs",
            max(duels, default=math.inf),
            1.0,
            strict=True,
        )
    )
    return found


BENCHMARK = Benchmark("latency", measure, render, figures, NAMES)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
