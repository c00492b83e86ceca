"""What to change, as data: a plan is made on one model, read by people, replayed bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.errors import UserError
from onnxprune.model import Array

FORMAT = 1
UNITS = 10**7  # that a plan may keep in all: more is a mistake, or an attack on the memory


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep these units of a group of `size`; the others go, wherever the group occurs."""

    group: str
    size: int
    units: tuple[int, ...]
    kind: str = "exact"
    reason: str = ""

    @property
    def removed(self) -> int:
        return self.size - len(self.units)


@dataclass(frozen=True, slots=True)
class Remove:
    """Take out a residual block (see `blocks`): the stream goes on without what the block adds."""

    block: str
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SetWeight:
    """Give a constant this value, in the array's own dtype; a name that is no constant yet becomes an
    initializer."""

    name: str
    array: Array
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Rewire:
    """Take nodes out, put nodes in, and redirect readers.

    remove   tensors; the nodes that make them go
    replace  tensor -> the tensor that its readers read from now on
    add      nodes; each stands where the first removed node stood, or behind what it reads
    """

    remove: tuple[str, ...] = ()
    replace: Mapping[str, str] = field(default_factory=dict)
    add: tuple[onnx.NodeProto, ...] = ()
    reason: str = ""


Edit = SetWeight | Rewire


@dataclass(frozen=True)
class Plan:
    """Edits for the model with this digest (`Model.digest`); `options` says how they were chosen."""

    model: str
    edits: tuple[Remove | Keep, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps(self) -> tuple[Keep, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, Keep))

    @property
    def removals(self) -> tuple[Remove, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, Remove))

    @property
    def removes_nothing(self) -> bool:
        return not self.removals and not any(edit.removed for edit in self.keeps)

    def to_json(self) -> str:
        edits = [
            {
                "keep": edit.group,
                "of": edit.size,
                "units": format_units(edit.units),
                "kind": edit.kind,
                "reason": edit.reason,
            }
            if isinstance(edit, Keep)
            else {"remove": edit.block, "reason": edit.reason}
            for edit in self.edits
        ]
        document = {
            "onnxprune-plan": FORMAT,
            "model": self.model,
            "options": dict(self.options),
            "edits": edits,
        }
        return json.dumps(document, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, name: str = "plan") -> Plan:
        """Read a plan; raises `UserError` where it is not one."""
        try:
            document = json.loads(text)
            if document["onnxprune-plan"] != FORMAT:
                raise UserError(
                    f"{name}: plan format {document['onnxprune-plan']!r} is unknown; make the plan again"
                )
            return Plan(str(document["model"]), _edits(document["edits"]), dict(document.get("options", {})))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{name}: not a plan ({type(error).__name__}: {str(error)[:200]}); make one with `onnxprune plan`"
            ) from None

    @staticmethod
    def load(path: Path) -> Plan:
        try:
            return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a plan") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a plan (it is not text); make one with `onnxprune plan`") from None


def _edits(entries: Iterable[Mapping[str, Any]]) -> tuple[Remove | Keep, ...]:
    edits: dict[str, Keep] = {}
    removals: dict[str, Remove] = {}
    room = UNITS
    for entry in entries:
        if "remove" in entry:
            block = entry["remove"]
            if not isinstance(block, str) or block in removals:
                raise ValueError(f"block {block!r}: expected a name, once")
            removals[block] = Remove(block, str(entry.get("reason", "")))
            continue
        group, size, kind = entry["keep"], entry["of"], entry.get("kind", "exact")
        if not isinstance(group, str) or type(size) is not int or kind not in ("exact", "lossy"):
            raise ValueError(
                f"group {group!r} of {size!r} units, {kind!r}: expected a name, a count and a kind"
            )
        if group in edits:
            raise ValueError(f"group {group!r} occurs twice")
        units = parse_units(entry["units"], min(size, room))
        if units[0] < 0 or units[-1] >= size or len(set(units)) != len(units):
            raise ValueError(f"units {entry['units']!r} of group {group!r} do not lie in 0-{size - 1}")
        room -= len(units)
        edits[group] = Keep(group, size, units, kind, str(entry.get("reason", "")))
    return (*removals.values(), *edits.values())


def format_units(units: Iterable[int]) -> str:
    """Units as ranges: (0, 1, 2, 5) -> '0-2,5'."""
    array = np.asarray(tuple(units), dtype=np.int64)
    runs = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs if len(r))


def parse_units(text: str, limit: int = UNITS) -> tuple[int, ...]:
    """The inverse of `format_units`; sorted. Raises `ValueError` for more than `limit` units, or none."""
    units: list[int] = []
    for part in str(text).split(","):
        low, dash, high = part.strip().partition("-")
        first, last = int(low), int(high if dash else low)
        if last < first or last - first >= limit - len(units):
            raise ValueError(f"units {part!r} do not lie in a group of {limit}")
        units.extend(range(first, last + 1))
    return tuple(sorted(units))
