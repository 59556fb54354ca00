"""Steps of decoding that are recorded once: the same bits as without, whatever happens to the cache."""

import pytest
import torch

from fastattn.models import DecoderLM, EncoderDecoder, ModelConfig, Step

SIZES = {
    "vocab_size": 50,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 48,
    "max_positions": 64,
}
PROMPTS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))

MODELS = {
    "llama": ModelConfig(**SIZES, num_kv_heads=2),
    "gpt2": ModelConfig.gpt2(**SIZES),
    "alibi": ModelConfig(**SIZES, positions="alibi", window=12),
    "original": ModelConfig(**SIZES, positions="sinusoidal", pre_norm=False, norm="layer_norm", gated=False),
}


def filled(model, **options):
    """A cache with prompts of different lengths."""
    cache = model.new_cache(3, 40, **options)
    model.hidden(PROMPTS, cache=cache)
    cache.truncate(torch.tensor([9, 4, 6]))
    return cache


@torch.inference_mode()
@pytest.mark.parametrize(
    "options", [{}, {"page_size": 4}, {"dtype": torch.bfloat16}], ids=["dense", "paged", "bf16"]
)
@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_are_the_same_bits(name, options):
    torch.manual_seed(0)
    model = DecoderLM(MODELS[name]).eval()
    caches = [filled(model, **options) for _ in range(2)]
    step = Step(model, caches[0])
    for i in range(12):
        tokens = PROMPTS[:, i % 9]
        expected = model(tokens[:, None], cache=caches[1])[:, 0]
        assert torch.equal(step(tokens), expected)
        assert step.not_recorded is None
        if i == 5:  # one sequence has ended
            for cache in caches:
                cache.truncate(cache.lengths * torch.tensor([1, 0, 1]))
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [21, 6, 18]


@torch.inference_mode()
def test_weights_are_read_anew():
    model = DecoderLM(MODELS["llama"]).eval()
    step, cache = Step(model, filled(model)), filled(model)
    step(PROMPTS[:, 0])
    model(PROMPTS[:, :1], cache=cache)
    for p in model.parameters():
        p.mul_(1.5)
    assert torch.equal(step(PROMPTS[:, 1]), model(PROMPTS[:, 1:2], cache=cache)[:, 0])


@torch.inference_mode()
def test_what_is_no_kernel_is_not_recorded():
    model = DecoderLM(ModelConfig(**SIZES, head_scale=0.5)).eval()
    step, cache = Step(model, filled(model)), filled(model)
    assert step.not_recorded == "no step was taken yet"
    for i in range(3):
        assert torch.equal(step(PROMPTS[:, i]), model(PROMPTS[:, i : i + 1], cache=cache)[:, 0])
        assert "got aten.mul" in step.not_recorded


@torch.inference_mode()
def test_a_full_cache_says_so():
    model = DecoderLM(MODELS["llama"]).eval()
    cache = model.new_cache(3, 10)
    model.hidden(PROMPTS, cache=cache)
    step = Step(model, cache)
    step(PROMPTS[:, 0])
    with pytest.raises(ValueError, match="the cache is full: max_length is 10"):
        step(PROMPTS[:, 0])
    assert cache.lengths.tolist() == [10, 10, 10]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vaswani", "t5"])
def test_encoder_decoders_generate(name):
    """As by whole forward passes; sources of different lengths."""
    torch.manual_seed(0)
    model = EncoderDecoder(getattr(ModelConfig, name)(**SIZES, decoder_start_id=0)).eval()
    lengths = torch.tensor([9, 3, 7])
    out = model.generate(PROMPTS, 8, lengths=lengths, stop_ids=())
    tokens = torch.zeros(3, 1, dtype=torch.int64)
    memory = model.encode(PROMPTS, lengths=lengths)
    for _ in range(8):
        tokens = torch.cat([tokens, model.decode(tokens, memory)[:, -1:].argmax(-1)], dim=1)
    assert out.tokens == tokens[:, 1:].tolist()
    step = Step(model, model.new_cache(3), memory=memory)
    step(tokens[:, 0])
    assert (step.not_recorded is None) == (name == "vaswani")


def test_a_generator_needs_a_first_token():
    model = EncoderDecoder(ModelConfig.vaswani(**SIZES)).eval()
    with pytest.raises(ValueError, match="generate needs a config with a decoder_start_id, got None"):
        model.generate(PROMPTS, 4)
