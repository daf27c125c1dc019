"""The engine: many requests at once, each with its own depth, each answered as if it were alone.

    engine = Engine(model)
    results = engine.generate(prompts, n_loops=[4, 32, 8])            # a list of Result
    for token in engine.submit(Request(prompt, exit=StateChange())):  # tokens as they come
        ...

There is no thread in the background: whoever waits for something (iterates a handle, asks for a result) runs turns of
the :class:`~open_mythos.inference.scheduler.Scheduler`, for all requests, until it has what it waits for.

Shape letters: T loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import Condition, get_ident
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from open_mythos.inference.checks import check_whole
from open_mythos.inference.exit_rules import Rule
from open_mythos.inference.kernel_runner import KernelRunner
from open_mythos.inference.pages import CacheCodec, Layers, PagePool
from open_mythos.inference.requests import Checked, Handle, QueueFull, Request, RequestError, Result, check
from open_mythos.inference.runner import PlainRunner, RowState, Runner
from open_mythos.inference.scheduler import Scheduler, Stats
from open_mythos.inference.speculative import Draft
from open_mythos.model import EveryLoop, LastLoop, LoopPolicy, OpenMythos
from open_mythos.model.transformer import evaluating

__all__ = ["Engine", "EngineStats", "Handle", "QueueFull", "Request", "RequestError", "Result"]

MakeRunner = Callable[[OpenMythos, PagePool, RowState], Runner]
Each = Sequence[Any]


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and what it has done.

    Attributes:
        pages: of the pool.
        free_pages: that nobody holds.
        running: requests that have a row.
        waiting: requests that wait for one.
        done: counts since the engine was made.
    """

    pages: int
    free_pages: int
    running: int
    waiting: int
    done: Stats


