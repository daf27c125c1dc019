"""The model: prelude, step, coda, and the modules they are made of."""

from open_mythos.model.attention import GQAttention, MLAttention, SequenceContext
from open_mythos.model.blocks import RecurrentBlock, TransformerBlock
from open_mythos.model.cache import CacheError, EveryLoop, KVCache, LastLoop, LoopPolicy, Snapshot
from open_mythos.model.layers import Expert, RMSNorm, apply_rope, precompute_rope_freqs
from open_mythos.model.moe import MoEFFN
from open_mythos.model.recurrence import ACTHalting, LoRAAdapter, LTIInjection, loop_index_embedding
from open_mythos.model.transformer import OpenMythos, rescale_spectral_radius, spectral_radius

__all__ = [
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
    "SequenceContext",
    "Snapshot",
    "TransformerBlock",
    "apply_rope",
    "loop_index_embedding",
    "precompute_rope_freqs",
    "rescale_spectral_radius",
    "spectral_radius",
]
