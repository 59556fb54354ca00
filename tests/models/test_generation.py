"""Generation: a batch like each prompt alone, every way to end, streams, caches that go on, clear errors."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.models import DecoderLM, ModelConfig, NextTokens, Sampling, Step
from fastattn.testing.compare import assert_close

pytestmark = pytest.mark.usefixtures("default_backend")

V, POSITIONS = 64, 48
SIZES: dict[str, Any] = {
    "vocab_size": V, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64,
    "max_positions": POSITIONS,
}  # fmt: skip
CONFIGS = {
    "llama": ModelConfig(**SIZES, num_kv_heads=2, tie_embeddings=False),
    "gpt2": ModelConfig.gpt2(**SIZES),
    "alibi": ModelConfig(**SIZES, positions="alibi", window=6),
}
PROMPTS = [[5, 9, 33, 2], [7], [1, 62, 3, 44, 12, 60, 8, 9, 10, 11, 13]]
kinds = pytest.mark.parametrize("kind", list(CONFIGS))


class Letters:
    """A tokenizer of single characters; token 63 is special."""

    def encode(self, text: str) -> list[int]:
        return [ord(x) - 48 for x in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(48 + i) for i in ids if i != 63 or not skip_special_tokens)


def model_of(kind: str = "llama", **changes: Any) -> DecoderLM:
    """A random model, with weights so large that its tokens vary."""
    torch.manual_seed(0)
    config = CONFIGS[kind]
    for name, value in changes.items():
        object.__setattr__(config := copy.copy(config), name, value)
    model = DecoderLM(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def alone(model: DecoderLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from the whole sequence, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def logprobs_without_cache(model: DecoderLM, prompt: list[int], tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]


@kinds
@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
def test_a_batch_is_each_prompt_alone(
    kind: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    out = model.generate(PROMPTS, 12, logprobs=True, page_size=page_size)
    assert out.reasons == ["length"] * 3
    assert out.texts is None
    assert out.logprobs is not None
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        assert tokens == alone(model, prompt, 12)
        assert len(set(tokens)) > 3
    monkeypatch.setattr(dispatch, "DEFAULT", dispatch.REFERENCE)
    exact = copy.deepcopy(model).double()
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        base, truth = (logprobs_without_cache(m, prompt, tokens) for m in (model, exact))
        assert_close(torch.tensor(logprobs), base, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_the_cache_has_the_type_asked_for(dtype: torch.dtype) -> None:
    model, kept = model_of(), []
    make = model.new_cache
    model.new_cache = lambda *sizes, **options: kept.append(make(*sizes, **options)) or kept[0]  # type: ignore
    out = model.generate(PROMPTS, 3, cache_dtype=dtype)
    assert kept[0][0].k.dtype is dtype
    assert [tokens[0] for tokens in out.tokens] == [alone(model, p, 1)[0] for p in PROMPTS]


def test_prompts_may_be_tensors() -> None:
    model = model_of()
    lists = [[5, 9, 33], [7, 8, 1]]
    expected = model.generate(lists, 4).tokens
    assert model.generate(torch.tensor(lists), 4).tokens == expected
    assert model.generate([torch.tensor(x, dtype=torch.int32) for x in lists], 4).tokens == expected


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
def test_sequences_end_one_by_one(page_size: int | None) -> None:
    model = model_of()
    whole = [alone(model, prompt, 12) for prompt in PROMPTS]
    stop = whole[0][2]
    expected = [x[: x.index(stop) + 1] if stop in x else x for x in whole]
    assert len({len(x) for x in expected}) > 1
    out = model.generate(PROMPTS, 12, stop_ids=[stop], page_size=page_size)
    assert out.tokens == expected
    assert out.reasons == ["stop" if stop in x else "length" for x in whole]


def test_the_config_says_what_ends() -> None:
    tokens = alone(model_of(), PROMPTS[0], 12)
    model = model_of(eos_ids=(tokens[3],))
    assert model.generate(PROMPTS[:1], 12).tokens == [tokens[: tokens.index(tokens[3]) + 1]]
    assert model.generate(PROMPTS[:1], 12, stop_ids=()).tokens == [tokens]


def test_stop_strings_end_the_text() -> None:
    model, letters = model_of(), Letters()
    tokens = alone(model, PROMPTS[0], 12)
    text = letters.decode(tokens)
    stop = text[4:7]
    at = text.index(stop)
    out = model.generate(PROMPTS[:1], 12, stop_strings=["never there", stop], tokenizer=letters)
    assert out.texts == [text[:at]]
    assert out.tokens == [tokens[: at + 3]]
    assert out.reasons == ["stop"]


def test_prompts_may_be_texts() -> None:
    model, letters = model_of(), Letters()
    out = model.generate([letters.decode(PROMPTS[0]), PROMPTS[2]], 4, tokenizer=letters)
    assert out.tokens == model.generate([PROMPTS[0], PROMPTS[2]], 4).tokens
    assert out.texts == [letters.decode(tokens) for tokens in out.tokens]
    with pytest.raises(ValueError, match=r"prompts\[0\] must have at least one token, got none"):
        model.generate([""], 4, tokenizer=letters)
    with pytest.raises(TypeError, match=r"prompts\[0\] must be ids, since there is no tokenizer, got 'a'"):
        model.generate(["a"], 4)


def test_a_stream_brings_all_that_generate_returns() -> None:
    model, letters, steps = model_of(), Letters(), list[NextTokens]()
    options: dict[str, Any] = {"logprobs": True, "tokenizer": letters, "stop_ids": [alone(model, [7], 3)[2]]}
    whole = model.generate(PROMPTS, 8, on_step=steps.append, **options)
    assert steps == list(model.stream(PROMPTS, 8, **options))
    for b, tokens in enumerate(whole.tokens):
        assert [x for step in steps if (x := step.tokens[b]) is not None] == tokens
        assert "".join(step.texts[b] for step in steps if step.texts) == letters.decode(tokens)
        assert [x for step in steps if (x := step.reasons[b])] == [whole.reasons[b]]
    assert whole.texts == [letters.decode(tokens) for tokens in whole.tokens]


def test_a_stream_leaves_the_mode_alone() -> None:
    steps = model_of().stream(PROMPTS, 3)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()


def test_samples_follow_the_seed() -> None:
    model, sampling = model_of(), Sampling(1.0, top_p=0.9, seed=3)
    tokens = model.generate(PROMPTS, 10, sampling=sampling).tokens
    assert model.generate(PROMPTS, 10, sampling=sampling).tokens == tokens
    assert model.generate(PROMPTS, 10, sampling=Sampling(1.0, top_p=0.9, seed=4)).tokens != tokens
    assert model.generate(PROMPTS, 10, sampling=Sampling(1.0, top_k=1)).tokens == [
        alone(model, prompt, 10) for prompt in PROMPTS
    ]


def test_the_penalty_counts_prompt_and_output() -> None:
    model = model_of()
    tokens = model.generate(PROMPTS, 30, sampling=Sampling(repetition_penalty=1e6)).tokens
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        assert len(set(new)) == 30
        assert not set(prompt) & set(new)


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
def test_a_cache_goes_on(page_size: int | None) -> None:
    model = model_of()
    cache = model.new_cache(2, page_size=page_size)
    ids = [list(prompt) for prompt in PROMPTS[:2]]
    for new in ([], [3, 4, 5], [6]):
        ids = [x + new for x in ids]
        read = cache.lengths.tolist()
        tokens = model.generate(ids, 5, cache=cache).tokens
        assert tokens == [alone(model, x, 5) for x in ids]
        ids = [x + y for x, y in zip(ids, tokens, strict=True)]
        assert cache.lengths.tolist() == [len(x) - 1 for x in ids] > read
    cache.truncate(3)
    assert model.generate(ids, 5, cache=cache).tokens == [alone(model, x, 5) for x in ids]


def test_a_cache_forgets_padding() -> None:
    model = model_of()
    stop = alone(model, PROMPTS[0], 1)[0]
    cache = model.new_cache(3)
    out = model.generate(PROMPTS, 9, stop_ids=[stop], cache=cache)
    assert len(out.tokens[0]) == 1 < len(out.tokens[1])
    lengths = [len(p) + len(t) - 1 if len(t) == 9 else 0 for p, t in zip(PROMPTS, out.tokens, strict=True)]
    assert cache.lengths.tolist() == lengths


def test_a_step_is_the_model_behind_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    cache = model.new_cache(2, 8)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=cache)
        cache.truncate(torch.tensor([3, 2]))
        logits = Step(model, cache)(torch.tensor([7, 8]))
        assert cache.lengths.tolist() == [4, 3]
        monkeypatch.setattr(dispatch, "DEFAULT", dispatch.REFERENCE)
        base, truth = (
            torch.cat([m(torch.tensor([ids]))[:, -1] for ids in ([1, 2, 3, 7], [4, 5, 8])])
            for m in (model, copy.deepcopy(model).double())
        )
    assert_close(logits, base, truth)


@kinds
def test_a_model_can_be_cast(kind: str) -> None:
    out = model_of(kind).bfloat16().generate(PROMPTS, 4, logprobs=True)
    assert [len(tokens) for tokens in out.tokens] == [4, 4, 4]
    assert out.logprobs is not None
    assert all(-10.0 < x <= 0.0 for row in out.logprobs for x in row)


def test_the_last_position_can_be_reached() -> None:
    model = model_of("gpt2")
    prompt = [3] * POSITIONS
    assert model.generate([prompt], 1).tokens == [alone(model, prompt, 1)]
    assert len(model.generate([prompt[:-4]], 5).tokens[0]) == 5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must have at least one sequence, got none"),
        ([[1], []], r"prompts\[1\] must have at least one token, got none"),
        ([[1, V]], r"prompts\[0\] must be in 0 ... 63, got 64"),
        ([[1], [-1, 2]], r"prompts\[1\] must be in 0 ... 63, got -1"),
        ([[1] * (POSITIONS + 1)], r"prompts\[0\] must have at most max_positions=48 tokens, got 49"),
        ([[1] * 40], "max_new_tokens must be at most 9 behind a prompt of 40 tokens .* got 10"),
        ("text", "prompts must be a tensor .* got str"),
        ([[1.0]], r"prompts\[0\] must be a list of integers, got \[1.0\]"),
        (torch.ones(4, dtype=torch.int64), r"prompts\[0\] must be a list of integers, got 1"),
    ],
)
def test_bad_prompts_are_named(prompts: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        model_of().stream(prompts, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer of at least 1, got 2.0"),
        ({"stop_ids": [V]}, "stop_ids must be in 0 ... 63, got 64"),
        ({"stop_strings": ["x"]}, "tokenizer must be given with stop_strings"),
        ({"stop_strings": "x", "tokenizer": Letters()}, "stop_strings must be a list of texts"),
        ({"stop_strings": [""], "tokenizer": Letters()}, "stop_strings must be a list of texts, none empty"),
        ({"page_size": 0}, "page_size must be at least 1, got 0"),
        ({"cache_dtype": torch.float64}, "dtype must be float32, bfloat16, float16 or int8"),
    ],
)
def test_bad_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        model_of().stream(PROMPTS, **{"max_new_tokens": 5, **wrong})


def test_a_cache_must_fit() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="cache must have 3 sequences, as prompts has, got 2"):
        model.stream(PROMPTS, 5, cache=model.new_cache(2))
    with pytest.raises(ValueError, match="cache must have room for 15 tokens of a sequence, got 14"):
        model.stream(PROMPTS, 5, cache=model.new_cache(3, 14))
    with pytest.raises(ValueError, match="page_size and cache_dtype must be None with a cache"):
        model.stream(PROMPTS, 5, cache=model.new_cache(3), page_size=4)
    cache = model.new_cache(1)
    model.generate([[1, 2, 3]], 5, cache=cache)
    with pytest.raises(ValueError, match=r"cache must have fewer tokens than prompts\[0\] with its 7, got 7"):
        model.stream([[1] * 7], 5, cache=cache)


def test_dropout_is_not_for_generation() -> None:
    model = model_of(dropout=0.1)
    model.generate(PROMPTS, 1)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        model.train().generate(PROMPTS, 1)
