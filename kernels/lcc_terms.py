"""What the Triton kernels of lcc_loss share: the LCC of a window from its sums, with its derivatives.

csrc/common/lcc_loss.h has the same formulas in C++.
"""

import torch
import triton
import triton.language as tl

from fastreg.ops.lcc_loss import TAU as EXACT_TAU

# By the type of the sums: the part of a window's sum of squares that its variance must exceed, and the planes of a slab, whole tiles
# in fp32.
TAU = {torch.float32: 2.0**-18, torch.float64: EXACT_TAU}
SLAB = {torch.float32: 64, torch.float64: 32}

# What differs between the launches of one call must not make a kernel of its own.
CHANGING = ("z_first", "z_end", "planes", "outer", "first_map")


@triton.jit
def window_terms(
    s1, t1, s2, t2, st, n, in_z, out_z, in_y, out_y, out_x, cf, cm, g, rule, TAU: tl.constexpr, VALID: tl.constexpr,
    SQUARED: tl.constexpr, DENOMINATOR: tl.constexpr,
):  # fmt: skip
    """LCC of windows from their sums about (cf, cm), and what they pass back along g, relative to (cf, cm).

    in, out: weight of a window's samples inside and outside the image along an axis. rule: fastreg.kernels.lcc_loss.Windows.
    d LCC / d f_q = a (f_q - f_mean) + e (m_q - m_mean), a = 2 dLCC/dv, e = dLCC/dc, so the adjoint maps are e, a and
    a f_mean + e m_mean (for the moved image e, b and b m_mean + e f_mean).
    """
    nr, dr = tl.load(rule), tl.load(rule + 1)
    if not VALID:
        # The padded samples stand for -(cf, cm). A sum of positive terms: exactly 0 where there are none.
        outside = (out_z * tl.load(rule + 3) + in_z * out_y) * tl.load(rule + 4) + in_z * in_y * out_x
        s1, t1 = s1 - outside * cf, t1 - outside * cm
        s2, t2, st = s2 + outside * cf * cf, t2 + outside * cm * cm, st + outside * cf * cm
        n += outside
    inverse = tl.where(n > 0, 1 / tl.where(n > 0, n, 1), 0)
    f_mean, m_mean = s1 * inverse, t1 * inverse
    v, w, c = s2 - s1 * f_mean, t2 - t1 * m_mean, st - s1 * m_mean
    counted = n >= tl.load(rule + 2)
    resolved = (v > TAU * s2) & (w > TAU * t2) & counted
    v, w, c = tl.where(resolved, v, 0), tl.where(resolved, w, 0), tl.where(resolved, c, 0)
    if DENOMINATOR == "product":
        d, d_by_v, d_by_w = v * w + dr, w, v
    elif DENOMINATOR == "each":
        d_by_v, d_by_w = w + dr, v + dr
        d = d_by_v * d_by_w
    else:
        floored_v, floored_w = tl.where(v > dr, v, dr), tl.where(w > dr, w, dr)
        d = floored_v * floored_w
        d_by_v, d_by_w = tl.where(v > dr, floored_w, 0), tl.where(w > dr, floored_v, 0)
    inverse = tl.where(d > 0, 1 / tl.where(d > 0, d, 1), 0)
    if SQUARED:
        value = (c * c + nr) * inverse
        by_c = 2 * c * inverse
        common = -2 * value * inverse
    else:
        by_c = tl.sqrt(inverse)
        value = c * by_c
        common = -value * inverse
    # A window that holds a non-finite sample, or whose variances overflow, is NaN, and so is what it passes back.
    probe = s2 + t2 + n + v * w
    bad = probe - probe != 0
    nan = float("nan")
    g = tl.where(bad, tl.where(g != 0, nan, 0), tl.where(resolved & (value <= 1), g, 0))
    value = tl.where(bad, nan, tl.where(counted, tl.where(value <= 1, value, 1), 0))
    f_mean, m_mean = tl.where(bad, 0, f_mean), tl.where(bad, 0, m_mean)
    e, a, b = g * by_c, g * common * d_by_v, g * common * d_by_w
    return value, e, a, a * f_mean + e * m_mean, b, b * m_mean + e * f_mean
