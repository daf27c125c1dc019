"""What a config costs: parameters, FLOPs and cache bytes, without building a model or importing torch.

Shape letters: C context tokens, D model width, H heads, G key/value heads, K head width, R latent rank,
E experts, F expert width, T loops, V vocabulary.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from open_mythos.config import ConfigError, MythosConfig

__all__ = [
    "ParameterCount",
    "flops_per_token",
    "format_count",
    "kv_bytes_per_token",
    "kv_table",
    "parameters",
    "parse_count",
    "propose",
]

POLICIES = ("every-loop", "last-loop")
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, by part. The parts add up to ``total``; buffers are not parameters.

    Attributes:
        parts: part → count. ``embed``; ``prelude`` (layers and input norm); ``recurrent.attention``,
            ``.router``, ``.routed_experts``, ``.shared_experts``, ``.lora``, ``.injection``, ``.halting``,
            ``.norms``; ``coda`` (layers and final norm); ``head`` (0 when tied).
        total: all parameters; the looped block is there once.
        active: parameters that one token uses, the looped block counted once: k of E routed experts, one row
            of an untied embedding, no halting head when halting is off.
    """

    parts: dict[str, int]
    total: int
    active: int

    @property
    def recurrent(self) -> int:
        """All of the looped block."""
        return sum(count for part, count in self.parts.items() if part.startswith("recurrent."))


def parameters(cfg: MythosConfig) -> ParameterCount:
    """Count the parameters of ``OpenMythos(cfg)``, exactly.

    Args:
        cfg: any valid config.

    Example:
        >>> parameters(MythosConfig(vocab_size=64, dim=128, n_heads=4)).parts["embed"]
        8192
    """
    D = cfg.dim
    attention = _attention_parameters(cfg)
    dense = attention + 3 * D * cfg.dense_dim + 2 * D
    expert = 3 * D * cfg.expert_dim
    parts = {
        "embed": cfg.vocab_size * D,
        "prelude": cfg.prelude_layers * dense + (D if cfg.input_norm else 0),
        "recurrent.attention": attention,
        "recurrent.router": D * cfg.n_experts,
        "recurrent.routed_experts": cfg.n_experts * expert,
        "recurrent.shared_experts": 3 * D * cfg.shared_dim,
        "recurrent.lora": cfg.lora_rank * (2 * D + cfg.max_loop_iters),
        "recurrent.injection": 2 * D + 1,
        "recurrent.halting": D + 1,
        "recurrent.norms": (3 + cfg.update_norm + cfg.state_norm) * D,
        "coda": cfg.coda_layers * dense + D,
        "head": 0 if cfg.tie_embeddings else cfg.vocab_size * D,
    }
    total = sum(parts.values())
    active = total - (cfg.n_experts - cfg.n_experts_per_tok) * expert
    if not cfg.tie_embeddings:
        active -= (cfg.vocab_size - 1) * D
    if cfg.halting == "off":
        active -= parts["recurrent.halting"]
    return ParameterCount(parts, total, active)


def _attention_parameters(cfg: MythosConfig) -> int:
    """Projections of one attention layer and the norms inside it."""
    D, H = cfg.dim, cfg.n_heads
    if cfg.attn_type == "gqa":
        norms = 2 * cfg.head_dim if cfg.qk_norm else 0
        return 2 * D * H * cfg.head_dim + 2 * D * cfg.n_kv_heads * cfg.head_dim + norms
    R, Q = cfg.kv_lora_rank, cfg.q_lora_rank
    rope, nope, value = cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.v_head_dim
    queries = D * Q + Q + Q * H * (nope + rope)
    return queries + D * (R + rope) + R + R * H * (nope + value) + H * value * D


def flops_per_token(
    cfg: MythosConfig, n_loops: int | None = None, *, context: int = 1, decode: bool = False
) -> int:
    """Floating-point operations of one token's forward pass, 2 for each multiply-add of a matrix product.

    Counted: every projection, scores and weighted values of attention over ``context`` keys, router, k routed
    and all shared experts, per-loop LoRA, halting head, output head.
    Not counted: embedding lookup, norms, softmax, activations and their weights, rotary
    positions, the linear injection.

    A whole sequence of S tokens through dense attention costs S times this at ``context=S``; what causality
    needs of it is the same at ``context=(S + 1) // 2``. A backward pass costs about twice a forward.

    Args:
        cfg: any valid config.
        n_loops: T; ``cfg.max_loop_iters`` when None.
        context: C, keys that the token sees, itself included.
        decode: one new token upon a cache of C − 1, where MLA either attends on the latent itself (its
            up-projections absorbed) or rebuilds keys and values, whichever is cheaper, as the model does.

    Raises:
        ValueError: ``n_loops`` or ``context`` is not a whole number of at least 1.
    """
    loops = cfg.max_loop_iters if n_loops is None else n_loops
    _whole("n_loops", loops)
    _whole("context", context)
    D, k = cfg.dim, cfg.n_experts_per_tok
    attention = _attention_products(cfg, context, decode)
    dense = attention + 3 * D * cfg.dense_dim
    experts = 3 * D * (k * cfg.expert_dim + cfg.shared_dim) + D * cfg.n_experts
    loop = attention + experts + 2 * D * cfg.lora_rank + (0 if cfg.halting == "off" else D)
    layers = cfg.prelude_layers + cfg.coda_layers
    return 2 * (layers * dense + loops * loop + D * cfg.vocab_size)


