"""Device functions that the similarity kernels share: which tile a program has, its products, its exponentials.

A tile is S = x t^T for BM rows and BN columns, in float32. Softmaxes over rows and over columns need exp(s S) relative
to two different maxima. While the logits of a tile span no more than 2 HALF_SPAN, one exponential relative to the
tile's centre c serves both: e = exp(s (S - c)). A `wide` tile (s = 100 and cosines from -0.3 to 1, or an Inf or NaN)
takes one relative to the rows' maxima and one relative to the columns'.

What is kept of a tile for the backward is a plane of 16 or 32 bits an entry and a record (offset, step):
    narrow        e                        (c, 0)
    wide, 32 bit  S                        (., 1)
    wide, 16 bit  round((S - low) / step)  (low, step), step = (high - low) / 65535: 0.003 nats where logits span 200,
                                           as fine as a bfloat16 e; S itself in bfloat16 would be 80 times coarser
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HALF_SPAN = tl.constexpr(64.0)  # e and its sums stay far from overflow, and so does what e is multiplied with later
LOWEST = tl.constexpr(-3e38)  # of entries outside the matrix: finite, so that 0 times it is 0

# Where the targets of the losses are.
PAIRS = tl.constexpr(0)  # on the diagonal of a square matrix
LABELS = tl.constexpr(1)  # spread over the entries of the same label of a square matrix
RECTANGLE = tl.constexpr(2)  # likewise, in some rows of it


@triton.jit
def long(size):
    """A size as int64: products of two overflow 32 bits. Sizes of 1 come as constants, which have no `.to`."""
    return tl.full((), 0, tl.int64) + size


@triton.jit
def place(rows, cols, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of this program's tile: GROUP tiles down before one to the right, so that L2 serves the rest."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    first = pid // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    within = pid % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def product(
    X, T, i, j, d, x_stride, t_stride,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(BM, BN) float32: the products of rows i of x (., d) and rows j of t (., d), which all must exist."""
    k = tl.arange(0, BK)
    x_at = X + i.to(tl.int64)[:, None] * x_stride + k[None, :]
    t_at = T + j.to(tl.int64)[None, :] * t_stride + k[:, None]
    s = tl.zeros((BM, BN), tl.float32)
    for start in range(0, d, BK):
        x = tl.load(x_at, mask=k[None, :] < d - start, other=0.0)
        t = tl.load(t_at, mask=k[:, None] < d - start, other=0.0)
        s = tl.dot(x, t, s, input_precision=PRECISION)
        x_at += BK
        t_at += BK
    return s


@triton.jit
def record(high, S, valid, scale):
    """offset and step of the tile (see above) for a plane of 16 bits, or, where wide, for one of 32."""
    low = tl.min(tl.min(tl.where(valid, S, float("inf")), 1), 0)
    half = (high - low) * 0.5
    # NaN is ignored by max and min, and shows in sums; an Inf makes the tile wide.
    narrow = half * scale <= HALF_SPAN
    return tl.where(narrow, low + half, low), tl.where(narrow, 0.0, (high - low) / 65535.0)


@triton.jit
def exponential(S, offset, scale):
    """exp(s (S - offset)): 0 of LOWEST, even where s is 0."""
    return tl.exp2((S - offset) * tl.maximum(scale * LOG2E, 1e-30))


@triton.jit
def keep_narrow(KEPT, at, valid, e):
    tl.store(KEPT + at, e.to(KEPT.dtype.element_ty), mask=valid)


@triton.jit
def keep_wide(KEPT, at, valid, S, offset, step):
    if KEPT.dtype.element_ty == tl.bfloat16:
        bits = ((S - offset) / step + 0.5).to(tl.int32).to(tl.int16)
        tl.store(KEPT + at, bits.to(tl.bfloat16, bitcast=True), mask=valid)
    else:
        tl.store(KEPT + at, S, mask=valid)


@triton.jit
def kept_similarity(kept, offset, step):
    """S of a wide tile from its plane as loaded."""
    if kept.dtype == tl.bfloat16:
        return offset + step * (kept.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF).to(tl.float32)
    else:
        return kept
