"""Checkpoints of the public 0.5.0 release ("upstream"), in and out.

Upstream rotates neighbouring channels (2i, 2i+1), this package halves (i, i + K/2): rows of rotated
projections are permuted. Its experts are modules, here they are stacked; its shared experts are several
SwiGLUs, here they are one wide one, which computes the same sum. The config is :meth:`MythosConfig.upstream`,
so that the model computes what upstream computes. One difference is kept: log_A + log_dt is clamped to
[-15, 4.4], not to [-20, 20], whose ends are A = 1 and A = 0 in float32.

Shape letters: D model width, H heads, K head width, N positions.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.weights.layout import State, block_in, block_out, layers, shapes, under
from open_mythos.weights.pretrained import (
    WRAPPERS,
    WeightsError,
    assemble,
    open_header,
    skeleton,
    some_names,
)

__all__ = ["from_upstream_state_dict", "load_upstream", "to_upstream_state_dict"]

_ROPE_TABLES = ("freqs_cis", "freqs_cis_mla")
_UPSTREAM_FIELDS = (
    *("vocab_size", "dim", "n_heads", "n_kv_heads", "max_seq_len", "max_loop_iters", "prelude_layers"),
    *("coda_layers", "attn_type", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"),
    *("v_head_dim", "n_experts", "n_shared_experts", "n_experts_per_tok", "expert_dim", "act_threshold"),
    *("rope_theta", "lora_rank", "max_output_tokens", "dropout"),
)


class _Fields:
    """Stands in for upstream's config class in a checkpoint: attributes, no behaviour."""


def load_upstream(
    source: Mapping[str, Any] | str | os.PathLike[str], fields: Mapping[str, Any] | None = None
) -> OpenMythos:
    """An upstream model as ours, in eval mode, with the weights' own dtype.

    Sizes are read from the tensors' shapes, rope_theta and max_seq_len from upstream's rotary tables where
    the checkpoint has them, anything from a config that it has under ``cfg`` or ``config``. What is left must
    be in ``fields``: act_threshold in any case, n_experts_per_tok without shared experts, and, without rotary
    tables, rope_theta and GQA's n_heads.

    Args:
        source: a state dict; a dict that holds one under ``model``, ``model_state_dict`` or ``state_dict``;
            or a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file of either. The latter three are read by
            ``torch.load(weights_only=True)``, which runs no code from the file and refuses one that needs it.
        fields: config fields of upstream; they must agree with the shapes, and go before the checkpoint's.

    Raises:
        WeightsError: the file or state dict is none of upstream's, or a needed field is not known.
        ConfigError: a field is not allowed.
    """
    if not isinstance(source, (Mapping, str, os.PathLike)):
        raise WeightsError(f"source must be a state dict or the path of a file, got {type(source).__name__}")
    if fields is not None and not isinstance(fields, Mapping):
        raise WeightsError(f"fields must be a dict of config fields, got {type(fields).__name__}")
    content = source if isinstance(source, Mapping) else _read(Path(source))
    state, stored = _unpack(content)
    known = {**_stored_fields(stored), **dict(fields or {})}
    cfg = MythosConfig.upstream(**_sizes(state, known))
    weights = {name: tensor for name, tensor in state.items() if name not in _ROPE_TABLES}
    return assemble(skeleton(cfg), from_upstream_state_dict(weights, cfg)).eval()


def from_upstream_state_dict(state: Mapping[str, Tensor], cfg: MythosConfig) -> State:
    """Upstream's tensors under our names and in our layout. It only moves values: gradients convert as well.

    Args:
        state: upstream's state dict, rotary tables left out; ``head.weight`` may be absent.
        cfg: the model's config.

    Raises:
        WeightsError: tensors are missing, unexpected, of another shape than the config says, or the head is
            not tied.
    """
    state = {"head.weight": state["embed.weight"], **state} if "embed.weight" in state else dict(state)
    _check_state(state, cfg)
    if state["head.weight"] is not state["embed.weight"] and not torch.equal(
        state["head.weight"], state["embed.weight"]
    ):
        raise WeightsError("head.weight differs from embed.weight, but upstream ties them")
    out: State = {"embed.weight": state["embed.weight"].clone(), "norm.weight": state["norm.weight"].clone()}
    for theirs, ours in layers(cfg):
        out |= block_in(under(state, theirs), cfg, ours, moe=theirs == "recurrent.block")
    out |= _around_the_block(state)
    return out


def to_upstream_state_dict(model: OpenMythos, rope_tables: bool = True) -> State:
    """The state dict that upstream's ``load_state_dict`` takes; the inverse of :func:`load_upstream`.

    Args:
        model: a model whose config is of the preset :meth:`MythosConfig.upstream`.
        rope_tables: with upstream's two complex tables, max_seq_len rows each, which it requires.

    Raises:
        WeightsError: the config computes what upstream cannot; the message names the field.
    """
    cfg = model.cfg
    _check_config(cfg)
    state = dict(model.state_dict())
    embed = state["embed.weight"].clone()
    out: State = {"embed.weight": embed, "head.weight": embed, "norm.weight": state["norm.weight"].clone()}
    for theirs, ours in layers(cfg):
        out |= block_out(under(state, ours), cfg, theirs, moe=theirs == "recurrent.block")
    out |= _around_the_block(state)
    if rope_tables:
        for name, width in zip(_ROPE_TABLES, (cfg.head_dim, cfg.qk_rope_head_dim), strict=True):
            out[name] = _rope_table(width, cfg.max_seq_len, cfg.rope_theta)
    return out