class Engine:
    """Generation for many requests at once.

    A request's tokens are those of ``model.generate`` on its prompt alone: with a seed the same draws, up to the
    rounding of products that a batch computes together (``deterministic`` takes that away too).

    Args:
        model: eval mode is set while it runs, and given back.
        max_rows: requests that compute at once; others wait.
        max_loops: the most loops of any request; None: ``cfg.max_loop_iters``, or 64 if that is less.
        max_context: cached tokens of a request at most; ``cfg.max_seq_len`` when None.
        cache_bytes: for keys and values. A request takes at once what it may need at most, and waits until that is
            there. None: enough for all rows at ``max_context`` and ``cfg.max_loop_iters``, and for any one request,
            but at most 1 GiB, or half of a GPU's free memory.
        page_size: tokens a page; the runner's own when None.
        prefill_chunk: tokens of prompts in one call, after which those who decode have their turn.
        queue: requests that may wait for a row.
        policy: how loops share the cache; exact (every loop) when None.
        codec: how keys and values are kept; as they are when None.
        deterministic: compute every row alone, so that its bits are the same whatever else runs. Slow.
        coda_every: loops between codas, while more than half of the rows still loop. More reads the coda's weights
            less often, and keeps rows waiting.
        runner: makes what computes; None takes the fastest that serves the model.

    Raises:
        ValueError: an argument is out of range or does not fit the model.
    """

    def __init__(
        self,
        model: OpenMythos,
        *,
        max_rows: int = 16,
        max_loops: int | None = None,
        max_context: int | None = None,
        cache_bytes: int | None = None,
        page_size: int | None = None,
        prefill_chunk: int = 512,
        queue: int = 1024,
        policy: LoopPolicy | None = None,
        codec: CacheCodec | None = None,
        deterministic: bool = False,
        coda_every: int = 8,
        runner: MakeRunner | None = None,
    ) -> None:
        _check_kinds(model, policy)
        cfg, device = model.cfg, model.embed.weight.device
        make: Any = _best(model) if runner is None else runner
        self.max_loops = max(cfg.max_loop_iters, 64) if max_loops is None else max_loops
        self.max_context = cfg.max_seq_len if max_context is None else max_context
        page_size = getattr(make, "page_size", PlainRunner.page_size) if page_size is None else page_size
        limits = {
            "max_rows": max_rows,
            "max_loops": self.max_loops,
            "page_size": page_size,
            "prefill_chunk": prefill_chunk,
            "queue": queue,
            "coda_every": coda_every,
        }
        for name, value in limits.items():
            check_whole(name, value, 1)
        check_whole("max_context", self.max_context, 1, cfg.max_seq_len)
        self.model, self._policy = model, policy
        self.pool = self._make_pool(max_rows, page_size, cache_bytes, codec)
        with self._on_device():
            self.runner: Runner = make(model, self.pool, RowState(model, max_rows))
        self._scheduler = Scheduler(
            model,
            self.pool,
            self.runner,
            rows=max_rows,
            chunk=prefill_chunk,
            queue=queue,
            coda_every=coda_every,
            alone=bool(deterministic),
            lag=2 if device.type == "cuda" else 0,
        )
        self._changed = Condition()
        self._closed = False
        self._driver: int | None = None  # the thread that runs turns
        self._waiting = 0  # threads that wait for it
        self._numbers = count()
        self._turning: tuple[asyncio.AbstractEventLoop, asyncio.Future[bool]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="open_mythos.engine")

    def _make_pool(
        self, rows: int, page_size: int, cache_bytes: int | None, codec: CacheCodec | None
    ) -> PagePool:
        cfg, weight, shared = self.model.cfg, self.model.embed.weight, isinstance(self._policy, LastLoop)
        layers = Layers(cfg.prelude_layers, self.max_loops, cfg.coda_layers, shared)
        pages = self._pages(layers, rows, page_size, cache_bytes, codec)
        return PagePool(
            cfg,
            layers,
            rows=rows,
            pages=pages,
            page_size=page_size,
            max_context=min(self.max_context, pages * page_size),
            dtype=weight.dtype,
            device=weight.device,
            codec=codec,
        )

    def _pages(
        self, layers: Layers, rows: int, page_size: int, cache_bytes: int | None, codec: CacheCodec | None
    ) -> int:
        """Pages that the bytes are enough for."""
        cfg, weight = self.model.cfg, self.model.embed.weight
        each = PagePool.page_bytes(cfg, page_size, weight.dtype, codec)
        one = len(layers.needed(min(self.max_loops, cfg.max_loop_iters)))
        if cache_bytes is None:
            device = weight.device
            most = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**30
            # Or for one row as deep as any may go, under a rule that decodes, if that is more.
            wanted = max(rows * one, layers.count) * -(-self.max_context // page_size)
            return max(1, min(wanted, most // each))
        least = each * len(layers.needed(1))
        check_whole("cache_bytes", cache_bytes, least)
        return cache_bytes // each

    # Asking for something.

    def submit(self, request: Request) -> Handle:
        """Queue a request; it begins when somebody waits for this or any other one.

        Raises:
            ValueError: a field is out of range or does not fit the model; nothing is queued then.
            QueueFull: as many requests wait as may.
            RuntimeError: the engine is closed.
        """
        return self._queue(self._check(request))

    def _check(self, request: Request) -> Checked:
        checked = check(request, self.model, self.max_loops, self.max_context, self._policy)
        self._scheduler.check(checked)
        return checked

    def _queue(self, checked: Checked) -> Handle:
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            handle = Handle(self, checked, next(self._numbers))
            self._scheduler.submit(handle)
            self._changed.notify_all()
        return handle

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Tensor] | Tensor,
        max_new_tokens: int | Each = 64,
        n_loops: int | Each | None = None,
        temperature: float | Each = 1.0,
        top_k: int | Each | None = 50,
        *,
        top_p: float | Each | None = None,
        eos_token_id: int | Each | None = None,
        seed: int | Each | None = None,
        exit: Rule | Each | None = None,
        speculate: Draft | Each | None = None,
    ) -> list[Result]:
        """Continue each prompt, and wait for all.

        Args:
            prompts: a list of prompts, or (B, S) ids.
            max_new_tokens: as for :class:`Request`; here and below a list gives each prompt its own.
            n_loops: likewise.
            temperature: likewise.
            top_k: likewise.
            top_p: likewise.
            eos_token_id: likewise.
            seed: one number gives prompt i the seed ``seed + i``.
            exit: likewise.
            speculate: likewise.

        Raises:
            ValueError: as for :meth:`submit`; no prompt has run then.
            RequestError: one failed. The others have run to their end: the error's ``results`` has them all.
        """
        if isinstance(prompts, Tensor) and prompts.dim() != 2:
            raise ValueError(f"prompts must be of shape (B, S), got {tuple(prompts.shape)}")
        if isinstance(seed, int) and not isinstance(seed, bool):
            seed = [seed + i for i in range(len(prompts))]
        fields = {
            "max_new_tokens": max_new_tokens,
            "n_loops": n_loops,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "eos_token_id": eos_token_id,
            "seed": seed,
            "exit": exit,
            "speculate": speculate,
        }
        spread = {name: _spread(name, value, len(prompts)) for name, value in fields.items()}
        requests = [
            self._check(Request(prompt, **{name: values[i] for name, values in spread.items()}))
            for i, prompt in enumerate(prompts)
        ]
        results = self._finish(requests)
        for i, result in enumerate(results):
            if result.reason == "failed":
                error = RequestError(f"prompts[{i}] failed: {result.error}")
                error.results = results
                raise error from result.error
        return results

    def _finish(self, requests: list[Checked]) -> list[Result]:
        """Queue all, as room comes, and wait for them; all are cancelled when that is interrupted."""
        handles: list[Handle] = []
        try:
            while len(handles) < len(requests):
                self.drive(self._scheduler.room)
                with suppress(QueueFull):  # another thread may take the room
                    handles.append(self._queue(requests[len(handles)]))
            for handle in handles:
                handle.wait()
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return [handle.state for handle in handles]

    async def stream(self, request: Request) -> AsyncIterator[int]:
        """New tokens of one request as they come; leaving early cancels it.

        Raises:
            ValueError: as :meth:`submit`.
            RequestError: it failed.
        """
        handle = self.submit(request)
        try:
            async for token in handle:
                yield token
        finally:
            handle.cancel()

    @property
    def stats(self) -> EngineStats:
        """Pages, requests, counts."""
        scheduler, pool = self._scheduler, self.pool
        return EngineStats(pool.capacity, pool.free, scheduler.running, scheduler.waiting, scheduler.stats)

    def close(self) -> None:
        """Cancel everything; nothing is taken in afterwards. Waits for a turn that is running."""
        self._exclusive(self._cancel_all)
        self._thread.shutdown()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Whoever waits drives.

    def step(self) -> bool:
        """Run one turn.

        Returns:
            False when there was nothing to do.
        """
        return self._exclusive(partial(self._turns, lambda: True))

    def drive(self, ready: Callable[[], bool]) -> None:
        """Run turns, or wait for another thread that does, until it is ready or there is nothing to do."""
        while not ready():
            if not self._exclusive(partial(self._turns, ready), ready):
                return

    async def drive_async(self, ready: Callable[[], bool]) -> None:
        """As :meth:`drive`, where all coroutines of an event loop wait for the same turn in one other thread."""
        loop = asyncio.get_running_loop()
        while not ready():
            turning, own = self._turning, False
            if turning is None or turning[0] is not loop or turning[1].done():
                turning, own = (loop, loop.run_in_executor(self._thread, self.step)), True
                self._turning = turning
            # A shared turn may have found nothing to do before what is waited for was submitted.
            if not await asyncio.shield(turning[1]) and own:
                return

    def cancel(self, handle: Handle) -> None:
        """End a request, at once if no turn is running, else after it."""
        with self._changed:
            self._scheduler.cancel(handle)
            if self._driver is None:
                self._scheduler.sweep()

    def _exclusive(self, work: Callable[[], bool], ready: Callable[[], bool] | None = None) -> bool:
        """Do this while no other thread runs a turn, unless that one's turns are enough."""
        me = get_ident()
        with self._changed:
            if self._driver == me:
                raise RuntimeError(
                    "on_token and exit rules may submit and cancel requests, but not wait for them"
                )
            while self._driver is not None:
                self._waiting += 1
                try:
                    self._changed.wait()
                finally:
                    self._waiting -= 1
                if ready is not None and ready():
                    return True
            self._driver = me
        try:
            return work()
        finally:
            with self._changed:
                self._driver = None
                self._changed.notify_all()  # first, or others would wait for ever should the sweep raise
                self._scheduler.sweep()

    def _cancel_all(self) -> bool:
        with self._changed:
            self._closed = True
        self._scheduler.cancel_all()
        return False

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels, streams and events take the thread's current GPU, which need not be the model's."""
        device = self.model.embed.weight.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _turns(self, ready: Callable[[], bool]) -> bool:
        """Turns until it is ready or other threads want to look; False when there is nothing to do."""
        scheduler = self._scheduler
        try:
            with self._on_device(), evaluating(self.model), torch.inference_mode():
                self.runner.refresh()
                while not scheduler.idle:
                    scheduler.turn()
                    if self._waiting or ready():
                        return True
        except BaseException as error:
            # What was interrupted cannot go on, and nobody may wait for it for ever.
            cause = error if isinstance(error, Exception) else RuntimeError(f"interrupted by {error!r}")
            scheduler.fail_all(cause)
            raise
        return False


def _check_kinds(model: object, policy: object) -> None:
    if not isinstance(model, OpenMythos):
        raise ValueError(f"model must be an OpenMythos, got {type(model).__name__}")
    if policy is not None and not isinstance(policy, (EveryLoop, LastLoop)):
        raise ValueError(f"policy = {policy!r} is not allowed: it must be EveryLoop(), LastLoop() or None")


def _best(model: OpenMythos) -> MakeRunner:
    """The fastest runner that serves this model here."""
    weight = model.embed.weight
    if weight.is_cuda:
        from open_mythos.inference.graph_runner import GraphRunner

        return GraphRunner
    return KernelRunner if weight.is_cpu and weight.dtype == torch.float32 else PlainRunner


def _spread(name: str, value: object, count: int) -> Sequence[Any]:
    """A value for each prompt."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} prompts: give one, or one for each")
    return value
