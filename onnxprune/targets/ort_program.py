"""A program that runs one model on one provider of the onnxruntime of its own environment.

    python -P ort_program.py MODEL PROVIDER OPTIONS(JSON) THREADS

It answers frames on stdin with frames on stdout until stdin ends: eight bytes of length, then an npz file. The
first frame it sends says how it started. It stands on numpy and onnxruntime alone.
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


def send(stream: BinaryIO, arrays: Mapping[str, Any], **facts: Any) -> None:
    """One frame: arrays by name, and facts that JSON can hold."""
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


def main(path: str, provider: str, options: str, threads: str) -> int:
    """Serve until stdin ends; 1 where the model is refused."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not get between the frames
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        ort = importlib.import_module("onnxruntime")
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.intra_op_num_threads = int(threads)
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = ort.InferenceSession(
            path, settings, providers=[(provider, json.loads(options))], enable_fallback=0
        )
        nodes = Counter[str]()
        for part in session.get_provider_graph_assignment_info():
            nodes[part.ep_name] += len(part.get_nodes())
        send(answers, {}, version=ort.__version__, nodes=nodes)
    except Exception as error:
        send(answers, {}, error=str(error))
        return 1
    types = {value.name: value.type for value in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    while (frame := receive(sys.stdin.buffer)) is not None:
        feeds = {
            name: value.astype(np.float32) if types[name] == "tensor(float)" else value
            for name, value in frame[0].items()
            if name in types
        }
        try:
            send(answers, dict(zip(names, session.run(names, feeds), strict=True)))
        except Exception as error:
            send(answers, {}, error=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
