"""Decode on a GPU: prelude, loop and coda of a few rows in a handful of kernels each, captured as CUDA graphs.

A loop is about ten kernels (:mod:`open_mythos.rows.launch`), which read pages, positions and loop indices from memory.
So one graph for each number of rows, rounded up, serves any rows at any positions, each at its own loop. The kernels
are the model's own step written once more: what they do not serve runs through the modules, and ``reason`` says why.

Shape letters: R rows of the engine, N entries of a graph, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from open_mythos.capture import capturing
from open_mythos.inference.device_rows import DeviceRows
from open_mythos.inference.exit_rules import Rule, StateChange
from open_mythos.inference.graph_room import Room, injection_of
from open_mythos.inference.graph_serves import unserved, unserved_config
from open_mythos.inference.graph_tables import Asking, entries_of, round_of, several_of, table_of, width_of
from open_mythos.inference.graph_work import GraphWork
from open_mythos.inference.pages import PagePool
from open_mythos.inference.prompt_graphs import PromptGraphs
from open_mythos.inference.runner import STRIDE, Batch, Chunk, RowState
from open_mythos.model import OpenMythos
from open_mythos.model.decode import replaced_method
from open_mythos.model.transformer import evaluating
from open_mythos.model.watch import Watch
from open_mythos.rows.launch import TritonRows
from open_mythos.rows.plain import Exits, PlainRows, wide

__all__ = ["GraphRunner"]

_GRAPHS = 128  # that are kept: about eight for each number of rows, and one for each depth of whole tokens


class GraphRunner(GraphWork):
    """:class:`PlainRunner` with decode steps in kernels, captured once for each number of rows.

    Args:
        model: in eval mode whenever this is called.
        pool: where keys and values are.
        state: the rows.
        rows: who computes; None: Triton's kernels, in graphs.

    Attributes:
        reason: why the model's modules are called instead, or None.

    Beside the cache, attention's parts take 4 bytes × rows × heads × 128 × latent rank (MLA) or head width; twice that
    once codas have run beside loops (:class:`~open_mythos.inference.device_rows.DeviceRows`).
    """

    page_size = 64

    def __init__(
        self, model: OpenMythos, pool: PagePool, state: RowState, rows: PlainRows | TritonRows | None = None
    ) -> None:
        super().__init__(model, pool, state)
        self._given = rows
        self._watch: Watch | None = None
        self._outside: tuple[bool, str | None] = False, None
        self._prompting: torch.cuda.Stream | None = None
        cfg, weight = model.cfg, model.embed.weight
        width = cfg.rope_dim
        exponent = torch.arange(0, width, 2, device=weight.device, dtype=wide(weight.dtype)) / width
        self._inverse = cfg.rope_theta**-exponent
        # Also for rows in the middle of a token when the model has changed.
        self.rope = exponent.new_zeros(len(state.ids), width)
        with evaluating(model):
            self.refresh()

    def refresh(self) -> None:
        """Look whether the model is still what was captured; capture anew if it is not."""
        outside = _has_any_global_hook(), replaced_method()
        if self._watch is not None and self._watch.holds() and outside == self._outside:
            return
        self._watch, self._outside = Watch(self.model, lambda each: isinstance(each, Tensor)), outside
        plain = isinstance(self._given, PlainRows)
        self.reason = unserved_config(self.model.cfg) if plain else unserved(self.model, self.pool)
        if self.reason is None:
            self._prepare()

    def _prepare(self) -> None:
        model, state = self.model, self.state
        rows, device = len(state.ids), state.ids.device
        if device.type == "cuda":
            torch.cuda.synchronize()  # prompts that are on their way need what is replaced here
        self._z = self.rope.new_zeros(rows, model.cfg.dim)
        self._injection = injection_of(model, state)
        self._buckets = [1]
        while self._buckets[-1] < rows:
            self._buckets.append(2 * self._buckets[-1])
        self.ops = TritonRows(most=self._buckets[-1]) if self._given is None else self._given
        self._whole = Room(model, self._buckets[-1])
        self._tables = {
            n: torch.full((4, width_of(n)), -1, dtype=torch.int32, device=device) for n in self._buckets
        }
        self._asking = Asking(self._buckets[-1], self.rope.dtype, device)
        self._shown: dict[int, Tensor] = {}
        self._next: dict[int, int] = {}  # loop for which each row's input has been prepared
        self._graphs: OrderedDict[Any, Any] = OrderedDict()
        self._rounds: dict[Any, Tensor] = {}
        self._strides: dict[Any, Tensor] = {}
        self._memory: Any = None
        self._side, self._prompting = (
            torch.cuda.Stream() if device.type == "cuda" else None for _ in range(2)
        )
        self._prompts = PromptGraphs(model, self.pool, capture=device.type == "cuda")
        self._device_rows: DeviceRows | None = None

    # What a runner does.

    def prefill(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """As :meth:`PlainRunner.prefill`; short prompts from graphs, their logits in a buffer that is used again."""
        self._after_prompts()
        if self.reason is None and self._prompts.serves(chunk):
            return self._prompts(chunk), None
        return super().prefill(chunk)

    def _after_prompts(self) -> None:
        """Who went while the prompt ran beside has left its pages to others, and they are still written to."""
        if self._prompting is not None and torch.cuda.current_stream() != self._prompting:
            torch.cuda.current_stream().wait_stream(self._prompting)

    def beside(self, chunk: Chunk) -> AbstractContextManager[Any] | None:
        """A stream for prompts that graphs serve. It begins when all that was launched before is done."""
        if self.reason is not None or self._prompting is None or not self._prompts.serves(chunk):
            return None
        self._prompting.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._prompting)

    def prelude(self, batch: Batch) -> None:
        """As :meth:`PlainRunner.prelude`."""
        if self.reason is not None:
            return super().prelude(batch)
        self._run("prelude", batch, loops=[0] * len(batch.rows))
        self._next.update(dict.fromkeys(batch.rows, 0))
        return None

    def loop(self, batch: Batch) -> None:
        """As :meth:`PlainRunner.loop`."""
        if self.reason is not None:
            return super().loop(batch)
        self._catch_up(batch)
        self._run("loop", batch)
        self._next.update((row, t + 1) for row, t in zip(batch.rows, batch.loops, strict=True))
        return None

    @property
    def stride(self) -> int:
        """Loops of one graph."""
        return 1 if self.reason is not None else STRIDE

    def loops(self, batch: Batch, times: Sequence[int]) -> None:
        """Several loops in one graph. Who has done theirs is not among the entries of the later ones."""
        if self.reason is not None:
            return super().loops(batch, times)
        self._catch_up(batch)
        self._several("loops", batch, times)
        done = zip(batch.rows, batch.loops, times, strict=True)
        self._next.update((row, t + count) for row, t, count in done)
        return None

    def _several(self, name: str, batch: Batch, times: Sequence[int], gone: bool = False) -> Tensor:
        """Do this work on a block of columns for each loop; returns the table."""
        most, bucket = max(times), self.bucket(len(times))
        width, key = width_of(bucket), (name, most)
        if (key, bucket) not in self._strides:
            columns = (most + gone) * width
            blank = torch.full((4, columns), -1, dtype=torch.int32, device=self.rope.device)
            self._strides[key, bucket] = blank
        table = self._strides[key, bucket]
        table.copy_(several_of(batch, times, width, gone), non_blocking=True)
        work: Callable[..., None] = getattr(self, f"do_{name}")
        self.replay((key, bucket), partial(work, table, most, width, bucket), table)
        return table

    def do_loops(self, table: Tensor, count: int, each: int, bucket: int) -> None:
        """Several loops, each of its block of columns."""
        for i in range(count):
            self.do_loop(entries_of(table[:, i * each :][:, :bucket]))

    def asks(self, rule: Rule) -> bool:
        """One that compares states."""
        return self.reason is None and type(rule) is StateChange

    def loops_under(
        self, batch: Batch, times: Sequence[int], rules: Sequence[Rule | None]
    ) -> list[int | None]:
        """Several loops in one graph, with the question after each who leaves. Reads the device once."""
        self._catch_up(batch)
        gone = self._under("under", batch, times, rules)
        left = [t if t >= 0 else None for t in gone.tolist()]
        done = zip(batch.rows, batch.loops, times, left, strict=True)
        self._next.update((row, t + count if end is None else end) for row, t, count, end in done)
        return left

    def token_under(self, batch: Batch, rules: Sequence[Rule]) -> tuple[Tensor, Tensor]:
        """Prelude, all loops and coda in one graph, in which a token that has left only waits for the coda."""
        n = len(batch.rows)
        gone = self._under("token_under", replace(batch, loops=(0,) * n), batch.most, rules)
        for row in batch.rows:
            self._next.pop(row, None)  # only the device knows
        return self._whole.logits[:n], gone

    def _under(self, name: str, batch: Batch, times: Sequence[int], rules: Sequence[Rule | None]) -> Tensor:
        """Do this work; returns (n,) loops of those who left, on the device."""
        asked = [rule if isinstance(rule, StateChange) else None for rule in rules]
        self._asking.show(
            [rule.tolerance if rule else 0.0 for rule in asked],
            [rule.min_loops if rule else 0 for rule in asked],
            [most if rule else 0 for rule, most in zip(asked, batch.most, strict=True)],
        )
        table, n = self._several(name, batch, times, gone=True), len(times)
        return table[2, -width_of(self.bucket(n)) :][:n]

    def do_under(self, table: Tensor, count: int, width: int, bucket: int) -> None:
        """The same, of which rules may leave out some; the last block is those who leave."""
        parts = [table[:, i * width :][:, :bucket] for i in range(count + 1)]
        *loops, gone = [entries_of(part, thin=True) for part in parts]
        asks, rows = self._asking.of(bucket), table[0].view(count + 1, width)[:, :bucket]
        for i, entries in enumerate(loops):
            self.do_loop(entries, Exits(asks, gone, rows[i + 1 : count]))
        self.do_leave(gone)

    def do_token_under(self, table: Tensor, count: int, width: int, bucket: int) -> None:
        """A whole token, likewise."""
        begun = entries_of(table[:, :bucket])
        self.do_prelude(begun)
        self.do_under(table, count, width, bucket)
        self.do_coda(begun)  # whoever left is no entry of later loops only

    def coda(self, batch: Batch) -> Tensor:
        """As :meth:`PlainRunner.coda`; the logits are float32, in a buffer that the next call reuses."""
        if self.reason is not None:
            return super().coda(batch)
        self._catch_up(batch)
        self._run("coda", batch)
        return self._whole.logits[: len(batch.rows)]

    def token(self, batch: Batch) -> Tensor | None:
        """Prelude, all loops and coda in one graph."""
        if self.reason is not None or len(set(batch.most)) != 1:
            return None
        return self._whole_of("token", batch, batch.most[0], [0] * len(batch.rows))

    def rest(self, batch: Batch) -> Tensor | None:
        """The loops that are left and the coda in one graph."""
        left = {most - done for most, done in zip(batch.most, batch.loops, strict=True)}
        if self.reason is not None or len(left) != 1:
            return None
        self._catch_up(batch)
        return self._whole_of("rest", batch, left.pop(), batch.loops)

    def _whole_of(self, name: str, batch: Batch, loops: int, done: Sequence[int]) -> Tensor:
        self._run((name, loops), batch, done)
        self._next.update((row, t + loops) for row, t in zip(batch.rows, done, strict=True))
        return self._whole.logits[: len(batch.rows)]

    def _catch_up(self, batch: Batch) -> None:
        """Read the states of rows whose last loop somebody else has run, or whose token the modules began."""
        if all(self._next.get(row) == t for row, t in zip(batch.rows, batch.loops, strict=True)):
            return
        # The modules leave these rows' choice for the coda to make.
        last = [
            row
            for row, ruled in zip(batch.rows, batch.ruled, strict=True)
            if ruled or self.model.cfg.halting == "off"
        ]
        self.state.chosen[last] = self.state.h[last]
        self._run("enter", batch)
        self._next.update(zip(batch.rows, batch.loops, strict=True))

    def round(self, batch: Batch, drafts: int, loops: int) -> Tensor | None:
        """Draft with the likeliest tokens and check, in one graph; see :meth:`PlainRunner.round`."""
        size = len(self._whole.logits) if self.reason is None else 0
        if len(batch.rows) > size or len(set(batch.most)) != 1:
            return None
        count, most = len(batch.rows) // (drafts + 1), batch.most[0]
        # Columns of the check, then those of each draft, all of them aligned as the kernels were compiled.
        wide, each = -(-len(batch.rows) // 4) * 4, -(-count // 4) * 4
        key = ("round", drafts, loops, most), count
        table = self._rounds.get(key)
        if table is None:
            columns = wide + (drafts + 1) * each
            table = self._rounds[key] = torch.full(
                (4, columns), -1, dtype=torch.int32, device=self.rope.device
            )
        table.copy_(round_of(batch, drafts, loops, wide, each), non_blocking=True)

        def work() -> None:
            parts = [table[:, wide + i * each :][:, :count] for i in range(drafts + 1)]
            self.do_round(table[:, : len(batch.rows)], parts, loops, most)

        self.replay(key, work, table)
        self._next.update(dict.fromkeys(batch.rows, most))
        return self._whole.logits[: len(batch.rows)]

    def do_round(self, check: Tensor, parts: Sequence[Tensor], loops: int, most: int) -> None:
        """Drafts and their check."""
        ids = self.state.ids
        for i, part in enumerate(parts):
            entries = entries_of(part)
            self.do_prelude(entries)
            if i + 1 == len(parts):
                for _ in range(loops):
                    self.do_loop(entries)
                break
            self.do_rest(entries, loops)
            tokens, rows = self._whole.logits[: part.shape[1]].argmax(-1), parts[i + 1][0].long()
            into = rows.clamp(min=0)  # fill, which stands for nobody
            ids[into] = torch.where(rows < 0, ids[into], tokens)
        self.do_rest(entries_of(check), most - loops)

    def leave(self, batch: Batch, probed: Sequence[int | None], probes: Sequence[Sequence[int]]) -> None:
        """As :meth:`PlainRunner.leave`; in the modules where a rule has decoded."""
        if self.reason is not None or any(loop is not None for loop in probed):
            return super().leave(batch, probed, probes)
        self._catch_up(batch)
        nothing = [0] * len(batch.rows)
        self._asking.show(nothing, nothing, batch.most)
        self._run("leave", batch)
        return None

    # How.

    def _run(self, what: Any, batch: Batch, loops: Sequence[int] | None = None) -> None:
        """Show the device the batch and launch the work."""
        count = len(batch.rows)
        bucket = self.bucket(count)
        wanted = torch.full(self._tables[bucket].shape, -1, dtype=torch.int32)
        wanted[:, :count] = table_of(batch, loops)
        shown = self._shown.get(bucket)
        if shown is None or not torch.equal(shown, wanted):
            # Not from pinned memory, which would have to outlive the copy.
            self._tables[bucket].copy_(wanted, non_blocking=True)
        self._launch(what, bucket)
        wanted[2, :count] += {"loop": 1}.get(what, 0) if isinstance(what, str) else what[1]
        self._shown[bucket] = wanted

    def _launch(self, what: Any, bucket: int) -> None:
        name, *rest = (what,) if isinstance(what, str) else what
        work: Callable[..., None] = getattr(self, f"do_{name}")
        table = self._tables[bucket]
        self.replay((what, bucket), lambda: work(entries_of(table[:, :bucket]), *rest), table)

    def bucket(self, count: int) -> int:
        """Entries of the graph for so many rows."""
        return next(n for n in self._buckets if n >= count)

    def replay(self, key: Any, work: Callable[[], None], table: Tensor) -> None:
        """Do this work on what the table shows, from a graph; it is called, and captured, only the first time."""
        self.ready(key, work, table)()

    def ready(self, key: Any, work: Callable[[], None], table: Tensor) -> Callable[[], None]:
        """What :meth:`replay` does, captured and not done yet."""
        if isinstance(self.ops, PlainRows):
            return work
        if key not in self._graphs:
            self._capture(key, work, table)
        self._graphs.move_to_end(key)
        replay: Callable[[], None] = self._graphs[key].replay
        return replay

    def _capture(self, key: Any, work: Callable[[], None], table: Tensor) -> None:
        """Compile by running it on entries that are all fill, which does nothing, and capture."""
        kept = table.clone()
        table.fill_(-1)
        try:
            work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self._memory):
                work()
        finally:
            table.copy_(kept)  # also for whoever tries again, who takes these rows for shown
        self._memory = graph.pool()
        self._graphs[key] = graph
        if len(self._graphs) > _GRAPHS:
            oldest, _ = self._graphs.popitem(last=False)
            self._rounds.pop(oldest, None)

    def device_rows(self) -> DeviceRows | None:
        """As :meth:`PlainRunner.device_rows`."""
        if self.reason is not None:
            return None
        if self._device_rows is None:
            self._device_rows = DeviceRows(self)
        return self._device_rows

    def hand_over(self, batch: Batch) -> None:
        """As :meth:`PlainRunner.hand_over`."""
        self._catch_up(batch)
        for row in batch.rows:
            self._next.pop(row, None)  # only the device knows
