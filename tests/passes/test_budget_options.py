"""A budget needs a target, and groups that cannot be probed."""

from __future__ import annotations

import pytest

import onnxprune
from models.quantised import QUANTISED
from onnxprune.errors import UserError
from onnxprune.passes import Options


def test_a_budget_without_a_target_is_refused() -> None:
    with pytest.raises(UserError, match="needs a target"):
        Options(channels=0.3, strategy="budget")


@pytest.mark.parametrize("name", ["blocked_weights", "mlp_of_qlinear"])
def test_a_target_is_met_where_weights_cannot_be_probed(name: str) -> None:
    model = QUANTISED[name]()
    result = onnxprune.shrink(model, macs=0.7, align=1, samples=4)
    assert result.report.kept["macs"] <= 0.7
    assert result.report.repair is not None
    assert set(result.report.repair.errors) == {"none", "ridge", "sequential"}
