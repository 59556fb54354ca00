"""All families, and the ones that are only ours: for configs that transformers has no model for."""

from dataclasses import MISSING, fields
from typing import Any

from fastattn.models.checkpoints.bert import BERT, BERT_MASKED
from fastattn.models.checkpoints.entries import REQUIRED, Field
from fastattn.models.checkpoints.family import Family
from fastattn.models.checkpoints.gpt2 import GPT2
from fastattn.models.checkpoints.llama import LLAMA, MISTRAL, QWEN2
from fastattn.models.checkpoints.t5 import T5
from fastattn.models.config import ModelConfig
from fastattn.models.decoder_lm import DecoderLM
from fastattn.models.encoder import Encoder, MaskedLM
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.pretrained import Pretrained


def _ours(model: type[Pretrained]) -> Family:
    """Our names for everything; JSON has lists where a config has tuples."""

    def read(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    entries = tuple(
        Field(field.name, field.name, REQUIRED if field.default is MISSING else None, read)
        for field in fields(ModelConfig)
    )
    return Family(f"fastattn.{model.__name__}", model, model.__name__, entries, choices={}, tensors=None)


# A model is saved as the first that can say its config.
FAMILIES = (
    *(GPT2, LLAMA, QWEN2, MISTRAL, BERT, BERT_MASKED, T5),
    *(_ours(model) for model in (DecoderLM, Encoder, MaskedLM, EncoderDecoder)),
)
