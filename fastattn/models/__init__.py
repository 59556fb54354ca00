"""The thin Transformer: models that are built from fastattn's ops and modules."""

from fastattn.models.cache import ModelCache
from fastattn.models.checkpoints import from_pretrained
from fastattn.models.config import ModelConfig
from fastattn.models.decoder_lm import DecoderLM
from fastattn.models.generation import Generated, NextTokens
from fastattn.models.layers import Packed
from fastattn.models.sampling import Sampling
from fastattn.models.step import Step

__all__ = [
    "DecoderLM",
    "Generated",
    "ModelCache",
    "ModelConfig",
    "NextTokens",
    "Packed",
    "Sampling",
    "Step",
    "from_pretrained",
]
