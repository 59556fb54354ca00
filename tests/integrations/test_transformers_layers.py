"""The attention and the mask function for transformers: bounds, compiling, training, refusals."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils as masks

from fastattn.integrations import transformers as ours
from fastattn.testing.compare import assert_close

BATCH, LENGTH = 2, 9
IDS = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
LEFT = torch.ones(BATCH, LENGTH, dtype=torch.long)
LEFT[0, :3] = 0
RIGHT = LEFT.flip(-1)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_compiles_as_one_graph(new_model: Callable[..., Any], name: str, padded: bool) -> None:
    model = new_model(name)
    model.set_attn_implementation("fastattn")
    mask = LEFT if padded else None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(IDS, attention_mask=mask, use_cache=False).logits
        expected = model(IDS, attention_mask=mask, use_cache=False).logits
    assert_close(out, expected, expected.double())


def test_compiled_layer_takes_bounds(new_model: Callable[..., Any]) -> None:
    """generate() makes the mask of a static cache outside of the compiled forward."""
    model = new_model("llama")
    model.set_attn_implementation("fastattn")
    bounds = ours.fastattn_mask(BATCH, LENGTH, LENGTH, attention_mask=LEFT.bool())
    assert bounds is not None
    assert bounds.dtype is torch.int32
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(IDS, attention_mask=bounds, use_cache=False).logits[LEFT.bool()]
        expected = model(IDS, attention_mask=bounds, use_cache=False).logits[LEFT.bool()]
    assert_close(out, expected, expected.double())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "t5"])
def test_gradients_agree_with_eager(
    new_model: Callable[..., Any], choose: Callable[[Any, str], None], name: str, checkpointing: bool
) -> None:
    model = new_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    models = {"eager": model, "fastattn": copy.deepcopy(model), "plain": copy.deepcopy(model).double()}
    gradients = {}
    for implementation, candidate in models.items():
        choose(candidate, implementation)
        candidate.train()
        if checkpointing:
            enable = getattr(candidate, "activation_checkpointing_enable", None)  # not in 5.17
            (enable or candidate.gradient_checkpointing_enable)({"use_reentrant": False})
        # The first token of a padded sequence would be predicted from padding, which sees nothing.
        labels = IDS.masked_fill(LEFT.cumsum(1) <= 1, -100)
        inputs = {"attention_mask": LEFT} if name != "gpt_oss" else {}
        candidate(IDS, labels=labels, use_cache=False, **inputs).loss.backward()
        gradients[implementation] = {n: p.grad for n, p in candidate.named_parameters() if p.grad is not None}
    assert gradients["fastattn"].keys() == gradients["eager"].keys()
    for parameter, gradient in gradients["fastattn"].items():
        base, truth = gradients["eager"][parameter], gradients["plain"][parameter]
        assert_close(gradient, base, truth, parameter)


def test_trains_with_dropout(new_model: Callable[..., Any]) -> None:
    model = new_model("gpt2").train()
    model.set_attn_implementation("fastattn")
    assert model.transformer.h[0].attn.attn_dropout.p > 0
    torch.manual_seed(0)
    first = model(IDS, labels=IDS).loss
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.manual_seed(0)
    assert torch.equal(model(IDS, labels=IDS).loss, first)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


class TestRefusals:
    @pytest.mark.parametrize("name", ["fastattn_flash", "my-sdpa", "flex_attention2", "org/fastattn", ""])
    def test_names_that_transformers_reads_meaning_into(self, name: str) -> None:
        with pytest.raises(ValueError, match="name must not"):
            ours.register(name)

    def test_name_of_another(self) -> None:
        transformers.AttentionInterface.register("somebody_elses", lambda *_: None)
        try:
            with pytest.raises(ValueError, match="registered already"):
                ours.register("somebody_elses")
        finally:
            del transformers.AttentionInterface._global_mapping["somebody_elses"]

    @pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
    def test_output_attentions(self, new_model: Callable[..., Any], name: str) -> None:
        """Asked for in the call or by the config, whether or not the layers are told."""
        model = new_model(name)
        inputs = torch.randn(1, 3, 16, 16) if name == "vit" else IDS
        model.set_attn_implementation("fastattn")
        with pytest.raises(ValueError, match="eager"):
            model(inputs, output_attentions=True)
        assert len(model(inputs, output_hidden_states=True).hidden_states) == 3
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        model.set_attn_implementation("fastattn")
        with pytest.raises(ValueError, match="eager"):
            model(inputs)

    def test_arguments_that_would_be_ignored(self) -> None:
        layer = torch.nn.Module()
        q = k = v = torch.randn(1, 2, 3, 8)
        for name in ("indices", "block_indices", "sinks", "cache"):
            with pytest.raises(ValueError, match="does not support"):
                ours.fastattn_attention(layer, q, k, v, None, **{name: torch.zeros(1)})
        with pytest.raises(ValueError, match="packed"):
            ours.fastattn_attention(layer, q, k, v, None, cu_seq_lens_q=torch.tensor([0, 1, 3]))
        with pytest.raises(ValueError, match="attention_mask must be"):
            ours.fastattn_attention(layer, q, k, v, torch.ones(1, 1, 3, 3, dtype=torch.long))

    def test_harmless_arguments_pass(self) -> None:
        q = k = v = torch.randn(1, 2, 3, 8)
        position_ids = torch.arange(3)[None]
        ours.fastattn_attention(
            torch.nn.Module(), q, k, v, None, position_ids=position_ids, use_cache=True, my_extra=3
        )


@pytest.mark.parametrize("q_offset", [0, 3])
@pytest.mark.parametrize("kind", ["causal", "sliding", "bidirectional sliding"])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
def test_bounds_mean_what_the_written_out_mask_says(kind: str, mask: Tensor | None, q_offset: int) -> None:
    mask_function = {
        "causal": masks.causal_mask_function,
        "sliding": masks.sliding_window_causal_mask_function(3),
        "bidirectional sliding": masks.sliding_window_bidirectional_mask_function(2),
    }[kind]
    options = {
        "batch_size": BATCH, "q_length": LENGTH - q_offset, "kv_length": 16, "q_offset": q_offset,
        "mask_function": mask_function, "attention_mask": None if mask is None else mask.bool(),
    }  # fmt: skip
    bounds = ours.fastattn_mask(**options, allow_is_bidirectional_skip=True)
    assert bounds is not None
    assert bounds.shape == (BATCH, 1, 1, 5)
    expected = masks.sdpa_mask(**options, allow_is_causal_skip=False)
    written_out = ours._written_out(bounds[:, 0, 0], LENGTH - q_offset, 16)
    assert torch.equal(written_out, expected)
    q, k, v = (torch.randn(BATCH, 2, n, 8) for n in (LENGTH - q_offset, 16, 16))
    layer = torch.nn.Module()
    out, _ = ours.fastattn_attention(layer, q, k, v, bounds)
    base, _ = ours.fastattn_attention(layer, q, k, v, expected)
    assert_close(out, base, base.double())


def test_bias_is_cut_with_the_keys() -> None:
    """Both ends of the cache are out of sight here, and the bias is as long as the cache."""
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[:, 3:] = True
    options = {"batch_size": 1, "q_length": 2, "kv_length": 12, "q_offset": 5}
    bounds = ours.fastattn_mask(**options, attention_mask=mask)
    expected = masks.sdpa_mask(**options, attention_mask=mask, allow_is_causal_skip=False)
    assert bounds is not None
    q, k, v = (torch.randn(1, 2, n, 8) for n in (2, 12, 12))
    layer, bias = torch.nn.Module(), torch.randn(1, 2, 2, 12)
    out, _ = ours.fastattn_attention(layer, q, k, v, bounds, position_bias=bias)
    base, _ = ours.fastattn_attention(layer, q, k, v, expected, position_bias=bias)
    assert_close(out, base, base.double())


def test_copy_of_bounds_means_the_same() -> None:
    """As when a model is spread over devices: the tensor travels, what hangs on it does not."""
    bounds = ours.fastattn_mask(BATCH, LENGTH, LENGTH, attention_mask=LEFT.bool())
    assert bounds is not None
    q, k, v = (torch.randn(BATCH, 2, LENGTH, 8) for _ in range(3))
    out, _ = ours.fastattn_attention(torch.nn.Module(), q, k, v, bounds)
    again, _ = ours.fastattn_attention(torch.nn.Module(), q, k, v, bounds.clone())
    assert torch.equal(out, again)
