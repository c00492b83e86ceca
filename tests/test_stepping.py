"""A graph that is run a little further at each stage, on some of the batches, against the graph run at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.builder import Graph
from onnxprune import rewrite
from onnxprune.model import Model
from onnxprune.parts import inner_values
from onnxprune.plan import SetWeight
from onnxprune.repair import stepping
from onnxprune.repair.stepping import Stepper
from tests.reference import graph_of

LENGTH = 4


def chain() -> tuple[Model, list[str]]:
    """Layers in a row, the sum of all as the output, and the tensors between them."""
    g = Graph(seed=1)
    x = g.input("batch", 3)
    between = []
    for _ in range(LENGTH):
        x = g.relu(g.gemm(x, 5))
        between.append(x)
    total = between[0]
    for other in between[1:]:
        total = g.add(total, other)
    return Model(g.model(total)), [tensor.name for tensor in between]


@settings(max_examples=10, deadline=None)
@given(
    stages=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=LENGTH, max_size=LENGTH),
    room=st.sampled_from([0, 250, 2**31]),
)
def test_batches_go_on_from_where_they_are(stages: list[set[int]], room: int) -> None:
    """Whichever of them each stage takes, while weights ahead are changed, and however few are kept."""
    model, between = chain()
    rng = np.random.default_rng(0)
    feeds = [{"input": rng.standard_normal((2, 3)).astype(np.float32)} for _ in range(4)]
    stepper = Stepper()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "ROOM", room)
        for place, batches in enumerate(stages):
            layers = [node.outputs[0] for node in model.nodes if node.op == "Gemm"]
            stepper.stage(model.proto, [between[place]], between[place + 1 :], layers[place:])
            whole = inner_values(model, graph_of(model.proto).shapes, between)
            for index in sorted(batches):
                found = stepper.run(index, feeds[index])
                wanted = whole(feeds[index])[between[place]]
                np.testing.assert_allclose(found[between[place]], wanted, rtol=1e-5, atol=1e-6)
            stepper.finish()
            weight = model.producers[layers[place]].inputs[1]
            model = Model(rewrite.edited(model, [SetWeight(weight, model.array(weight) * 2, "doubled")]))
