"""attn_implementation="fastattn" against eager, in every way in which transformers makes a mask."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastattn.integrations import transformers as ours
from fastattn.testing.compare import assert_close

DECODERS = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "llama4"]
ENCODERS = ["bert", "modernbert"]

BATCH, LENGTH = 2, 9
_generator = torch.Generator().manual_seed(7)
IDS = torch.randint(3, 60, (BATCH, LENGTH), generator=_generator)
LEFT = torch.ones(BATCH, LENGTH, dtype=torch.long)
LEFT[0, :3] = 0
RIGHT = LEFT.flip(-1)
HOLES = torch.ones(BATCH, LENGTH, dtype=torch.long)
HOLES[0, 2:5] = 0
EVERYWHERE = torch.ones(BATCH, LENGTH, dtype=torch.bool)


def _padded(mask: Tensor) -> Callable[[Any], Tensor]:
    return lambda model: model(IDS, attention_mask=mask).logits[mask.bool()]


def _packed(model: Any) -> Tensor:
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(BATCH, -1)
    return model(IDS, position_ids=position_ids, use_cache=False).logits


def _two_chunks(model: Any) -> Tensor:
    first = model(IDS[:, :4], use_cache=True)
    return model(IDS[:, 4:], past_key_values=first.past_key_values).logits


def _padded_chunks(model: Any) -> Tensor:
    first = model(IDS[:, :5], attention_mask=LEFT[:, :5], use_cache=True)
    second = model(IDS[:, 5:], attention_mask=LEFT, past_key_values=first.past_key_values)
    return second.logits


def _static_steps(mask: Tensor | None) -> Callable[[Any], Tensor]:
    """A prefill of 5, a chunk of 2, and two single tokens, in a cache longer than all of them."""

    def run(model: Any) -> Tensor:
        past = transformers.StaticCache(config=model.config, max_cache_len=16)
        logits = []
        for start, stop in ((0, 5), (5, 7), (7, 8), (8, 9)):
            seen = None if mask is None else mask[:, :stop]
            step = model(IDS[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True)
            logits.append(step.logits)
        kept = EVERYWHERE if mask is None else mask.bool()
        return torch.cat(logits, dim=1)[kept]

    return run


def _four_dims(model: Any, *, as_float: bool) -> Tensor:
    """A mask of the user's own. Under eager a bool one would be added, so there it is always a float."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.arange(LENGTH) != 2)
    seen = (seen | torch.eye(LENGTH, dtype=torch.bool)).expand(BATCH, 1, -1, -1)
    if as_float or model.config._attn_implementation == "eager":
        floats = torch.zeros(seen.shape, dtype=model.dtype)
        return model(IDS, attention_mask=floats.masked_fill(~seen, torch.finfo(model.dtype).min)).logits
    return model(IDS, attention_mask=seen).logits


SCENARIOS: dict[str, Callable[[Any], Tensor]] = {
    "no mask": lambda model: model(IDS).logits,
    "all ones": _padded(torch.ones_like(LEFT)),
    "left padding": _padded(LEFT),
    "right padding": _padded(RIGHT),
    "holes": _padded(HOLES),
    "packed": _packed,
    "two chunks": _two_chunks,
    "two chunks, left padding": _padded_chunks,
    "static cache": _static_steps(None),
    "static cache, all ones": _static_steps(torch.ones_like(LEFT)),
    "static cache, left padding": _static_steps(LEFT),
    "user's bool mask": lambda model: _four_dims(model, as_float=False),
    "user's float mask": lambda model: _four_dims(model, as_float=True),
}


def _counted(model: Any) -> int:
    return sum(ours.calls[id(module)] for module in model.modules())


Compare = Callable[[str, Callable[[Any], Tensor]], None]


@pytest.fixture
def compare(shared_model: Callable[..., Any], choose: Callable[[Any, str], None]) -> Compare:
    """`compare(name, run)`: what run(model) gives with fastattn, by the error rule."""
    return lambda name, run: _compare(shared_model, choose, name, run)


