"""Random scores: the baseline every criterion must beat. Seeded by group name, so node order and
other groups change nothing.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from onnxprune.dependency import Group


def score(group: Group, seed: int) -> npt.NDArray[np.float64]:
    """Independent uniform numbers."""
    generator = np.random.default_rng([seed, zlib.crc32(group.name.encode())])
    return generator.random(group.size)