def _attention_products(cfg: MythosConfig, context: int, decode: bool) -> int:
    """Multiply-adds of one attention layer for one new token that sees ``context`` keys."""
    D, H = cfg.dim, cfg.n_heads
    if cfg.attn_type == "gqa":
        heads = H * cfg.head_dim
        return 2 * D * heads + 2 * D * cfg.n_kv_heads * cfg.head_dim + 2 * context * heads
    R, Q = cfg.kv_lora_rank, cfg.q_lora_rank
    rope, nope, value = cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.v_head_dim
    projections = D * Q + Q * H * (nope + rope) + D * (R + rope) + H * value * D
    up = R * H * (nope + value)
    expanded = context * H * (nope + rope + value)
    if not decode or context == 1:
        return projections + up + expanded
    absorbed = up + context * H * (2 * R + rope)
    return projections + min(absorbed, context * up + expanded)


def kv_bytes_per_token(
    cfg: MythosConfig,
    policy: str = "every-loop",
    n_loops: int | None = None,
    bytes_per_element: int = 2,
    attn_type: str | None = None,
) -> int:
    """Bytes that a cache keeps for each token of each sequence.

    One entry a layer is 2·G·K elements (GQA: keys and values) or R + K_rope (MLA: the latent and one rope key
    for all heads). Prelude and coda layers keep one each, the looped block one a loop or one in all.

    Args:
        cfg: any valid config.
        policy: ``"every-loop"`` (exact) or ``"last-loop"`` (one entry for all loops).
        n_loops: T; ``cfg.max_loop_iters`` when None.
        bytes_per_element: 2 for bfloat16, 4 for float32.
        attn_type: ``"gqa"`` or ``"mla"`` instead of the config's own, its other sizes as they are.

    Raises:
        ValueError: an argument is out of range.
    """
    loops = cfg.max_loop_iters if n_loops is None else n_loops
    _whole("n_loops", loops)
    _whole("bytes_per_element", bytes_per_element)
    attn_type = cfg.attn_type if attn_type is None else attn_type
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r} is not allowed: it must be 'every-loop' or 'last-loop'")
    if attn_type not in ("gqa", "mla"):
        raise ValueError(f"attn_type = {attn_type!r} is not allowed: it must be 'gqa' or 'mla'")
    each = sum(map(math.prod, cfg.cached_shapes(attn_type).values()))
    entries = cfg.prelude_layers + cfg.coda_layers + (loops if policy == "every-loop" else 1)
    return entries * each * bytes_per_element


def kv_table(
    cfg: MythosConfig, n_loops: int | None = None, bytes_per_element: int = 2
) -> dict[tuple[str, str], int]:
    """:func:`kv_bytes_per_token` of both attentions under both policies: (attn_type, policy) → bytes."""
    return {
        (attn_type, policy): kv_bytes_per_token(cfg, policy, n_loops, bytes_per_element, attn_type)
        for attn_type in ("gqa", "mla")
        for policy in POLICIES
    }


def parse_count(text: str | int) -> int:
    """A number of parameters as people write it: ``200k``, ``1.5M``, ``7b``, ``1t``, ``200_000``, ``200000``.

    Raises:
        ValueError: it is not such a number, or below one.
    """
    allowed = "a whole number of at least 1, written as 200k, 1.5M, 7b, 1t or 200000"
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"{text!r} is not a parameter count: it must be {allowed}")
    match = re.fullmatch(r"(\d[\d_]{0,17}(?:\.\d{1,12})?)\s*([kmbt]?)", str(text).strip().lower(), re.ASCII)
    count = Decimal(match[1].replace("_", "")) * _SUFFIXES[match[2]] if match else Decimal(0)
    if count < 1 or count != int(count):
        raise ValueError(f"{text!r} is not a parameter count: it must be {allowed}")
    return int(count)


def format_count(count: int) -> str:
    """A count in three digits and the suffix that :func:`parse_count` reads: 370306 → ``370k``."""
    if abs(count) < 1000:
        return str(count)
    value = float(count)
    for suffix in ("", "k", "M", "B", "T"):
        if abs(value) < 999.5 or suffix == "T":
            break
        value /= 1000
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    number = f"{value:.{digits}f}"
    return (number.rstrip("0").rstrip(".") if "." in number else number) + suffix


# The order in which a budget is met. Widths first, all by the same fraction; the experts that one token uses
# only when the widths are down to an eighth, and the number of experts last.
_WIDTHS = ("expert_dim", "heads", "ffn_dim", "q_lora_rank", "kv_lora_rank", "lora_rank")
_EXPERTS = ("n_experts_per_tok", "n_experts")


