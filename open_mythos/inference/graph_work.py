"""What graphs of decode steps are made of: prelude, loop and coda of a few rows, each a handful of operations.

The operations (:mod:`open_mythos.rows`) read rows, positions and loop indices from memory. This is the model's own step
written once more; which rows there are, and what is captured, :mod:`open_mythos.inference.graph_runner` says.

Shape letters: N entries of a graph, R rows of the engine, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from open_mythos.inference.graph_room import Room
from open_mythos.inference.graph_tables import Asking
from open_mythos.inference.runner import PlainRunner
from open_mythos.rows.plain import Asks, Entries, Exits, Injection, Pages

__all__ = ["GraphWork"]


class GraphWork(PlainRunner):
    """The parts of a token, on entries that say whose.

    Attributes:
        ops: who computes.
        rope: (R, P) rotations of the tokens that rows compute.
    """

    fork = True  # shared and routed experts side by side
    ops: Any
    rope: Tensor
    _whole: Room
    _injection: Injection
    _asking: Asking
    _inverse: Tensor
    _z: Tensor
    _side: torch.cuda.Stream | None = None

    def do_leave(self, entries: Entries, asks: Asks | None = None) -> None:
        """Show what the next loop would show, and deeper ones the same."""
        looped = not self.pool.layers.shared
        pages = self._pages(self.pool.layers.of_loop(0), looped=looped)
        self._shown_by(entries, self.model.recurrent.block, self._injection.x, pages)
        if looped:
            asks = self._asking.of(len(entries.rows)) if asks is None else asks
            self.ops.spread(entries, asks, pages, self.pool.layers.loops)

    @contextmanager
    def branch(self, stream: torch.cuda.Stream | None, ops: Any, room: Room) -> Iterator[None]:
        """Work within has memory of its own, and this stream; what comes later need not wait for it. None: in line."""
        kept = self.ops, self._whole
        self.ops, self._whole = ops, room
        try:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                yield
        finally:
            self.ops, self._whole = kept

    def _beside(self) -> AbstractContextManager[Any]:
        """A branch of the graph that need not wait for what comes before :meth:`join`."""
        if self._side is None or not self.fork:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._side)

    @staticmethod
    def join(stream: torch.cuda.Stream | None) -> None:
        """Wait for a branch."""
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)

    def do_enter(self, entries: Entries) -> None:
        """Read the states of these as they are."""
        self.do_embed(entries)  # for the rotation; nobody reads z now
        self.ops.enter(entries, self._injection)

    def do_embed(self, entries: Entries) -> None:
        """Embedding and rotation of new tokens."""
        model, weight = self.model, self.model.embed.weight
        scale = model.cfg.dim**0.5 if model.cfg.init == "scaled" else 1.0
        self.ops.embed(entries, self.state.ids, weight, scale, self._inverse, self.rope, self._z)

    def do_prelude(self, entries: Entries) -> None:
        """Begin a token."""
        model, ops = self.model, self.ops
        self.do_embed(entries)
        for i, block in enumerate(model.prelude_layers):
            self._dense(entries, block, self.pool.layers.of_prelude(i))
        ops.enter(entries, self._injection, self._z)

    def do_loop(self, entries: Entries, exits: Exits | None = None) -> None:
        """One loop."""
        block: Any = self.model.recurrent.block
        room, ops, count, eps = self._whole, self.ops, len(entries.rows), self.model.cfg.norm_eps
        layers = self.pool.layers
        pages = self._pages(layers.of_loop(0), looped=not layers.shared)
        inner = self._attention(entries, block, self._injection.x, pages)
        moe, gain, shared = block.ffn, block.ffn_norm.weight, None
        if moe.shared is not None:
            shared, hidden = room.shared[:count], room.shared_hidden[:count]
            with self._beside():
                ops.linear(
                    entries, inner, (moe.shared.gate_up.weight,), hidden, gain=gain, eps=eps, gated=True
                )
                ops.linear(entries, hidden, (moe.shared.down.weight,), shared)
        k = self.model.cfg.n_experts_per_tok
        chosen, weights = room.chosen[:count], room.weights[:count]
        ops.route(entries, inner, gain, moe.router.weight, moe.router_bias, chosen, weights, eps)
        slots = room.slots[: count * k]
        ops.experts(inner, gain, moe.w_in, moe.w_out, chosen, weights, room.hidden[: count * k], slots, eps)
        if shared is not None:
            self.join(self._side if self.fork else None)
        ops.advance(entries, self._injection, inner, shared, slots, exits)

    def do_coda(self, entries: Entries) -> Tensor:
        """Logits (N, V) of tokens whose loops are done, in a buffer that is used again."""
        model, ops = self.model, self.ops
        ops.lift(entries, self._injection.chosen, self._z)
        for i, block in enumerate(model.coda_layers):
            self._dense(entries, block, self.pool.layers.of_coda(i))
        logits = self._whole.logits[: len(entries.rows)]
        eps = model.cfg.norm_eps
        ops.linear(entries, self._z, (model.head.weight,), logits, gain=model.norm.weight, eps=eps, maps="a")
        return logits

    def do_token(self, entries: Entries, loops: int) -> None:
        """A whole token."""
        self.do_prelude(entries)
        self.do_rest(entries, loops)

    def do_rest(self, entries: Entries, loops: int) -> None:
        """So many loops, and the coda."""
        for _ in range(loops):
            self.do_loop(entries)
        self.do_coda(entries)

    def _pages(self, layer: int, looped: bool = False) -> Pages:
        tensors = list(self.pool.tensors.values())
        return Pages(self.pool.table, tensors[0], tensors[1] if len(tensors) > 1 else None, layer, looped)

    def _dense(self, entries: Entries, block: Any, layer: int) -> None:
        """A layer around the loop, on z in place."""
        count, eps = len(entries.rows), self.model.cfg.norm_eps
        inner, hidden = (
            self._attention(entries, block, self._z, self._pages(layer)),
            self._whole.dense[:count],
        )
        gain, ops = block.ffn_norm.weight, self.ops
        ops.linear(entries, inner, (block.ffn.gate_up.weight,), hidden, gain=gain, eps=eps, gated=True)
        ops.linear(entries, hidden, (block.ffn.down.weight,), self._z, add=inner, maps="o")

    def _attention(self, entries: Entries, block: Any, x: Tensor, pages: Pages) -> Tensor:
        """X + attention(norm(x)), (N, D), of persistent rows x."""
        room, ops, count = self._whole, self.ops, len(entries.rows)
        mixed, inner, attn = room.mixed[:count], room.inner[:count], block.attn
        q = self._shown_by(entries, block, x, pages)
        if self.model.cfg.attn_type == "mla":
            ops.attend(entries, q, pages, mixed, attn.scale, attn.kv_up.weight, attn.nope_dim)
        else:
            ops.attend(entries, q, pages, mixed, attn.head_dim**-0.5)
        ops.linear(entries, mixed, (attn.wo.weight,), inner, add=x, maps="+")
        return inner

    def _shown_by(self, entries: Entries, block: Any, x: Tensor, pages: Pages) -> Tensor:
        """Queries (N, H, …) of persistent rows x; what later tokens see of them goes to their pages."""
        room, ops, count, eps = self._whole, self.ops, len(entries.rows), self.model.cfg.norm_eps
        low, q, attn, gain = room.low[:count], room.q[:count], block.attn, block.attn_norm.weight
        if self.model.cfg.attn_type == "mla":
            downs, up = (attn.q_down.weight, attn.kv_down.weight), attn.kv_up.weight
            ops.linear(entries, x, downs, low, gain=gain, eps=eps, maps="a")
            gains = attn.q_norm.weight, attn.kv_norm.weight
            ops.queries(entries, low, *gains, attn.q_up.weight, up, self.rope, pages, q, attn.nope_dim, eps)
        else:
            weights = attn.wq.weight, attn.wk.weight, attn.wv.weight
            ops.linear(entries, x, weights, low, gain=gain, eps=eps, maps="a")
            gains = (None, None) if attn.q_norm is None else (attn.q_norm.weight, attn.k_norm.weight)
            ops.heads(entries, low, *gains, self.rope, pages, q, eps)
        return q