# Reading.


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise WeightsError(
            f"{path} is a directory: load_upstream takes a file; what save_pretrained wrote is for from_pretrained"
        )
    if not path.is_file():
        raise WeightsError(f"{path} is missing")
    if path.suffix == ".safetensors":
        names = open_header(path).shapes
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise WeightsError(f"{path} is not allowed: it must end in .safetensors, .pt, .pth or .bin")
    try:
        stand_in = torch.serialization.safe_globals([(_Fields, "open_mythos.main.MythosConfig")])
        with stand_in, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols; what matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain values, and reading "
            "that could run code from the file; save it anew with torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # a damaged file may raise anything inside the reader
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{path} is not a readable torch file: {reason}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds {type(content).__name__}: it must hold a dict of tensors")
    return content


def _unpack(content: Mapping[str, Any]) -> tuple[State, object]:
    """The state dict, wrappers' prefixes removed, and the config beside it, if any."""
    stored = next((content[key] for key in ("cfg", "config") if content.get(key) is not None), None)
    for key in ("model", "model_state_dict", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {WRAPPERS.sub("", str(name)): value for name, value in content.items()}
    odd = sorted(name for name, value in state.items() if not isinstance(value, Tensor))
    if odd or "embed.weight" not in state:
        what = f"it holds {some_names(odd)}, which are no tensors" if odd else "it has no embed.weight"
        raise WeightsError(
            f"this is no upstream state dict: {what}; give the state dict, or a dict that holds it under "
            "'model', 'model_state_dict' or 'state_dict'"
        )
    return state, stored


def _stored_fields(stored: object) -> dict[str, Any]:
    """Upstream's fields of a config stored as a dict or as upstream's config object."""
    if stored is None:
        return {}
    fields = (
        dict(stored) if isinstance(stored, Mapping) else vars(stored) if hasattr(stored, "__dict__") else None
    )
    if fields is None:
        raise WeightsError(f"the checkpoint's config is {type(stored).__name__}: it must be a dict of fields")
    return {name: fields[name] for name in _UPSTREAM_FIELDS if name in fields}


# Sizes from shapes.


def _sizes(state: State, known: Mapping[str, Any]) -> dict[str, Any]:
    """Every field: from the shapes where they tell, else the known ones."""
    inferred = _infer(state)
    needed = ["act_threshold", "rope_theta", "n_heads", "n_experts_per_tok"]
    missing = [name for name in needed if name not in known and name not in inferred]
    if missing:
        raise WeightsError(
            f"the checkpoint does not tell {', '.join(missing)}: pass them, as load_upstream(source, "
            f"{{{', '.join(f'{name!r}: ...' for name in missing)}}})"
        )
    if inferred["attn_type"] == "gqa" and "n_heads" not in inferred:
        inferred["n_kv_heads"] = _kv_heads(state, inferred["dim"], known["n_heads"])
    for name, value in inferred.items():
        given = known.get(name, value)
        # The table in single precision tells theta nearly; the length of it is no more than a limit.
        near = (
            name == "rope_theta"
            and isinstance(given, (int, float))
            and math.isclose(given, value, rel_tol=1e-4)
        )
        if given != value and not near and name != "max_seq_len":
            raise WeightsError(f"{name} = {given!r} is not allowed: the checkpoint's tensors say {value!r}")
    return {**inferred, **known}


def _infer(state: State) -> dict[str, Any]:
    """Every field that shapes and rotary tables determine."""
    block = "recurrent.block"
    attn_type = "mla" if f"{block}.attn.q_down.weight" in state else "gqa"
    attn = {"mla": ("q_down", "q_up_nope", "q_up_rope", "kv_norm", "kv_down", "kv_up"), "gqa": ("wq", "wk")}
    needed = [f"{block}.attn.{name}.weight" for name in attn[attn_type]]
    needed += [f"{block}.ffn.router.weight", f"{block}.ffn.routed_experts.0.gate.weight"]
    needed += ["recurrent.lora.scale.weight"]
    if missing := [name for name in needed if name not in state or state[name].dim() == 0]:
        raise WeightsError(f"this is no upstream state dict: it lacks {some_names(missing)}")
    rows = {name.removeprefix(f"{block}."): state[name].shape[0] for name in needed}
    sizes: dict[str, Any] = {
        "attn_type": attn_type,
        "vocab_size": state["embed.weight"].shape[0],
        "dim": state["embed.weight"].shape[-1],
        "prelude_layers": _count(state, r"prelude\.(\d+)\."),
        "coda_layers": _count(state, r"coda\.(\d+)\."),
        "max_loop_iters": state["recurrent.lora.scale.weight"].shape[0],
        "lora_rank": state["recurrent.lora.scale.weight"].shape[-1],
        "n_experts": rows["ffn.router.weight"],
        "expert_dim": rows["ffn.routed_experts.0.gate.weight"],
        "n_shared_experts": _count(state, rf"{re.escape(block)}\.ffn\.shared_experts\.(\d+)\."),
    }
    shared = state.get(f"{block}.ffn.shared_experts.0.gate.weight")
    if shared is not None:
        sizes["n_experts_per_tok"] = shared.shape[0] // max(sizes["expert_dim"], 1)
    if attn_type == "mla":
        sizes |= _infer_mla(rows)
    return sizes | _infer_rope(state, attn_type, sizes["dim"])


def _infer_mla(rows: Mapping[str, int]) -> dict[str, Any]:
    """Widths and heads of MLA from the rows of its projections."""
    rank = rows["attn.kv_norm.weight"]
    rope = rows["attn.kv_down.weight"] - rank
    heads = rows["attn.q_up_rope.weight"] // max(rope, 1)
    nope = rows["attn.q_up_nope.weight"] // max(heads, 1)
    return {
        "n_heads": heads,
        "kv_lora_rank": rank,
        "q_lora_rank": rows["attn.q_down.weight"],
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": nope,
        "v_head_dim": rows["attn.kv_up.weight"] // max(heads, 1) - nope,
    }


def _infer_rope(state: State, attn_type: str, dim: int) -> dict[str, Any]:
    """What upstream's rotary table tells: exp(i · position · theta^(-2j/K)), (N, K/2)."""
    table = state.get("freqs_cis_mla" if attn_type == "mla" else "freqs_cis")
    if table is None or table.dim() != 2 or not table.is_complex():
        return {}
    width = 2 * table.shape[1]
    sizes: dict[str, Any] = {"max_seq_len": table.shape[0]}
    if attn_type == "gqa" and width and dim % width == 0:
        sizes["n_heads"] = dim // width
        sizes["n_kv_heads"] = _kv_heads(state, dim, dim // width)
        if (other := state.get("freqs_cis_mla")) is not None:
            sizes["qk_rope_head_dim"] = 2 * other.shape[-1]
    if table.shape[0] > 1 and width > 2:
        # The lowest frequency tells theta best. The table is single precision; people choose round thetas.
        angle = float(table[1, -1].angle())
        theta = angle ** (-width / (width - 2)) if 0 < angle < 1 else math.nan
        rounded = float(f"{theta:.4g}")
        if math.isfinite(theta):
            sizes["rope_theta"] = rounded if math.isclose(theta, rounded, rel_tol=1e-5) else theta
    return sizes


def _kv_heads(state: State, dim: int, heads: object) -> int:
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or dim % heads:
        raise WeightsError(f"n_heads = {heads!r} is not allowed: it must be a divisor of dim ({dim})")
    return state["recurrent.block.attn.wk.weight"].shape[0] // (dim // heads)


def _count(state: State, pattern: str) -> int:
    """How many numbered modules have names of this pattern."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _rope_table(width: int, length: int, theta: float) -> Tensor:
    """Upstream's buffer, (N, K/2) complex64, computed as it does."""
    frequencies = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _around_the_block(state: Mapping[str, Tensor]) -> State:
    """Tensors of the looped part that lie outside its block, copied; their names and layout are the same."""
    return {
        name: tensor.clone()
        for name, tensor in state.items()
        if name.startswith("recurrent.") and not name.startswith("recurrent.block.")
    }


# Checks.


def _check_config(cfg: MythosConfig) -> None:
    """Refuse a config that upstream has no way to express."""
    try:
        MythosConfig.upstream(**cfg.to_dict())
    except ConfigError as error:
        raise WeightsError(f"upstream cannot compute this model: {error}") from error
    if cfg.lora_rank == 0:
        raise WeightsError("upstream cannot compute this model: lora_rank = 0, but it needs at least 1")
    if cfg.attn_type == "gqa" and cfg.n_heads % cfg.n_kv_heads:
        raise WeightsError(
            f"upstream cannot compute this model: n_kv_heads = {cfg.n_kv_heads} does not divide n_heads"
        )


def _check_state(state: Mapping[str, Tensor], cfg: MythosConfig) -> None:
    """Names and shapes against the config's."""
    _check_config(cfg)
    expected = shapes(cfg)
    if missing := sorted(expected.keys() - state.keys()):
        raise WeightsError(
            f"the upstream state dict lacks {some_names(missing)}, which the config's model has"
        )
    if unexpected := sorted(state.keys() - expected.keys()):
        raise WeightsError(
            f"the upstream state dict holds {some_names(unexpected)}, which the config's model has not"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise WeightsError(f"{name} has shape {tuple(state[name].shape)}, but the config says {shape}")
        if not state[name].is_floating_point():
            raise WeightsError(f"{name} has dtype {state[name].dtype}: it must be a floating dtype")
        if state[name].is_meta:
            raise WeightsError(f"{name} has no values: it is on the meta device")
