"""Modules on the ops, with the constructor arguments and state_dict keys of torch.nn where it has them."""

from fastattn.nn.feed_forward import FeedForward, GatedFeedForward, Linear
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.linear_cross_entropy_loss import LinearCrossEntropyLoss
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.norms import LayerNorm, RMSNorm
from fastattn.nn.rotary_embedding import RotaryEmbedding
from fastattn.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
