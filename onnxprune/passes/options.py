"""What a user can ask the passes for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from onnxprune import allocation, criteria
from onnxprune.allocation import Alignment, Rounding
from onnxprune.blocks import Role
from onnxprune.errors import UserError
from onnxprune.passes import layers
from onnxprune.targets import target

SHARES: dict[Role, str] = {
    "channels": "channels",
    "heads": "heads",
    "head-width": "head_width",
    "ffn": "ffn",
    "hidden": "hidden",
}


COSTS = ("macs", "params", "bytes")
REPAIRS = ("auto", "none", "mean", "ridge", "sequential")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the passes.

    channels     share of the units of each group to remove, in [0, 1); the fields below it override it
                 for groups of one role (see `blocks`)
    heads, head_width, ffn, hidden
                 the same for attention heads, their width, neurons and the residual stream
    layers       residual blocks to remove: how many, a share below 1, or patterns on their node names,
                 separated by commas
    macs, params, bytes
                 targets: the share of the model's MACs, parameters or weight bytes to keep (instead of shares
                 to remove)
    criterion, strategy, repair
                 how units are ranked, shares are spread and weights repaired; `auto` is the best for what data
                 there is (`resolved`)
    steps        prune in so many steps, repaired and scored anew after each
    max_drop     what a metric may lose, instead of shares and targets
    latency      share of the original's time to keep, on the first of the targets (without one: cpu)
    align        channel counts are rounded to its multiples (1: not at all); where it is not given, to what fills
                 the kernels of the targets, and without targets to 16
    targets      where the model is to run (see `onnxprune.targets`)
    include      patterns on node and weight names; only groups that touch one are cut
    exclude      patterns; groups and blocks that touch one stay whole
    allow_lossy  cut groups that a statistic is taken over, too
    """

    channels: float | None = None
    heads: float | None = None
    head_width: float | None = None
    ffn: float | None = None
    hidden: float | None = None
    layers: str | None = None
    layer_criterion: str = "influence"
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    criterion: str = "l2"
    strategy: str = "uniform"
    repair: str = "none"
    steps: int = 1
    max_drop: float | None = None
    latency: float | None = None
    align: int | None = None
    targets: tuple[str, ...] = ()
    minimum: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_lossy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        shares = [field for field in SHARES.values() if getattr(self, field) is not None]
        targets = [field for field in COSTS if getattr(self, field) is not None]
        if self.latency is not None:
            if not 0 < self.latency <= 1:
                raise UserError(f"--latency {self.latency}: the share of the time to keep lies in (0, 1]")
            if targets or shares or self.max_drop is not None:
                raise UserError(
                    "--latency searches for the size; leave shares, --max-drop and other targets out"
                )
        elif self.max_drop is not None:
            if not self.max_drop >= 0:
                raise UserError(f"--max-drop {self.max_drop}: what the metric may lose is 0 or more")
            if targets or shares:
                raise UserError("--max-drop searches for the size; leave shares and targets out")
        elif len(targets) > 1 or (targets and shares) or not (targets or shares or self.layers):
            raise UserError(
                "say what to remove: shares (--channels, --heads, --ffn, --head-width, --hidden), or one of "
                "--macs, --params and --bytes; and --layers"
            )
        for field in shares:
            if not 0 <= getattr(self, field) < 1:
                flag = field.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, field)}: the share to remove lies in [0, 1)")
        for field in targets:
            if not 0 < getattr(self, field) <= 1:
                raise UserError(f"--{field} {getattr(self, field)}: the share to keep lies in (0, 1]")
        if self.layers is not None:
            layers.check(self.layers)
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: a seed is 0 or more")
        _known("criterion", self.criterion, ("auto", *criteria.NAMES))
        _known("layer criterion", self.layer_criterion, layers.CRITERIA)
        _known("allocation", self.strategy, ("auto", *allocation.STRATEGIES))
        _known("repair", self.repair, REPAIRS)
        if self.strategy == "budget" and shares:
            raise UserError(
                "--allocation budget needs a target: --macs, --params, --bytes or --max-drop; with shares take uniform, "
                "global, isomorphic or sensitivity"
            )
        _ = self.alignment
        if self.steps < 1:
            raise UserError(f"--steps {self.steps}: at least one step is taken")

    def resolved(self, calibrated: bool) -> Options:
        """What `auto` stands for, with inputs (data, or made up) or without (docs/decisions/0010)."""
        strategy = "budget" if self.aimed and calibrated else "uniform"
        return replace(
            self,
            criterion=self.criterion if self.criterion != "auto" else "obs" if calibrated else "l2",
            strategy=self.strategy if self.strategy != "auto" else strategy,
            repair=self.repair if self.repair != "auto" else "sequential" if calibrated else "none",
        )

    @property
    def needs_data(self) -> bool:
        """Whether these options mean nothing without activations."""
        return (
            criteria.needs_data(self.criterion)
            or self.strategy in allocation.MEASURED
            or self.repair in ("mean", "ridge", "sequential")
            or self.max_drop is not None
        )

    @property
    def wants_data(self) -> bool:
        """Whether activations are used where they can be had."""
        return self.needs_data or "auto" in (self.criterion, self.strategy, self.repair)

    @staticmethod
    def replayed(stated: Mapping[str, Any]) -> Options:
        """The options of a plan that decide what is done with its edits."""
        method, seed = stated.get("repair", "none"), stated.get("seed", 0)
        if method not in REPAIRS or type(seed) is not int:
            raise UserError(f"the plan asks for repair {method!r} with seed {seed!r}; make the plan again")
        return Options(channels=0.0, repair=method, seed=seed)

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.alignment, self.minimum)

    @property
    def alignment(self) -> Alignment:
        return self.kernels if self.align is None else Alignment.of(self.align)

    @property
    def kernels(self) -> Alignment:
        """What fills the kernels of all targets; without targets, of most."""
        wanted = [target(name).alignment() for name in self.targets]
        return functools.reduce(Alignment.joined, wanted) if wanted else Alignment()

    @property
    def aim(self) -> tuple[str, float] | None:
        """(cost, share to keep) where a target was given instead of shares."""
        for name in COSTS:
            if (share := getattr(self, name)) is not None:
                return name, share
        return None

    @property
    def aimed(self) -> bool:
        """Whether a size is searched for, in place of shares to remove."""
        return self.aim is not None or self.max_drop is not None or self.latency is not None

    def option_for(self, role: Role) -> Role | None:
        """The role whose share decides over groups of this role: their own or `channels`; None: neither."""
        if getattr(self, SHARES[role]) is not None:
            return role
        return "channels" if self.channels is not None or self.aimed else None

    @property
    def asked(self) -> tuple[Role, ...]:
        """The roles that have a share of their own."""
        return tuple(role for role in SHARES if role != "channels" and self.share(role) > 0)

    def share(self, role: Role) -> float:
        return float(getattr(self, SHARES[role]) or 0.0)

    def stated(self) -> dict[str, Any]:
        """The options that say something, as JSON has them."""
        given = asdict(self) | {name: list(getattr(self, name)) for name in ("targets", "include", "exclude")}
        if self.layers is None:
            del given["layer_criterion"]
        given["align"] = int(f"{self.alignment}") if f"{self.alignment}".isdigit() else f"{self.alignment}"
        return {name: value for name, value in given.items() if value is not None}


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"{what} '{name}' is unknown; choose one of {', '.join(names)}")
