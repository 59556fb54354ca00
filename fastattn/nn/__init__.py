"""Modules on the ops, with the constructor arguments and state_dict keys of torch.nn where it has them."""

from fastattn.nn.kv_cache import KVCache
from fastattn.nn.multihead_attention import MultiheadAttention

__all__ = ["KVCache", "MultiheadAttention"]
