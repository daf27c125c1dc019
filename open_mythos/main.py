"""The door that published code uses: ``from open_mythos.main import OpenMythos, MythosConfig, ...``."""

from open_mythos.config import MythosConfig
from open_mythos.model import (
    ACTHalting,
    Expert,
    GQAttention,
    LoRAAdapter,
    LTIInjection,
    MLAttention,
    MoEFFN,
    OpenMythos,
    RecurrentBlock,
    RMSNorm,
    TransformerBlock,
    apply_rope,
    loop_index_embedding,
    precompute_rope_freqs,
)

__all__ = [
    "ACTHalting",
    "Expert",
    "GQAttention",
    "LTIInjection",
    "LoRAAdapter",
    "MLAttention",
    "MoEFFN",
    "MythosConfig",
    "OpenMythos",
    "RMSNorm",
    "RecurrentBlock",
    "TransformerBlock",
    "apply_rope",
    "loop_index_embedding",
    "precompute_rope_freqs",
]
