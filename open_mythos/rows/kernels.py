"""Triton kernels of a decode step, one token a row and a few rows; but for attention's. Importing needs Triton.

:mod:`open_mythos.rows.launch` launches them, and :mod:`open_mythos.rows.plain` says what each computes. Every row is
computed alike whatever the other rows are: tiles of 16 rows, and sums in an order that only sizes and the row's own
position decide. So the batch changes no bit of a row.

Shape letters: N rows, D model width, K inner width of a product, E experts.
"""

# Annotations of kernels are not types, and their pointers have none.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["advance", "embed", "enter", "experts", "lift", "linear", "product", "route"]


@triton.jit
def product(
    a, at, live, gain, w, step, cols, inside, up, K, EPS,
    NORM: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of ``a`` from offsets ``at`` times columns of ``w`` from offsets ``cols``, ``step`` between its rows.

    The norm is one factor a row, so it is applied to the sum. Gated: silu of it times the product ``up`` further on.
    """
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        here = start + k
        if EVEN:
            x = tl.load(a + at[:, None] + here[None, :], live[:, None], 0.0)
            b = tl.load(w + here[:, None] * step + cols[None, :])
        else:
            x = tl.load(a + at[:, None] + here[None, :], live[:, None] & (here < K)[None, :], 0.0)
            b = tl.load(w + here[:, None] * step + cols[None, :], (here < K)[:, None] & inside[None, :], 0.0)
        if NORM:
            x = x.to(tl.float32)
            squares += x * x
            x *= tl.load(gain + here, here < K, 0.0).to(tl.float32)[None, :]
        x = x.to(b.dtype)
        total = tl.dot(x, b, total, input_precision="ieee")
        if GATED:
            if EVEN:
                c = tl.load(w + up + here[:, None] * step + cols[None, :])
            else:
                c = tl.load(
                    w + up + here[:, None] * step + cols[None, :], (here < K)[:, None] & inside[None, :], 0.0
                )
            second = tl.dot(x, c, second, input_precision="ieee")
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
        total *= factor
        second *= factor
    if GATED:
        total = total * tl.sigmoid(total) * second
    return total


@triton.jit(do_not_specialize=["N"])
def linear(
    a, gain, w0, w1, w2, add, out, rows, N, K, n0, n1, n2, up, EPS,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, SKIP: tl.constexpr,
    MAP_A: tl.constexpr, MAP_ADD: tl.constexpr, MAP_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Norm, up to three weights side by side, gate, residual."""
    tile, t0, t1 = tl.program_id(0), tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    w, n, before = w0, n0, 0
    if tile >= t0 + t1:
        w, n, before, tile = w2, n2, n0 + n1, tile - t0 - t1
    elif tile >= t0:
        w, n, before, tile = w1, n1, n0, tile - t0
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < N
    if SKIP and tl.max(tl.load(rows + m, live, -1), 0) < 0:
        return
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < n
    at = m
    if MAP_A:
        at = tl.load(rows + m, live, -1)
        live &= at >= 0
    y = product(
        a, at * K, live, gain, w, 1, column * K, inside, up, K, EPS, NORM, GATED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    column, width = before + column, n0 + n1 + n2
    to = m
    if ADD or MAP_OUT:
        row = tl.load(rows + m, live, -1)
        live &= row >= 0
        if MAP_OUT:
            to = row
    here = live[:, None] & inside[None, :]
    if ADD:
        y += tl.load(add + ((row if MAP_ADD else m) * width)[:, None] + column[None, :], here, 0.0).to(
            tl.float32
        )
    tl.store(out + (to * width)[:, None] + column[None, :], y, here)


@triton.jit(do_not_specialize=["N", "k"])
def route(
    a, gain, w, bias, rows, chosen, weights, N, K, E, k, EPS,
    EVEN: tl.constexpr, SKIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Router, the k best of the biased logits, softmax of their plain ones."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < N
    place = tl.arange(0, KEPT)
    here = live[:, None] & (place < k)[None, :]
    slot = m[:, None] * k + place[None, :]
    if SKIP and tl.max(tl.load(rows + m, live, -1), 0) < 0:
        tl.store(chosen + slot, tl.full((BLOCK_M, KEPT), -1, tl.int32), here)
        return
    expert = tl.arange(0, BLOCK_N)
    inside = expert < E
    logits = product(
        a, m * K, live, gain, w, 1, expert * K, inside, 0, K, EPS, True, False, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    shown = tl.load(bias + expert, inside, 0.0).to(tl.float32)
    scores = tl.where(inside[None, :], logits + shown[None, :], -float("inf"))
    kept = tl.full((BLOCK_M, KEPT), -float("inf"), tl.float32)
    ids = tl.zeros((BLOCK_M, KEPT), tl.int32)
    for j in range(k):
        # Of logits that are NaN it may be any column, but there is no expert beyond the last.
        best = tl.minimum(tl.argmax(scores, 1), E - 1)
        mine = expert[None, :] == best[:, None]
        value = tl.sum(tl.where(mine, logits, 0.0), 1)
        kept = tl.where(place[None, :] == j, value[:, None], kept)
        ids = tl.where(place[None, :] == j, best[:, None], ids)
        scores = tl.where(mine, -float("inf"), scores)
    share = tl.exp(kept - tl.max(kept, 1)[:, None])
    share /= tl.sum(share, 1)[:, None]
    # Rows that only fill the batch up ask for no expert.
    works = tl.load(rows + m, live, -1) >= 0
    tl.store(chosen + slot, tl.where(works[:, None], ids, -1), here)
    tl.store(weights + slot, share, here)


@triton.jit(do_not_specialize=["count"])
def experts(
    a, gain, w, chosen, weights, out, count, K, width, up, per_expert, step, divide, EPS,
    NORM: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, BY_SLOT: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of each expert through its matrix."""
    group = tl.program_id(1)
    slot = tl.arange(0, SLOTS)
    asked = tl.load(chosen + slot, slot < count, -1)
    expert = group
    if BY_SLOT:  # few slots: a program for each, of which the first that asks for an expert serves all who do
        expert = tl.load(chosen + group)
        earlier = tl.sum(((asked == expert) & (slot < group)).to(tl.int32), 0)
        expert = tl.where(earlier > 0, -2, expert)
    mine = (asked == expert) & (expert >= 0)
    total = tl.sum(mine.to(tl.int32), 0)
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    base = w + tl.maximum(expert, 0).to(tl.int64) * per_expert
    for begin in range(0, total, BLOCK_M):
        place = begin + tl.arange(0, BLOCK_M)
        hit = mine[:, None] & (rank[:, None] == place[None, :])
        which = tl.sum(tl.where(hit, slot[:, None], 0), 0)
        live = place < total
        y = product(
            a, (which // divide) * K, live, gain, base, step, column, inside, up, K, EPS,
            NORM, GATED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if GATED:
            y *= tl.load(weights + which, live, 0.0)[:, None]
        tl.store(out + (which * width)[:, None] + column[None, :], y, live[:, None] & inside[None, :])


@triton.jit
def embed(
    ids,
    pos,
    rows,
    weight,
    frequencies,
    rope,
    z,
    D,
    HALF,
    scale,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Embedding and rotation of the new tokens."""
    m = tl.program_id(0)
    row = tl.load(rows + m)
    if row < 0:
        return
    d = tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    tl.store(z + row * D + d, tl.load(weight + token * D + d, d < D, 0.0).to(tl.float32) * scale, d < D)
    half = tl.arange(0, BLOCK_HALF)
    angle = tl.load(pos + m).to(tl.float32) * tl.load(frequencies + half, half < HALF, 0.0)
    tl.store(rope + row * 2 * HALF + half, tl.cos(angle), half < HALF)
    tl.store(rope + row * 2 * HALF + HALF + half, tl.sin(angle), half < HALF)


@triton.jit
def lift(source, rows, z, D, BLOCK: tl.constexpr):
    """Copy rows."""
    row = tl.load(rows + tl.program_id(0))
    if row < 0:
        return
    d = tl.arange(0, BLOCK)
    tl.store(z + row * D + d, tl.load(source + row * D + d, d < D, 0.0).to(tl.float32), d < D)


@triton.jit
def _norm(x, gain, d, D, EPS):
    x *= tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    return x * tl.load(gain + d, d < D, 0.0).to(tl.float32)


@triton.jit
def _seen(h, e, t, sines, d, D, loop_dim, LOOP_DIM: tl.constexpr):
    """State and injected input as the block reads them: their sum, and the loop's index on the first channels."""
    if LOOP_DIM:
        half = (loop_dim + 1) // 2
        there = d < loop_dim
        angle = t.to(tl.float32) * tl.load(sines + tl.where(d < half, d, d - half), there, 0.0)
        h += tl.where(there, tl.where(d < half, tl.sin(angle), tl.cos(angle)), 0.0)
    return h + e


@triton.jit(do_not_specialize=["loop_dim"])
def enter(
    z, rows, gain, loop_gain, sines, e, h, x, chosen, mass, running, loop, D, loop_dim, EPS,
    FRESH: tl.constexpr, NORM: tl.constexpr, AT_INPUT: tl.constexpr, LOOP_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the block reads first, or, as it is, next."""
    m = tl.program_id(0)
    row = tl.load(rows + m)
    if row < 0:
        return
    d = tl.arange(0, BLOCK)
    here = d < D
    to = row * D + d
    if FRESH:
        t = 0 * row
        tl.store(loop + m, t)
        brought = tl.load(z + to, here, 0.0)
        if NORM:
            brought = _norm(brought, gain, d, D, EPS)
        tl.store(e + to, brought, here)
        brought = brought.to(e.dtype.element_ty).to(tl.float32)
        state = brought if AT_INPUT else tl.zeros_like(brought)
        tl.store(h + to, state, here)
        tl.store(chosen + to, state, here)
        tl.store(mass + row, 1.0)
        tl.store(running + row, 1)
    else:
        brought = tl.load(e + to, here, 0.0).to(tl.float32)
        state = tl.load(h + to, here, 0.0).to(tl.float32)
        t = tl.load(loop + m)
    seen = _seen(state, brought, t, sines, d, D, loop_dim, LOOP_DIM)
    tl.store(x + to, _norm(seen, loop_gain, d, D, EPS), here)


@triton.jit
def _with_lora(update, out, down, up, scale, rank, d, D, BLOCK_L: tl.constexpr):
    """The update, with what the loop's own scales of the adapter make of the block's output."""
    for begin in range(0, rank, BLOCK_L):
        n = begin + tl.arange(0, BLOCK_L)
        both = (n < rank)[:, None] & (d < D)[None, :]
        w = tl.load(down + (n * D)[:, None] + d[None, :], both, 0.0).to(tl.float32)
        b = tl.load(up + (n * D)[:, None] + d[None, :], both, 0.0).to(tl.float32)
        s = tl.load(scale + n, n < rank, 0.0).to(tl.float32)
        update += tl.sum((tl.sum(w * out[None, :], 1) * s)[:, None] * b, 0)
    return update


@triton.jit
def _ask(moved, now, row, t, m, tolerance, first, until, gone_rows, gone_loop, following, later, width):
    """Whether a loop that moved a row's state so far lets it leave; if so, it is no row of later loops."""
    may = (t >= tl.load(first + m)) & (t < tl.load(until + m))
    if may & (tl.sqrt(tl.sum(moved * moved, 0)) <= tl.load(tolerance + m) * tl.sqrt(tl.sum(now * now, 0))):
        tl.store(gone_rows + m, row)
        tl.store(gone_loop + m, t)
        for i in range(later):
            tl.store(following + i * width + m, -1)


@triton.jit(do_not_specialize=["k", "rank", "lora_rows", "loop_dim", "later", "width"])
def advance(
    inner, shared, slots, rows, ruled, loop_gain, update_gain, state_gain, sines, log_a, log_dt, drive, halt, halt_bias,
    lora_down, lora_b, lora_scale, e, h, x, before, chosen, mass, running, loop,
    tolerance, first, until, gone_rows, gone_loop, following,
    D, k, rank, lora_rows, loop_dim, later, width, still, LOW, HIGH, EPS,
    SHARED: tl.constexpr, KEEP: tl.constexpr, LORA: tl.constexpr, UPDATE: tl.constexpr, STATE: tl.constexpr,
    SELECT: tl.constexpr, LOOP_DIM: tl.constexpr, ASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """All of a loop after the experts' products, and the norm with which the next begins."""
    m = tl.program_id(0)
    row = tl.load(rows + m)
    if row < 0:
        return
    t = tl.load(loop + m)
    d = tl.arange(0, BLOCK)
    here = d < D
    to = row * D + d
    out = tl.load(inner + m * D + d, here, 0.0).to(tl.float32)
    if SHARED:
        out += tl.load(shared + m * D + d, here, 0.0).to(tl.float32)
    for j in range(k):
        out += tl.load(slots + (m * k + j) * D + d, here, 0.0).to(tl.float32)
    update = out if KEEP else out - tl.load(x + to, here, 0.0)
    if LORA:
        at = tl.minimum(t, lora_rows - 1) * rank
        update = _with_lora(update, out, lora_down, lora_b, lora_scale + at, rank, d, D, BLOCK_L)
    if UPDATE:
        update = _norm(update, update_gain, d, D, EPS)
    exponent = tl.load(log_a + d, here, 0.0).to(tl.float32) + tl.load(log_dt).to(tl.float32)
    decay = tl.exp(-tl.exp(tl.minimum(tl.maximum(exponent, LOW), HIGH)))
    brought = tl.load(e + to, here, 0.0).to(tl.float32)
    last = tl.load(h + to, here, 0.0)
    state = decay * last.to(tl.float32) + tl.load(drive + d, here, 0.0).to(tl.float32) * brought + update
    if STATE:
        state = _norm(state, state_gain, d, D, EPS)
    state = tl.where(here, state, 0.0).to(h.dtype.element_ty)
    tl.store(before + to, last, here)
    tl.store(h + to, state, here)
    wide = state.to(tl.float32)
    if SELECT:
        left, free = tl.load(mass + row), tl.load(ruled + m) != 0
        tl.store(chosen + to, state, here & (free | (tl.load(running + row) != 0)))
        logit = tl.sum(wide * tl.load(halt + d, here, 0.0).to(tl.float32), 0) + tl.load(halt_bias).to(
            tl.float32
        )
        left *= 1 - tl.sigmoid(logit)
        if not free:
            tl.store(mass + row, left)
            tl.store(running + row, (left > still).to(tl.int8))
    else:
        tl.store(chosen + to, state, here)
    seen = _seen(wide, brought, t + 1, sines, d, D, loop_dim, LOOP_DIM)
    tl.store(x + to, _norm(seen, loop_gain, d, D, EPS), here)
    tl.store(loop + m, t + 1)
    if ASK:
        moved = wide - last.to(tl.float32)
        _ask(
            moved, wide, row, t + 1, m, tolerance, first, until, gone_rows, gone_loop, following, later, width
        )
