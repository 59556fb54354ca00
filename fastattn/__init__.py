"""fastattn: fused attention kernels under one API. Importing it patches nothing."""

from fastattn import nn
from fastattn.dispatch import explain
from fastattn.integrations.override import sdpa_override
from fastattn.integrations.patch import accelerate
from fastattn.integrations.sdpa import scaled_dot_product_attention
from fastattn.ops.attention import attention
from fastattn.ops.attention_decode import attention_decode
from fastattn.ops.attention_varlen import attention_varlen
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.rms_norm import rms_norm
from fastattn.ops.rotary import rotary

__all__ = [
    "accelerate",
    "attention",
    "attention_decode",
    "attention_varlen",
    "explain",
    "layer_norm",
    "nn",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "sdpa_override",
]

__version__ = "0.1.0"
