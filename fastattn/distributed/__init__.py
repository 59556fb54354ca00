"""Context parallelism: attention over a sequence whose parts lie with the ranks of torch.distributed."""

from fastattn.distributed.ring import ring_attention
from fastattn.distributed.sequence import local_positions, shard_sequence, unshard_sequence

__all__ = ["local_positions", "ring_attention", "shard_sequence", "unshard_sequence"]
