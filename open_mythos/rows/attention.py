"""Triton kernels of attention in a decode step; keys and values are read where their pages lie. Importing needs Triton.

:mod:`open_mythos.rows.launch` launches them, and :mod:`open_mythos.rows.plain` says what each computes.

Shape letters: N rows, H heads, G key/value heads, Q query rank, R latent rank, V value width, C context tokens.
"""

# Annotations of kernels are not types, and their pointers have none.
# mypy: ignore-errors

import triton
import triton.language as tl

from open_mythos.rows.kernels import product

__all__ = ["attend", "combine", "heads", "queries", "spread"]


@triton.jit
def _place(table, row, at, t, layer, row_stride, layer_stride, page_size, LOOPED: tl.constexpr):
    """Token index inside the pool of each row's own token."""
    virtual = layer + t if LOOPED else layer
    page = tl.load(table + row * row_stride + virtual * layer_stride + at // page_size, row >= 0, 0).to(
        tl.int64
    )
    return page * page_size + at % page_size


@triton.jit(do_not_specialize=["N", "layer"])
def queries(
    low, gain, kv_gain, q_up, kv_up, rope, rows, loop, pos, table, latent, q,
    N, H, Q, R, NOPE, V, HALF, layer, row_stride, layer_stride, page_size, EPS,
    LOOPED: tl.constexpr, EVEN: tl.constexpr, SKIP: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDE_R: tl.constexpr,
):  # fmt: skip
    """Programs: for each head PARTS column blocks of its query in latent space and one of its rope channels; the
    last program writes the new tokens' latents.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(rows + m, m < N, -1)
    if SKIP and tl.max(row, 0) < 0:
        return
    live = row >= 0
    head, part = tl.program_id(0) // (PARTS + 1), tl.program_id(0) % (PARTS + 1)
    stride, width = Q + R + 2 * HALF, R + 2 * HALF
    half = tl.arange(0, BLOCK_HALF)
    turns = live[:, None] & (half < HALF)[None, :]
    cos = tl.load(rope + (row * 2 * HALF)[:, None] + half[None, :], turns, 0.0)
    sin = tl.load(rope + (row * 2 * HALF)[:, None] + HALF + half[None, :], turns, 0.0)
    if head == H:
        r = tl.arange(0, WIDE_R)
        here = live[:, None] & (r < R)[None, :]
        from_low = low + (m * stride)[:, None] + Q
        c = tl.load(from_low + r[None, :], here, 0.0)
        c *= tl.rsqrt(tl.sum(c * c, 1) / R + EPS)[:, None]
        c *= tl.load(kv_gain + r, r < R, 0.0).to(tl.float32)[None, :]
        k1 = tl.load(from_low + R + half[None, :], turns, 0.0)
        k2 = tl.load(from_low + R + HALF + half[None, :], turns, 0.0)
        at, t = tl.load(pos + m, live, 0), tl.load(loop + m, live, 0)
        to = _place(table, row, at, t, layer, row_stride, layer_stride, page_size, LOOPED)
        to = latent + (to * width)[:, None]
        tl.store(to + r[None, :], c, here)
        tl.store(to + R + half[None, :], k1 * cos - k2 * sin, turns)
        tl.store(to + R + HALF + half[None, :], k2 * cos + k1 * sin, turns)
    elif part == PARTS:
        first = (head * (NOPE + 2 * HALF) + NOPE + half) * Q
        q1 = product(
            low, m * stride, live, gain, q_up, 1, first, half < HALF, 0, Q, EPS,
            True, False, False, BLOCK_M, BLOCK_HALF, BLOCK_K,
        )  # fmt: skip
        q2 = product(
            low, m * stride, live, gain, q_up + HALF * Q, 1, first, half < HALF, 0, Q, EPS,
            True, False, False, BLOCK_M, BLOCK_HALF, BLOCK_K,
        )  # fmt: skip
        to = q + ((m * H + head) * width)[:, None] + R
        tl.store(to + half[None, :], q1 * cos - q2 * sin, turns)
        tl.store(to + HALF + half[None, :], q2 * cos + q1 * sin, turns)
    else:
        nope = tl.arange(0, BLOCK_NOPE)
        y = product(
            low, m * stride, live, gain, q_up, 1, (head * (NOPE + 2 * HALF) + nope) * Q, nope < NOPE, 0, Q, EPS,
            True, False, EVEN, BLOCK_M, BLOCK_NOPE, BLOCK_K,
        )  # fmt: skip
        r = part * BLOCK_R + tl.arange(0, BLOCK_R)
        up = kv_up + ((head * (NOPE + V) + nope) * R)[:, None] + r[None, :]
        b = tl.load(up, (nope < NOPE)[:, None] & (r < R)[None, :], 0.0)
        y = tl.dot(y.to(b.dtype), b, input_precision="ieee")
        tl.store(q + ((m * H + head) * width)[:, None] + r[None, :], y, live[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["layer"])
def heads(
    qkv, q_gain, k_gain, rope, rows, loop, pos, table, keys, values, q,
    H, G, HALF, layer, row_stride, layer_stride, page_size, EPS,
    LOOPED: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of one row's head; keys and values into their pages."""
    m, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + m)
    if row < 0:
        return
    d = tl.arange(0, BLOCK)
    here = d < HALF
    width = 2 * HALF
    a = tl.load(qkv + (m * (H + 2 * G) + head) * width + d, here, 0.0).to(tl.float32)
    b = tl.load(qkv + (m * (H + 2 * G) + head) * width + HALF + d, here, 0.0).to(tl.float32)
    if head < H + G:
        if NORM:
            gain = q_gain
            if head >= H:
                gain = k_gain
            factor = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / width + EPS)
            a *= factor * tl.load(gain + d, here, 0.0).to(tl.float32)
            b *= factor * tl.load(gain + HALF + d, here, 0.0).to(tl.float32)
        cos = tl.load(rope + row * width + d, here, 0.0)
        sin = tl.load(rope + row * width + HALF + d, here, 0.0)
        a, b = a * cos - b * sin, b * cos + a * sin
    to = q + (m * H + head) * width
    if head >= H:
        at = _place(
            table, row, tl.load(pos + m), tl.load(loop + m), layer, row_stride, layer_stride, page_size, LOOPED
        )  # fmt: skip
        to = keys + (at * G + head - H) * width
        if head >= H + G:
            to = values + (at * G + head - H - G) * width
    tl.store(to + d, a, here)
    tl.store(to + HALF + d, b, here)


