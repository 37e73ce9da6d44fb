"""Scores of class cosines c = x w^T on a GPU: one launch, in which a program sweeps once over the classes of its rows.

With m the largest c so far, at the scale s (and, for mcm, at a = 1 / temperature) the sums of e = exp(s (c - m)) and of
e (c - m) are brought to a new m by exp(s (m - m')):

    max_cosine = m            mcm = 1 / sum exp(a (c - m))     msp = 1 / sum e
    energy = m + log(sum e) / s        entropy = s (sum e (c - m)) / (sum e) - log(sum e)      prediction: the first m

No matrix of cosines exists, nor anything else that is larger than the results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustft.ops.triton import autotune, configs
from robustft.ops.triton.launch import addressable, architecture, launch
from robustft.ops.triton.tile import LN2, LOG2E, LOWEST, long, product


@triton.jit
def class_scores_kernel(
    X, W, SCALE, SCORES, PREDICTION,  # (n, d), (k, d), one element, (5, n), (n,)
    inverse_temperature, n, k, d, x_stride, w_stride,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    in_row, i_read = i < n, tl.minimum(i, n - 1)
    scale = tl.load(SCALE).to(tl.float32)
    highest = tl.full((BM,), LOWEST, tl.float32)
    prediction = tl.zeros((BM,), tl.int32)
    none = tl.zeros((BM,), tl.float32)
    sums, weighted, other = none, none, none
    for start in range(0, k, BN):
        j = start + tl.arange(0, BN)
        c = product(X, W, i_read, tl.minimum(j, k - 1), d, x_stride, w_stride, PRECISION, BM, BN, BK)
        c = tl.where((j < k)[None, :], c, LOWEST)
        tile = tl.max(c, 1)
        new = tl.maximum(highest, tile)
        first = tl.min(tl.where(c == new[:, None], j[None, :], k), 1)
        prediction = tl.where((tile > highest) & (first < k), first, prediction)
        shift = highest - new
        keep = tl.exp2(shift * (scale * LOG2E))
        gap = tl.where((j < k)[None, :], c - new[:, None], 0.0)
        e = tl.where((j < k)[None, :], tl.exp2(gap * (scale * LOG2E)), 0.0)
        # Of no sum yet, a shift from LOWEST: 0 times it is 0.
        weighted = (weighted + sums * shift) * keep + tl.sum(e * gap, 1)
        sums = sums * keep + tl.sum(e, 1)
        f = tl.where((j < k)[None, :], tl.exp2(gap * (inverse_temperature * LOG2E)), 0.0)
        other = other * tl.exp2(shift * (inverse_temperature * LOG2E)) + tl.sum(f, 1)
        highest = new
    log_sum = tl.log2(sums) * LN2
    log_sum = tl.where(log_sum < 0.0, 0.0, log_sum)
    out, plane = SCORES + i, long(n)
    tl.store(out, tl.where(sums == sums, highest, sums), mask=in_row)  # a maximum ignores NaN
    tl.store(out + plane, 1.0 / other, mask=in_row)
    tl.store(out + 2 * plane, 1.0 / sums, mask=in_row)
    tl.store(out + 3 * plane, highest + log_sum / scale, mask=in_row)
    tl.store(out + 4 * plane, scale * (weighted / sums) - log_sum, mask=in_row)
    tl.store(PREDICTION + i, prediction.to(tl.int64), mask=in_row)


def class_scores(x, w, temperature, scale, precision) -> tuple[Tensor, Tensor]:
    x, w = addressable(x), addressable(w)
    (n, d), k = x.shape, len(w)
    scores, prediction = x.new_empty(5, n, dtype=torch.float32), x.new_empty(n, dtype=torch.int64)
    arithmetic = configs.arithmetic(x.dtype, precision)
    # A program owns all classes of its rows: only few rows want small tiles.
    of = architecture(x.device), arithmetic, "scores", n <= configs.SMALL_ROWS

    def run() -> None:
        tile = configs.tile(d, *of)
        sides = {name: value for name, value in tile.constants(arithmetic).items() if name != "GROUP"}
        launch(
            class_scores_kernel,
            -(-n // tile.bm),
            {
                "X": x, "W": w, "SCALE": scale, "SCORES": scores, "PREDICTION": prediction,
                "inverse_temperature": 1 / temperature, "n": n, "k": k, "d": d,
                "x_stride": x.stride(0), "w_stride": w.stride(0), **sides,
            },
            warps=tile.warps,
            stages=tile.stages,
        )  # fmt: skip

    if autotune.WANTED:
        choice = configs.tiles(*of)
        autotune.tune(choice, autotune.tiles(choice), run)
    run()
    return scores, prediction
