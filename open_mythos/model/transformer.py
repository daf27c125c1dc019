"""OpenMythos: encode once, loop one shared block as long as asked, decode once.

Shape letters: B batch, S new tokens, C context tokens, D model width, T loops, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.attention import SequenceContext, distance_penalty
from open_mythos.model.blocks import RecurrentBlock, TransformerBlock
from open_mythos.model.cache import CacheError, Entry, KVCache
from open_mythos.model.inputs import check_ids, check_loops, segments, visibility
from open_mythos.model.layers import RMSNorm, rope_table
from open_mythos.model.moe import MoEFFN
from open_mythos.model.recurrence import (
    HaltingWeights,
    attach_loss,
)

__all__ = [
    "OpenMythos",
    "evaluating",
    "rescale_spectral_radius",
    "spectral_radius",
]


class OpenMythos(nn.Module):
    """A recurrent-depth transformer language model.

        h = initial_state(e),   e = prelude(ids)
        for t in range(n_loops): h = step(h, e, t)
        logits = coda(h)

    ``prelude``, ``step`` and ``coda`` are the only ways in; everything else composes them.

    Args:
        cfg: the configuration; see :class:`~open_mythos.MythosConfig`.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        if not isinstance(cfg, MythosConfig):
            raise TypeError(f"cfg must be a MythosConfig, got {type(cfg).__name__}")
        self.cfg = cfg
        self.embed = nn.Embedding.from_pretrained(torch.empty(cfg.vocab_size, cfg.dim), freeze=False)
        self.prelude_layers = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.prelude_layers))
        self.input_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.input_norm else nn.Identity()
        self.recurrent = RecurrentBlock(cfg)
        self.coda_layers = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.coda_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        # Never asked then, so it would never get the gradient that DDP waits for.
        self.recurrent.act.requires_grad_(cfg.halting != "off")
        # DDP would overwrite every rank's counts with rank 0's before they are summed.
        loads = [name for name, _ in self.named_buffers() if name.endswith("expert_load")]
        self._ddp_params_and_buffers_to_ignore = loads
        self._passes = 0  # forward passes with gradients that could draw extra loops
        self.reset_parameters()

    # The three ways in.

    def prelude(self, ids: Tensor, ctx: SequenceContext | None = None) -> Tensor:
        """Token ids (B, S) → injected input e (B, S, D)."""
        ctx = self.context(ids) if ctx is None else ctx
        x = self.embed(ids)
        if self.cfg.init == "scaled":
            x = x * math.sqrt(self.cfg.dim)
        for i, layer in enumerate(self.prelude_layers):
            x = layer(x, ctx, _slot(ctx, f"prelude_{i}"))
        return self.input_norm(x)

    def step(self, h: Tensor, e: Tensor, t: int | Tensor, ctx: SequenceContext | None = None) -> Tensor:
        """One loop: state (B, S, D), injected input (B, S, D), loop index from 0 → next state (B, S, D).

        The index is a number, a tensor of one, or (B,) with one for each sequence, where a sequence whose
        index is below zero has not begun and keeps its state.
        """
        ctx = self.context(e) if ctx is None else ctx
        slot = "" if ctx.cache is None else ctx.cache.slot(t)
        return self.recurrent(h, e, t, ctx, slot)

    def coda(self, h: Tensor, ctx: SequenceContext | None = None, logits_at: Tensor | None = None) -> Tensor:
        """State (B, S, D) → logits (B, S, V), or (B, 1, V) at one column of each row, (B,)."""
        features = self.features(h, ctx)
        return self.head(features if logits_at is None else _rows(features, logits_at))

    # What composes them.

    def features(self, h: Tensor, ctx: SequenceContext | None = None) -> Tensor:
        """The coda before its head: state (B, S, D) → what the head reads, (B, S, D)."""
        ctx = self.context(h) if ctx is None else ctx
        for i, layer in enumerate(self.coda_layers):
            h = layer(h, ctx, _slot(ctx, f"coda_{i}"))
        return self.norm(h)

    def initial_state(self, e: Tensor) -> Tensor:
        """State before the first loop, (B, S, D): e, zeros, or while training unit normal noise."""
        if self.cfg.initial_state == "prelude":
            return e
        if self.cfg.initial_state == "random" and self.training:
            return torch.randn_like(e)
        return torch.zeros_like(e)

    def think(
        self, h: Tensor, e: Tensor, ctx: SequenceContext | None, loops: Iterable[int | Tensor]
    ) -> Tensor:
        """Run these loops, each with an index as :meth:`step` takes, and hand over a state, (B, S, D).

        It is the state that halting selects. Only while training with ``halting="select"`` it is the last
        one, so that halting takes nothing from the language model: the halting head learns, on features that
        carry no gradient back, to tell that the state has settled; see
        :func:`~open_mythos.model.recurrence.convergence_loss`.
        """
        loops = list(loops)
        if self.cfg.halting == "off" or not loops:
            for t in loops:
                h = self.step(h, e, t, ctx)
            return h
        select = self.cfg.halting == "select"
        if select and self.training and torch.is_grad_enabled():
            return self._think_and_learn(h, e, ctx, loops)
        weights = HaltingWeights(self.cfg)
        out = torch.zeros_like(h)
        for i, t in enumerate(loops):
            h = self.step(h, e, t, ctx)
            p = _begun(t, self.recurrent.act(h.detach() if select else h))
            if select:
                out = weights.observe(h, p.detach(), out)
            else:
                out = out + weights.next(p, last=i == len(loops) - 1).unsqueeze(-1).to(h.dtype) * h
        return out

    def _settle(self, h: Tensor, e: Tensor, ctx: SequenceContext, n_loops: int) -> tuple[Tensor, int]:
        """While training, the state after some loops without gradient, and how many: none in three passes of four.

        The number follows from how many passes there were, so that all processes that train it draw the same, and
        a recomputation for the backward draws as its pass did.
        """
        most = int(self.cfg.extra_loops * n_loops)
        learns = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not most or not learns or ctx.cache is not None:
            return h, 0
        if not _recomputing():
            self._passes += 1
        with torch.no_grad():
            draw = torch.Generator(device="cpu").manual_seed(self._passes)
            extra = max(0, int(torch.randint(1 - 3 * most, most + 1, (), generator=draw, device="cpu")))
            for t in range(extra):
                h = self.step(h, e, t, ctx)
        return h, extra

    def _think_and_learn(
        self, h: Tensor, e: Tensor, ctx: SequenceContext | None, loops: list[int | Tensor]
    ) -> Tensor:
        states: list[Tensor] = []
        for t in loops:
            h = self.step(h, e, t, ctx)
            states.append(h.detach())
        # The last loop asks too: whoever listens to the head hears every loop, and DDP waits for its gradient.
        losses = [self.recurrent.halting_loss(state, states[-1]) for state in states]
        begun = [_begun(t, torch.ones_like(loss)) for t, loss in zip(loops, losses, strict=True)]
        begun[-1] = torch.zeros_like(begun[-1])
        # A mean over each sequence's own loops, so that a sequence learns alike in whatever batch it is.
        count = torch.stack(begun).sum(0).clamp(min=1)
        total = (torch.stack(losses) * torch.stack(begun)).sum(0)
        return attach_loss(h, (total / count).mean())

    def forward(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        kv_cache: KVCache | dict[str, Entry] | None = None,
        start_pos: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: (B, S) token ids.
            n_loops: T ≥ 1; ``cfg.max_loop_iters`` when None. May exceed the number trained with.
            kv_cache: a :class:`KVCache`, or a plain dict (empty at first) that is filled with one entry per
                cached layer and loop; passed again it continues the sequence.
            start_pos: position of the first id; None takes it from the cache. Given, it must agree with it.
            attention_mask: (B, S), nonzero for tokens and zero for padding, on either side, of these ids.
            document_ids: (B, S) non-negative ints; a token sees only its own document.
            logits_at: (B,) column of each row whose logits are wanted, and no others; None: all.

        Returns:
            (B, S, V), or (B, 1, V) with ``logits_at``.

        Raises:
            ValueError: an argument does not fit the model, the ids or the cache.
        """
        n_loops = check_loops(self.cfg.max_loop_iters if n_loops is None else n_loops)
        check_ids(input_ids, self.cfg.vocab_size)
        if not isinstance(kv_cache, (KVCache, dict, type(None))):
            raise CacheError(f"kv_cache must be a KVCache, a dict or None, got {type(kv_cache).__name__}")
        cache = KVCache.wrap(kv_cache) if isinstance(kv_cache, dict) else kv_cache
        if isinstance(kv_cache, dict) and (attention_mask is not None or document_ids is not None):
            raise CacheError(
                "a plain dict keeps no padding or document marks: pass kv_cache=KVCache() with a mask"
            )
        ctx = self.context(input_ids, attention_mask, document_ids, cache, start_pos)
        if cache is not None:
            cache.check_loops(n_loops)
        if self.training and not torch.is_inference_mode_enabled() and not _recomputing():
            self.update_router_bias()
        past = ctx.past
        try:
            logits = self._in_one_kernel(input_ids, ctx, n_loops)
            if logits is None:
                e = self.prelude(input_ids, ctx)
                h, begun = self._settle(self.initial_state(e), e, ctx, n_loops)
                h = self.think(h, e, ctx, range(begun, begun + n_loops))
                logits = self.coda(h, ctx) if logits_at is None else self.coda(h, ctx, logits_at)
            elif logits_at is not None:
                logits = _rows(logits, logits_at)
        except BaseException:
            if cache is not None:
                cache.trim(past)
            raise
        if cache is not None:
            cache.commit(input_ids.shape[1], ctx.segments, ctx.packed)
        return logits

    def context(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        start_pos: int | None = None,
    ) -> SequenceContext:
        """Positions and mask of a call, shared by all its layers.

        Args:
            tokens: ids (B, S) or states (B, S, D); only shape and device are read.
            attention_mask: as in :meth:`forward`.
            document_ids: as in :meth:`forward`.
            cache: cached tokens that come before.
            start_pos: as in :meth:`forward`.

        Raises:
            ValueError: shapes, lengths or positions do not fit.
        """
        batch, new = tokens.shape[:2]
        past = 0 if cache is None else cache.length
        if cache is not None and cache.batch_size not in (None, batch):
            raise CacheError(
                f"the cache holds a batch of {cache.batch_size}, but input_ids has batch {batch}"
            )
        if start_pos is not None and (cache is not None or start_pos != 0) and start_pos != past:
            what = "no cache is given" if cache is None else f"the cache holds {past} tokens"
            raise CacheError(f"start_pos = {start_pos!r} is not allowed: {what}, so it must be {past}")
        if past + new > self.cfg.max_seq_len:
            raise ValueError(
                f"{past} cached and {new} new tokens exceed max_seq_len = {self.cfg.max_seq_len}; "
                "use a shorter sequence or a config with a larger max_seq_len"
            )
        marks = segments(tokens, attention_mask, document_ids, cache)
        mask = visibility(marks, past, new, tokens.device)
        if marks is None or mask is None:
            positions = torch.arange(past, past + new, device=tokens.device).unsqueeze(0)
        else:
            positions = mask.sum(-1).squeeze(1) - 1
        cfg = self.cfg
        rope = rope_table(positions, cfg.rope_dim, cfg.rope_theta, self.embed.weight.dtype)
        penalty = None
        if cfg.alibi or cfg.previous_heads:
            slopes = cfg.alibi * 0.5 ** torch.arange(cfg.n_heads - cfg.previous_heads, device=tokens.device)
            penalty = distance_penalty(mask, past, new, slopes, cfg.previous_heads)
        return SequenceContext(rope, mask, cache, marks, document_ids is not None, penalty)

    def _in_one_kernel(self, ids: Tensor, ctx: SequenceContext, n_loops: int) -> Tensor | None:
        """Logits of a few tokens after cached ones, where the CPU kernel serves; else None."""
        if ctx.cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        from open_mythos.model.decode import decode

        return decode(self, ids, ctx, n_loops)

    def update_router_bias(self, forget: bool = True) -> None:
        """Let the balancing bias follow the loads counted so far; :meth:`forward` calls it while training.

        Args:
            forget: see :meth:`MoEFFN.update_bias`.
        """
        for module in self.modules():
            if isinstance(module, MoEFFN):
                module.update_bias(forget)

    def generate(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Continue each row; see :func:`open_mythos.inference.generate.generate` for every argument.

        Args:
            input_ids: (B, S) prompt ids.
            *args: ``max_new_tokens, n_loops, temperature, top_k``, in that order.
            **kwargs: the same by name, and top_p, eos_token_id, seed, attention_mask, cache_policy, exit, speculate,
                report.

        Returns:
            (B, S + new).
        """
        from open_mythos.inference.generate import generate

        return generate(self, input_ids, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenMythos:
        """Follow conversions and moves, and tie the head again: leaving ``meta`` makes two tensors of one."""
        super()._apply(fn, recurse)
        if self.cfg.tie_embeddings and self.head.weight is not self.embed.weight:
            self.head.weight = self.embed.weight
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As every module's, but a state dict of the public release is refused, also when not ``strict``:

        a few of its tensors have our names, and only those would be loaded.

        Raises:
            ValueError: it is one of the public release's.
        """
        if any("ffn.routed_experts." in name for name in state_dict):
            raise ValueError(
                "this is a state dict of the public 0.5.0 release, whose layout differs: "
                "load it with open_mythos.load_upstream"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """With the passes that extra loops are drawn by, once there were any: whoever resumes draws on from there."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._passes:
            destination[f"{prefix}_passes"] = torch.tensor(self._passes, device="cpu")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (passes := state_dict.pop(f"{prefix}_passes", None)) is not None:
            self._passes = int(passes)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """Draw fresh initial weights from torch's default generator, as ``cfg.init`` says; none on ``meta``.

        Every parameter and buffer gets its initial value, also after ``to_empty``.
        """
        if self.embed.weight.is_meta:  # nothing to draw, and torch's first normal_ there loads its compiler
            return
        scaled = self.cfg.init == "scaled"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5 if scaled else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, MoEFFN):
                for weight in (module.w_in, module.w_out):
                    nn.init.normal_(weight, std=weight.shape[1] ** -0.5 if scaled else 0.02)
                nn.init.zeros_(module.router_bias)
                nn.init.zeros_(module.expert_load)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.normal_(self.embed.weight, std=self.cfg.dim**-0.5 if scaled else 0.02)
        self._reset_recurrence(scaled)

    def _reset_recurrence(self, scaled: bool) -> None:
        act, lora, injection = self.recurrent.act, self.recurrent.lora, self.recurrent.injection
        nn.init.zeros_(injection.log_A)
        nn.init.zeros_(injection.log_dt)
        nn.init.constant_(injection.B, injection.b_init)
        nn.init.constant_(act.halt.bias, act.bias_init)
        if scaled:
            nn.init.zeros_(act.halt.weight)
        if lora is not None:
            if scaled:
                nn.init.zeros_(lora.B)
                nn.init.ones_(lora.scale.weight)
            else:
                nn.init.normal_(lora.B, std=0.02)
                nn.init.normal_(lora.scale.weight, std=0.02)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is back in its own mode."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def spectral_radius(model: OpenMythos) -> float:
    """ρ(A) of the injection: the largest decay, strictly inside (0, 1)."""
    radius: Any = model.recurrent.injection.get_A().detach().max()
    # Of a sharded model, all shards' largest; every rank must ask.
    return float(radius.full_tensor() if hasattr(radius, "full_tensor") else radius)


def rescale_spectral_radius(model: OpenMythos, limit: float = 0.9) -> float:
    """Scale A on its parameters so that ρ(A) ≤ limit: A ← A · limit / ρ(A) when ρ(A) > limit.

    Returns:
        ρ(A) afterwards.

    Raises:
        ConfigError: ``limit`` is not inside (0, 1).
    """
    return model.recurrent.injection.rescale(limit)


def _rows(x: Tensor, columns: Tensor) -> Tensor:
    """One column of each row, (B, S, …) and (B,) → (B, 1, …)."""
    return x[torch.arange(x.shape[0], device=x.device), columns].unsqueeze(1)


def _recomputing() -> bool:
    """Whether a backward is running this forward again, which must then choose the same experts."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _begun(t: int | Tensor, value: Tensor) -> Tensor:
    """(B, S), with zeros for sequences that have not begun."""
    if isinstance(t, Tensor) and t.dim():
        return value * (t >= 0).unsqueeze(1)
    return value


def _slot(ctx: SequenceContext, name: str) -> str:
    """Nothing where nothing is cached, so that a compiler sees equal layers as one."""
    return name if ctx.cache is not None else ""
