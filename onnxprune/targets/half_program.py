"""Writes the copy in float16 that `tensorrt:fp16` builds of a float32 model, for other tools.

python -m onnxprune.targets.half_program MODEL OUTPUT
"""

from __future__ import annotations

import sys

from onnxprune import model as models
from onnxprune.errors import UserError, printable
from onnxprune.targets.half import converted
from onnxprune.targets.target import TargetError
from onnxprune.targets.tensorrt import TensorRt


def main(path: str, output: str) -> int:
    """Write the copy, and say what is not in float16 there; 1 if there is none."""
    try:
        model = models.load(path)
        half = converted(model, TensorRt("fp16").tolerance)
        models.save(half.proto, output, sources=model.files)
    except (UserError, TargetError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    for key, value in half.as_dict().items():
        print(printable(f"{key}: {value}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
