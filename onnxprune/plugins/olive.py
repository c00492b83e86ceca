"""A pass for Microsoft Olive (`olive-ai`): `OnnxPrune`, whose settings are the arguments of `onnxprune.shrink`.

    python -m onnxprune.plugins.olive > packages.json
    olive run --config workflow.json --package-config packages.json

`--package-config` is Olive's way to a pass that it does not have ("olive run", Olive's command line reference). The
first command writes Olive's own list of passes with this one added, so that a workflow can mix them.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.search.search_parameter import Categorical

from onnxprune import api
from onnxprune.errors import UserError

_TEXT = ("data", "judge", "preprocess", "latency_table")
"""Arguments of several types, of which JSON has text: paths and names."""


class OnnxPrune(Pass):  # type: ignore[misc, unused-ignore]
    """Prunes an ONNX model with `onnxprune.shrink`. In a workflow that searches, a list of values is a choice.

    The report is `onnxprune` among the attributes of the result, in its `model_config.json`.
    """

    @classmethod
    def _default_config(cls, _accelerator_spec: Any) -> dict[str, PassConfigParam]:
        arguments = list(inspect.signature(api.shrink).parameters.values())[1:]
        types = get_type_hints(api.shrink)
        return {
            one.name: PassConfigParam(
                type_=str if one.name in _TEXT else types[one.name],
                default_value=one.default,
                search_defaults=Categorical([one.default]),
                description=f"As the argument of onnxprune.shrink, and --{one.name.replace('_', '-')}.",
            )
            for one in arguments
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> ONNXModelHandler:
        settings = {name: getattr(config, name) for name in self.default_config(self.accelerator_spec)}
        folder, source = Path(model.get_resource("model_path")), Path(model.model_path)
        # Olive 0.13 also looks for the file's name in the working directory, and prefers what it finds there
        if not source.is_relative_to(folder):
            why = f"{source}: Olive mistakes it for a file of {folder}; rename it, or run Olive elsewhere"
            raise UserError(why)
        result = api.shrink(source, **settings)
        path = Path(resolve_onnx_path(output_model_path))
        result.save(path)
        # so that the only model of a folder is better not named
        return ONNXModelHandler(
            model_path=str(path.parent if result.data_files(path) else path),
            model_attributes={**(model.model_attributes or {}), "onnxprune": result.report.as_dict()},
        )


def packages() -> dict[str, Any]:
    """Olive's own list of passes, with this one."""
    known: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    mine = {
        "module_path": f"{__spec__.name}.OnnxPrune",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
    }
    return known | {"passes": known["passes"] | {"OnnxPrune": mine}}


if __name__ == "__main__":
    json.dump(packages(), sys.stdout, indent=2)
