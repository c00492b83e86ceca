"""Run a graph a little further at each stage, on the same batches, without starting over."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.model import Array
from onnxprune.parts import ancestors, closure
from onnxprune.runtime import Feeds, Session

ROOM = 2**31  # bytes of activations that are kept between stages; batches beyond it start from the inputs


class Stepper:
    """One graph on its way from its inputs to its outputs.

    At each stage some tensors are computed for good and others for now (what is behind a weight that will
    change); of each batch only what later stages read is kept. A batch that a stage leaves out stays where it is,
    and goes on from there: what is kept of it no longer changes.
    """

    def __init__(self) -> None:
        self._keeps = True
        self._kept: dict[int, Feeds] = {}
        self._fresh: dict[int, Feeds] = {}
        self._live: list[str] = []
        self._wanted: list[str] = []
        self._proto = onnx.ModelProto()
        self._sessions: dict[tuple[str, ...], Session] = {}

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
        fed = {name: feeds[name] for name in self._wanted if name in feeds}
        names = list(dict.fromkeys([*self._wanted, *self._live]))
        missing = [name for name in names if name not in fed and name not in state]
        values = self._session(state).run({**feeds, **state}, missing) if missing else {}
        values = {**{name: state[name] for name in names if name in state}, **values}
        if self._live:
            self._fresh[index] = {name: values[name] for name in self._live}
        return {**{name: values[name] for name in self._wanted if name in values}, **fed}

    def finish(self) -> None:
        """End a stage: forget what no later stage reads, and what there is no room for."""
        kept = {**self._kept, **self._fresh} if self._live else {}
        self._kept, used = {}, 0
        for index in sorted(kept):
            arrays = kept[index].values()
            if not all(isinstance(array, np.ndarray) for array in arrays):
                self._keeps, self._kept = False, {}
                return
            used += sum(array.nbytes for array in arrays)
            if used <= ROOM:
                self._kept[index] = kept[index]

    def _session(self, known: Feeds) -> Session:
        """From what is known of a batch to what is wanted."""
        names = tuple(known)
        if names not in self._sessions:
            part = ancestors(self._proto, [*self._wanted, *self._live], known)
            self._sessions[names] = Session(part, optimise="all")
        return self._sessions[names]
