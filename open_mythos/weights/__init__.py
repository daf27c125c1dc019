"""Weights on disk: config.json and safetensors, and checkpoints of the public 0.5.0 release."""

from open_mythos.weights.pretrained import WeightsError, from_pretrained, save_pretrained
from open_mythos.weights.upstream import load_upstream, to_upstream_state_dict

__all__ = ["WeightsError", "from_pretrained", "load_upstream", "save_pretrained", "to_upstream_state_dict"]
