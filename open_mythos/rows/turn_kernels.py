"""Triton kernels of :mod:`open_mythos.rows.turns`, which says what each does. Importing needs Triton.

Shape letters: X persistent rows, N entries, V vocabulary.
"""

# Annotations of kernels are not types, and their pointers have none.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["begins", "ends", "leaves", "pick"]

# Of open_mythos.rows.turns, in this order.
_LEFT: tl.constexpr = tl.constexpr(0)
_POS: tl.constexpr = tl.constexpr(1)
_DONE: tl.constexpr = tl.constexpr(2)
_REST: tl.constexpr = tl.constexpr(3)
_MOST: tl.constexpr = tl.constexpr(4)
_RULED: tl.constexpr = tl.constexpr(5)
_FIRST: tl.constexpr = tl.constexpr(6)
_UNTIL: tl.constexpr = tl.constexpr(7)
_EOS: tl.constexpr = tl.constexpr(8)


@triton.jit(do_not_specialize=["X", "N"])
def ends(numbers, told, rows, pos, loop, ruled, X, N, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows whose loops are done."""
    r = tl.arange(0, BLOCK)
    here = r < X
    tl.store(told + r, -1, here)
    on = (tl.load(numbers + _LEFT * X + r, here, 0) > 0) & (tl.load(numbers + _REST * X + r, here, 0) != 0)
    at = tl.cumsum(on.to(tl.int32), 0) - 1
    tl.store(rows + at, r, on)
    tl.store(pos + at, tl.load(numbers + _POS * X + r, here, 0), on)
    tl.store(loop + at, tl.load(numbers + _DONE * X + r, here, 0), on)
    tl.store(ruled + at, tl.load(numbers + _RULED * X + r, here, 0), on)
    n = tl.arange(0, BLOCK_N)
    tl.store(rows + n, -1, (n >= tl.sum(on.to(tl.int32), 0)) & (n < N))


@triton.jit(do_not_specialize=["X"])
def pick(logits, ids, numbers, told, rows, pos, V, X, BLOCK: tl.constexpr):
    """The likeliest token, the first of those that are equally likely."""
    m = tl.program_id(0)
    row = tl.load(rows + m)
    if row < 0:
        return
    c = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    which = tl.full((BLOCK,), 0, tl.int32)
    unfit = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, V, BLOCK):
        here = start + c < V
        x = tl.load(logits + m * V + start + c, here, -float("inf"))
        unfit |= (here & ~(tl.abs(x) < float("inf"))).to(tl.int32)
        more = x > best
        best = tl.where(more, x, best)
        which = tl.where(more, start + c, which)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, which, V), 0)
    fit = tl.max(unfit, 0) == 0
    done, end = tl.load(numbers + _DONE * X + row), tl.load(numbers + _EOS * X + row)
    tl.store(told + row, tl.where(fit, token, -2))
    tl.store(told + X + row, done)
    tl.store(ids + row, tl.where(fit, token, 0).to(tl.int64))
    left = tl.where(fit & (token != end), tl.load(numbers + _LEFT * X + row) - 1, 0)
    tl.store(numbers + _LEFT * X + row, left)
    at = tl.load(numbers + _POS * X + row) + 1
    tl.store(numbers + _POS * X + row, at)
    tl.store(numbers + _DONE * X + row, 0)
    tl.store(numbers + _REST * X + row, 0)
    tl.store(pos + m, at)
    if left <= 0:
        tl.store(rows + m, -1)


@triton.jit(do_not_specialize=["X", "N", "loops", "width", "apart"])
def begins(
    numbers, tolerance, table, ask_tolerance, ask_first, ask_until, X, N, loops, width, apart,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows that loop, in a block of columns for each loop and one more."""
    r = tl.arange(0, BLOCK)
    here = r < X
    on = (tl.load(numbers + _LEFT * X + r, here, 0) > 0) & (tl.load(numbers + _REST * X + r, here, 0) == 0)
    on &= here
    at = tl.cumsum(on.to(tl.int32), 0) - 1
    total = tl.sum(on.to(tl.int32), 0)
    n = tl.arange(0, BLOCK_N)
    fill = (n >= total) & (n < N)
    done, most = tl.load(numbers + _DONE * X + r, here, 0), tl.load(numbers + _MOST * X + r, here, 0)
    pos, ruled = tl.load(numbers + _POS * X + r, here, 0), tl.load(numbers + _RULED * X + r, here, 0)
    for i in range(loops + 1):
        to = table + i * width + at
        tl.store(to, tl.where((i < loops) & (done + i < most), r, -1), on)
        tl.store(to + apart, pos, on)
        tl.store(to + 2 * apart, done + i, on)
        tl.store(to + 3 * apart, ruled, on)
        tl.store(table + i * width + n, -1, fill)
    tl.store(ask_tolerance + at, tl.load(tolerance + r, here, 0.0), on)
    tl.store(ask_first + at, tl.load(numbers + _FIRST * X + r, here, 0), on)
    tl.store(ask_until + at, tl.load(numbers + _UNTIL * X + r, here, 0), on)
    done = tl.minimum(done + loops, most)
    tl.store(numbers + _DONE * X + r, done, on)
    tl.store(numbers + _REST * X + r, (done == most).to(tl.int32), on)


@triton.jit(do_not_specialize=["X", "N"])
def leaves(numbers, rows, loop, X, N, BLOCK_N: tl.constexpr):
    """Rows that have left rest."""
    n = tl.arange(0, BLOCK_N)
    row = tl.load(rows + n, n < N, -1)
    tl.store(numbers + _DONE * X + row, tl.load(loop + n, n < N, 0), row >= 0)
    tl.store(numbers + _REST * X + row, 1, row >= 0)
