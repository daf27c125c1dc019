"""Fused float32 CPU kernels for decoding: built by the C compiler on first use, kept per user, optional.

A decode step reads every weight once for a handful of tokens, and eager PyTorch spends more time between its
many small operators than in them. The entries here do a whole layer's work in one call. They serve up to 16
tokens in float32 on the CPU without gradients; :mod:`open_mythos.ops` decides and has the reference beside
each. The source is kernels.c. It is compiled with ``$CC`` or ``cc`` into ``$XDG_CACHE_HOME/open_mythos`` (or
``~/.cache/open_mythos``) under a name made of source, flags, compiler, processor and OpenMP library, and uses
the OpenMP library that torch has loaded, hence torch's threads. Where it cannot be built, :func:`status` says
why and PyTorch's operators do the work. ``OPEN_MYTHOS_KERNELS=0`` switches it off.

    python -m open_mythos.kernels        # build now, and say what there is

Shape letters: N tokens, B batch, S new tokens (N = B·S), C context, D model width, E experts, F expert width,
Fs shared width, k experts per token, H heads, R latent rank, P rope width, K nope width, V value width, Q query rank.
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

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "MAX_TOKENS",
    "Call",
    "Layer",
    "Slot",
    "Step",
    "disabled",
    "latent_outputs",
    "latent_queries",
    "moe",
    "readable",
    "rms_norm",
    "serves",
    "status",
    "swiglu",
]

MAX_TOKENS = 16
"""Beyond this many tokens the matrix products of PyTorch are the faster way."""

SOURCE = Path(__file__).with_name("kernels.c")
PARTS = [SOURCE.with_name(name) for name in ("kernels_decode.c", "kernels_train.c")]  # which it includes
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
    "om_rms_norm": [_P, _P, _F, _N, _N, _P],
    "om_moe": [_P] * 7 + [_N] * 7 + [_P] * 5,
    "om_latent_queries": [_P, _P, _P, _F, _P, _P, _P, _F, _P, _P] + [_N] * 12 + [_P] * 4,
    "om_latent_outputs": [_P, _P, _N, _N, _P, _N, _N, _F, _P, _P] + [_N] * 10 + [_P] * 4,
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


class Layer(ctypes.Structure):
    """Addresses of a transformer block's weights; kernels.c says what each is. What is left out is null."""

    _fields_ = _fields(
        (_P, "attn_norm ffn_norm wo q_down q_up kv_down kv_norm kv_up wq wk wv q_norm k_norm"),
        (_P, "router router_bias w_in w_out gate_up down"),
        (_N, "Fs"),
    )


class Slot(ctypes.Structure):
    """Where a layer keeps keys and values, and the floats from row to row and from token to token."""

    _fields_ = _fields((_P, "keys values"), (_N, "batch token"))


