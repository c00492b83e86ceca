"""A program that converts one model for LiteRT with onnx2tf and runs it there.

    python -P litert_program.py MODEL PROVIDER OPTIONS(JSON) THREADS [PLUGIN]

It is started and spoken to like `ort_program.py` beside it; of the arguments only MODEL and THREADS mean anything here.
What onnx2tf writes goes beside the model. It stands on numpy, onnx2tf and ai-edge-litert alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

FRAMES = runpy.run_path(str(Path(__file__).with_name("ort_program.py")))


def main(*arguments: str) -> int:
    """Serve until stdin ends; 1 where the model is refused."""
    path, provider, _, threads = arguments[:4]
    send, receive = FRAMES["send"], FRAMES["receive"]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not get between the frames
    try:
        names = [
            value.name
            for value in importlib.import_module("onnx").load(path, load_external_data=False).graph.input
        ]
        importlib.import_module("onnx2tf").convert(
            input_onnx_file_path=path,
            output_folder_path=str(Path(path).parent / "converted"),
            keep_shape_absolutely_input_names=names,  # else images are to be fed as NHWC
            verbosity="error",
        )
        litert = importlib.import_module("ai_edge_litert.interpreter")
        converted = Path(path).parent / "converted" / f"{Path(path).stem}_float32.tflite"
        interpreter = litert.Interpreter(model_path=str(converted), num_threads=int(threads))
        interpreter.allocate_tensors()
        runner = interpreter.get_signature_runner()
        types = {name: about["dtype"] for name, about in runner.get_input_details().items()}
        taken = [operation["op_name"] for operation in interpreter._get_ops_details()]
        if "DELEGATE" not in taken:
            raise ValueError("XNNPACK takes no operator")
        version = importlib.metadata.version("ai-edge-litert")
        send(
            answers,
            {},
            software="LiteRT",
            version=version,
            nodes={provider: len(taken) - taken.count("DELEGATE")},
        )
    except (Exception, SystemExit) as error:  # onnx2tf exits where it refuses
        send(answers, {}, error=str(error))
        return 1
    while (frame := receive(sys.stdin.buffer)) is not None:
        try:
            feeds = {name: frame[0][name].astype(kind, copy=False) for name, kind in types.items()}
            interpreter.reset_all_variables()  # an LSTM starts with the state it ended in, otherwise
            send(answers, dict(runner(**feeds)))
        except Exception as error:
            send(answers, {}, error=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