@triton.jit(do_not_specialize=["layer"])
def spread(
    rows, loop, pos, until, table, keys, values, K, layer, row_stride, layer_stride, page_size,
    VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What one row's token shows in its loop is copied to one of the deeper loops."""
    m = tl.program_id(0)
    row = tl.load(rows + m)
    if row < 0:
        return
    t = tl.load(loop + m)
    deep = t + 1 + tl.program_id(1)
    if deep >= tl.load(until + m):
        return
    at = tl.load(pos + m)
    source = _place(table, row, at, t, layer, row_stride, layer_stride, page_size, True) * K
    to = _place(table, row, at, deep, layer, row_stride, layer_stride, page_size, True) * K
    d = tl.arange(0, BLOCK)
    tl.store(keys + to + d, tl.load(keys + source + d, d < K, 0.0), d < K)
    if VALUES:
        tl.store(values + to + d, tl.load(values + source + d, d < K, 0.0), d < K)


@triton.jit
def _chunk(length, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Context tokens of each split of a row of this length."""
    return tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_C) * BLOCK_C


@triton.jit(do_not_specialize=["layer"])
def attend(
    q, rows, loop, pos, table, keys, values, partial, stats,
    H, G, R, P, layer, row_stride, layer_stride, page_size, scale,
    LOOPED: tl.constexpr, LATENT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A split of one row's context for up to 16 heads that read the same keys: sums, with their largest score."""
    m, split = tl.program_id(0), tl.program_id(2)
    row = tl.load(rows + m)
    length = tl.load(pos + m) + 1
    chunk = _chunk(length, SPLITS, BLOCK_C)
    start = split * chunk
    if (start >= length) | (row < 0):
        return
    per_group = tl.cdiv(tl.cdiv(H, G), BLOCK_H)
    group, part = tl.program_id(1) // per_group, tl.program_id(1) % per_group
    head = tl.cdiv(group * H, G) + part * BLOCK_H + tl.arange(0, BLOCK_H)
    live = head < tl.cdiv((group + 1) * H, G)
    width = R + P
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    from_q = q + ((m * H + head) * width)[:, None]
    a = tl.load(from_q + r[None, :], live[:, None] & (r < R)[None, :], 0.0)
    if LATENT:
        turned = tl.load(from_q + R + p[None, :], live[:, None] & (p < P)[None, :], 0.0)
    virtual = layer + tl.load(loop + m) if LOOPED else layer
    pages = table + row * row_stride + virtual * layer_stride
    best = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    for first in range(start, tl.minimum(start + chunk, length), BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        here = c < length
        at = tl.load(pages + c // page_size, here, 0).to(tl.int64) * page_size + c % page_size
        at = ((at * G + group) * width)[:, None]
        k = tl.load(keys + at + r[None, :], here[:, None] & (r < R)[None, :], 0.0)
        scores = tl.dot(a, tl.trans(k), input_precision="ieee")
        if LATENT:
            k_rope = tl.load(keys + at + R + p[None, :], here[:, None] & (p < P)[None, :], 0.0)
            scores = tl.dot(turned, tl.trans(k_rope), scores, input_precision="ieee")
            v = k
        else:
            v = tl.load(values + at + r[None, :], here[:, None] & (r < R)[None, :], 0.0)
        scores = tl.where(here[None, :], scores * scale, -float("inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - top)
        share = tl.exp2(scores - top[:, None])
        mass = mass * shrink + tl.sum(share, 1)
        total = tl.dot(share.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
        best = top
    to = (m * H + head) * SPLITS + split
    tl.store(partial + (to * R)[:, None] + r[None, :], total, live[:, None] & (r < R)[None, :])
    tl.store(stats + to * 2, best, live)
    tl.store(stats + to * 2 + 1, mass, live)


@triton.jit
def combine(
    partial, stats, rows, pos, up, out, H, R, V, before, per_head,
    LATENT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Splits of one row and head joined; of a latent, its values: ``up`` holds V rows of R a head, from ``before``."""
    m, head = tl.program_id(0), tl.program_id(1)
    if tl.load(rows + m) < 0:
        return
    length = tl.load(pos + m) + 1
    active = tl.cdiv(length, _chunk(length, SPLITS, BLOCK_C))
    first = (m * H + head) * SPLITS
    split, r = tl.arange(0, SPLITS), tl.arange(0, BLOCK_R)
    best = tl.load(stats + (first + split) * 2, split < active, -float("inf"))
    top = tl.max(best, 0)
    mass = tl.sum(tl.load(stats + (first + split) * 2 + 1, split < active, 0.0) * tl.exp2(best - top), 0)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for begin in range(0, active, 16):
        s = begin + tl.arange(0, 16)
        factor = tl.exp2(tl.load(stats + (first + s) * 2, s < active, -float("inf")) - top)
        here = (s < active)[:, None] & (r < R)[None, :]
        total += tl.sum(
            tl.load(partial + ((first + s) * R)[:, None] + r[None, :], here, 0.0) * factor[:, None], 0
        )
    total /= mass
    if LATENT:
        for begin in range(0, V, BLOCK_V):
            v = begin + tl.arange(0, BLOCK_V)
            from_up = up + ((head * per_head + before + v) * R)[:, None] + r[None, :]
            w = tl.load(from_up, (v < V)[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
            tl.store(out + (m * H + head) * V + v, tl.sum(w * total[None, :], 1), v < V)
    else:
        tl.store(out + (m * H + head) * R + r, total, r < R)
