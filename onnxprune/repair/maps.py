"""The map between channels: what was removed, said by what stays, and folded into every reader.

    x_D ~ mu_D + M (x_K - mu_K),   M = C_DK (C_KK + l I)^-1
    W_K += W_D M,                  b += W_D (mu_D - M mu_K)

Ridge regression on the reader's input (He et al., "Channel Pruning for Accelerating Very Deep Neural
Networks", 2017, step 2; per channel as in GRAIL and CORP); M = 0 is mean folding (An et al., "FLAP", 2023).
Where a reader has no bias, moments about zero take the place of covariances and nothing is shifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.axes import BoolArray
from onnxprune.ops.spec import Array
from onnxprune.readers import Reader
from onnxprune.statistics import Floats, Moments

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance; chosen by the error on held-out samples


@dataclass(frozen=True)
class Fix:
    """New weights of a reader whose source has lost channels.

    weight  [groups, outputs, channels kept, taps]
    shift   [groups, outputs] to add to what the reader makes; None where it has no bias
    method  none, mean or ridge
    before, after  shares of the reader's output variance lost on held-out samples, without and with it
    """

    weight: Floats
    shift: Floats | None
    method: str
    before: float
    after: float


def fit(
    reader: Reader,
    weight: Floats,
    kept: BoolArray,
    fitted: Moments,
    held: Moments,
    mean_only: bool = False,
    apart: bool = False,
) -> Fix:
    """The best map on held-out samples among none, the mean and ridges of several strengths.

    weight   [groups, outputs, channels, taps] of the original, for the groups and outputs that stay
    kept     [groups, channels] of those groups
    fitted, held   moments of the source, for those groups
    apart    the held-out samples choose the map alone; otherwise the map chosen is fitted to them, too

    Never worse than no repair on the held-out samples: then it is none. Without any of them no ridge is taken.
    """
    centred = reader.bias is not None
    whole = fitted if apart else fitted.merged(held)
    judge = held if held.count > 1 else fitted
    options = ("none", "mean") if centred else ("none",)
    strengths = () if mean_only or judge is fitted else RIDGES
    errors: dict[str | float, float] = dict.fromkeys((*options, *strengths), 0.0)
    energy = 0.0
    flat = weight.transpose(0, 2, 1, 3).reshape(weight.shape[0], weight.shape[2], -1)
    offset = fitted.mean if centred else np.zeros_like(fitted.mean)  # what a bias can take away
    away: dict[str | float, Floats] = {option: np.zeros(flat[:, 0].shape) for option in errors}
    for block, here in enumerate(fitted.slices):
        grams, covariance = fitted.second(centred, block), judge.covariance(block)
        for g, mask in enumerate(kept[:, here]):
            own = flat[g, here]
            product = own @ own.T
            energy += float(np.sum(product * covariance[g]))
            mixing = product[np.ix_(~mask, ~mask)]
            gone, across, left = (
                covariance[g][np.ix_(a, b)] for a, b in ((~mask, ~mask), (~mask, mask), (mask, mask))
            )
            alone = float(np.sum(mixing * gone))
            for option in errors:
                mean = judge.mean[g, here] - (0.0 if option == "none" else offset[g, here])
                missed, spread = mean[~mask], alone
                if not isinstance(option, str):  # tr(W_D S W_D^T), S the covariance of x_D - M x_K
                    m = _map(grams[g], mask, option)
                    spread += float(np.sum((mixing @ m) * (m @ left - 2 * across)))
                    missed = missed - m @ mean[mask]
                errors[option] += max(spread, 0.0)
                away[option][g] += missed @ own[~mask]
    for option in errors:
        errors[option] += float(np.square(away[option]).sum())
    if not centred:
        energy += float(np.square(np.einsum("gc,gco->go", judge.mean, flat)).sum())
    best = min(errors, key=lambda option: errors[option] if np.isfinite(errors[option]) else np.inf)
    new, shifts = [], []
    seen = [whole.second(centred, block) for block in range(len(whole.slices))] if best in strengths else []
    for g, mask in enumerate(kept):
        stays, shift = [], np.zeros(weight.shape[1])
        for block, here in enumerate(whole.slices):
            own, left, mean = mask[here], weight[g][:, here], whole.mean[g, here]
            away_here = mean[~own] if best != "none" else np.zeros(int((~own).sum()))
            stay = left[:, own]
            if best in strengths:
                m = _map(seen[block][g], own, float(best))
                stay = stay + np.einsum("odt,dk->okt", left[:, ~own], m)
                away_here = away_here - m @ mean[own]
            stays.append(stay)
            shift += np.einsum("odt,d,t->o", left[:, ~own], away_here, coverage(reader, weight.shape[3]))
        new.append(np.concatenate(stays, axis=1))
        shifts.append(shift)
    scale = max(energy, 1e-300)
    name = best if isinstance(best, str) else f"ridge {best:g}"
    return Fix(
        np.stack(new),
        np.stack(shifts) if centred else None,
        name,
        errors["none"] / scale,
        errors[best] / scale,
    )


def _map(gram: Floats, mask: BoolArray, strength: float) -> Floats:
    """M [dropped, kept]."""
    inner = gram[np.ix_(mask, mask)]
    ridge = strength * max(float(np.trace(inner)) / max(len(inner), 1), 1e-12)
    found: Floats = np.linalg.solve(inner + ridge * np.eye(len(inner)), gram[np.ix_(mask, ~mask)]).T
    return found


def coverage(reader: Reader, taps: int) -> Array:
    """For each tap the share of the output's positions that it gives anything to: zeros beyond the border are no
    mean values, so a constant counts for less there. [taps], with the positions around the channels in front.
    """
    rule, source = reader.link.rule, reader.source
    given, made = reader.link.inputs[0], reader.link.outputs[0]
    patterns = rule.inputs[0], rule.outputs[0]
    total = np.ones(1)
    if given and made and patterns[0] and patterns[1] and reader.windowed:
        own = {name for terms in patterns[1] for term in terms for name in term}
        space = [
            axis
            for axis, terms in enumerate(patterns[0])
            if axis != source.axis and not own & {name for term in terms for name in term}
        ]
        for place, axis in enumerate(space):
            share = _share(reader, place, len(space), given[axis].extent, made[axis].extent)
            total = np.multiply.outer(total, share).ravel()
    return np.tile(total, taps // len(total))


def _share(reader: Reader, place: int, rank: int, size: int, outputs: int) -> Array:
    """The share for each tap of one spatial axis of a filter, from `size` to `outputs` positions."""
    window = reader.window
    if window is not None:
        reached = [window.position(place, tap, size, outputs)[1] for tap in range(window.extents[place])]
        return np.array([inside.sum() / outputs for inside in reached])
    # transposed: every position gives to each tap's place (ONNX, ConvTranspose)
    attributes = reader.node.attributes
    extent = reader.link.inputs[reader.operand][place - rank].extent  # type: ignore[index]
    stride, dilation = (int((attributes.get(name) or [1] * rank)[place]) for name in ("strides", "dilations"))
    padding = str(attributes.get("auto_pad", "NOTSET"))
    begin = int((attributes.get("pads") or [0] * (2 * rank))[place])
    if padding != "NOTSET" or "output_shape" in attributes:
        extra = int((attributes.get("output_padding") or [0] * rank)[place])
        missing = max(stride * (size - 1) + extra + (extent - 1) * dilation + 1 - outputs, 0)
        begin = missing // 2 if padding == "SAME_UPPER" else missing - missing // 2
    at = np.arange(size) * stride - begin
    places = [at + tap * dilation for tap in range(extent)]
    return np.array([((where >= 0) & (where < outputs)).sum() / outputs for where in places])
