"""What is asked of the engine, checked before it is queued, and what comes back.

Shape letters: T loops, V vocabulary.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from open_mythos.inference.checks import check_prompt, check_sampling, check_whole
from open_mythos.inference.exit_rules import ACT, Fixed, Never, Predicting, Rule, StateChange
from open_mythos.inference.exits import Learned, check_rule
from open_mythos.inference.speculative import Draft, check_draft
from open_mythos.model import LoopPolicy, OpenMythos

__all__ = ["Depth", "Handle", "QueueFull", "Reason", "Request", "RequestError", "Result"]

Reason = Literal["length", "eos", "cancelled", "failed"]


class QueueFull(RuntimeError):  # noqa: N818 (a state of the queue, which passes)
    """As many requests wait as may; try again when some have finished."""


class RequestError(RuntimeError):
    """A request failed; ``__cause__`` is why. Others are not touched by it.

    Attributes:
        results: of all prompts, where it is one of several that were given together.
    """

    results: Sequence[Result] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how to continue it.

    Args:
        prompt: token ids, a sequence of ints or a 1-D tensor; at least one.
        max_new_tokens: tokens to add. The last one is never fed to the model.
        n_loops: T for every token; ``cfg.max_loop_iters`` when None. Under ``exit`` it is the most.
        exit: asked after each loop whether the token leaves it.
        speculate: draft with fewer loops and check with all; tokens are the same, or their distribution. Each drafted
            token takes a row of the engine.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: sample among the k likeliest; None, 0, or anything from V up keeps all.
        top_p: sample among the likeliest whose probabilities reach this sum; None keeps all.
        eos_token_id: ends the answer, of which it is the last token; ``cfg.eos_token_id`` when None.
        seed: fixes the draws, which are those of ``model.generate`` on this prompt alone; None takes one from
            torch's default generator when the request is submitted.
        on_token: called with each new token by whoever drives the engine; what it raises fails this request alone.
    """

    prompt: Sequence[int] | Tensor
    max_new_tokens: int = 64
    n_loops: int | None = None
    exit: Rule | None = None
    speculate: Draft | None = None
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = None
    eos_token_id: int | None = None
    seed: int | None = None
    on_token: Callable[[int], object] | None = None


@dataclass
class Result:
    """What came of a request.

    Attributes:
        tokens: the new ones, the EOS included.
        reason: why there are no more.
        error: what failed, else None.
        prompt_loops: loops that each token of the prompt has spent.
        loops: the same of each new token that was fed: all but the last one. With drafts, of those that were kept; what
            refused ones spent is not here.
    """

    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None
    error: Exception | None = None
    prompt_loops: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Depth:
    """How deep the tokens of a request go.

    Attributes:
        most: loops at most.
        rule: who is asked whether a token leaves before; None: nobody, and all run ``most`` loops.
        ruled: the state with which a token left counts; otherwise the one that the model's own halting selects.
        probes: loops, from 0, after which the rule decodes with the coda's layers.
    """

    most: int
    rule: Rule | None = None
    ruled: bool = False
    probes: tuple[int, ...] = ()

    @classmethod
    def of(cls, n_loops: int, rule: Rule | None) -> Depth:
        """Of a checked request."""
        if rule is None:
            return cls(n_loops)
        most = rule.limit(n_loops)
        if type(rule) in (Never, Fixed) or most == 1:
            return cls(most, ruled=True)
        probes: tuple[int, ...] = ()
        if isinstance(rule, Predicting):
            asked = range(most - 1) if rule.reads == "coda" else ()
            probes = tuple(t for t in asked if rule.asks(t + 1))
        elif not isinstance(rule, (ACT, StateChange, Learned)):
            probes = tuple(range(most - 1))  # a rule of somebody's own may ask whenever it likes
        return cls(most, rule, True, probes)


@dataclass(frozen=True, eq=False)
class Checked:
    """A request whose every field is known to fit the model."""

    request: Request
    prompt: Tensor
    depth: Depth
    eos: int | None
    seed: int | None

    @property
    def cached(self) -> int:
        """Tokens that are fed at most."""
        return self.prompt.numel() + self.request.max_new_tokens - 1


