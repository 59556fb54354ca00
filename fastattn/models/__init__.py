"""The thin Transformer: models that are built from fastattn's ops and modules."""

from fastattn.models.attention_maps import attention_maps
from fastattn.models.cache import ModelCache
from fastattn.models.checkpoints import Tokenizer, from_pretrained, load_tokenizer
from fastattn.models.config import ModelConfig
from fastattn.models.cross_attention import Memory
from fastattn.models.decoder_lm import DecoderLM
from fastattn.models.encoder import Encoder, MaskedLM, pool
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.layers import Packed
from fastattn.models.padding import Padding

__all__ = [
    "DecoderLM",
    "Encoder",
    "EncoderDecoder",
    "MaskedLM",
    "Memory",
    "ModelCache",
    "ModelConfig",
    "Packed",
    "Padding",
    "Tokenizer",
    "attention_maps",
    "from_pretrained",
    "load_tokenizer",
    "pool",
]
