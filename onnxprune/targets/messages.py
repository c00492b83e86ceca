"""Messages of other people's software, on one line."""

from __future__ import annotations

import re

from onnxprune.errors import printable

LONGEST = 300  # characters
_SOURCE = re.compile(
    r"(?:Exception from |Check '.*?' failed at )\S+?:\d+:?"  # OpenVINO
    r"|\[ONNXRuntimeError\] : \d+ : |Load model from \S+ failed:"
    r"|(?:\w+ )?onnxruntime::[\w:~]+\([^()]*\)(?: const)?(?: \[with [^]]*\])?"  # a function that says where it is
    r"|(?: In \w+ at )?\[?[\w./-]+\.(?:cpp|cc|rs|h)(?:::\w+)*::?\d+(?::\d+)?\]?:?"  # places in source code
)


def one_line(text: object) -> str:
    """A message without places in source code, line breaks and control characters, of bounded length.

    The beginning and the end stay: one says what was done, the other what was wrong.
    """
    words = printable(" ".join(_SOURCE.sub(" ", f"{text}").split()))
    if len(words) <= LONGEST:
        return words
    half = (LONGEST - 5) // 2
    return f"{words[:half]} ... {words[-half:]}"