def check(
    request: Request, model: OpenMythos, max_loops: int, max_context: int, policy: LoopPolicy | None = None
) -> Checked:
    """Refuse what does not fit.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if not isinstance(request, Request):
        raise ValueError(f"request must be a Request, got {type(request).__name__}")
    cfg = model.cfg
    ids = check_prompt("prompt", request.prompt, cfg.vocab_size)
    prompt = torch.as_tensor(ids, dtype=torch.int64, device="cpu").clone()
    check_sampling(request.temperature, request.top_k, request.top_p, request.seed)
    n_loops = cfg.max_loop_iters if request.n_loops is None else request.n_loops
    check_whole("n_loops", n_loops, 1, max_loops)
    check_whole("max_new_tokens", request.max_new_tokens, 1, cfg.max_output_tokens)
    eos = cfg.eos_token_id if request.eos_token_id is None else request.eos_token_id
    if eos is not None:
        check_whole("eos_token_id", eos, 0, cfg.vocab_size - 1)
    if request.exit is not None:
        check_rule(request.exit, model)
    if request.speculate is not None:
        check_draft(request.speculate, model, int(n_loops), policy)
    if request.on_token is not None and not callable(request.on_token):
        raise ValueError(f"on_token = {request.on_token!r} is not allowed: it must be callable, or None")
    room = max_context - prompt.numel() + 1
    if room < 1:
        raise ValueError(f"the prompt has {prompt.numel()} tokens, more than {max_context}: shorten it")
    if request.max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens = {request.max_new_tokens} is not allowed: {prompt.numel()} prompt tokens leave room "
            f"for {room} of {max_context}"
        )
    seed = request.seed
    if seed is None and request.temperature != 0:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return Checked(request, prompt, Depth.of(int(n_loops), request.exit), eos, seed)


class Driver(Protocol):
    """What a handle needs of the engine."""

    def drive(self, ready: Callable[[], bool]) -> None:
        """Run turns until it is ready."""
        ...

    def drive_async(self, ready: Callable[[], bool]) -> Awaitable[None]:
        """The same without blocking the event loop."""
        ...

    def cancel(self, handle: Handle) -> None:
        """End a request."""
        ...


class Handle:
    """A request under way. Who waits for it (iterates, or asks for the result) drives the engine.

    Args:
        engine: who runs it.
        checked: the request.
        number: requests that came before.
    """

    def __init__(self, engine: Driver, checked: Checked, number: int) -> None:
        self._engine, self.checked, self.number = engine, checked, number
        self.state = Result()
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether there is nothing more to come."""
        return self.state.reason is not None

    @property
    def tokens(self) -> list[int]:
        """New tokens so far."""
        return list(self.state.tokens)

    def cancel(self) -> None:
        """End it; its pages are free after the turn that is running. A finished request stays as it is."""
        self._engine.cancel(self)

    def wait(self) -> Result:
        """Wait for the end, and return what there is, also of a failed request."""
        self._engine.drive(lambda: self.done)
        return self.state

    def result(self) -> Result:
        """Wait for the end.

        Raises:
            RequestError: it failed.
        """
        self.wait()
        self._check()
        return self.state

    def __iter__(self) -> Iterator[int]:
        """New tokens as they come, from the first.

        Raises:
            RequestError: it failed.
        """
        at = 0
        while True:
            self._engine.drive(partial(self._more, at))
            if at == len(self.state.tokens):
                break
            yield self.state.tokens[at]
            at += 1
        self._check()

    async def __aiter__(self) -> AsyncIterator[int]:
        """As iteration, without blocking the event loop."""
        at = 0
        while True:
            await self._engine.drive_async(partial(self._more, at))
            if at == len(self.state.tokens):
                break
            yield self.state.tokens[at]
            at += 1
        self._check()

    def _more(self, than: int) -> bool:
        return self.done or len(self.state.tokens) > than

    def _check(self) -> None:
        if self.state.reason == "failed":
            raise RequestError(f"the request failed: {self.state.error}") from self.state.error
