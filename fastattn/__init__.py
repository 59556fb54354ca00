"""fastattn: fused attention kernels under one API. Importing it patches nothing."""

from fastattn import nn
from fastattn.dispatch import explain
from fastattn.integrations.accelerate import accelerate
from fastattn.integrations.override import sdpa_override
from fastattn.integrations.sdpa import scaled_dot_product_attention
from fastattn.ops.attention import attention
from fastattn.ops.attention_decode import attention_decode
from fastattn.ops.attention_varlen import attention_varlen

__all__ = [
    "accelerate",
    "attention",
    "attention_decode",
    "attention_varlen",
    "explain",
    "nn",
    "scaled_dot_product_attention",
    "sdpa_override",
]

__version__ = "0.1.0"
