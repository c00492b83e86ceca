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
    reader: Reader, weight: Floats, kept: BoolArray, fitted: Moments, held: Moments, mean_only: bool = False
) -> Fix:
    """The best map on held-out samples among none, the mean and ridges of several strengths.

    weight   [groups, outputs, channels, taps] of the original, for the groups and outputs that stay
    kept     [groups, channels] of those groups
    fitted, held   moments of the source, for those groups

    Never worse than no repair on the held-out samples: then it is none. Without any of them no ridge is taken.
    """
    centred = reader.bias is not None
    whole = fitted.merged(held)
    judge = held if held.count > 1 else fitted
    options = ("none", "mean") if centred else ("none",)
    strengths = () if mean_only or not fitted.full or judge is fitted else RIDGES
    errors: dict[str | float, float] = dict.fromkeys((*options, *strengths), 0.0)
    energy = 0.0
    flat = weight.transpose(0, 2, 1, 3).reshape(weight.shape[0], weight.shape[2], -1)
    if fitted.full:
        grams = [moments.second(centred) for moments in (fitted, judge, whole)]
        for g, mask in enumerate(kept):
            product = flat[g] @ flat[g].T
            energy += float(np.sum(product * grams[1][g]))
            shift = judge.mean[g] - fitted.mean[g] if centred else np.zeros(len(mask))
            for option in errors:
                errors[option] += _residual(
                    option, mask, product, grams[0][g], grams[1][g], shift, judge.mean[g] if centred else None
                )
    else:
        for g, mask in enumerate(kept):
            spread = np.square(flat[g]).sum(axis=1) * judge.variance[g]
            energy += float(spread.sum()) + (0.0 if centred else _energy(flat[g], judge.mean[g]))
            missed = {"none": judge.mean[g], "mean": judge.mean[g] - fitted.mean[g]}
            for name in options:
                errors[name] += float(spread[~mask].sum()) + _energy(flat[g][~mask], missed[name][~mask])
    best = min(errors, key=lambda option: errors[option] if np.isfinite(errors[option]) else np.inf)
    maps = [
        np.zeros((int((~mask).sum()), int(mask.sum())))
        if isinstance(best, str)
        else _map(grams[2][g], mask, best)
        for g, mask in enumerate(kept)
    ]
    new, shifts = [], []
    for g, mask in enumerate(kept):
        dropped = weight[g][:, ~mask]
        new.append(weight[g][:, mask] + np.einsum("odt,dk->okt", dropped, maps[g]))
        mean = whole.mean[g]
        away = mean[~mask] - maps[g] @ mean[mask] if best != "none" else np.zeros(len(maps[g]))
        shifts.append(np.einsum("odt,d,t->o", dropped, away, coverage(reader, weight.shape[3])))
    scale = max(energy, 1e-300)
    shift = np.stack(shifts) if centred else None
    name = best if isinstance(best, str) else f"ridge {best:g}"
    return Fix(np.stack(new), shift, name, errors["none"] / scale, errors[best] / scale)


def _energy(flat: Floats, mean: Floats) -> float:
    """Of what a constant input makes, summed over outputs and taps."""
    return float(np.square(mean @ flat).sum())


def _map(gram: Floats, mask: BoolArray, strength: float) -> Floats:
    """M [dropped, kept]."""
    inner = gram[np.ix_(mask, mask)]
    ridge = strength * max(float(np.trace(inner)) / max(len(inner), 1), 1e-12)
    found: Floats = np.linalg.solve(inner + ridge * np.eye(len(inner)), gram[np.ix_(mask, ~mask)]).T
    return found


def _residual(
    option: str | float,
    mask: BoolArray,
    product: Floats,
    gram: Floats,
    judged: Floats,
    shift: Floats,
    mean: Floats | None,
) -> float:
    """Mean squared output error tr(W_D S W_D^T) on the judged moments, S those of x_D less its prediction."""
    mixing = product[np.ix_(~mask, ~mask)]
    second = judged[np.ix_(~mask, ~mask)]
    if option == "none":
        away = mean[~mask] if mean is not None else np.zeros(len(second))
        return float(np.sum(mixing * (second + np.outer(away, away))))
    if option == "mean":
        away = shift[~mask]
        return float(np.sum(mixing * (second + np.outer(away, away))))
    assert not isinstance(option, str)
    m = _map(gram, mask, option)
    cross = judged[np.ix_(~mask, mask)] @ m.T
    away = shift[~mask] - m @ shift[mask]
    error = second - cross - cross.T + m @ judged[np.ix_(mask, mask)] @ m.T + np.outer(away, away)
    return max(float(np.sum(mixing * error)), 0.0)


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
