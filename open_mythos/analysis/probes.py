"""Probes: what happens inside the loop, as plain records (JSON-ready dicts) that pictures are drawn from.

They compose the model's three ways in (prelude, step, coda) and watch; nothing in the model knows of them.

Shape letters: B batch, S sequence, D model width, E experts, T loops, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model import EveryLoop, KVCache, LastLoop, MoEFFN, OpenMythos
from open_mythos.model.inputs import check_ids, check_loops
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.model.transformer import evaluating
from open_mythos.weights.pretrained import assemble, skeleton

__all__ = ["Trace", "kv_footprint", "latent_path", "trace"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """What each loop did to each token.

    Attributes:
        ids: (B, S) the tokens.
        norms: (T, B, S) length ‖h_t‖ of the state after each loop.
        change: (T, B, S) ‖h_t − h_{t−1}‖ / ‖h_t‖, how far the loop moved it.
        selected: (B, S) loop, from 0, that contributes most to what the coda reads.
        weights: (T, B, S) weight of each loop's state in what the coda reads.
        expert_loads: (T, E) slots that each expert took in each loop; padding is not counted.
        halting: (T, B, S) probability of halting after each loop; None when ``cfg.halting`` is ``"off"``.
        states: (T, B, S, D), when asked for.
        entropy: (T, B, S) bits, of the prediction if the loop ended there, when asked for.
        mask: (B, S) bool, True for tokens; None without padding.
    """

    ids: Tensor
    norms: Tensor
    change: Tensor
    selected: Tensor
    weights: Tensor
    expert_loads: Tensor
    halting: Tensor | None = None
    states: Tensor | None = None
    entropy: Tensor | None = None
    mask: Tensor | None = None

    @property
    def n_loops(self) -> int:
        """T."""
        return self.norms.shape[0]

    def to_record(self, *, row: int = 0, max_tokens: int = 96, labels: Sequence[str] | None = None) -> Record:
        """A JSON-ready summary: quantiles over all tokens, and the matrices of one row's first tokens.

        Args:
            row: the sequence whose tokens are shown one by one.
            max_tokens: how many of its tokens to keep.
            labels: a readable name for each token of that row; its id by default.

        Raises:
            ValueError: ``row`` is not in the batch, ``max_tokens`` is below 1, or ``labels`` are too few.
        """
        if not 0 <= row < self.ids.shape[0]:
            raise ValueError(f"row = {row!r} is not allowed: it must be 0 to {self.ids.shape[0] - 1}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens = {max_tokens!r} is not allowed: it must be at least 1")
        real = torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask
        shown = real[row].nonzero().flatten()[:max_tokens]
        names = [str(int(i)) for i in self.ids[row]] if labels is None else list(labels)
        if len(names) < self.ids.shape[1]:
            raise ValueError(
                f"labels has {len(names)} entries: it must have one for each of {self.ids.shape[1]} tokens"
            )

        def matrix(values: Tensor | None) -> list[list[float]] | None:
            return None if values is None else _rounded(values[:, row, shown])

        return {
            "n_loops": self.n_loops,
            "sequences": self.ids.shape[0],
            "tokens": int(real.sum()),
            "labels": [names[int(i)] for i in shown],
            "norms": _spread(self.norms, real),
            "change": _spread(self.change, real),
            "entropy": None if self.entropy is None else _spread(self.entropy, real),
            "expert_loads": self.expert_loads.tolist(),
            "halting": matrix(self.halting),
            "weights": matrix(self.weights),
            "selected": (self.selected[row, shown] + 1).tolist(),
            "selected_mean": round(float(self.selected[real].double().mean()) + 1, 4),
        }


class _ExpertLoads:
    """Counts, by a hook on the router, the slots that each expert takes; one row each time the block runs."""

    def __init__(self, model: OpenMythos, mask: Tensor | None) -> None:
        ffn = model.recurrent.block.ffn
        if not isinstance(ffn, MoEFFN):
            raise TypeError(f"the looped block's ffn must be a MoEFFN, got {type(ffn).__name__}")
        self.ffn = ffn
        self.mask = mask
        self.rows: list[Tensor] = []

    def __enter__(self) -> _ExpertLoads:
        self.handle = self.ffn.router.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _count(self, _module: object, _inputs: object, logits: Tensor) -> None:
        experts = (logits.float() + self.ffn.router_bias).topk(self.ffn.topk, dim=-1).indices
        if self.mask is not None:
            experts = experts[self.mask.flatten()]
        self.rows.append(torch.bincount(experts.flatten(), minlength=self.ffn.n_experts))


@torch.no_grad()
def trace(
    model: OpenMythos,
    ids: Tensor,
    n_loops: int | None = None,
    *,
    attention_mask: Tensor | None = None,
    keep_states: bool = False,
    entropy: bool = False,
) -> Trace:
    """Run the loop and record it. The model is in eval mode meanwhile, and its mode is given back.

    Args:
        model: the model.
        ids: (B, S) token ids.
        n_loops: T ≥ 1; ``cfg.max_loop_iters`` when None.
        attention_mask: (B, S), zero for padding.
        keep_states: keep every state, 4·T·B·S·D bytes.
        entropy: decode every state and record the entropy of the prediction.

    Raises:
        ValueError: an argument does not fit the model.
    """
    n_loops = model.cfg.max_loop_iters if n_loops is None else n_loops
    check_loops(n_loops)
    check_ids(ids, model.cfg.vocab_size)
    ids = ids.to(model.embed.weight.device)
    mask = None if attention_mask is None else attention_mask.to(ids.device) != 0
    with evaluating(model), _ExpertLoads(model, mask) as loads:
        found = _run(model, ids, n_loops, mask, keep_states, entropy)
    return Trace(ids=ids.cpu(), expert_loads=torch.stack(loads.rows).cpu(), mask=_cpu(mask), **found)


def _run(
    model: OpenMythos, ids: Tensor, n_loops: int, mask: Tensor | None, keep_states: bool, entropy: bool
) -> dict[str, Any]:
    """The loop of :func:`trace`: its measurements, on the CPU."""
    ctx = model.context(ids, mask)
    e = model.prelude(ids, ctx)
    h = model.initial_state(e)
    ask = model.cfg.halting != "off"
    halt = HaltingWeights(model.cfg)
    kept: dict[str, list[Tensor]] = {
        key: [] for key in ("norms", "change", "halting", "weights", "states", "entropy")
    }
    for t in range(n_loops):
        before, h = h, model.step(h, e, t, ctx)
        length = h.float().norm(dim=-1)
        kept["norms"].append(length)
        kept["change"].append((h - before).float().norm(dim=-1) / length.clamp(min=1e-30))
        if ask:
            p = model.recurrent.act(h)
            kept["halting"].append(p.float())
            kept["weights"].append(halt.next(p, last=t == n_loops - 1).float())
        else:
            kept["weights"].append(torch.full_like(length, float(t == n_loops - 1)))
        if keep_states:
            kept["states"].append(h.float())
        if entropy:
            log_p = model.coda(h, ctx).float().log_softmax(-1)
            kept["entropy"].append(-(log_p.exp() * log_p).sum(-1) / math.log(2))
    out = {key: torch.stack(rows).cpu() for key, rows in kept.items() if rows}
    return {**out, "selected": out["weights"].argmax(0)}


def latent_path(found: Trace, tokens: Sequence[int] | None = None, *, row: int = 0) -> Record:
    """Where the states of some tokens go, loop by loop, in the plane that shows most of their movement.

    The plane holds the first two principal axes of these states over all loops (mean removed). Each axis
    points where its largest entry is positive, so that the same trace gives the same picture.

    Args:
        found: a trace with ``keep_states=True``.
        tokens: columns to follow; up to eight spread over the row by default.
        row: which sequence.

    Returns:
        ``points`` [token][loop][2], ``explained`` (share of variance of each axis), ``tokens``, ``n_loops``.

    Raises:
        ValueError: the trace has no states, or a token or the row is out of range.
    """
    if found.states is None:
        raise ValueError("the trace has no states: make it with trace(..., keep_states=True)")
    rows, width = found.ids.shape
    if not 0 <= row < rows:
        raise ValueError(f"row = {row!r} is not allowed: it must be 0 to {rows - 1}")
    real = list(range(width)) if found.mask is None else found.mask[row].nonzero().flatten().tolist()
    if tokens is None:
        count = min(8, len(real))
        tokens = [real[round(i * (len(real) - 1) / max(count - 1, 1))] for i in range(count)]
    for token in tokens:
        if token not in real:
            raise ValueError(
                f"token = {token!r} is not allowed: it must be a column of row {row} that is no padding"
            )
    states = found.states[:, row, list(tokens)].double()
    flat = states.flatten(0, 1)
    flat = flat - flat.mean(0)
    _, sizes, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    points = (flat @ axes.T).unflatten(0, states.shape[:2])
    if points.shape[-1] < 2:
        points = torch.nn.functional.pad(points, (0, 2 - points.shape[-1]))
    share = sizes.square() / sizes.square().sum().clamp(min=1e-300)
    return {
        "n_loops": found.n_loops,
        "tokens": list(tokens),
        "points": _rounded(points.transpose(0, 1)),
        "explained": [round(float(x), 4) for x in [*share[:2].tolist(), 0.0, 0.0][:2]],
    }


@torch.no_grad()
def kv_footprint(cfg: MythosConfig, tokens: int, loops: int) -> Record:
    """Bytes of real caches: MLA and GQA, one slot for every loop and one for all, filled by a model call.

    The model that fills them has this config's attention and layers, and the least of everything that no
    cache sees (vocabulary, experts, feed-forward), so that it also runs for large configs.

    Args:
        cfg: whose attention sizes to use; both attention types are built from it.
        tokens: sequence length, batch 1.
        loops: loops run.

    Returns:
        ``bars``: [{"attention", "policy", "bytes"}] in float32, ``per_token`` the sizes in words.

    Raises:
        ValueError: ``tokens`` or ``loops`` is not a whole number of at least 1.
        ConfigError: the config cannot be given one of the attention types.
    """
    for name, value in (("tokens", tokens), ("loops", loops)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} is not allowed: it must be a whole number of at least 1")
    least = {
        "vocab_size": 1, "n_experts": 1, "n_experts_per_tok": 1, "n_shared_experts": 0, "expert_dim": 4,
        "ffn_dim": 1, "lora_rank": 0, "max_seq_len": tokens, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    bars = []
    for attention in ("mla", "gqa"):
        model = skeleton(cfg.replace(attn_type=attention, **least))
        # Only sizes count: zeros, because drawing the weights of a large config would take most of the time.
        zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
        model = assemble(model, zeros).eval()
        for policy in (EveryLoop(), LastLoop()):
            cache = KVCache(policy)
            model(torch.zeros(1, tokens, dtype=torch.int64), n_loops=loops, kv_cache=cache)
            bars.append({"attention": attention, "policy": type(policy).__name__, "bytes": cache.nbytes})
    return {
        "tokens": tokens,
        "loops": loops,
        "layers": cfg.cached_layers,
        "bars": bars,
        "widths": {
            "mla": f"latent {cfg.kv_lora_rank} + rope key {cfg.qk_rope_head_dim}",
            "gqa": f"{cfg.n_kv_heads} heads × (key {cfg.head_dim} + value {cfg.head_dim})",
        },
    }


def _spread(values: Tensor, real: Tensor) -> Record:
    """Median and the 10th and 90th percentile over all real tokens, for each loop."""
    flat = values[:, real].double()
    low, middle, high = torch.quantile(flat, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=1)
    return {"p10": _rounded(low), "median": _rounded(middle), "p90": _rounded(high)}


def _rounded(values: Tensor) -> Any:
    """Nested lists with five significant digits: enough for a picture, and small."""

    def short(value: Any) -> Any:
        return [short(x) for x in value] if isinstance(value, list) else float(f"{value:.5g}")

    return short(values.tolist())


def _cpu(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.cpu()
