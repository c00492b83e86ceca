"""Normal equations A X = B, A symmetric and positive definite.

A Cholesky factorisation by blocks of columns, left-looking (Golub and Van Loan, "Matrix Computations", section
4.2): nearly all of it is products of matrices. Blocks on the diagonal are factorised and inverted by halves.
"""

from __future__ import annotations

import numpy as np

from onnxprune.statistics import Floats

BLOCK = 512  # columns factorised together; systems up to this size go to LAPACK as they are
LEAF = 64  # and up to this size blocks on the diagonal


def solve(matrices: Floats, right: Floats) -> Floats:
    """X of A X = B for each of a stack: A [groups, n, n], which is overwritten, B [groups, n, columns].

    Raises `numpy.linalg.LinAlgError` where A is found not to be positive definite (wide ones) or singular.
    """
    if matrices.shape[1] <= BLOCK:
        return np.asarray(np.linalg.solve(matrices, right))
    return np.stack([_solved(a, b.astype(a.dtype)) for a, b in zip(matrices, right, strict=True)])


def _solved(a: Floats, x: Floats) -> Floats:
    """Both are overwritten; of a the lower triangle is read."""
    blocks = [slice(start, min(start + BLOCK, len(a))) for start in range(0, len(a), BLOCK)]
    inverses = []
    for here in blocks:
        first, end = here.start, here.stop
        a[first:, here] -= a[first:, :first] @ a[here, :first].T
        inverse = _inverse(a[here, here])
        a[end:, here] = a[end:, here] @ inverse.T
        x[here] = inverse @ (x[here] - a[here, :first] @ x[:first])
        inverses.append(inverse)
    for here, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        x[here] = inverse.T @ (x[here] - a[here.stop :, here].T @ x[here.stop :])
    return x


def _inverse(a: Floats) -> Floats:
    """Of the lower Cholesky factor."""
    if len(a) <= LEAF:
        return np.asarray(np.tril(np.linalg.inv(np.linalg.cholesky(a))))
    half = len(a) // 2
    first = _inverse(a[:half, :half])
    below = a[half:, :half] @ first.T
    second = _inverse(a[half:, half:] - below @ below.T)
    found = np.zeros_like(a)
    found[:half, :half], found[half:, half:] = first, second
    found[half:, :half] = -second @ (below @ first)
    return found
