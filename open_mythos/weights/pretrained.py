"""A model as a directory: ``config.json`` and ``model.safetensors``, or shards and an index when it is large.

Nothing is unpickled and no code is read from the directory. Everything that can be refused is refused from
the file headers, before a tensor is read.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos

__all__ = ["WeightsError", "assemble", "from_pretrained", "open_header", "save_pretrained", "skeleton"]

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Wrappers that training puts around modules; the names inside are the model's own.
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|module)\.")


class WeightsError(ValueError):
    """Weights that cannot be saved or loaded. The message names the file or tensor and what is wrong."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds.

    Attributes:
        path: the file.
        shapes: tensor name → shape.
        dtypes: tensor name → safetensors dtype, such as ``"BF16"``.
        metadata: strings that the writer left.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def save_pretrained(
    model: OpenMythos, directory: str | os.PathLike[str], max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write the model's config, parameters and buffers; :func:`from_pretrained` reads them back.

    A tied head is stored once. All files are written beside their place and then renamed into it, config.json
    last, so that a crash leaves the old model, the new one, or a directory that loading refuses, never a mix.
    Other files in the directory are left alone.

    Args:
        model: the model, on any device; compiled and checkpoint-wrapped modules are seen through.
        directory: where to write; made when absent.
        max_shard_bytes: largest weights file; more go into ``model-00001-of-0000N.safetensors`` and an index.
            A tensor larger than this has a file of its own.

    Raises:
        WeightsError: the model is not an OpenMythos, holds other tensors than its config says, or has no
            values yet (meta device).
        ValueError: ``max_shard_bytes`` is below one.
        OSError: the directory cannot be written.
    """
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(
            f"max_shard_bytes = {max_shard_bytes!r} is not allowed: it must be a whole number of at least 1"
        )
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, OpenMythos):
        raise WeightsError(f"save_pretrained takes an OpenMythos, got {type(model).__name__}")
    tensors = _state_to_save(inner)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{folder} is a file: save_pretrained needs a directory")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    metadata = {"format": "pt", "save_id": secrets.token_hex(8)}
    with _temporary(folder) as stage:
        for name, names in shards.items():
            shard = {key: tensors[key].detach().to("cpu").contiguous() for key in names}
            save_file(shard, stage(name), metadata=metadata)
        if len(shards) > 1:
            weight_map = {key: name for name, names in shards.items() for key in names}
            index = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
            stage(INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        stage(CONFIG).write_text(inner.cfg.to_json(), encoding="utf-8")


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> OpenMythos:
    """Load what :func:`save_pretrained` wrote, in eval mode.

    Args:
        directory: holds config.json and the weights.
        device: where to put the model; CPU when None.
        dtype: floating dtype of the weights; as stored when None. The router's bias stays at least float32
            and its load counts int64 whatever is asked.

    Raises:
        WeightsError: a file is missing, damaged, or holds other tensors than the config says.
        ValueError: ``dtype`` is not a floating dtype.
    """
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"dtype = {dtype!r} is not allowed: it must be a floating torch dtype or None")
    folder = Path(directory)
    cfg = _read_config(folder)
    headers = _read_headers(folder)
    # Before a config that lies about its layers makes the skeleton endless.
    held, layers = sum(len(header.shapes) for header in headers), cfg.prelude_layers + cfg.coda_layers
    if layers > held:
        raise WeightsError(f"{folder / CONFIG} has {layers} layers, but the weights are only {held} tensors")
    try:
        model = skeleton(cfg)
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's, for sizes beyond 64 bits
        raise WeightsError(f"{folder / CONFIG} asks for tensors larger than any can be") from error
    _check_tensors(headers, model)
    place = torch.device("cpu" if device is None else device)
    state: dict[str, Tensor] = {}
    for header in headers:
        with safe_open(header.path, framework="pt") as file:
            for name in header.shapes:
                state[name] = _convert(name, file.get_tensor(name), place, dtype)
    return assemble(model, state).eval()


def skeleton(cfg: MythosConfig) -> OpenMythos:
    """The model without values, on the meta device; :func:`assemble` gives it some."""
    with torch.device("meta"):
        return OpenMythos(cfg)


def assemble(model: OpenMythos, state: dict[str, Tensor]) -> OpenMythos:
    """Put these tensors into a :func:`skeleton`, the very tensors, and tie the head again."""
    if model.cfg.tie_embeddings:
        state = {**state, "head.weight": state["embed.weight"]}
    model.load_state_dict(state, assign=True)
    if model.cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    return model


def _state_to_save(model: OpenMythos) -> dict[str, Tensor]:
    """Name → tensor, without wrappers in the names and without a tied head, checked against the config."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in model.state_dict().items()}
    state.pop("_passes", None)  # of a training that a state dict resumes; nothing to use
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        raise WeightsError("the model is sharded over devices: gather it into one OpenMythos before saving")
    expected = skeleton(model.cfg).state_dict()
    if model.cfg.tie_embeddings:
        head = state.pop("head.weight", None)
        expected.pop("head.weight")
        same = head is not None and head.data_ptr() == state["embed.weight"].data_ptr()
        if not same and head is not None and not head.is_meta:
            raise WeightsError("head.weight is not embed.weight, but the config says tie_embeddings = True")
    odd = sorted(state.keys() ^ expected.keys())
    odd += [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if odd:
        raise WeightsError(f"the model holds other tensors than its config says: {some_names(odd)}")
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise WeightsError(f"the model has no values yet, it is on the meta device: {some_names(empty)}")
    return state


def _split(tensors: dict[str, Tensor], limit: int) -> dict[str, list[str]]:
    """File name → tensor names, in the model's order, each file within the limit where one tensor is."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


@contextmanager
def _temporary(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Stage files under temporary names and rename them, in the order staged, when all are written.

    Weights of an earlier save go before the config comes, and a config that changes goes first of all: the
    old one must not vouch for the new weights, nor the new one for old weights.
    """
    token = secrets.token_hex(4)
    staged: dict[str, Path] = {}

    def stage(name: str) -> Path:
        staged[name] = folder / f".{name}.{token}.tmp"
        return staged[name]

    try:
        yield stage
        for path in staged.values():
            _flush(path)
        config = folder / CONFIG
        if config.exists() and config.read_bytes() != staged[CONFIG].read_bytes():
            config.unlink()
        for name, path in staged.items():
            if name == CONFIG:
                _remove_stale(folder, set(staged))
            os.replace(path, folder / name)
        _flush(folder)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the disk hold it, so that a rename never outlives the content, on systems that can."""
    with suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):
                os.fsync(handle)
        finally:
            os.close(handle)


def _remove_stale(folder: Path, kept: set[str]) -> None:
    """Take away weights of an earlier save, what loading looks at first before the rest."""
    for name in (SINGLE, INDEX):
        if name not in kept:
            (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def _read_config(folder: Path) -> MythosConfig:
    path = folder / CONFIG
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a directory; it must be one with {CONFIG} and {SINGLE}")
    if not path.is_file():
        raise WeightsError(f"{path} is missing: this is no saved model, or saving it was cut short")
    try:
        return MythosConfig.from_json(path.read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _read_headers(folder: Path) -> list[Header]:
    """The single file, or the shards of the index, which must name each tensor's file rightly."""
    if (folder / SINGLE).is_file():
        return [open_header(folder / SINGLE)]
    path = folder / INDEX
    if not path.is_file():
        raise WeightsError(f"{folder / SINGLE} is missing, and so is {INDEX}")
    weight_map, save_id = _read_index(path)
    headers = [open_header(folder / name) for name in sorted(set(weight_map.values()))]
    for header in headers:
        if save_id is not None and header.metadata.get("save_id") != save_id:
            raise WeightsError(f"{header.path} comes from another save than {INDEX}: saving was cut short")
        named = {tensor for tensor, name in weight_map.items() if name == header.path.name}
        odd = sorted(named ^ header.shapes.keys())
        if odd:
            raise WeightsError(f"{header.path} and {INDEX} disagree about {some_names(odd)}")
    return headers


def _read_index(path: Path) -> tuple[dict[str, str], str | None]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map of tensor names to file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise WeightsError(
                f"{path} places {tensor} in {name!r}: it must be the plain name of a .safetensors file"
            )
    metadata = index.get("metadata")
    save_id = metadata.get("save_id") if isinstance(metadata, dict) else None
    return weight_map, save_id if isinstance(save_id, str) else None


def open_header(path: Path) -> Header:
    """Names, shapes and dtypes of a safetensors file.

    Raises:
        WeightsError: it is missing or damaged.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            return Header(path, shapes, dtypes, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _check_tensors(headers: list[Header], model: OpenMythos) -> None:
    """Names, shapes and dtypes against the config's, all files together."""
    expected = model.state_dict()
    if model.cfg.tie_embeddings:
        del expected["head.weight"]
    found = {name: header for header in headers for name in header.shapes}
    where = headers[0].path if len(headers) == 1 else headers[0].path.parent / INDEX
    if missing := sorted(expected.keys() - found.keys()):
        raise WeightsError(f"{where} lacks {some_names(missing)}, which the model of {CONFIG} has")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise WeightsError(f"{where} holds {some_names(unexpected)}, which the model of {CONFIG} has not")
    for name, header in found.items():
        shape, dtype = header.shapes[name], header.dtypes[name]
        if shape != tuple(expected[name].shape):
            raise WeightsError(
                f"{header.path}: {name} has shape {shape}, but {CONFIG} says {tuple(expected[name].shape)}"
            )
        allowed = _allowed_dtypes(name)
        if dtype not in allowed:
            raise WeightsError(f"{header.path}: {name} has dtype {dtype}: it must be {' or '.join(allowed)}")


def _allowed_dtypes(name: str) -> tuple[str, ...]:
    if name.endswith(".expert_load"):
        return ("I64",)
    return ("F64", "F32") if name.endswith(".router_bias") else _FLOATS


def _convert(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A copy on the device; memory of its own, because the file may be replaced while the model lives."""
    if dtype is not None and tensor.is_floating_point():
        tight = name.endswith(".router_bias") and torch.finfo(dtype).bits < 32
        return tensor.to(device, torch.float32 if tight else dtype, copy=True)
    return tensor.to(device, copy=True)


def some_names(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
