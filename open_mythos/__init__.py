"""OpenMythos: recurrent-depth transformers. Encode once, loop one shared block as long as asked, decode once.

Names are loaded when first used, so that ``import open_mythos`` and the command line start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0a1"

_HOMES = {
    "config": ("ConfigError", "MythosConfig"),
    "variants": (
        "mythos_1b",
        "mythos_3b",
        "mythos_10b",
        "mythos_50b",
        "mythos_100b",
        "mythos_500b",
        "mythos_1t",
        "mythos_nano",
        "mythos_micro",
        "mythos_small",
    ),
    "model": (
        "ACTHalting",
        "CacheError",
        "EveryLoop",
        "Expert",
        "GQAttention",
        "KVCache",
        "LTIInjection",
        "LastLoop",
        "LoRAAdapter",
        "LoopPolicy",
        "MLAttention",
        "MoEFFN",
        "OpenMythos",
        "RMSNorm",
        "RecurrentBlock",
        "TransformerBlock",
        "apply_rope",
        "loop_index_embedding",
        "precompute_rope_freqs",
        "rescale_spectral_radius",
        "spectral_radius",
    ),
    "tokenizer": ("ByteTokenizer", "MythosTokenizer", "get_vocab_size", "load_tokenizer"),
    "weights": (
        "WeightsError",
        "from_pretrained",
        "load_upstream",
        "save_pretrained",
        "to_upstream_state_dict",
    ),
    "inference.engine": ("Engine", "Request"),
    "inference.generate": ("generate", "stream"),
    "analysis.probes": ("Trace", "trace"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULES)]

if TYPE_CHECKING:
    from open_mythos.analysis.probes import Trace as Trace
    from open_mythos.analysis.probes import trace as trace
    from open_mythos.config import ConfigError as ConfigError
    from open_mythos.config import MythosConfig as MythosConfig
    from open_mythos.inference.engine import Engine as Engine
    from open_mythos.inference.engine import Request as Request
    from open_mythos.inference.generate import generate as generate
    from open_mythos.inference.generate import stream as stream
    from open_mythos.model import *  # noqa: F403
    from open_mythos.tokenizer import *  # noqa: F403
    from open_mythos.variants import *  # noqa: F403
    from open_mythos.weights import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
