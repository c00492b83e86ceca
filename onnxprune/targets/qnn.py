"""Qualcomm's NPU (HTP) through onnxruntime's QNN provider: the plug-in onnxruntime-qnn.

On x86-64 the package brings a simulator of the NPU that computes what the chip would, bit for bit as far as the
vendor promises, hundreds of times slower. One model per process: a session changes how the next one is compiled.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from onnxprune.allocation import Alignment
from onnxprune.model import Model, Node
from onnxprune.runtime import newest
from onnxprune.targets.fixed import opened
from onnxprune.targets.provider import UNTRIED, FixedEngine, control_flow, library, open_shapes
from onnxprune.targets.remote import RemoteEngine
from onnxprune.targets.target import Engine, Scheme, State, Target, TargetError, Versions, version_of

PROVIDER = "QNNExecutionProvider"
PACKAGE = "onnxruntime-qnn"
SIMULATED = ("x86_64", "AMD64")
SOC = ("43", "73", "Snapdragon 8 Gen 2")  # SM8550: number of the model, version of its HTP, name


class Qnn(Target):
    """The HTP computes float models in fp16, whatever they are stored in, and quantised ones (QDQ) in integers of 8
    and 16 bits. Its tensors have 32 channels in a block, and others are padded (Qualcomm AI Engine Direct, HTP
    guidelines: multiples of 32).

    The simulator is told of a chip. Told of none it computes in fp32 instead, which no device does, and for most
    graphs runs out of its memory (error 1002).
    """

    name = "qnn"
    title = "onnxruntime with the QNN provider, Qualcomm HTP"
    scheme = Scheme(
        "uint8", "uint16", symmetric=False, biases=True, reach="whole",
        why="the HTP runs nothing else; 8 bits are too few for what a LayerNorm leaves (A16W8)",
    )  # fmt: skip
    extra = "qnn"
    precisions = ("fp16", "int8")
    timed = False

    def alignment(self) -> Alignment:
        return Alignment(32, 32, 32)

    def state(self) -> State:
        machine = platform.machine()
        simulated = machine in SIMULATED
        device = f"simulator, HTP v{SOC[1]} ({SOC[2]})" if simulated else f"HTP, {machine}"
        version = version_of(PACKAGE)
        if not version:
            if sys.platform == "darwin":
                return State("absent", device=device, missing=f"{PACKAGE} is for Linux and Windows only")
            untried = "" if simulated else f" ({UNTRIED})"
            return State(
                "absent", device=device, missing=f"{PACKAGE} is not installed: {self.install()}{untried}"
            )
        version = f"{PACKAGE} {version}"
        if not all(_libraries()):
            return State("absent", version, device, f"{PACKAGE} has no HTP library for this platform")
        return State("runs", version, device)

    def newest(self) -> Versions:
        return Versions(*newest())

    def objections(self, model: Model) -> list[str]:
        found = super().objections(model) + open_shapes(model, "QNN") + control_flow(model)
        quantised = _quantised(model)
        if self.precision == "int8" and not quantised:
            found.append("nothing in the model is quantised: quantise it to QDQ first, or ask for qnn")
        if self.precision == "fp16" and quantised:
            found.append("the model is quantised: ask for qnn:int8")
        if pools := [node for node in model.nodes if _leaves_padding_out(node)]:
            more = f" and {len(pools) - 1} more" if len(pools) > 1 else ""
            found.append(
                f"{pools[0]}{more}: averages that leave their padding out come out wrong at some sizes, or the process dies"
            )
        return found

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        plugin, backend = _libraries()
        if state.reach != "runs":
            raise TargetError(f"{self.name} does not run here: {state.missing}")
        quantised = _quantised(opened(path)[0])
        if quantised != (self.precision == "int8"):
            what = "is quantised: ask for qnn:int8" if quantised else "is not quantised: ask for qnn"
            raise TargetError(f"the model {what}")
        options = {
            "backend_path": str(backend)
        }  # HTP, never QnnSaver, which computes nothing and returns zeros
        if platform.machine() in SIMULATED:
            options |= {"soc_model": SOC[0], "htp_arch": SOC[1]}

        def loaded(file: Path) -> Engine:
            return RemoteEngine(
                file,
                PROVIDER,
                options,
                threads,
                plugin=plugin,
                precision=self.precision,
                device=state.device,
            )

        return FixedEngine(path, loaded)


def _libraries() -> tuple[str, str]:
    """The provider and the HTP's back end; empty where they are not there."""
    return library("onnxruntime_qnn", "onnxruntime_providers_qnn"), library("onnxruntime_qnn", "QnnHtp")


def _leaves_padding_out(node: Node) -> bool:
    """As found of onnxruntime-qnn 2.7.0: with padding on one side always wrong; on both sides with 24 channels, say, and inside
    of networks also with others. Averages that count their padding are right."""
    given = node.attributes
    padded = any(given.get("pads", ())) or given.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    return node.op == "AveragePool" and padded and not given.get("count_include_pad", 0)


def _quantised(model: Model) -> bool:
    return any(node.op == "QuantizeLinear" for node in model.nodes)


TARGET = Qnn
