"""A program that runs one model on one provider of the onnxruntime of its own environment.

    python -P ort_program.py MODEL PROVIDER OPTIONS(JSON) THREADS [PLUGIN]

PLUGIN is the library of a provider that onnxruntime does not bring itself. The program answers frames on stdin with
frames on stdout until stdin ends: eight bytes of length, then an npz file. The first frame it sends says how it
started. It stands on numpy and onnxruntime alone.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np


def session(
    ort: Any,
    path: str,
    provider: str,
    options: Mapping[str, str],
    threads: int,
    plugin: str = "",
) -> tuple[Any, Counter[str]]:
    """A session on a provider, and how many nodes each provider took. Raises what onnxruntime raises.

    ort     the module onnxruntime
    plugin  library that brings the provider, where onnxruntime does not
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Threads that spin take the processors from another session, and from a provider that has threads of its own.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    asked = [(provider, dict(options))]
    if plugin:
        found = devices(ort, provider, plugin)
        if not found:
            raise ValueError(f"{provider} finds no device")
        settings.add_provider_for_devices(found[:1], dict(options))
        asked = []
    opened = ort.InferenceSession(
        path, settings, providers=asked, enable_fallback=0
    )  # or it retries on the CPU
    nodes = Counter[str]()
    for part in opened.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    return opened, nodes


_registered: set[str] = set()


def devices(ort: Any, provider: str, plugin: str) -> list[Any]:
    """Devices of a provider that a library brings; the library is registered once for every process."""
    if plugin not in _registered:
        ort.register_execution_provider_library(provider, plugin)
        _registered.add(plugin)
    return [device for device in ort.get_ep_devices() if device.ep_name == provider]


def types_of(opened: Any) -> dict[str, str]:
    """The type of every input of a session, as onnxruntime words it."""
    return {value.name: value.type for value in opened.get_inputs()}


def fitted(types: Mapping[str, str], feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Feeds that the model has, floats in the width that it states."""
    return {
        name: value.astype(np.float32, copy=False) if types[name] == "tensor(float)" else value
        for name, value in feeds.items()
        if name in types
    }


def send(stream: BinaryIO, arrays: Mapping[str, Any], **facts: Any) -> None:
    """One frame: arrays by name, and facts that JSON can hold.

    Raises `TypeError`, and sends nothing, for what is no array of plain values: sequences, maps, objects (as texts are).
    """
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray | np.generic) or value.dtype.hasobject:
            raise TypeError(
                f"'{name}' is no tensor of numbers, and cannot go to or come from another process"
            )
    packed = io.BytesIO()
    numbered: dict[str, Any] = {f"value{i:06}": value for i, value in enumerate(arrays.values())}
    about = json.dumps({"names": list(arrays), **facts}).encode()
    np.savez(packed, about=np.frombuffer(about, np.uint8), **numbered)
    content = packed.getvalue()
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Arrays and facts of the next frame; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    length = struct.unpack("<Q", head)[0]
    content = stream.read(length)
    if len(content) < length:
        return None
    with np.load(io.BytesIO(content)) as stored:
        facts = json.loads(stored["about"].tobytes())
        names = facts.pop("names")
        return {name: stored[f"value{i:06}"] for i, name in enumerate(names)}, facts


def main(path: str, provider: str, options: str, threads: str, plugin: str = "") -> int:
    """Serve until stdin ends; 1 where the model is refused."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not get between the frames
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        ort = importlib.import_module("onnxruntime")
        opened, nodes = session(ort, path, provider, json.loads(options), int(threads), plugin)
        send(answers, {}, software="onnxruntime", version=ort.__version__, nodes=nodes)
    except Exception as error:
        send(answers, {}, error=str(error))
        return 1
    names, types = [output.name for output in opened.get_outputs()], types_of(opened)
    while (frame := receive(sys.stdin.buffer)) is not None:
        try:
            send(answers, dict(zip(names, opened.run(names, fitted(types, frame[0])), strict=True)))
        except Exception as error:
            send(answers, {}, error=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
