"""Copies of a model for inputs of exact shapes, for engines that are prepared anew for every set of shapes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import flow
from onnxprune import model as models
from onnxprune.errors import UserError
from onnxprune.model import INSIDE, Model
from onnxprune.runtime import Feeds, RunError, make_feeds
from onnxprune.shapes import analyse
from onnxprune.sizes import Sizes, assignments, dynamic_dims
from onnxprune.targets.target import TargetError

_NO_NUMBERS = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)


def dtypes(values: Iterable[onnx.ValueInfoProto], what: str) -> dict[str, np.dtype[Any]]:
    """Types by name of inputs or outputs, which errors call `what`. Raises `TargetError` where one is a sequence or map, or holds strings."""
    found = {}
    for value in values:
        kind = value.type.tensor_type.elem_type  # 0 of what is no tensor
        if kind in _NO_NUMBERS or kind not in onnx.TensorProto.DataType.values():
            raise TargetError(f"{what} '{value.name}' is not a tensor of numbers")
        found[value.name] = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return found


def opened(path: Path) -> tuple[Model, Feeds]:
    """A model, and inputs at which it is likely to run. Raises `TargetError`."""
    try:
        model = models.load(path)
        dtypes(model.inputs, "input")
        return model, make_feeds(model, _sizes(model), 0, {})
    except (UserError, RunError) as error:
        raise TargetError(f"{error}") from None


def _sizes(model: Model) -> Sizes:
    """Sizes of open dimensions at which the model is likely to run."""
    keys = dynamic_dims(model)
    if not keys:
        return {}
    try:
        return analyse(model).sizes
    except UserError:  # the engine may say better what is wrong
        return next(assignments(keys))


def fixed(path: Path, feeds: Feeds, folder: Path, inside: int = INSIDE) -> Path:
    """A copy in `folder` for inputs of these shapes, that states no other shapes: a name of an open dimension, which
    a file may repeat at every tensor, would contradict the extent that it stands for here.

    Its weights lie in its file, since not every converter reads others, and onnx refuses links; more than `inside` bytes
    stay where they are, and are linked.
    """
    proto = _proto(path, inside)
    for graph in flow.graphs(proto):
        del graph.value_info[:]
    for output in proto.graph.output:
        if output.type.HasField("tensor_type"):  # of a sequence or map the line below would make a tensor
            output.type.tensor_type.ClearField("shape")
    for value in proto.graph.input:
        if value.name in feeds:
            for dim, extent in zip(value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=False):
                dim.dim_value = extent
    data: dict[str, str] = {}
    for tensor in models.external_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.setdefault(entry.value, f"data{len(data)}")
    for location, name in data.items():
        source = (path.parent / location).resolve()
        try:
            os.link(source, folder / name)  # tract follows no symbolic link out of the model's folder
        except OSError:  # across file systems
            shutil.copyfile(source, folder / name)
    copy = folder / "model.onnx"
    copy.write_bytes(proto.SerializeToString())
    return copy


def _proto(path: Path, inside: int) -> onnx.ModelProto:
    """A model to be changed, with its weights where they are no more than `inside` bytes."""
    try:
        model = models.load(path)
    except UserError as error:
        raise TargetError(f"{error}") from None
    if sum(file.stat().st_size for file in model.files) > inside:
        return onnx.load(str(path), load_external_data=False)
    copy = onnx.ModelProto()
    copy.CopyFrom(models.materialised(model.source))
    return copy
