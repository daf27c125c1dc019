"""Fused float32 CPU kernels: built by the C compiler on first use, kept per user, optional.

A decode step reads every weight once for a handful of tokens, and eager PyTorch spends more time between its many
small operators than in them. :class:`Call` does a step of the whole model, from token ids to logits, in one call
(kernels_decode.c), for up to 64 tokens without gradients; :mod:`open_mythos.model.decode` decides, and the modules are
the reference. :mod:`open_mythos.model.paged` does parts of a step for rows at different loops (kernels_pages.c), and
:mod:`open_mythos.fused` has the kernels for training (kernels_train.c). The sources are compiled with
``$CC`` or ``cc`` into ``$XDG_CACHE_HOME/open_mythos`` (or ``~/.cache/open_mythos``) under a name made of source,
flags, compiler, processor and OpenMP library, and use the OpenMP library that torch has loaded, hence torch's
threads. Where they cannot be built, :func:`status` says why and PyTorch's operators do the work.
``OPEN_MYTHOS_KERNELS=0`` switches them off.

    python -m open_mythos.kernels        # build now, and say what there is
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "MAX_TOKENS",
    "Call",
    "Layer",
    "Matrix",
    "Slot",
    "Step",
    "call",
    "disabled",
    "readable",
    "serves",
    "status",
    "unserved",
]

MAX_TOKENS = 64
"""Beyond this many tokens the matrix products of PyTorch are the faster way."""

SOURCE = Path(__file__).with_name("kernels.c")
# What it includes.
PARTS = [SOURCE.with_name(f"kernels_{part}.c") for part in ("decode", "attention", "pages", "train")]
# Not -ffast-math: NaN and infinity must stay what they are.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]

_library: ctypes.CDLL | None = None
_reason: str | None = None
_off = 0


class _UnavailableError(Exception):
    """Why there are no kernels here, as a clause that can follow "because"."""


def _openmp() -> Path:
    """The GNU OpenMP library that torch has mapped: ours must share its threads."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise _UnavailableError("this system has no /proc/self/maps; only Linux is served") from error
    found = sorted({line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libgomp" in line})
    if len(found) != 1:
        raise _UnavailableError(f"torch has loaded {len(found)} GNU OpenMP libraries, and one is needed")
    return Path(found[0])


def _processor() -> str:
    """Model and instruction sets, which -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    keep = ("model name", "flags", "Features", "CPU part", "isa")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(keep)}))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError as error:
        raise _UnavailableError(f"there is no C compiler ({command[0]!r} was not found)") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise _UnavailableError(f"the C compiler {command[0]!r} cannot be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise _UnavailableError(
            f"the C compiler {command[0]!r} failed: {(lines or ['no message'])[0].strip()}"
        )
    return done.stdout


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or ""
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "open_mythos"


def _build() -> Path:
    """The compiled library, made when it is not there yet. Concurrent builders each rename a whole file."""
    openmp = _openmp()
    compiler = shlex.split(os.environ.get("CC") or "cc")
    key = "\n".join([*compiler, *FLAGS, _run([*compiler, "--version"]), _processor(), str(openmp)])
    source = b"".join(path.read_bytes() for path in (SOURCE, *PARTS))
    name = hashlib.sha256(source + key.encode()).hexdigest()[:24]
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = folder / f"kernels-{name}.so"
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as room:
            part, whole = f"{room}/kernels.o", f"{room}/kernels.so"
            _run([*compiler, *FLAGS, "-c", str(SOURCE), "-o", part])
            # Linked by path and not by -fopenmp: wheels differ in what they call their OpenMP library.
            _run([*compiler, "-shared", part, str(openmp), "-lm", "-o", whole])
            os.replace(whole, target)
        return target
    except (OSError, RuntimeError) as error:
        raise _UnavailableError(
            f"the compiled library cannot be kept in the cache folder: {error}"
        ) from error


_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "om_room": [_P, _P],
    "om_step": [_P],
    "om_part": [_P, _N],
    "om_parts": [_P, _N, _P, _N, _N],
    "om_norm": [_P, _P, _F, _N, _N, _N, _P, _P],
    "om_norm_back": [_P] * 4 + [_N] * 3 + [_P] * 3,
    "om_gate": [_P, _P, _N, _N, _N, _P],
    "om_gate_back": [_P] * 3 + [_N] * 3 + [_P] * 2,
    "om_gather_sum": [_P, _P] + [_N] * 4 + [_P],
    "om_turn_heads": [_P, _P, _N, _N, _N, _F] + [_N] * 5 + [_P],
    "om_keys": [_P, _P] + [_N] * 6 + [_P, _P],
    "om_keys_back": [_P, _P] + [_N] * 6 + [_P, _P],
    "om_causal": [_P, _P, _P, _F] + [_N] * 7 + [_P] * 3,
    "om_causal_back": [_P] * 6 + [_F] + [_N] * 7 + [_P] * 4,
    "om_causal_room": [_N] * 3,
}


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class Matrix(ctypes.Structure):
    """A weight matrix as it is stored: where, the factors of its rows (int8 only), and the bytes of an entry."""

    _fields_ = _fields((_P, "at factor"), (_N, "bytes"))


class Layer(ctypes.Structure):
    """Addresses of a transformer block's weights; kernels_decode.c says what each is. What is left out is null."""

    _fields_ = _fields(
        (_P, "attn_norm ffn_norm"),
        (Matrix, "wo q_down q_up kv_down kv_up"),
        (_P, "kv_norm"),
        (Matrix, "wq wk wv"),
        (_P, "q_norm k_norm"),
        (Matrix, "router"),
        (_P, "router_bias"),
        (Matrix, "w_in w_out gate_up down"),
        (_N, "Fs"),
    )


class Slot(ctypes.Structure):
    """Where a layer keeps keys and values; kernels_decode.c says what the numbers are."""

    _fields_ = _fields((_P, "keys values"), (_N, "batch token by_loop"))


class Step(ctypes.Structure):
    """Sizes and addresses of one step; kernels_decode.c says what each is. What is left out is zero or null."""

    _fields_ = _fields(
        (_N, "threads N S C D H G K P R Q V E F k T L"),
        (_N, "n_prelude n_coda vocab loop_dim lora_rows keeps_input starts_at_input"),
        (_F, "eps scale embed_scale still_running"),
        (_P, "ids embed rope"),
        (_N, "rope_half rope_batch"),
        (_P, "mask"),
        (_N, "mask_batch mask_token"),
        (_P, "layers slots input_norm loop_norm log_A log_dt B lora_down lora_B lora_scale"),
        (_P, "update_norm state_norm"),
        (_P, "halt halt_bias norm"),
        (Matrix, "head"),
        (_P, "room logits"),
        (_P, "pages"),
        (_N, "pages_row pages_layer page"),
        (_P, "rows past at ruled kept_e kept_h before picked kept_mass"),
    )


def _load() -> ctypes.CDLL | None:
    """Build and load once a process; afterwards the library, or None with the reason kept."""
    global _library, _reason
    if _library is not None or _reason is not None:
        return _library
    if os.environ.get("OPEN_MYTHOS_KERNELS", "1") == "0":
        _reason = "OPEN_MYTHOS_KERNELS=0 is set"
        return None
    try:
        path = _build()
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        _openmp()
    except _UnavailableError as error:
        _reason = str(error)
    except (OSError, AttributeError) as error:
        _reason = f"the compiled library cannot be loaded: {error}"
    else:
        _library = library
    return _library


def status() -> str:
    """One sentence: whether the kernels are in use, and otherwise why not. Builds them when that is still open."""
    if _load() is None:
        return f"CPU kernels are off, because {_reason}; PyTorch's operators are used."
    return "CPU kernels are on: float32 decoding without gradients uses them."


@contextmanager
def disabled() -> Iterator[None]:
    """PyTorch's operators inside, whatever is built; to compare the two."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def _unwatched() -> bool:
    """Nobody has to see each operator: no compiler, tracer, autocast, transform or mode."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


_PLAIN = (Tensor, torch.nn.Parameter)
_FLOAT = (torch.float32,)


def readable(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether C may use its memory: an ordinary contiguous CPU tensor of these dtypes (float32), not a subclass."""
    if type(tensor) not in _PLAIN or tensor.dtype not in (dtypes or _FLOAT):
        return False
    return tensor.is_cpu and tensor.is_contiguous()


def serves(tokens: int, *tensors: Tensor) -> bool:
    """Whether a kernel may do the work of so many tokens on these contiguous tensors.

    They must be ordinary float32 CPU tensors, not subclasses, and the call one that nobody differentiates,
    compiles, traces, transforms or watches operator by operator.
    """
    if not 0 < tokens <= MAX_TOKENS or torch.is_grad_enabled():
        return False
    return fit(*tensors)


def unserved(tokens: int, *tensors: Tensor) -> str | None:
    """Why :func:`serves` says no, as a clause that can follow "because"; None where it says yes."""
    if serves(tokens, *tensors):
        return None
    if _off:
        return "the kernels are disabled here"
    for tensor in tensors:
        if not readable(tensor):
            found = (
                f"{'' if tensor.is_contiguous() else 'non-contiguous '}{tensor.dtype} on {tensor.device.type}"
            )
            if type(tensor) not in (Tensor, torch.nn.Parameter):
                found += f", of class {type(tensor).__name__}"
            return f"the weights are {found}, and the kernels serve contiguous float32 on the CPU"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if not _unwatched():
        return "a compiler, a tracer, autocast, a transform or a mode has to see each operator"
    _load()
    return _reason or f"{tokens} tokens are not 1 to {MAX_TOKENS}"


def fit(*tensors: Tensor) -> bool:
    """:func:`serves` for any number of tokens, with gradients or without: training differentiates by itself."""
    if _off or not tensors[0].is_cpu or not _unwatched():
        return False
    return all(readable(tensor) for tensor in tensors) and _load() is not None


def call(name: str, *arguments: Tensor | float | None) -> int:
    """Run a function of the C library, which is loaded: somebody has asked :func:`serves` or :func:`fit`."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return int(getattr(_library, name)(*values))


class Call:
    """The kernel for one model, ready to be run step after step. Sizes are trusted.

    Args:
        fields: of :class:`Step`, all that does not change from step to step.
        layers: prelude, the looped block, coda.
        slots: prelude, T loops, coda.
    """

    def __init__(self, fields: dict[str, Any], layers: list[Layer], slots: list[Slot]) -> None:
        self._step = Step(**fields, threads=torch.get_num_threads())
        self._layers, self._slots = (Layer * len(layers))(*layers), (Slot * len(slots))(*slots)
        self._step.layers, self._step.slots = ctypes.addressof(self._layers), ctypes.addressof(self._slots)
        self._kept: dict[str, Tensor] = {}  # what the step points to
        self._context = 0

    def set_rope(self, rope: Tensor) -> None:
        """Rotation of the tokens to come, (2, B or 1, tokens, 1, K)."""
        self._kept["rope"] = rope = rope.contiguous()
        self._step.rope, self._step.rope_half = rope.data_ptr(), rope.stride(0)
        self._step.rope_batch = 0 if rope.shape[1] == 1 else rope.stride(1)

    def set_mask(self, mask: Tensor) -> None:
        """Where the new tokens may look, bool (B, S, C or more)."""
        self._kept["mask"] = mask = mask.contiguous()
        self._step.mask, self._step.mask_batch, self._step.mask_token = mask.data_ptr(), *mask.stride()[:2]

    def run(self, ids: Tensor, context: int, rope_from: int = 0) -> Tensor:
        """One step: ids (B, S), all columns C after it, first float of the rotation → logits (B, S, V).

        The new keys and values are in the slots then.
        """
        step = self._step
        step.C = context
        if context > self._context:
            self._context, floats = context + 64, ctypes.c_int64()
            step.C = self._context
            call("om_room", ctypes.addressof(step), ctypes.addressof(floats))
            self._kept["room"] = room = torch.empty(floats.value, dtype=torch.float32, device="cpu")
            step.room, step.C = room.data_ptr(), context
        ids = ids.to(torch.int64).contiguous()
        logits = torch.empty(*ids.shape, step.vocab, dtype=torch.float32, device="cpu")
        step.ids, step.logits = ids.data_ptr(), logits.data_ptr()
        rope = step.rope
        step.rope = rope + 4 * rope_from
        call("om_step", ctypes.addressof(step))
        step.rope = rope
        return logits


if __name__ == "__main__":
    print(status())
    sys.exit(0 if _load() is not None else 1)