class Step(ctypes.Structure):
    """Sizes and addresses of one step; kernels.c says what each is. What is left out is zero or null."""

    _fields_ = _fields(
        (_N, "threads N S C D H G K P R Q V E F k T L"),
        (_N, "n_prelude n_coda vocab loop_dim lora_rows keeps_input starts_at_input"),
        (_F, "eps scale embed_scale still_running"),
        (_P, "ids embed rope"),
        (_N, "rope_half rope_batch"),
        (_P, "mask"),
        (_N, "mask_batch mask_token"),
        (_P, "layers slots input_norm loop_norm log_A log_dt B lora_down lora_B lora_scale state_norm"),
        (_P, "halt halt_bias norm head room logits"),
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


def readable(tensor: Tensor) -> bool:
    """Whether C may use its memory: an ordinary contiguous float32 CPU tensor, not a subclass."""
    return (
        type(tensor) in _PLAIN and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
    )


def serves(tokens: int, *tensors: Tensor) -> bool:
    """Whether a kernel may do the work of so many tokens on these contiguous tensors.

    They must be ordinary float32 CPU tensors, not subclasses, and the call one that nobody differentiates,
    compiles, traces, transforms or watches operator by operator.
    """
    if not 0 < tokens <= MAX_TOKENS or torch.is_grad_enabled():
        return False
    return fit(*tensors)


def fit(*tensors: Tensor) -> bool:
    """:func:`serves` for any number of tokens, with gradients or without: training differentiates by itself."""
    if _off or not tensors[0].is_cpu or not _unwatched():
        return False
    return all(readable(tensor) for tensor in tensors) and _load() is not None


def _call(name: str, *arguments: Tensor | float | None) -> int:
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return int(getattr(_library, name)(*values))


def _fit(what: str, fits: bool) -> None:
    """The C code trusts its sizes, so they are compared here."""
    if not fits:
        raise ValueError(f"{what}: the shapes do not fit each other")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the last axis: x / sqrt(mean(x²) + eps) · weight.

    Args:
        x: (…, D).
        weight: (D,).
        eps: ε.

    Returns:
        (…, D).
    """
    out = torch.empty_like(x)
    width = x.shape[-1]
    _fit("rms_norm", weight.shape == (width,))
    _call("om_rms_norm", x, weight, eps, x.numel() // width, width, out)
    return out


def moe(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """Σ_i w_i · Expert_i(x) + Shared(x), SwiGLU experts; the weights of each are read once for all its tokens.

    Args:
        x: (N, D).
        w_in: (E, D, 2F), gate and up side by side.
        w_out: (E, F, D).
        experts: (N, k) int64.
        weights: (N, k).
        gate_up: (2Fs, D), gate above up, or None without a shared expert.
        down: (D, Fs), or None.

    Returns:
        (N, D).

    Raises:
        IndexError: an expert is not 0 to E - 1.
    """
    (n, width), (count, hidden, _), k = x.shape, w_out.shape, experts.shape[1]
    side = 0 if down is None else down.shape[1]
    _fit("moe", w_out.shape[2] == width and w_in.shape == (count, width, 2 * hidden))
    _fit("moe", weights.shape == experts.shape and experts.shape[0] == n)
    if gate_up is not None and down is not None:
        _fit("moe", gate_up.shape == (2 * side, width) and down.shape[0] == width)
    room = x.new_empty(n * (k * 2 * hidden + 2 * side))
    sort = experts.new_empty(n * k + count + 1)
    out = torch.empty_like(x)
    at, at_sort = room.data_ptr(), sort.data_ptr()
    wrong = _call(
        *("om_moe", x, w_in, w_out, experts, weights, gate_up, down),
        *(n, width, count, hidden, k, side, torch.get_num_threads()),
        *(at, at + 4 * n * k * 2 * hidden, at_sort, at_sort + 8 * n * k, out),
    )
    if wrong:
        raise IndexError(f"experts holds {experts.tolist()}: each must be 0 to {count - 1}")
    return out


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)).

    Args:
        x: (…, D).
        gate_up: (2Fs, D), gate above up.
        down: (D, Fs).

    Returns:
        (…, D).
    """
    out = torch.empty_like(x)
    width, side = down.shape
    _fit("swiglu", x.shape[-1] == width and gate_up.shape == (2 * side, width))
    n = x.numel() // width
    room = x.new_empty(n * 2 * side)
    _call(
        *("om_moe", x, None, None, None, None, gate_up, down),
        *(n, width, 0, 0, 0, side, torch.get_num_threads(), None, room, None, None, out),
    )
    return out


def latent_queries(
    x: Tensor,
    q_down: Tensor,
    q_norm: Tensor,
    q_eps: float,
    q_up: Tensor,
    kv_down: Tensor,
    kv_norm: Tensor,
    kv_eps: float,
    kv_up: Tensor,
    rope: Tensor,
    n_heads: int,
) -> tuple[Tensor, Tensor]:
    """What MLA computes before it reads its cache: the latent to store, and queries that read such latents.

    Args:
        x: (B, S, D).
        q_down: (Q, D).
        q_norm: (Q,), and its ε.
        q_eps: ε.
        q_up: (H·(K + P), Q).
        kv_down: (R + P, D).
        kv_norm: (R,), and its ε.
        kv_eps: ε.
        kv_up: (H·(K + V), R).
        rope: (2, B or 1, S, 1, P).
        n_heads: H.

    Returns:
        Latent (B, S, R + P) and queries (B, S, H, R + P).
    """
    batch, new, width = x.shape
    q_rank, rank, rope_dim, n = q_norm.shape[0], kv_norm.shape[0], rope.shape[-1], batch * new
    nope = q_up.shape[0] // n_heads - rope_dim
    value = kv_up.shape[0] // n_heads - nope
    _fit(
        "latent_queries",
        q_down.shape == (q_rank, width) and q_up.shape == (n_heads * (nope + rope_dim), q_rank),
    )
    _fit("latent_queries", kv_down.shape == (rank + rope_dim, width) and value > 0 and nope >= 0)
    _fit("latent_queries", kv_up.shape == (n_heads * (nope + value), rank))
    _fit("latent_queries", rope.shape in ((2, batch, new, 1, rope_dim), (2, 1, new, 1, rope_dim)))
    latent = x.new_empty(batch, new, rank + rope_dim)
    queries = x.new_empty(batch, new, n_heads, rank + rope_dim)
    room = x.new_empty(n * (2 * q_rank + rank + rope_dim + n_heads * (nope + rope_dim)))
    at = room.data_ptr()
    _call(
        *("om_latent_queries", x, q_down, q_norm, q_eps, q_up, kv_down, kv_norm, kv_eps, kv_up, rope),
        *(rope.stride(0), 0 if rope.shape[1] == 1 else rope.stride(1), new, n, width, q_rank, n_heads),
        *(rank, rope_dim, nope, value, torch.get_num_threads()),
        *(at, at + 4 * n * (2 * q_rank + rank + rope_dim), latent, queries),
    )
    return latent, queries


def latent_outputs(
    queries: Tensor, latent: Tensor, mask: Tensor | None, scale: float, kv_up: Tensor, wo: Tensor
) -> Tensor:
    """What MLA computes after it has read its cache: W_o W_uv softmax(scale · q latentᵀ) latent[:R].

    Args:
        queries: (B, S, H, R + P).
        latent: (B, C, R + P); the last axis contiguous.
        mask: bool (B or 1, 1, S, C), True where a query may look; or None.
        scale: factor on the scores.
        kv_up: (H·(K + V), R).
        wo: (D, H·V).

    Returns:
        (B, S, D).
    """
    batch, new, heads, width = queries.shape
    context, (out_width, values), rank, n = latent.shape[1], wo.shape, kv_up.shape[1], batch * new
    value = values // heads
    nope = kv_up.shape[0] // heads - value
    _fit("latent_outputs", latent.shape == (batch, context, width) and latent.stride(2) == 1 and nope >= 0)
    _fit(
        "latent_outputs",
        kv_up.shape[0] == heads * (nope + value) and values == heads * value and rank <= width,
    )
    if mask is not None:
        _fit("latent_outputs", mask.shape in ((batch, 1, new, context), (1, 1, new, context)))
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    mask_batch = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    out = queries.new_empty(batch, new, out_width)
    room = queries.new_empty(n * heads * (context + rank + value))
    at, at_mixed = room.data_ptr(), room.data_ptr() + 4 * n * heads * context
    _call(
        *("om_latent_outputs", queries, latent, latent.stride(0), latent.stride(1)),
        *(mask, mask_batch, 0 if mask is None else mask.stride(2), scale, kv_up, wo),
        *(n, new, context, out_width, heads, rank, width - rank, nope, value, torch.get_num_threads()),
        *(at, at_mixed, at_mixed + 4 * n * heads * rank, out),
    )
    return out


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
            _call("om_room", ctypes.addressof(step), ctypes.addressof(floats))
            self._kept["room"] = room = torch.empty(floats.value, dtype=torch.float32, device="cpu")
            step.room, step.C = room.data_ptr(), context
        ids = ids.to(torch.int64).contiguous()
        logits = torch.empty(*ids.shape, step.vocab, dtype=torch.float32, device="cpu")
        step.ids, step.logits = ids.data_ptr(), logits.data_ptr()
        rope = step.rope
        step.rope = rope + 4 * rope_from
        _call("om_step", ctypes.addressof(step))
        step.rope = rope
        return logits


if __name__ == "__main__":
    print(status())
    sys.exit(0 if _load() is not None else 1)
