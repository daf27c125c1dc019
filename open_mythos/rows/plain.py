"""The operations of a decode step on a few rows, in PyTorch; :mod:`open_mythos.rows.launch` has them as kernels.

One call computes one token for each of N entries. An entry is a row of the persistent buffers (state, pages), its
token's position and the loop that it is about to run; entries with row −1 fill a batch up and are left out. Products
read their inputs from ``a``, entry by entry, or from persistent rows, and round where the weights' dtype says so;
everything between them is float32 (float64 on float64 weights).

Shape letters: N entries, X persistent rows, D model width, H heads, G key/value heads, R latent rank, P rope width,
K head width, V value width, E experts, F expert width, k experts per token, C context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Asks", "Entries", "Exits", "Injection", "Pages", "PlainRows", "wide"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of what lies between products."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Entries:
    """What the N entries of a batch are, on the device: (N,) int32 each.

    Attributes:
        rows: persistent row, or −1.
        pos: position of the token that is computed.
        loop: loop it is about to run.
        ruled: not 0 where the model's own halting is not asked.
        thin: all of them may be left out, which is worth a look before the weights are read.
    """

    rows: Tensor
    pos: Tensor
    loop: Tensor
    ruled: Tensor
    thin: bool = False


@dataclass(frozen=True)
class Asks:
    """What is asked of N entries after a loop; (N,) each.

    Attributes:
        tolerance: float32 or wider; a state that moved no further, relative to its size, lets its token leave.
        first: int32, loops before which nobody leaves.
        until: int32, the token's most loops, after which nobody is asked; 0: not asked at all.
    """

    tolerance: Tensor
    first: Tensor
    until: Tensor


@dataclass(frozen=True)
class Exits:
    """Who may leave after a loop of several, and where it is written down.

    Attributes:
        asks: of each of the N entries.
        gone: N entries whose rows and loops those who leave get; written.
        later: (L, N) int32, rows of the later loops, of which who leaves is none; written.
    """

    asks: Asks
    gone: Entries
    later: Tensor


@dataclass(frozen=True)
class Pages:
    """Where keys and values of one layer lie.

    Attributes:
        table: (X, layers, blocks) int32, page of each block of tokens.
        keys: (pages, page_size, …) keys of GQA, (G, K), or latents of MLA, (R + P,).
        values: (pages, page_size, G, K), or None: the latents.
        layer: virtual layer; with ``looped`` that of loop 0, and each entry's own loop counts from there.
        looped: see ``layer``.
    """

    table: Tensor
    keys: Tensor
    values: Tensor | None
    layer: int
    looped: bool = False

    def places(self, entries: Entries, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Page and offset of each column, (N, C) → (N, C) twice."""
        size, live = self.keys.shape[1], entries.rows >= 0  # of fill anything may be said but that it is
        layers = self.layer + entries.loop.long() * self.looped * live
        blocks = columns // size * live[:, None]
        pages = self.table[entries.rows.clamp(min=0).long()[:, None], layers[:, None], blocks]
        return pages.long(), columns % size


@dataclass(frozen=True)
class Injection:
    """Persistent state of a batch and the parameters of the recurrence around the block, for enter and advance.

    Attributes:
        e: (X, D) injected input; h: state; before: state before the last loop; chosen: what the coda reads.
        x: (X, D) what the block reads next, float32 or wider.
        mass: (X,) what has not halted, Π(1 − p); running: (X,) bool.
        weights: parameters by name; absent where the model has none.
        loop_dim: channels with the loop's index, 0 for none.
        keep: the update keeps the block's input.
        still: mass above which a position has not halted; None: the last state is chosen.
        limits: of log A + log Δ.
        eps: of the norms.
    """

    e: Tensor
    h: Tensor
    before: Tensor
    chosen: Tensor
    x: Tensor
    mass: Tensor
    running: Tensor
    weights: dict[str, Tensor]
    loop_dim: int
    keep: bool
    still: float | None
    at_input: bool
    limits: tuple[float, float]
    eps: float


