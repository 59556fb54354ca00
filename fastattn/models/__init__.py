"""The thin Transformer: models that are built from fastattn's ops and modules."""

from fastattn.models.cache import ModelCache
from fastattn.models.checkpoints import Tokenizer, from_pretrained, load_tokenizer
from fastattn.models.config import ModelConfig
from fastattn.models.decoder_lm import DecoderLM
from fastattn.models.layers import Packed

__all__ = [
    "DecoderLM",
    "ModelCache",
    "ModelConfig",
    "Packed",
    "Tokenizer",
    "from_pretrained",
    "load_tokenizer",
]
