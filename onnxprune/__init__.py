"""onnxprune: a pruning compiler for ONNX graphs.

import onnxprune
result = onnxprune.shrink("model.onnx", channels=0.3)
result.save("model.pruned.onnx")
"""

from __future__ import annotations

__version__ = "0.1.0"

from onnxprune.api import (
    apply,
    bench,
    build,
    calibration_data,
    fold,
    inspect,
    measure,
    quantize,
    sensitivities,
    shrink,
    validate,
)
from onnxprune.errors import (
    InternalError,
    NotFaster,
    NothingToPrune,
    OnnxPruneError,
    UserError,
    WrongOnTarget,
)
from onnxprune.passes import Options
from onnxprune.pipeline import Result, make_plan
from onnxprune.plan import Keep, Plan
from onnxprune.report import Report

__all__ = [
    "InternalError",
    "Keep",
    "NotFaster",
    "NothingToPrune",
    "OnnxPruneError",
    "Options",
    "Plan",
    "Report",
    "Result",
    "UserError",
    "WrongOnTarget",
    "__version__",
    "apply",
    "bench",
    "build",
    "calibration_data",
    "fold",
    "inspect",
    "make_plan",
    "measure",
    "quantize",
    "sensitivities",
    "shrink",
    "validate",
]
