"""Modules on the ops, with the constructor arguments and state_dict keys of torch.nn where it has them."""

from fastattn.nn.kv_cache import KVCache
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.norms import LayerNorm, RMSNorm
from fastattn.nn.rotary_embedding import RotaryEmbedding

__all__ = ["KVCache", "LayerNorm", "MultiheadAttention", "RMSNorm", "RotaryEmbedding"]
