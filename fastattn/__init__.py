"""fastattn: fused attention kernels under one API. Importing it patches nothing."""

from fastattn.dispatch import explain
from fastattn.ops.attention import attention

__all__ = ["attention", "explain"]

__version__ = "0.1.0"
