"""fastattn: fused attention kernels under one API. Importing it patches nothing."""

from fastattn import nn
from fastattn.dispatch import explain
from fastattn.integrations.accelerate import accelerate
from fastattn.integrations.accelerate.packing import pack
from fastattn.integrations.override import sdpa_override
from fastattn.integrations.sdpa import scaled_dot_product_attention
from fastattn.merge import merge_attention_states
from fastattn.ops.attention import attention
from fastattn.ops.attention_decode import attention_decode
from fastattn.ops.attention_varlen import attention_varlen
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.gated_feed_forward import gated_feed_forward
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.rms_norm import rms_norm
from fastattn.ops.rotary import rotary
from fastattn.weights import attention_weights

__all__ = [
    "accelerate",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "explain",
    "feed_forward",
    "gated_feed_forward",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention_states",
    "nn",
    "pack",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "sdpa_override",
]

__version__ = "0.1.0"
