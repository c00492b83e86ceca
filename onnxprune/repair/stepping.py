"""Run a graph a little further at each stage, on the same batches, without starting over."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.model import Array
from onnxprune.parts import ancestors, closure
from onnxprune.runtime import Feeds, Session

ROOM = 2**31  # bytes of activations that are kept between stages; above it every stage starts from the inputs


class Stepper:
    """One graph on its way from its inputs to its outputs.

    At each stage some tensors are computed for good and others for now (what is behind a weight that will
    change); of each batch only what later stages read is kept.
    """

    def __init__(self) -> None:
        self._keeps = True
        self._kept: dict[int, Feeds] = {}
        self._fresh: dict[int, Feeds] = {}
        self._live: list[str] = []
        self._wanted: list[str] = []
        self._proto = onnx.ModelProto()
        self._sessions: dict[bool, Session] = {}

    def stage(
        self,
        proto: onnx.ModelProto,
        wanted: Sequence[str],
        later: Sequence[str],
        changing: Collection[str] = (),
    ) -> None:
        """Begin a stage.

        wanted    tensors to compute
        later     tensors that later stages will ask for
        changing  tensors that will have other values later, and all that depend on them
        """
        self._proto, self._sessions, self._fresh = proto, {}, {}
        self._wanted = list(dict.fromkeys(wanted))
        nodes = proto.graph.node
        self._keeps &= not any(node.domain == flow.DOMAIN for node in nodes)
        makers = {output: i for i, node in enumerate(nodes) for output in node.output if output}
        tainted: set[str] = set(changing)
        for node in nodes:
            if not tainted.isdisjoint(node.input):
                tainted.update(node.output)
        done = set(closure(proto, [name for name in self._wanted if name not in tainted])[0])
        ahead = set(closure(proto, [*self._wanted, *later])[0]) - done
        read = [name for i in sorted(ahead) for name in nodes[i].input] + list(later)
        live = (name for name in read if makers.get(name) in done and nodes[makers[name]].input)
        self._live = list(dict.fromkeys(live)) if self._keeps else []

    def run(self, index: int, feeds: Feeds) -> dict[str, Array]:
        """The wanted tensors for one batch. Raises `RunError`."""
        state = self._kept.get(index, {})
        session = self._session(bool(state))
        fed = {name: feeds[name] for name in self._wanted if name in feeds}
        names = list(dict.fromkeys([*self._wanted, *self._live]))
        values = session.run({**feeds, **state}, [n for n in names if n not in fed and n not in state])
        values = {**{name: state[name] for name in names if name in state}, **values}
        if self._live:
            self._fresh[index] = {name: values[name] for name in self._live}
        return {**{name: values[name] for name in self._wanted if name in values}, **fed}

    def finish(self) -> None:
        """End a stage: forget what no later stage reads."""
        arrays = [value for state in self._fresh.values() for value in state.values()]
        plain = all(isinstance(array, np.ndarray) for array in arrays)
        if not plain or sum(array.nbytes for array in arrays) > ROOM:
            self._keeps, self._fresh = False, {}
        self._kept = self._fresh

    def _session(self, resumed: bool) -> Session:
        if resumed not in self._sessions:
            known = next(iter(self._kept.values())) if resumed else {}
            part = ancestors(self._proto, [*self._wanted, *self._live], known)
            self._sessions[resumed] = Session(part, optimise="all")
        return self._sessions[resumed]
