"""What a user can ask the passes for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onnxprune import allocation, criteria
from onnxprune.allocation import Rounding
from onnxprune.blocks import Role
from onnxprune.errors import UserError
from onnxprune.passes import layers

SHARES: dict[Role, str] = {
    "channels": "channels",
    "heads": "heads",
    "head-width": "head_width",
    "ffn": "ffn",
    "hidden": "hidden",
}


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the passes.

    channels     share of the units of each group to remove, in [0, 1); the fields below it override it
                 for groups of one role (see `blocks`)
    heads, head_width, ffn, hidden
                 the same for attention heads, their width, neurons and the residual stream
    layers       residual blocks to remove: how many, a share below 1, or patterns on their node names,
                 separated by commas
    macs, params targets: the share of the model's MACs or parameters to keep (instead of shares to remove)
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
    criterion: str = "l2"
    strategy: str = "uniform"
    align: int = 16
    minimum: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_lossy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        shares = [field for field in SHARES.values() if getattr(self, field) is not None]
        targets = [field for field in ("macs", "params") if getattr(self, field) is not None]
        if len(targets) > 1 or (targets and shares) or not (targets or shares or self.layers):
            raise UserError(
                "say what to remove: shares (--channels, --heads, --ffn, --head-width, --hidden), or one of "
                "--macs and --params; and --layers"
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
        _known("criterion", self.criterion, criteria.NAMES)
        _known("layer criterion", self.layer_criterion, layers.CRITERIA)
        _known("allocation", self.strategy, allocation.STRATEGIES)

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.align, self.minimum)

    @property
    def target(self) -> tuple[str, float] | None:
        """(cost, share to keep) where a target was given instead of shares."""
        for name in ("macs", "params"):
            if (share := getattr(self, name)) is not None:
                return name, share
        return None

    def option_for(self, role: Role) -> Role | None:
        """The role whose share decides over groups of this role: their own or `channels`; None: neither."""
        if getattr(self, SHARES[role]) is not None:
            return role
        return "channels" if self.channels is not None or self.target is not None else None

    @property
    def asked(self) -> tuple[Role, ...]:
        """The roles that have a share of their own."""
        return tuple(role for role in SHARES if role != "channels" and self.share(role) > 0)

    def share(self, role: Role) -> float:
        return float(getattr(self, SHARES[role]) or 0.0)

    def stated(self) -> dict[str, Any]:
        """The options that say something, as JSON has them."""
        given = asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}
        if self.layers is None:
            del given["layer_criterion"]
        return {name: value for name, value in given.items() if value is not None}


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"{what} '{name}' is unknown; choose one of {', '.join(names)}")