def _live(entries: Entries) -> tuple[Tensor, Tensor]:
    """Entries that are not fill, and their rows; both (n,)."""
    live = (entries.rows >= 0).nonzero().flatten()
    return live, entries.rows[live].long()


def _rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.to(x.dtype)


def _turned(x: Tensor, rope: Tensor) -> Tensor:
    """(…, P) rotated by (…, P), cosines then sines, halves against each other."""
    (a, b), (cos, sin) = x.chunk(2, -1), rope.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class PlainRows:
    """Each operation in PyTorch: the meaning of the kernels, on any device and in any floating dtype."""

    def embed(
        self, entries: Entries, ids: Tensor, weight: Tensor, scale: float, inverse: Tensor, rope: Tensor, z: Tensor
    ) -> None:  # fmt: skip
        """z[row] = weight[ids[row]] · scale, and the rotation of its position, rope[row] = cos | sin.

        Args:
            entries: N.
            ids: (X,) int64.
            weight: (V, D).
            scale: of the embedding.
            inverse: (P / 2,) rotary frequencies.
            rope: (X, P), written.
            z: (X, D), written.
        """
        live, rows = _live(entries)
        z[rows] = weight[ids[rows]].to(z.dtype) * scale
        angles = entries.pos[live, None].to(rope.dtype) * inverse
        rope[rows] = torch.cat((angles.cos(), angles.sin()), -1)

    def linear(
        self, entries: Entries, a: Tensor, weights: Sequence[Tensor], out: Tensor, *, gain: Tensor | None = None,
        eps: float = 0.0, gated: bool = False, add: Tensor | None = None, maps: str = "",
    ) -> None:  # fmt: skip
        """Out = norm(a) [w₀ | w₁ | …]ᵀ + add.

        Args:
            entries: N.
            a: (N, K), or (X, K) when ``maps`` has "a".
            weights: up to three of (width, K).
            out: (N, ΣWidth), or (X, ΣWidth) when ``maps`` has "o"; written.
            gain: (K,) of an RMSNorm before it, or None.
            eps: of the norm.
            gated: silu of the first half of the one weight's columns times the other half; ``out`` is half as wide.
            add: as ``out``, or (X, ΣWidth) when ``maps`` has "+".
            maps: what is read and written by persistent rows.
        """
        live, rows = _live(entries)
        x = a[rows if "a" in maps else live].to(wide(weights[0].dtype))
        if gain is not None:
            x = _rms(x, gain, eps)
        y = torch.cat([F.linear(x.to(w.dtype), w) for w in weights], -1).to(x.dtype)
        if gated:
            left, right = y.chunk(2, -1)
            y = F.silu(left) * right
        if add is not None:
            y = y + add[rows if "+" in maps else live]
        out[rows if "o" in maps else live] = y.to(out.dtype)

    def queries(
        self, entries: Entries, low: Tensor, q_gain: Tensor, kv_gain: Tensor, q_up: Tensor, kv_up: Tensor, rope: Tensor,
        pages: Pages, q: Tensor, nope: int, eps: float,
    ) -> None:  # fmt: skip
        """MLA before attention: queries in latent space, and the new token's latent into its page.

        Args:
            entries: N.
            low: (N, Q + R + P), both down-projections.
            q_gain: (Q,).
            kv_gain: (R,).
            q_up: (H (nope + P), Q).
            kv_up: (H (nope + V), R).
            rope: (X, P).
            pages: of the layer; written.
            q: (N, H, R + P), written.
            nope: width of a head's keys without positions.
            eps: of the norms.
        """
        live, rows = _live(entries)
        heads, width = q.shape[1], rope.shape[1]
        rank, table = q.shape[2] - width, rope[rows]
        down, c, k_rope = low[live].split((low.shape[1] - rank - width, rank, width), -1)
        y = F.linear(_rms(down, q_gain, eps).to(q_up.dtype), q_up).view(len(live), heads, nope + width)
        left, right = y.split((nope, width), -1)
        w_uk = kv_up.view(heads, -1, rank)[:, :nope]
        q[live, :, :rank] = torch.einsum("nhd,hdr->nhr", left, w_uk).to(q.dtype)
        q[live, :, rank:] = _turned(right.to(low.dtype), table.unsqueeze(1)).to(q.dtype)
        latent = torch.cat((_rms(c, kv_gain, eps), _turned(k_rope, table)), -1)
        self._write(entries, pages, pages.keys, latent)

    def _write(self, entries: Entries, pages: Pages, pool: Tensor, new: Tensor) -> None:
        live = (entries.rows >= 0).nonzero().flatten()
        page, offset = pages.places(entries, entries.pos.long().unsqueeze(1))
        pool[page[live, 0], offset[live, 0]] = new.to(pool.dtype)

    def heads(
        self, entries: Entries, qkv: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, rope: Tensor, pages: Pages,
        q: Tensor, eps: float,
    ) -> None:  # fmt: skip
        """GQA before attention: heads normed and rotated, keys and values into their pages.

        Args:
            entries: N.
            qkv: (N, (H + 2G) K).
            q_gain: (K,) or None: heads are not normed.
            k_gain: likewise.
            rope: (X, K).
            pages: of the layer; written.
            q: (N, H, K), written.
            eps: of the norms.
        """
        live, rows = _live(entries)
        count, groups = q.shape[1], pages.keys.shape[2]
        y = qkv[live].view(len(live), count + 2 * groups, q.shape[2]).to(wide(qkv.dtype))
        a, k, v = y.split((count, groups, groups), 1)
        if q_gain is not None and k_gain is not None:
            a, k = _rms(a, q_gain, eps), _rms(k, k_gain, eps)
        table = rope[rows].unsqueeze(1)
        q[live] = _turned(a, table).to(q.dtype)
        self._write(entries, pages, pages.keys, _turned(k, table))
        assert pages.values is not None
        self._write(entries, pages, pages.values, v)

    def spread(self, entries: Entries, asks: Asks, pages: Pages, loops: int) -> None:
        """Deeper loops show of each token what its own loop does: up to ``asks.until``, and to ``loops`` of anybody."""
        page, offset = pages.places(entries, entries.pos.long().unsqueeze(1))
        for t in range(1, loops):
            deep = (entries.rows >= 0) & (entries.loop < t) & (t < asks.until)
            one = Entries(entries.rows, entries.pos, torch.full_like(entries.loop, t), entries.ruled)
            into, _ = pages.places(one, entries.pos.long().unsqueeze(1))
            for pool in (pages.keys, pages.values):
                if pool is not None:
                    pool[into[deep, 0], offset[deep, 0]] = pool[page[deep, 0], offset[deep, 0]]

    def attend(
        self, entries: Entries, q: Tensor, pages: Pages, out: Tensor, scale: float, kv_up: Tensor | None = None,
        nope: int = 0,
    ) -> None:  # fmt: skip
        """Attention of each entry over the columns 0 … its position.

        Args:
            entries: N.
            q: (N, H, K), or (N, H, R + P) on latents.
            pages: of the layer.
            out: (N, H · V), written.
            scale: factor on the scores.
            kv_up: (H (nope + V), R), whose value rows leave the latent space; None without latents.
            nope: see ``kv_up``.
        """
        dtype = wide(q.dtype)
        for i in (entries.rows >= 0).nonzero().flatten().tolist():
            one = Entries(*(getattr(entries, name)[i : i + 1] for name in ("rows", "pos", "loop", "ruled")))
            page, offset = pages.places(
                one, torch.arange(int(entries.pos[i]) + 1, device=q.device).unsqueeze(0)
            )
            k = pages.keys[page[0], offset[0]].to(dtype)
            if kv_up is not None:
                rank = kv_up.shape[1]
                share = (scale * (q[i].to(dtype) @ k.t())).softmax(-1)
                w_uv = kv_up.view(q.shape[1], -1, rank)[:, nope:].to(dtype)
                y = torch.einsum("hr,hvr->hv", share @ k[:, :rank], w_uv)
            else:
                assert pages.values is not None
                group = torch.arange(q.shape[1], device=q.device) * k.shape[1] // q.shape[1]
                k, v = k[:, group], pages.values[page[0], offset[0]].to(dtype)[:, group]
                share = (scale * torch.einsum("hd,chd->hc", q[i].to(dtype), k)).softmax(-1)
                y = torch.einsum("hc,chd->hd", share, v)
            out[i] = y.flatten().to(out.dtype)

    def route(
        self, entries: Entries, x: Tensor, gain: Tensor, router: Tensor, bias: Tensor, chosen: Tensor, weights: Tensor,
        eps: float,
    ) -> None:  # fmt: skip
        """The k experts of each entry, none (−1) for those that fill up, and their weights.

        Args:
            entries: N.
            x: (N, D), normed first.
            gain: (D,).
            router: (E, D).
            bias: (E,) that chooses and does not weigh.
            chosen: (N, k) int32, written.
            weights: (N, k), written.
            eps: of the norm.
        """
        live, _ = _live(entries)
        logits = F.linear(_rms(x[live], gain, eps).to(router.dtype), router).to(x.dtype)
        experts = (logits + bias).topk(chosen.shape[1], -1).indices
        chosen.fill_(-1)
        chosen[live] = experts.to(chosen.dtype)
        weights[live] = logits.gather(-1, experts).softmax(-1).to(weights.dtype)

    def experts(
        self, x: Tensor, gain: Tensor, w_in: Tensor, w_out: Tensor, chosen: Tensor, weights: Tensor, hidden: Tensor,
        out: Tensor, eps: float,
    ) -> None:  # fmt: skip
        """Each slot's expert, its hidden activations weighted.

        Args:
            x: (N, D), normed first.
            gain: (D,).
            w_in: (E, D, 2F).
            w_out: (E, F, D).
            chosen: (N, k).
            weights: (N, k).
            hidden: (N · k, F), written.
            out: (N · k, D), written.
            eps: of the norm.
        """
        for slot, expert in enumerate(chosen.flatten().tolist()):
            if expert < 0:
                continue
            y = _rms(x[slot // chosen.shape[1]], gain, eps).to(w_in.dtype) @ w_in[expert]
            left, right = y.to(x.dtype).chunk(2, -1)
            hidden[slot] = (F.silu(left) * right * weights.flatten()[slot]).to(hidden.dtype)
            out[slot] = (hidden[slot].to(w_out.dtype) @ w_out[expert]).to(out.dtype)

    def lift(self, entries: Entries, source: Tensor, z: Tensor) -> None:
        """z[row] = source[row], (X, D)."""
        _, rows = _live(entries)
        z[rows] = source[rows].to(z.dtype)

    def enter(self, entries: Entries, state: Injection, z: Tensor | None = None) -> None:
        """Begin the loops of the prelude's output z (X, D); or, without it, read state and loop as they are."""
        live, rows = _live(entries)
        if z is not None:
            gain = state.weights.get("input_norm")
            state.e[rows] = (z[rows] if gain is None else _rms(z[rows], gain, state.eps)).to(state.e.dtype)
            state.h[rows] = state.e[rows] if state.at_input else torch.zeros_like(state.e[rows])
            state.chosen[rows] = state.h[rows]
            state.mass[rows] = torch.ones_like(state.mass[rows])
            state.running[rows] = torch.ones_like(state.running[rows])
            entries.loop[live] = 0
        self._seen(entries, state)

    def _seen(self, entries: Entries, state: Injection) -> None:
        """X = norm(h + the loop's index + e)."""
        live, rows = _live(entries)
        x = state.h[rows].to(state.x.dtype)
        if state.loop_dim:
            angles = entries.loop[live, None].to(x.dtype) * state.weights["sines"].to(x.dtype)
            index = torch.cat((angles.sin(), angles.cos()), -1)[:, : state.loop_dim]
            x[:, : state.loop_dim] += index
        state.x[rows] = _rms(x + state.e[rows].to(x.dtype), state.weights["loop_norm"], state.eps)

    def advance(
        self, entries: Entries, state: Injection, inner: Tensor, shared: Tensor | None, slots: Tensor,
        exits: Exits | None = None,
    ) -> None:  # fmt: skip
        """The block's output becomes the next state: LoRA, injection, norms, halting; and the loop counts on.

        Args:
            entries: N.
            state: written.
            inner: (N, D), the residual stream after attention.
            shared: (N, D) of the shared experts, or None.
            slots: (N · k, D) of the routed ones.
            exits: rows leave that moved no further than ‖h − before‖ ≤ tolerance · ‖h‖; None: nobody is asked.
        """
        live, rows = _live(entries)
        w, dtype = state.weights, state.x.dtype
        out = inner[live] + slots.view(len(inner), -1, slots.shape[-1])[live].sum(1)
        if shared is not None:
            out = out + shared[live]
        update = out if state.keep else out - state.x[rows]
        if "lora_down" in w:
            scale = w["lora_scale"][entries.loop[live].long().clamp(max=len(w["lora_scale"]) - 1)].to(dtype)
            update = update + (out @ w["lora_down"].to(dtype).t() * scale) @ w["lora_B"].to(dtype)
        if "update_norm" in w:
            update = _rms(update, w["update_norm"], state.eps)
        decay = torch.exp(-torch.exp((w["log_A"].to(dtype) + w["log_dt"].to(dtype)).clamp(*state.limits)))
        last = state.h[rows]
        h = decay * last.to(dtype) + w["B"].to(dtype) * state.e[rows].to(dtype) + update
        if "state_norm" in w:
            h = _rms(h, w["state_norm"], state.eps)
        h = h.to(last.dtype)
        state.before[rows], state.h[rows] = last, h
        self._choose(entries, state, h)
        entries.loop[live] += 1
        self._seen(entries, state)
        if exits is not None:
            self._ask(entries, state, exits)

    def _ask(self, entries: Entries, state: Injection, exits: Exits) -> None:
        """Who moved no further than ‖h − before‖ ≤ tolerance · ‖h‖ leaves."""
        _, rows = _live(entries)
        asks, live = exits.asks, entries.rows >= 0
        now = torch.zeros(len(entries.rows), state.h.shape[1], dtype=state.x.dtype, device=state.h.device)
        change = now.clone()
        now[live] = state.h[rows].to(now.dtype)
        change[live] = now[live] - state.before[rows].to(now.dtype)
        leaves = live & (entries.loop >= asks.first) & (entries.loop < asks.until)
        leaves &= change.norm(dim=-1) <= asks.tolerance * now.norm(dim=-1)
        exits.gone.rows[leaves], exits.gone.loop[leaves] = entries.rows[leaves], entries.loop[leaves]
        exits.later[:, leaves] = -1

    def _choose(self, entries: Entries, state: Injection, h: Tensor) -> None:
        live, rows = _live(entries)
        if state.still is None:
            state.chosen[rows] = h
            return
        free = entries.ruled[live] != 0
        takes = free | state.running[rows].bool()
        state.chosen[rows] = torch.where(takes.unsqueeze(-1), h, state.chosen[rows])
        w = state.weights
        p = torch.sigmoid(
            (h.to(state.x.dtype) @ w["halt"].to(state.x.dtype).t()).squeeze(-1) + w["halt_bias"]
        )
        left = (state.mass[rows] * (1 - p)).to(state.mass.dtype)
        state.mass[rows] = torch.where(free, state.mass[rows], left)
        running = (left > state.still).to(state.running.dtype)
        state.running[rows] = torch.where(free, state.running[rows], running)