@torch.no_grad()
def _compare(
    shared_model: Callable[..., Any],
    choose: Callable[[Any, str], None],
    name: str,
    run: Callable[[Any], Tensor],
) -> None:
    model = shared_model(name)
    exact = shared_model(name, torch.float64)
    choose(exact, "plain")
    choose(model, "eager")
    truth, base = run(exact), run(model)
    choose(model, "fastattn")
    before = _counted(model)
    out = run(model)
    assert _counted(model) > before
    # The rule would allow anything if eager and the truth did not mean the same.
    assert (base - truth).abs().max() < 1e-4 * max(1.0, truth.abs().max())
    assert_close(out, base, truth, name)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_agrees_with_eager(compare: Compare, name: str, scenario: str) -> None:
    compare(name, SCENARIOS[scenario])


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT, HOLES], ids=["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_agrees_with_eager(compare: Compare, name: str, mask: Tensor | None) -> None:
    kept = EVERYWHERE if mask is None else mask.bool()
    compare(name, lambda model: model(IDS, attention_mask=mask).last_hidden_state[kept])


def test_vit_agrees_with_eager(compare: Compare) -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    compare("vit", lambda model: model(pixels.to(model.dtype)).last_hidden_state)


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
def test_t5_agrees_with_eager(compare: Compare, mask: Tensor | None) -> None:
    def run(model: Any) -> Tensor:
        decoder_mask = RIGHT if mask is RIGHT else None
        out = model(IDS, attention_mask=mask, decoder_input_ids=IDS, decoder_attention_mask=decoder_mask)
        return out.logits[EVERYWHERE if decoder_mask is None else RIGHT.bool()]

    compare("t5", run)


def _features(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(BATCH, 8, 20, generator=generator).to(model.dtype)


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["none", "right"])
def test_whisper_agrees_with_eager(compare: Compare, mask: Tensor | None) -> None:
    def run(model: Any) -> Tensor:
        out = model(_features(model), decoder_input_ids=IDS, decoder_attention_mask=mask)
        return out.logits[EVERYWHERE if mask is None else mask.bool()]

    compare("whisper", run)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["no padding", "left padding"])
@pytest.mark.parametrize("name", [*DECODERS, "t5", "whisper"])
def test_greedy_tokens_are_eagers(
    shared_model: Callable[..., Any],
    choose: Callable[[Any, str], None],
    name: str,
    mask: Tensor | None,
    cache: str | None,
) -> None:
    model = shared_model(name)
    chunked = transformers.masking_utils.create_chunked_causal_mask
    if (name, cache) == ("llama4", "static") and "block_sequence_ids" not in signature(chunked).parameters:
        pytest.skip("this transformers raises TypeError here, whatever computes the attention")
    inputs = {"input_ids": IDS, "attention_mask": mask}
    if name == "whisper":
        inputs = {"input_features": _features(model), "decoder_attention_mask": None}
    tokens = []
    for implementation in ("eager", "fastattn"):
        choose(model, implementation)
        # Without repetition: a model that says one token for ever would agree with anything.
        tokens.append(
            model.generate(
                **inputs, max_new_tokens=10, do_sample=False, no_repeat_ngram_size=1,
                cache_implementation=cache,
            )
        )  # fmt: skip
    assert torch.equal(*tokens)


def test_static_decode_reads_only_what_was_written(
    shared_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask at all without padding, and keys up to the last token only."""
    seen: list[tuple[int, Any]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.append((k.shape[1], options["mask"]))
        return attention(q, k, v, **options)

    attention = ours.attention
    monkeypatch.setattr(ours, "attention", spy)
    model = shared_model("llama")
    model.set_attn_implementation("fastattn")
    with torch.no_grad():
        _static_steps(None)(model)
    assert [length for length, _ in seen] == [5, 5, 7, 7, 8, 8, 9, 9]
    assert all(mask is None for _, mask in seen)
    seen.clear()
    with torch.no_grad():
        _static_steps(LEFT)(model)
    assert [length for length, _ in seen] == [5, 5, 7, 7, 8, 8, 9, 9]
    assert all(mask.shape == (BATCH, 1, 1, length) for length, mask in seen)


def test_a_sliding_layer_reads_only_its_window(
    shared_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        lengths.append(k.shape[1])
        assert options["mask"] is None
        return attention(q, k, v, **options)

    attention = ours.attention
    monkeypatch.setattr(ours, "attention", spy)
    model = shared_model("mistral")
    model.set_attn_implementation("fastattn")
    with torch.no_grad():
        past = transformers.DynamicCache()  # not told of the window: it keeps all keys
        model(IDS[:, :8], past_key_values=past)
        model(IDS[:, 8:], past_key_values=past)
    assert lengths == [8, 8, 4, 4]
