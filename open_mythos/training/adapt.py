"""Start from a saved model, and adapt it: train its per-loop LoRA alone, and keep that as a file of its own.

The LoRA (arXiv 2410.20672) is the model's own: Δ(x, t) = (down(x) ⊙ scale_t) B, one for the looped block, with
a scale for each loop. Added to a model without one it starts at B = 0, which changes nothing.

Letters: D model width, T loops.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.model.moe import MoEFFN
from open_mythos.training.checkpoint import write_json
from open_mythos.training.config import RunConfig
from open_mythos.weights import WeightsError, from_pretrained
from open_mythos.weights.pretrained import open_header

__all__ = ["account", "first_model", "load_adapter", "resolve", "save_adapter"]

DEFAULT_RANK = 8
FILE, FACTS = "adapter.safetensors", "adapter.json"


def resolve(config: RunConfig, saved: dict[str, Any] | None = None) -> RunConfig:
    """The config with the model that its [adapt] section leads to, which then is the run's [model].

    Args:
        config: as read.
        saved: the config of the run that goes on, if one does. Its model is taken then, and the one that it
            started from is not needed any more.

    Raises:
        ConfigError: there is no such model, or it does not fit the data or ``adapt.rank``.
    """
    section = config.adapt
    if not section.start:
        return config
    if saved is not None and saved.get("adapt", {}).get("start") == section.start:
        return dataclasses.replace(config, model=MythosConfig.from_dict(saved["model"]))
    path = Path(section.start) / "config.json"
    try:
        model = MythosConfig.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        allowed = "a directory of a saved model, with a config.json, such as RUN/model"
        raise ConfigError(f"adapt.start = {section.start!r} is not allowed: it must be {allowed}") from error
    if not config.data.is_task:
        _check_tokens(config, model)
    if section.kind == "lora":
        rank = section.rank or model.lora_rank or DEFAULT_RANK
        if model.lora_rank not in (0, rank):
            raise ConfigError(
                f"adapt.rank = {rank} is not allowed: the model has a LoRA of rank {model.lora_rank}"
            )
        model = dataclasses.replace(model, lora_rank=rank)
    return dataclasses.replace(config, model=model)


def _check_tokens(config: RunConfig, model: MythosConfig) -> None:
    for name, value in config.data.tokens().items():
        own = getattr(model, name)
        if own != value and not (name == "vocab_size" and value is not None and own >= value):
            raise ConfigError(
                f"data: its {name} is {value}, but the model in adapt.start has {own}: they must agree"
            )


def first_model(config: RunConfig, fresh: bool = True) -> OpenMythos:
    """The model that a resolved config's training begins with; seed torch first.

    Args:
        config: from :func:`resolve`.
        fresh: False when all weights are about to be loaded from a checkpoint.

    Raises:
        WeightsError: the model to start from cannot be read.
    """
    section = config.adapt
    model = OpenMythos(config.model)
    if section.start and fresh:
        _take_weights(model, from_pretrained(section.start))
    if section.kind == "lora":
        _freeze(model)
    return model


def _take_weights(model: OpenMythos, start: OpenMythos) -> None:
    """All of them, without the loads that its training left to follow; a LoRA that it lacks begins at zero."""
    lora = model.recurrent.lora
    if lora is not None:
        nn.init.zeros_(lora.B)
        nn.init.ones_(lora.scale.weight)
    missing, unexpected = model.load_state_dict(start.state_dict(), strict=False)
    added = {name for name in missing if name.startswith("recurrent.lora.") and start.recurrent.lora is None}
    if unexpected or set(missing) != added:  # config.json was changed in between
        raise WeightsError(f"the model to start from does not fit its config: {[*missing, *unexpected][0]}")
    for module in model.modules():
        if isinstance(module, MoEFFN):
            module.expert_load.zero_()


def _freeze(model: OpenMythos) -> None:
    """Let nothing but the LoRA learn; the router's balance stands still too."""
    model.requires_grad_(False)
    cast(nn.Module, model.recurrent.lora).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, MoEFFN):
            module.bias_rate = 0.0


def account(model: OpenMythos) -> str:
    """How many parameters are trained, in one phrase."""
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained:,} of {every:,} parameters are trained ({trained / every:.2%})"


def save_adapter(model: OpenMythos, directory: str | os.PathLike[str]) -> None:
    """Write the model's LoRA as ``adapter.safetensors``, and its shape as ``adapter.json``.

    Raises:
        WeightsError: the model has none.
    """
    lora, folder = model.recurrent.lora, Path(directory)
    if lora is None:
        raise WeightsError("save_adapter needs a model with a LoRA: its config has lora_rank = 0")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in lora.state_dict().items()}
    save_file(tensors, folder / f"{FILE}.part", metadata={"format": "pt"})
    os.replace(folder / f"{FILE}.part", folder / FILE)
    loops, rank = lora.scale.weight.shape
    write_json(folder / FACTS, {"kind": "lora", "rank": rank, "loops": loops, "dim": model.cfg.dim})


def load_adapter(model: OpenMythos, directory: str | os.PathLike[str]) -> OpenMythos:
    """A copy of ``model`` with the LoRA that :func:`save_adapter` wrote, in eval mode.

    Args:
        model: the one that was adapted; left as it is.
        directory: holds the adapter.

    Raises:
        WeightsError: a file is missing or damaged, or the adapter does not fit the model.
    """
    folder = Path(directory)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        rank = facts["rank"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder / FACTS} is missing or damaged: {error}") from error
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= model.cfg.dim:
        raise WeightsError(
            f"{folder / FACTS}: rank = {rank!r} must be a whole number from 1 to the model's width"
        )
    adapted = OpenMythos(dataclasses.replace(model.cfg, lora_rank=rank)).to(model.embed.weight)
    wanted = {name: value.shape for name, value in adapted.recurrent.lora.state_dict().items()}  # type: ignore[union-attr]
    tensors = _read(folder / FILE)
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            held = tuple(tensors[name].shape) if name in tensors else "missing"
            raise WeightsError(
                f"{folder / FILE} does not fit the model: {name} is {held}, not {tuple(shape)}"
            )
    own = {
        name: value for name, value in model.state_dict().items() if not name.startswith("recurrent.lora.")
    }
    given = {f"recurrent.lora.{name}": tensors[name] for name in wanted}
    adapted.load_state_dict({**own, **given})
    return adapted.eval()


def _read(path: Path) -> dict[str, Tensor]:
    open_header(path)  # refuses what is no safetensors file, in one line
    from safetensors.torch import load_file

    return load_file(path)
