"""Token generation, the simple path: one cache, one token a step, every row the same number of loops.

Shape letters: B batch, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.inference.checks import check_prompt, check_range, check_sampling, check_whole
from open_mythos.inference.exit_cache import ExitCache
from open_mythos.inference.exits import LoopReport, Rule, check_rule, forward
from open_mythos.inference.sampling import Settings, sample
from open_mythos.inference.speculative import Draft, check_draft, drafted
from open_mythos.model import KVCache, LoopPolicy, OpenMythos
from open_mythos.model.decode import Decoder
from open_mythos.model.inputs import TOKEN_DTYPES
from open_mythos.model.transformer import evaluating

__all__ = ["generate", "sample", "stream"]

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


def generate(
    model: OpenMythos,
    input_ids: Prompts,
    max_new_tokens: int = 64,
    n_loops: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 50,
    *,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    cache_policy: LoopPolicy | None = None,
    exit: Rule | None = None,
    speculate: Draft | None = None,
    report: LoopReport | None = None,
) -> Tensor:
    """Continue each prompt.

    Args:
        model: the model; its train/eval mode is left as it was.
        input_ids: (B, S) ids, or a list of unequal prompts, which are padded on the left with
            ``cfg.pad_token_id``, or id 0.
        max_new_tokens: tokens to add, 0 to ``cfg.max_output_tokens``. The last one is never fed to the model,
            so prompt + new may exceed ``max_seq_len`` by one.
        n_loops: loops for every token; ``cfg.max_loop_iters`` when None.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: sample among the k likeliest; None, 0, or anything from V up keeps all.
        top_p: sample among the likeliest tokens whose probabilities reach this sum, 0 < top_p ≤ 1; None keeps all.
        eos_token_id: a row that produced it is finished; ``cfg.eos_token_id`` when None.
        seed: fixes the draws; None uses torch's default generator.
        attention_mask: (B, S), zero where a prompt is padded, left or right.
        cache_policy: how loops share the cache; exact (every loop) when None.
        exit: asked after each loop which tokens leave it, see :mod:`open_mythos.inference.exits`; n_loops is
            then the most. None: the model's own forward.
        speculate: draft tokens with fewer loops, which changes how fast they come and not which, see
            :mod:`open_mythos.inference.speculative`. Draws for one seed differ, their distribution does not.
        report: counts the loops that tokens spent under ``exit``, and with ``speculate`` what drafts were worth.

    Returns:
        (B, S + new) int64. Finished rows are filled with ``cfg.pad_token_id``, or the EOS id. Fewer new
        columns when every row has finished.

    Raises:
        ValueError: an argument is out of range or does not fit the model; nothing has run then.
    """
    ids, mask = _prompts(model, input_ids, attention_mask)
    settings = _settings(model, ids, max_new_tokens, n_loops, temperature, top_k, top_p, eos_token_id, seed)
    steps = _begin(model, ids, mask, settings, cache_policy, exit, speculate, report, alone=True)
    with evaluating(model):
        new = list(steps)
    return torch.cat((ids, torch.stack(new, 1)), 1) if new else ids


def stream(
    model: OpenMythos,
    input_ids: Prompts,
    max_new_tokens: int = 64,
    n_loops: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 50,
    *,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    cache_policy: LoopPolicy | None = None,
    exit: Rule | None = None,
    speculate: Draft | None = None,
    report: LoopReport | None = None,
) -> Iterator[Tensor]:
    """:func:`generate`, one step at a time: an iterator over the new tokens of all rows, each (B,) int64.

    Arguments are checked when this is called, before the first step. Each step runs in eval mode and gives
    the mode back before it yields.
    """
    ids, mask = _prompts(model, input_ids, attention_mask)
    settings = _settings(model, ids, max_new_tokens, n_loops, temperature, top_k, top_p, eos_token_id, seed)
    return _begin(model, ids, mask, settings, cache_policy, exit, speculate, report, alone=False)


def _settings(
    model: OpenMythos,
    ids: Tensor,
    max_new_tokens: int,
    n_loops: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | None,
    seed: int | None,
) -> Settings:
    cfg = model.cfg
    n_loops = cfg.max_loop_iters if n_loops is None else n_loops
    check_sampling(temperature, top_k, top_p, seed)
    check_whole("n_loops", n_loops, 1)
    check_whole("max_new_tokens", max_new_tokens, 0, cfg.max_output_tokens)
    eos = cfg.eos_token_id if eos_token_id is None else eos_token_id
    if eos is not None:
        check_whole("eos_token_id", eos, 0, cfg.vocab_size - 1)
    longest = ids.shape[1] + max_new_tokens - 1
    if longest > cfg.max_seq_len:
        room = cfg.max_seq_len - ids.shape[1] + 1
        if room < 1:
            raise ValueError(
                f"the prompt has {ids.shape[1]} tokens, more than max_seq_len = {cfg.max_seq_len}: shorten it"
            )
        raise ValueError(
            f"max_new_tokens = {max_new_tokens} is not allowed: {ids.shape[1]} prompt tokens leave room for "
            f"{room} under max_seq_len = {cfg.max_seq_len}"
        )
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    return Settings(
        int(max_new_tokens), int(n_loops), eos, max(longest, 0), temperature, top_k, top_p, generator
    )


@dataclass(frozen=True)
class _Leaving:
    """The model's calls under an exit rule, and who counts their loops."""

    model: OpenMythos
    rule: Rule
    n_loops: int
    report: LoopReport | None

    def prompt(self, ids: Tensor, cache: KVCache, mask: Tensor | None, last: Tensor) -> Tensor:
        """Logits (B, 1, V) of each prompt's last token."""
        answer = forward(self.model, ids, self.rule, self.n_loops, cache, attention_mask=mask, logits_at=last)
        if self.report is not None:
            self.report.add("prompt", answer.loops, mask)
        return answer.logits

    def logits(self, fed: Tensor, cache: KVCache, finished: Tensor) -> Tensor:
        """Logits (B, 1, V) after the tokens (B, 1)."""
        idle = finished.unsqueeze(1)
        answer = forward(self.model, fed, self.rule, self.n_loops, cache, idle=idle)
        if self.report is not None:
            self.report.add("new", answer.loops, ~idle)
        return answer.logits


