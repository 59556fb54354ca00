"""Beam search: transformers' sequences and scores, the exhaustive search's where it can be done, errors."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.models import DecoderLM, ModelConfig
from fastattn.testing.compare import assert_close

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("default_backend")

V, PAD = 40, 39
PROMPTS = [[5, 9, 33, 2], [7], [1, 32, 3, 24, 12]]
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": None,
    "bos_token_id": 1, "pad_token_id": PAD,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderLM]:
    """A random Llama of transformers, and ours with its weights."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, DecoderLM.from_pretrained(folder)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("stops", [(), (4,), tuple(range(0, V, 4))], ids=["", "a stop", "many stops"])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_are_theirs(
    pair: tuple[Any, DecoderLM], num_beams: int, stops: tuple[int, ...], length_penalty: float
) -> None:
    theirs, ours = pair
    found = ours.beam_search(PROMPTS, 10, num_beams, length_penalty=length_penalty, stop_ids=stops)
    for prompt, beams in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=10, num_beams=num_beams, do_sample=False,
                num_return_sequences=num_beams, length_penalty=length_penalty, output_scores=True,
                return_dict_in_generate=True, eos_token_id=list(stops) or None, pad_token_id=PAD,
            )  # fmt: skip
        rows = expected.sequences[:, len(prompt) :].tolist()
        assert len(beams) == len(rows)
        for beam, row in zip(beams, rows, strict=True):
            assert beam.tokens == row[: len(beam.tokens)]
            assert set(row[len(beam.tokens) :]) <= {PAD}
            assert beam.reason == ("stop" if beam.tokens[-1] in stops else "length")


def test_one_beam_is_greedy(pair: tuple[Any, DecoderLM]) -> None:
    _, model = pair
    found = model.beam_search(PROMPTS, 10, 1, stop_ids=())
    assert [beam.tokens for (beam,) in found] == model.generate(PROMPTS, 10, stop_ids=()).tokens


def test_scores_are_sums_of_logprobs(pair: tuple[Any, DecoderLM], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair
    found = model.beam_search(PROMPTS, 6, 4, length_penalty=0.5)
    monkeypatch.setattr(dispatch, "DEFAULT", dispatch.REFERENCE)
    exact = copy.deepcopy(model).double()
    for prompt, beams in zip(PROMPTS, found, strict=True):
        scores = [beam.score for beam in beams]
        assert scores == sorted(scores, reverse=True)
        base, truth = (torch.stack([score(x, prompt, beam.tokens) for beam in beams]) for x in (model, exact))
        assert_close(torch.tensor(scores), base, truth)


def score(model: DecoderLM, prompt: list[int], tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + tokens])).log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(tokens)[:, None]).sum() / len(tokens) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_beams_have_caches_of_any_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = DecoderLM(
        ModelConfig(vocab_size=8, embed_dim=16, num_layers=2, num_heads=2, hidden_dim=16, max_positions=8)
    ).new_cache(2, dtype=dtype)
    new = torch.randn(2, 3, 2, 8)
    for layer in cache.layers:
        layer.extend(new[:, :0], new, -new)
    cache.advance(3)
    cache.truncate(torch.tensor([3, 2]))
    copies = cache.repeat(2)
    assert copies.lengths.tolist() == [3, 3, 2, 2]
    for row in range(4):
        for ours, theirs in zip(copies[1].read(row), cache[1].read(row // 2), strict=True):
            assert torch.equal(ours, theirs)


def test_pages_cannot_be_repeated(pair: tuple[Any, DecoderLM]) -> None:
    with pytest.raises(ValueError, match="repeat needs a cache without pages"):
        pair[1].new_cache(1, page_size=4).repeat(2)


def test_as_many_beams_as_sequences_find_the_best() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32}
    model = DecoderLM(ModelConfig(**sizes, max_positions=8)).eval()
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    with torch.no_grad():
        logprobs = model(torch.cat([torch.ones(125, 1, dtype=torch.int64), every], 1)).log_softmax(-1)
    totals = logprobs[:, :3].gather(-1, every[..., None])[..., 0].sum(-1)
    best = model.beam_search([[1]], 3, 5, length_penalty=0.0)[0]
    assert best[0].tokens == every[totals.argmax()].tolist()


def test_bad_arguments_are_named(pair: tuple[Any, DecoderLM]) -> None:
    _, model = pair
    for wrong, message in (
        ({"num_beams": 0}, "num_beams must be in 1 ... 40, got 0"),
        ({"num_beams": 41}, "num_beams must be in 1 ... 40, got 41"),
        ({"length_penalty": math.nan}, "length_penalty must be finite, got nan"),
        ({"stop_ids": [V]}, "stop_ids must be in 0 ... 39, got 40"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"prompts": [[]]}, r"prompts\[0\] must have at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            model.beam_search(**{"prompts": PROMPTS, "max_new_tokens": 5, **wrong})