def propose(cfg: MythosConfig, budget: int | str) -> tuple[MythosConfig, list[str]]:
    """The nearest config whose total parameters fit a budget.

    The order is the articles': expert_dim and heads go before n_experts_per_tok. In full: expert_dim, heads,
    the dense layers' ffn_dim and the ranks are lowered in that order, first to no less than a half, then a
    quarter, then an eighth of what they were; then n_experts_per_tok; then n_experts. The last one lowered
    stops at the largest value that fits, and what is left of the budget is given back, experts first. Heads
    are n_heads for MLA and n_kv_heads for GQA, whose query heads share out ``dim`` whatever their number.
    Vocabulary, dim, layers and loops are never touched. Lowered widths are multiples of 8 (of more where they
    are large), which fast matrix products need.

    Args:
        cfg: where to start.
        budget: parameters, as a number or as :func:`parse_count` reads it.

    Returns:
        The config, and one line for each change; ``cfg`` itself and no lines when it already fits.

    Raises:
        ConfigError: the budget is below what these changes can reach.
        ValueError: the budget is not a parameter count.
    """
    limit = parse_count(budget)
    start = cfg
    if parameters(cfg).total <= limit:
        return cfg, []
    rounds = [(name, part) for part in (2, 4, 8) for name in _WIDTHS]
    for name, part in [*rounds, *((name, 0) for name in _EXPERTS)]:
        cfg = _lower(cfg, _field(start, name), _levels(start, name, part), limit)
        if parameters(cfg).total <= limit:
            cfg = _give_back(start, cfg, limit)
            return cfg, _changes(start, cfg)
    least = parameters(cfg).total
    raise ConfigError(
        f"budget = {limit:,} parameters is not allowed: fewer and narrower heads and experts reach {least:,} "
        f"at vocab_size {cfg.vocab_size}, dim {cfg.dim} and {cfg.prelude_layers} + {cfg.coda_layers} layers; "
        "lower one of these, or raise the budget"
    )


def _field(cfg: MythosConfig, name: str) -> str:
    if name == "heads":
        return "n_heads" if cfg.attn_type == "mla" else "n_kv_heads"
    return name


def _levels(start: MythosConfig, name: str, part: int) -> list[int]:
    """Values a field may take in this round, from large to small; empty when it plays no part."""
    mla_only = name in ("q_lora_rank", "kv_lora_rank")
    no_dense_layers = name == "ffn_dim" and not start.prelude_layers + start.coda_layers
    if (mla_only and start.attn_type != "mla") or no_dense_layers:
        return []
    now = start.dense_dim if name == "ffn_dim" else getattr(start, _field(start, name))
    if name == "n_experts":
        return list(range(now, 0, -1))
    if name in ("heads", "n_experts_per_tok"):
        return list(range(now, max(1, -(-now // part) if part else 1) - 1, -1))
    step = 8
    while step < 64 and now % (2 * step) == 0 and now >= 16 * step:
        step *= 2
    if name == "lora_rank":
        step = 1
    floor = max(step, -(-now // part))
    multiples = range((now - 1) // step * step, floor - 1, -step)
    return [now, *multiples] if now >= floor else [now]


def _lower(cfg: MythosConfig, field: str, levels: list[int], limit: int) -> MythosConfig:
    """The largest of the levels at or below the present value that fits, else the smallest of them."""
    now = cfg.dense_dim if field == "ffn_dim" else getattr(cfg, field)
    low = cfg.n_experts_per_tok if field == "n_experts" else 0
    for value in levels:
        if low <= value < now:
            cfg = cfg.replace(**{field: value})
            if parameters(cfg).total <= limit:
                return cfg
    return cfg


def _give_back(start: MythosConfig, cfg: MythosConfig, limit: int) -> MythosConfig:
    """Raise each lowered field, the articles' first ones first, as far as the budget still allows."""
    for name in (*_EXPERTS, *_WIDTHS):
        field = _field(start, name)
        now = cfg.dense_dim if field == "ffn_dim" else getattr(cfg, field)
        for value in _levels(start, name, 0 if name in _EXPERTS else 8):
            if value <= now:
                break
            if field == "n_experts_per_tok" and value > cfg.n_experts:
                continue
            raised = start.ffn_dim if field == "ffn_dim" and value == start.dense_dim else value
            candidate = cfg.replace(**{field: raised})
            if parameters(candidate).total <= limit:
                cfg = candidate
                break
    return cfg


def _changes(start: MythosConfig, cfg: MythosConfig) -> list[str]:
    """One line for each field that differs, in the order they are lowered."""
    lines = []
    for name in (*_WIDTHS, *_EXPERTS):
        field = _field(start, name)
        before = start.dense_dim if field == "ffn_dim" else getattr(start, field)
        after = cfg.dense_dim if field == "ffn_dim" else getattr(cfg, field)
        if before != after:
            lines.append(f"{field}: {before} -> {after}")
    return lines


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r} is not allowed: it must be a whole number of at least 1")
