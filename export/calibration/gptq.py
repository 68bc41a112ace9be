"""GPTQ (Frantar et al. 2022): weights rounded one input at a time, each making up for the errors before it.

A column w [in] of a kernel is to be rounded to w' so that x w changes least over the inputs x that were seen, that is
(w - w')ᵀ H (w - w') with H = Σ x xᵀ, the Hessian of that error. With H = R Rᵀ, R upper triangular,

    (w - w')ᵀ H (w - w') = Σ_k R_kk² (e_k + Σ_{j<k} e_j R_jk / R_kk)²,    e = w - w'

so that input k is rounded from w_k + Σ_{j<k} e_j R_jk / R_kk, to which the errors before it have been added: no term
is then larger than half a step times R_kk. (The paper has the same numbers by way of the inverse of H.) Inputs that
carry most come first, while there is nothing to make up for yet. The steps are chosen beforehand, for the blocks in
which kernels read a row, so that it does not matter to them in which order the inputs are taken.
"""

import numpy as np
from numpy.typing import DTypeLike

from ..model.quantized import block_size, pack

#: Of the widest step, by bits; each block takes the best.
CUTS = {4: np.linspace(1, 0.6, 17, dtype=np.float32), 2: np.linspace(1, 0.4, 25, dtype=np.float32)}
PANEL = 256  # inputs between two products with all the errors before them
STEP = 16 * 2**20  # weights rounded at once


class Rounder:
    """Rounds kernels that read the same inputs, of which Σ x xᵀ [in, in] is known. It is overwritten.

    `damping` is added to its diagonal, as a share of the mean: how much inputs count that were not seen.
    """

    def __init__(self, hessian: np.ndarray, damping: float):
        size = len(hessian)
        hessian.flat[:: size + 1] += damping * max(hessian.trace() / size, np.finfo(np.float32).tiny)
        self.weights = hessian.diagonal().copy()
        self.order = np.argsort(-self.weights, kind="stable")
        self.feedback, self.diagonal = unit_factor(hessian[np.ix_(self.order, self.order)])

    def solve(self, sums: np.ndarray) -> np.ndarray:
        """Least squares with as much damping: Σ xᵀ y [in, out] -> the kernel [in, out] by which x is nearest to y."""
        found, panels = sums[self.order], range(0, len(sums), PANEL)
        for start in reversed(panels):  # U D Uᵀ, one factor after the other
            own, later = slice(start, start + PANEL), slice(start + PANEL, None)
            found[own] -= self.feedback[own, later] @ found[later]
            found[own] = np.linalg.solve(np.triu(self.feedback[own, own]), found[own])
        found /= self.diagonal[:, None]
        for start in panels:
            own, before = slice(start, start + PANEL), slice(start)
            found[own] -= self.feedback[before, own].T @ found[before]
            found[own] = np.linalg.solve(np.triu(self.feedback[own, own]).T, found[own])
        kernel = np.empty_like(found)
        kernel[self.order] = found
        return kernel

    def quantize(self, rows: np.ndarray, bits: int, dtype: DTypeLike = np.float32) -> tuple[np.ndarray, np.ndarray]:
        """Rows [out, in] of a transposed kernel or a table -> uint8 [out, in / S, S * bits / 8], scales [out, in / S].

        In the form of `quantized.quantize_blocks`, with scales in `dtype`.
        """
        step, found = max(1, STEP // rows.shape[1]), []
        for start in range(0, len(rows), step):
            found.append(self._quantize(np.asarray(rows[start : start + step], np.float32), bits, dtype))
        values, scales = (np.concatenate(part) for part in zip(*found, strict=True))
        return values, scales

    def _quantize(self, rows, bits, dtype):
        block = block_size(rows.shape[1])
        scales = steps(rows, self.weights, bits).astype(dtype)
        each = np.repeat(scales.astype(np.float32), block, axis=1)
        q = np.empty(rows.shape, np.int8)
        q[:, self.order] = round_in_turn(rows.T[self.order], each.T[self.order], self.feedback, bits).T
        return pack(q.reshape(len(rows), -1, block), bits), scales


def steps(rows: np.ndarray, weights: np.ndarray, bits: int) -> np.ndarray:
    """The step of each block: rows [out, in], weights [in] of the squared errors -> [out, in / S].

    With the widest step the largest weight of a block becomes the lowest number; narrower ones cut it short.
    """
    zero, block = 2 ** (bits - 1), block_size(rows.shape[1])
    blocks, weights = rows.reshape(len(rows), -1, block), weights.reshape(-1, block)
    places = np.abs(blocks).argmax(-1)[..., None]
    widest = np.take_along_axis(blocks, places, -1) / np.float32(-zero)
    found, least = widest[..., 0], np.full(blocks.shape[:2], np.inf, np.float32)
    for cut in CUTS[bits]:
        q = np.clip(np.rint(blocks / np.where(widest == 0, np.float32(1), widest * cut)), -zero, zero - 1)
        along, length = (np.einsum("obs,bs->ob", q * other, weights) for other in (blocks, q))
        fitted = along / np.where(length > 0, length, 1)
        error = np.einsum("obs,bs->ob", np.square(blocks - fitted[..., None] * q), weights)
        better = error < least
        found, least = np.where(better, fitted, found), np.where(better, error, least)
    return found


def unit_factor(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U [n, n], upper triangular with ones on its diagonal, and D [n] of matrix [n, n] = U D Uᵀ; U in its own memory.

    Below the diagonal stands what has no meaning. It is a Cholesky factor, from the last column to the first and panel
    by panel, whose columns are divided by their last entries.
    """
    for stop in range(len(matrix), 0, -PANEL):
        start = max(0, stop - PANEL)
        panel = matrix[:stop, start:stop]
        panel -= matrix[:stop, stop:] @ matrix[start:stop, stop:].T
        corner = np.linalg.cholesky(panel[start:][::-1, ::-1])[::-1, ::-1]
        panel[:start] = np.linalg.solve(corner, panel[:start].T).T
        panel[start:] = corner
    last = matrix.diagonal().copy()
    matrix /= last
    return matrix, np.square(last)


def round_in_turn(kernel: np.ndarray, steps: np.ndarray, feedback: np.ndarray, bits: int) -> np.ndarray:
    """kernel [in, out] in steps [in, out] -> whole numbers int8 [in, out], each input told of the errors before it.

    `feedback` [in, in] is the first that `unit_factor` gives for their Hessian.
    """
    zero, size = 2 ** (bits - 1), len(kernel)
    steps = np.where(steps == 0, np.float32(1), steps)
    q, errors = np.empty(kernel.shape, np.int8), np.empty(kernel.shape, np.float32)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        aims = kernel[start:stop] + feedback[:start, start:stop].T @ errors[:start]
        for k in range(start, stop):
            aim = aims[k - start] + feedback[start:k, k] @ errors[start:k]
            q[k] = np.clip(np.rint(aim / steps[k]), -zero, zero - 1)
            errors[k] = kernel[k] - q[k] * steps[k]
    return q