def _leaving(
    model: OpenMythos, settings: Settings, exit: Rule | None, report: LoopReport | None
) -> _Leaving | None:
    if exit is None:
        if report is not None:
            raise ValueError(
                "report is only counted with an exit rule or drafts: pass exit as well, such as Never(), or speculate"
            )
        return None
    check_rule(exit, model)
    return _Leaving(model, exit, settings.n_loops, report)


def _begin(
    model: OpenMythos,
    ids: Tensor,
    mask: Tensor | None,
    settings: Settings,
    policy: LoopPolicy | None,
    exit: Rule | None,
    draft: Draft | None,
    report: LoopReport | None,
    alone: bool,
) -> Iterator[Tensor]:
    """Check how tokens are to be computed; the new tokens.

    Unless ``alone``, whoever takes them may change the model and its mode in between.
    """
    last = ids.new_full((ids.shape[0],), ids.shape[1] - 1) if mask is None else _last_real(mask)
    if draft is not None:
        check_draft(draft, model, settings.n_loops, policy)
        if exit is not None:
            check_rule(exit, model)
        return drafted(model, ids, mask, last, draft, settings, exit, report, alone)
    leaving = _leaving(model, settings, exit, report)
    cache = (KVCache if leaving is None else ExitCache)(policy, settings.columns)
    return _steps(model, ids, mask, last, settings, cache, leaving, alone)


def _steps(
    model: OpenMythos,
    ids: Tensor,
    mask: Tensor | None,
    last: Tensor,
    settings: Settings,
    cache: KVCache,
    leaving: _Leaving | None,
    alone: bool,
) -> Iterator[Tensor]:
    finished, fill = torch.zeros_like(last, dtype=torch.bool), model.cfg.pad_token_id
    n_loops, eos, fed = settings.n_loops, settings.eos, ids
    decoder: Decoder | None = None
    for step in range(settings.max_new_tokens):
        with nullcontext() if alone else evaluating(model), torch.inference_mode():
            if decoder is not None and not alone and not decoder.holds():
                decoder.close()
                decoder = None
            if leaving is not None:
                logits = (
                    leaving.logits(fed, cache, finished) if step else leaving.prompt(ids, cache, mask, last)
                )
            elif decoder is not None:
                logits = decoder.step(fed)
            elif step:
                logits = model(fed, n_loops, cache)
            else:
                logits = model(ids, n_loops, cache, attention_mask=mask, logits_at=last)
                decoder = Decoder.begin(model, cache, n_loops, settings.columns - ids.shape[1])
            token = settings.pick(logits[:, -1])
        if eos is not None:
            token = token.masked_fill(finished, eos if fill is None else fill)
            finished = finished | (token == eos)
        fed = token.unsqueeze(1)
        yield token.clone()  # an ordinary tensor, which may take part in training
        if eos is not None and bool(finished.all()):
            return


def _last_real(mask: Tensor) -> Tensor:
    """Column of each row's last token, (B,)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask.bool() * columns).argmax(1)


def _prompts(model: OpenMythos, prompts: Prompts, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Ids (B, S) on the model's device, and their mask when some row is padded."""
    device = model.embed.weight.device
    if not isinstance(prompts, Tensor):
        if mask is not None:
            raise ValueError(
                "attention_mask is not allowed with a list of prompts: their lengths say what is padding"
            )
        return _pad_left(prompts, device, model.cfg)
    if prompts.dim() != 2 or prompts.dtype not in TOKEN_DTYPES:
        raise ValueError(
            f"input_ids must be int64 or int32 of shape (B, S), got {prompts.dtype} of shape {tuple(prompts.shape)}"
        )
    ids = prompts.to(device, torch.int64)
    if ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}: every prompt must hold at least one token")
    check_range("input_ids", ids, model.cfg.vocab_size)
    if mask is None:
        return ids, None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, got {got}")
    mask = mask.to(device) != 0
    if not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} is all padding: every prompt must hold at least one token"
        )
    return ids, None if bool(mask.all()) else mask


def _pad_left(
    prompts: Sequence[Sequence[int]] | Sequence[Tensor], device: torch.device, cfg: MythosConfig
) -> tuple[Tensor, Tensor]:
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(
            f"input_ids must be a tensor of ids or a list of prompts, got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("input_ids is an empty list: give at least one prompt")
    checked = [check_prompt(f"input_ids[{i}]", prompt, cfg.vocab_size) for i, prompt in enumerate(prompts)]
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in checked]
    width = max(row.numel() for row in rows)
    ids = torch.full((len(rows), width), cfg.pad_token_id or 0, dtype=torch.int64, device=device)
    mask = torch.zeros((len(rows), width), dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        ids[i, width - row.numel() :] = row
        mask[i, width - row.numel() :] = True
    return ids, mask
