"""The configuration of a recurrent-depth transformer: one frozen dataclass, checked when it is made.

Standard library only, so that a config can be read, checked and counted without importing torch.

Shape letters used across the project: B batch, S sequence (new tokens), C context (cached and new tokens),
D model width, H heads, K head width, R latent rank, E experts, F expert width, T loops, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

__all__ = ["ConfigError", "MythosConfig"]

AttnType = Literal["mla", "gqa"]
InitialState = Literal["prelude", "zero", "random"]
BlockOutput = Literal["update", "state"]
Halting = Literal["select", "average", "upstream", "off"]
Init = Literal["scaled", "upstream"]


class ConfigError(ValueError):
    """A configuration value that is not allowed. The message names the field, the value and what is allowed."""


@dataclass(frozen=True)
class MythosConfig:
    """Every size and every architectural choice of an :class:`~open_mythos.OpenMythos` model.

    The first group has the names and defaults of the public 0.5.0 release, so that published code runs as it
    is. The second group is ours; :meth:`upstream` sets it so that the model computes what that release computes.

    Args:
        vocab_size: V, number of token ids.
        dim: D, width of the hidden state.
        n_heads: H, query heads.
        n_kv_heads: key/value heads of GQA, any 1 <= n_kv_heads <= n_heads; it need not divide n_heads. Not
            used by MLA.
        max_seq_len: longest sequence, in tokens fed to the model. Costs no memory.
        max_loop_iters: T, loops run when a call names none, and rows of the per-loop LoRA table.
        prelude_layers: layers run once before the loop.
        coda_layers: layers run once after the loop.
        attn_type: ``"mla"`` (latent cache, DeepSeek-V2, arXiv 2405.04434) or ``"gqa"`` (arXiv 2305.13245).
        kv_lora_rank: R, width of MLA's cached latent.
        q_lora_rank: width of MLA's query bottleneck.
        qk_rope_head_dim: MLA, per-head query/key channels that carry position; even.
        qk_nope_head_dim: MLA, per-head query/key channels that do not.
        v_head_dim: MLA, per-head value channels.
        n_experts: E, routed experts of the looped block.
        n_shared_experts: experts that see every token, each ``expert_dim * n_experts_per_tok`` wide.
        n_experts_per_tok: routed experts that see one token, at most n_experts.
        expert_dim: F, hidden width of one routed expert.
        act_threshold: cumulative halting probability at which a position stops (ACT, arXiv 1603.08983).
        rope_theta: base of the rotary frequencies. None becomes 2.5 · max_seq_len: 10,240, as is usual, for 4096
            tokens, and for short sequences a base whose slowest pairs still turn within them.
        lora_rank: rank of the per-loop LoRA on the looped block; 0 leaves it out.
        max_output_tokens: most tokens that one :meth:`generate` call may add.
        dropout: probability, on attention weights and on residual branches, while training.
        ffn_dim: hidden width of the dense feed-forward layers; None means ``4 * dim // 3``.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: the output head shares the embedding matrix.
        qk_norm: RMS-normalise each query and key head (GQA; MLA always normalises its latents).
        input_norm: RMS-normalise the prelude's output before it is injected.
        initial_state: state before the first loop: the injected input (``"prelude"``), zeros, or while training
            a fresh unit normal per position and zeros in evaluation (``"random"``, arXiv 2502.05171).
        block_output: what the looped block adds to the state: only its residual branches (``"update"``) or
            its whole output, input included (``"state"``, the public release).
        update_norm: RMS-normalise what the looped block adds to the state, so that the state stays bounded
            whatever its weights: ‖h‖ ≤ (‖B ⊙ e‖ + max|g| √D) / (1 − ρ(A)), g being the norm's gain.
        state_norm: RMS-normalise the state after each loop.
        previous_heads: the first heads of the looped block that see the token before alone (or, where there is none,
            the token itself): each loop hands states on by one position, wherever that is.
        alibi: let the scores of the looped block's other heads, h = 0, 1, …, fall by ``alibi · 2^−h`` a token of
            distance (arXiv 2108.12409): what is near counts, and far positions look like those trained on. 0 leaves
            it out.
        loop_embedding: add a sinusoidal loop index to the first ``dim // 8`` channels the block reads.
        extra_loops: while training, one forward pass in four with T loops first runs 1 to ``extra_loops · T`` more,
            without gradient and drawn anew each time, so that the loop learns to go on from wherever it stands. It
            is for training loops of one's own; the trainer draws its loops itself, as [loops] says, and a model
            inside ``torch.compile`` leaves them out.
        halting: what the loop hands to the coda. ``"select"``: for each position the state at which its
            cumulative halting probability reaches act_threshold, else the last. ``"average"``: ACT's weighted
            sum, weights summing to one. ``"upstream"``: the public release's sum, remainder missing.
            ``"off"``: the last state, no halting head is asked.
        halt_bias_init: bias of the halting head at initialisation (negative: halts late, arXiv 2604.21999).
        halt_tolerance: relative distance to the final state below which the halting head is taught to stop.
        router_bias_rate: step of the load-balancing bias per training forward (arXiv 2408.15664); 0 freezes it.
        init: ``"scaled"`` (unit embeddings, matrices at 1/sqrt(fan-in)) or ``"upstream"`` (all N(0, 0.02)).
        bos_token_id: token id that starts a text, or None.
        eos_token_id: token id that ends a text and a generation, or None.
        pad_token_id: token id that fills finished rows of a generation, or None (then the EOS id fills them).

    Raises:
        ConfigError: a field is unknown, of the wrong type, or out of range.

    Example:
        >>> MythosConfig(vocab_size=256, dim=128, n_heads=4, attn_type="gqa", n_kv_heads=3).head_dim
        32
    """

    vocab_size: int = 32000
    dim: int = 2048
    n_heads: int = 16
    n_kv_heads: int = 4
    max_seq_len: int = 4096
    max_loop_iters: int = 16
    prelude_layers: int = 2
    coda_layers: int = 2
    attn_type: AttnType = "mla"
    kv_lora_rank: int = 512
    q_lora_rank: int = 1536
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    n_experts: int = 64
    n_shared_experts: int = 2
    n_experts_per_tok: int = 4
    expert_dim: int = 512
    act_threshold: float = 0.99
    rope_theta: float = None  # type: ignore[assignment]  # a number once made
    lora_rank: int = 16
    max_output_tokens: int = 4096
    dropout: float = 0.0
    # Ours.
    ffn_dim: int | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = True
    input_norm: bool = True
    initial_state: InitialState = "zero"
    block_output: BlockOutput = "update"
    update_norm: bool = False
    state_norm: bool = False
    previous_heads: int = 0
    alibi: float = 0.0
    loop_embedding: bool = False
    extra_loops: float = 0.0
    halting: Halting = "select"
    halt_bias_init: float = -3.0
    halt_tolerance: float = 0.05
    router_bias_rate: float = 1e-2
    init: Init = "scaled"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> MythosConfig:
        """Refuse unknown fields with a hint, before the generated ``__init__`` refuses them without."""
        _refuse_unknown(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        chosen: float | None = self.rope_theta
        for name, rule in _RULES.items():
            if name != "rope_theta" or chosen is not None:
                _check_value(name, getattr(self, name), rule)
        if chosen is None:
            object.__setattr__(self, "rope_theta", max(2.5 * self.max_seq_len, _LEAST_ROPE_THETA))
        self._check_relations()

    def _check_relations(self) -> None:
        if self.attn_type == "gqa":
            if self.n_kv_heads > self.n_heads:
                raise _error(
                    "n_kv_heads", self.n_kv_heads, f"1 to n_heads ({self.n_heads}) when attn_type is 'gqa'"
                )
            if self.dim % self.n_heads:
                raise _error(
                    "n_heads", self.n_heads, f"a divisor of dim ({self.dim}) when attn_type is 'gqa'"
                )
            if self.head_dim % 2:
                allowed = f"dim / n_heads even, but it is {self.head_dim} (rotary pairs)"
                raise _error("n_heads", self.n_heads, allowed)
        elif self.qk_rope_head_dim % 2:
            raise _error("qk_rope_head_dim", self.qk_rope_head_dim, "an even number (rotary pairs)")
        if self.previous_heads > self.n_heads:
            raise _error("previous_heads", self.previous_heads, f"0 to n_heads ({self.n_heads})")
        if self.n_experts_per_tok > self.n_experts:
            raise _error("n_experts_per_tok", self.n_experts_per_tok, f"1 to n_experts ({self.n_experts})")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise _error(name, token, f"None or 0 to vocab_size - 1 ({self.vocab_size - 1})")

    @property
    def head_dim(self) -> int:
        """K, width of one GQA head."""
        return self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """Channels of a query or key that its position turns: all of a GQA head, those that MLA sets apart."""
        return self.qk_rope_head_dim if self.attn_type == "mla" else self.head_dim

    def cached_shapes(self, attn_type: str | None = None) -> dict[str, tuple[int, ...]]:
        """What one token leaves in the cache of one layer, name → shape.

        MLA keeps the latent and, beside it, the key channels with the position, which all heads share.

        Args:
            attn_type: ``"gqa"`` or ``"mla"`` instead of the config's own, its other sizes as they are.
        """
        if (self.attn_type if attn_type is None else attn_type) == "mla":
            return {"latent": (self.kv_lora_rank + self.qk_rope_head_dim,)}
        # Only GQA's own configs have had their number of heads checked.
        heads = (min(self.n_kv_heads, self.n_heads), self.head_dim)
        return {"k": heads, "v": heads}

    @property
    def dense_dim(self) -> int:
        """Hidden width of the dense feed-forward layers."""
        return self.ffn_dim if self.ffn_dim is not None else 4 * self.dim // 3

    @property
    def shared_dim(self) -> int:
        """Hidden width of all shared experts together (their sum is one wide SwiGLU)."""
        return self.n_shared_experts * self.n_experts_per_tok * self.expert_dim

    @property
    def cached_layers(self) -> int:
        """Layers of one loop count that keep keys and values: prelude, looped block (once), coda."""
        return self.prelude_layers + 1 + self.coda_layers

    @classmethod
    def upstream(cls, **fields: Any) -> MythosConfig:
        """The preset that computes exactly what the public 0.5.0 release computes (averaged ACT included).

        Args:
            **fields: the release's own fields, and any of ours except those the preset fixes.

        Raises:
            ConfigError: a field that the preset fixes is given another value.
        """
        for name, value in fields.items():
            if name in _UPSTREAM and value != _UPSTREAM[name]:
                raise _error(name, value, f"{_UPSTREAM[name]!r}, which the upstream preset fixes")
        return cls(**{"rope_theta": _UPSTREAM_ROPE_THETA, **_UPSTREAM, **fields})

    def replace(self, **changes: Any) -> MythosConfig:
        """A checked copy with some fields changed."""
        _refuse_unknown(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MythosConfig:
        """The config with these fields; absent ones take their defaults.

        Raises:
            ConfigError: ``fields`` is not a dict, or a field is unknown or not allowed.
        """
        if not isinstance(fields, dict):
            raise ConfigError(f"a config must be a JSON object of fields, got {type(fields).__name__}")
        _refuse_unknown(cls, fields)
        return cls(**fields)

    def to_json(self) -> str:
        """The config as a JSON object, one field a line."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MythosConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            ConfigError: the text is not JSON, or a field is unknown or not allowed.
        """
        if not isinstance(text, (str, bytes, bytearray)):
            raise ConfigError(f"a config must be JSON text, got {type(text).__name__}")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # not only bad JSON: endless digits, nesting, bad UTF-8
            raise ConfigError(f"config is not valid JSON: {error}") from error
        return cls.from_dict(fields)


_LEAST_ROPE_THETA = 10.0
_UPSTREAM_ROPE_THETA = 500000.0

_UPSTREAM: dict[str, Any] = {
    "qk_norm": False,
    "input_norm": False,
    "initial_state": "prelude",
    "block_output": "state",
    "update_norm": False,
    "state_norm": False,
    "previous_heads": 0,
    "alibi": 0.0,
    "loop_embedding": True,
    "extra_loops": 0.0,
    "halting": "upstream",
    "halt_bias_init": 0.0,
    "router_bias_rate": 0.0,
    "init": "upstream",
    "tie_embeddings": True,
    "ffn_dim": None,
    "norm_eps": 1e-6,
}


@dataclass(frozen=True)
class _Int:
    low: int = 1
    optional: bool = False


@dataclass(frozen=True)
class _Float:
    """A finite number in the interval; ``open_low``/``open_high`` exclude the end itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        left = "" if math.isinf(self.low) else f"{'above' if self.open_low else 'at least'} {self.low:g}"
        right = "" if math.isinf(self.high) else f"{'below' if self.open_high else 'at most'} {self.high:g}"
        return "a finite number " + " and ".join(part for part in (left, right) if part)


