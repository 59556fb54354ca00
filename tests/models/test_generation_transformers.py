"""Generation against transformers: the same weights, the same greedy tokens in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models import DecoderLM, Sampling, from_pretrained

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("default_backend")

V = 96
PROMPTS = [[5, 9, 33, 2], [7], [1, 62, 3, 44, 12, 60, 8, 9, 10, 11, 13]]
TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIZES = {"vocab_size": V, "initializer_range": 0.3, **TOKENS}
LLAMA = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": ("LlamaConfig", LLAMA),
    "tied llama": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderLM]:
    """A random model of transformers, and ours with its weights."""
    name, options = CONFIGS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder: Path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    ours = from_pretrained(folder)
    assert isinstance(ours, DecoderLM)
    return theirs, ours


def theirs_alone(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, **options)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("options", [{}, {"page_size": 8}], ids=["dense", "pages"])
def test_greedy_tokens_are_theirs(pair: tuple[Any, DecoderLM], options: dict[str, Any]) -> None:
    theirs, ours = pair
    found = ours.generate(PROMPTS, 30, **options)
    assert found.tokens == [theirs_alone(theirs, prompt, 30) for prompt in PROMPTS]
    assert found.reasons == ["length"] * 3


def test_stop_tokens_are_theirs(pair: tuple[Any, DecoderLM]) -> None:
    theirs, ours = pair
    stop = theirs_alone(theirs, PROMPTS[0], 8)[-1]
    expected = [theirs_alone(theirs, prompt, 30, eos_token_id=stop) for prompt in PROMPTS]
    assert ours.generate(PROMPTS, 30, stop_ids=[stop]).tokens == expected
    assert len(expected[0]) <= 8


def test_penalised_tokens_are_theirs(pair: tuple[Any, DecoderLM]) -> None:
    theirs, ours = pair
    found = ours.generate(PROMPTS, 30, sampling=Sampling(repetition_penalty=1.4))
    assert found.tokens == [theirs_alone(theirs, prompt, 30, repetition_penalty=1.4) for prompt in PROMPTS]