@dataclass(frozen=True)
class _Choice:
    options: tuple[str, ...]


_RULES: dict[str, _Int | _Float | _Choice | type] = {
    "vocab_size": _Int(),
    "dim": _Int(),
    "n_heads": _Int(),
    "n_kv_heads": _Int(),
    "max_seq_len": _Int(),
    "max_loop_iters": _Int(),
    "prelude_layers": _Int(0),
    "coda_layers": _Int(0),
    "attn_type": _Choice(get_args(AttnType)),
    "kv_lora_rank": _Int(),
    "q_lora_rank": _Int(),
    "qk_rope_head_dim": _Int(2),
    "qk_nope_head_dim": _Int(),
    "v_head_dim": _Int(),
    "n_experts": _Int(),
    "n_shared_experts": _Int(0),
    "n_experts_per_tok": _Int(),
    "expert_dim": _Int(),
    "act_threshold": _Float(0, open_low=True),
    "rope_theta": _Float(1, open_low=True),
    "lora_rank": _Int(0),
    "max_output_tokens": _Int(),
    "dropout": _Float(0, 1, open_high=True),
    "ffn_dim": _Int(optional=True),
    "norm_eps": _Float(0, open_low=True),
    "tie_embeddings": bool,
    "qk_norm": bool,
    "input_norm": bool,
    "initial_state": _Choice(get_args(InitialState)),
    "block_output": _Choice(get_args(BlockOutput)),
    "update_norm": bool,
    "state_norm": bool,
    "previous_heads": _Int(0),
    "alibi": _Float(0, 1e4),
    "loop_embedding": bool,
    "extra_loops": _Float(0, 1e3),
    "halting": _Choice(get_args(Halting)),
    "halt_bias_init": _Float(),
    "halt_tolerance": _Float(0, open_low=True),
    "router_bias_rate": _Float(0, 1e3),
    "init": _Choice(get_args(Init)),
    "bos_token_id": _Int(0, optional=True),
    "eos_token_id": _Int(0, optional=True),
    "pad_token_id": _Int(0, optional=True),
}


def _error(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name} = {value!r} is not allowed: it must be {allowed}")


def _refuse_unknown(cls: type, fields: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name, value in fields.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the fields are {', '.join(known)}"
            raise ConfigError(f"{name} = {value!r} is not allowed: MythosConfig has no such field{hint}")


def _check_value(name: str, value: Any, rule: _Int | _Float | _Choice | type) -> None:
    if isinstance(rule, _Int):
        if value is None and rule.optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < rule.low:
            raise _error(
                name, value, f"{'None or ' if rule.optional else ''}a whole number of at least {rule.low}"
            )
    elif isinstance(rule, _Float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (rule.low <= value <= rule.high) or not abs(value) <= sys.float_info.max:
            raise _error(name, value, str(rule))
        if (rule.open_low and value == rule.low) or (rule.open_high and value == rule.high):
            raise _error(name, value, str(rule))
    elif isinstance(rule, _Choice):
        if value not in rule.options:
            raise _error(name, value, " or ".join(repr(option) for option in rule.options))
    elif not isinstance(value, bool):
        raise _error(name, value, "True or False")


def field_types() -> dict[str, Any]:
    """Field name → annotated type; for command lines and docs that list the fields."""
    return get_type_hints(MythosConfig)
