"""accelerate beyond attention: each layer of each kind of model, against float64 and after remove()."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.testing.compare import assert_close

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(7))
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(8))

# name: how many layers run each op in a forward pass of two blocks; all that there are, the loss aside.
LLAMA = {"attention": 2, "rotary": 2, "gated_feed_forward": 2, "linear": 9, "rms_norm": 5}
BERT = {"attention": 2, "linear": 9, "linear, layer_norm": 4, "layer_norm": 1}
T5 = {"attention": 6, "linear": 25, "rms_norm": 12}
OPS = {
    "gpt2": {"attention": 2, "feed_forward": 2, "linear": 5, "layer_norm": 5},
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "rms_norm": 9},
    "mistral": LLAMA,
    "phi3": {**LLAMA, "linear": 5},
    "olmo2": {**LLAMA, "rms_norm": 9},
    "gemma2": {**LLAMA, "rms_norm": 9},
    "gpt_neox": {"attention": 2, "rotary": 2, "feed_forward": 2, "linear": 5, "layer_norm": 5},
    "bert": BERT,
    "roberta": BERT,
    "modernbert": {"attention": 2, "rotary": 2, "gated_feed_forward": 2, "linear": 4, "layer_norm": 5},
    "vit": {"attention": 2, "feed_forward": 2, "linear": 9, "layer_norm": 5},
    "t5": {**T5, "feed_forward": 4},
    "t5_gated": {**T5, "gated_feed_forward": 4},
    "whisper": {"attention": 6, "linear": 33, "layer_norm": 12},
}


def _inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "whisper":
        features = torch.randn(2, 8, 20, generator=generator)
        return {"input_features": features, "decoder_input_ids": IDS}
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if name.startswith("t5") else {})}


def _run(model: nn.Module, name: str) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(**{k: x.to(dtype) if x.is_floating_point() else x for k, x in _inputs(name).items()})[0]


def _grads(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights.to(out.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _enable_checkpointing(model: Any) -> None:
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _stop_dropout(model: nn.Module) -> None:
    """In training too, without which there is no checkpointing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _ops(handle: Any) -> Counter[str]:
    return Counter(layer.ops for layer in handle.report() if layer.part != "loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_all_layers_of_a_model(
    new_model: Callable[..., Any], choose: Callable[[Any, str], None], name: str, dtype: torch.dtype
) -> None:
    model = new_model(name, dtype)
    exact = copy.deepcopy(model).double()
    choose(model, "eager")
    choose(exact, "plain")
    keys = list(model.state_dict())
    with torch.no_grad():
        truth, before = _run(exact, name), _run(model, name)
        handle = fastattn.accelerate(model)
        assert_close(_run(model, name), before, truth, dtype=dtype)
        assert _ops(handle) == OPS[name]
        assert all(layer.calls == 1 and not layer.note for layer in handle.report() if layer.part != "loss")
        handle.remove()
        assert torch.equal(_run(model, name), before)
    assert list(model.state_dict()) == keys
    assert not any(layer.served for layer in handle.report())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox", "bert", "vit", "t5", "t5_gated"])
def test_gradients(
    new_model: Callable[..., Any], choose: Callable[[Any, str], None], name: str, checkpointing: bool
) -> None:
    model = new_model(name).train()
    _stop_dropout(model)
    exact = copy.deepcopy(model).double()
    if checkpointing:
        _enable_checkpointing(model)
    choose(model, "eager")
    choose(exact, "plain")
    truth, base = _grads(exact, _run(exact, name)), _grads(model, _run(model, name))
    with fastattn.accelerate(model) as handle:
        grads = _grads(model, _run(model, name))
        assert _ops(handle) == OPS[name]
        assert not any(layer.note for layer in handle.report() if layer.part != "loss")
    assert grads.keys() == base.keys() == truth.keys()
    for key, grad in grads.items():
        assert_close(grad, base[key], truth[key], key)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "t5_gated"])
def test_generates_the_same_tokens(new_model: Callable[..., Any], name: str) -> None:
    model = new_model(name)
    model.set_attn_implementation("eager")  # the one that knows Gemma's softcap, but for ours
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    with fastattn.accelerate(model) as handle:
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)
        assert all(layer.calls == 8 for layer in handle.report().of("linear") if layer.name == "lm_head")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_compiles_whole(new_model: Callable[..., Any], name: str) -> None:
    model = new_model(name)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad(), fastattn.accelerate(model):
        torch._dynamo.reset()
        out, expected = (
            torch.compile(model, fullgraph=True, backend=backend)(**_inputs(name)),
            _run(model, name),
        )
    assert_close(out[0], expected, expected.double())
    assert len(graphs) == 1
    if fastattn.dispatch.DEFAULT != fastattn.dispatch.REFERENCE:
        assert "fastattn.linear_fwd" in graphs[0]
        assert "torch.nn.functional.linear" not in graphs[0] and "torch._C._nn.linear" not in graphs[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_copies_run_the_models_own_layers(new_model: Callable[..., Any], name: str) -> None:
    model = new_model(name)
    with torch.no_grad(), fastattn.accelerate(model) as handle:
        expected = _run(model, name)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_close(_run(twin, name), expected, expected.double())
            twin.get_input_embeddings().weight.mul_(0.5)  # its own weights, not those of the model
            assert not torch.equal(_run(twin, name), expected)
            with fastattn.accelerate(twin) as second:
                assert _ops(second) == OPS[name]
        assert torch.equal(_run(model, name), expected)
        assert all(layer.calls == 2 for layer in handle.report().of("linear"))


def test_autocast(new_model: Callable[..., Any]) -> None:
    for name in ("llama", "bert"):
        model = new_model(name)
        truth = _run(copy.deepcopy(model).double(), name).detach()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            base = _run(model, name)
            with fastattn.accelerate(model):
                out = _run(model, name)
        assert out.dtype is base.dtype
        assert_close(out.float(), base.float(), truth, dtype=torch.bfloat16)


def test_dropout_in_training(new_model: Callable[..., Any]) -> None:
    model = new_model("gpt2").train()
    with fastattn.accelerate(model) as handle:
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(_run(model, "gpt2"))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
        assert all(layer.calls == 3 for layer in handle.report().of("mlp"))
        model.eval()
        assert torch.equal(_run(model, "gpt2"), _run(model, "gpt2"))


class TestTorch:
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()], ids=["relu", "gelu", "silu"])
    def test_encoder_and_decoder(self, norm_first: bool, activation: Any) -> None:
        torch.manual_seed(0)
        options = {"activation": activation, "norm_first": norm_first, "batch_first": True}
        encoder = nn.TransformerEncoderLayer(16, 4, 32, **options)
        decoder = nn.TransformerDecoderLayer(16, 4, 32, **options)
        for model, inputs in ((encoder, (X,)), (decoder, (X, X))):
            model = model.eval()
            exact = copy.deepcopy(model).double()
            with torch.no_grad():
                before, truth = model(*inputs), exact(*(x.double() for x in inputs))
                with fastattn.accelerate(model) as handle:
                    assert_close(model(*inputs), before, truth)
                    assert {x.part: x.ops for x in handle.report()} == {
                        "attention": "attention", "mlp": "feed_forward", "norm": "layer_norm"
                    }  # fmt: skip
                    assert all(layer.calls == 1 for layer in handle.report())
                assert torch.equal(model(*inputs), before)

    def test_without_attention_the_fast_path_is_off_too(self) -> None:
        """It would compute the whole layer, and call none of its parts."""
        model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        choice = lambda module, _: not isinstance(module, nn.MultiheadAttention)  # noqa: E731
        with torch.no_grad(), fastattn.accelerate(model, filter_fn=choice) as handle:
            model(X)
            assert [layer.calls for layer in handle.report().of("mlp")] == [1]
            assert [layer.calls for layer in handle.report().of("attention")] == [0]

    def test_gradients(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        exact = copy.deepcopy(layer).double()
        truth, base = _grads(exact, exact(X.double())), _grads(layer, layer(X))
        with fastattn.accelerate(layer):
            for key, grad in _grads(layer, layer(X)).items():
                assert_close(grad, base[key], truth[key], key)

    def test_a_single_linear(self) -> None:
        for layer, op in ((nn.Linear(16, 8), "linear"), (nn.LayerNorm(16), "layer_norm")):
            with fastattn.accelerate(layer) as handle:
                layer(X)
                assert [(row.name, row.ops, row.calls) for row in handle.report()] == [("", op, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "kind", "options"),
    [
        ("llama", "LlamaRMSNorm", {}),
        ("olmo2", "Olmo2RMSNorm", {}),
        ("gemma", "GemmaRMSNorm", {}),
        ("gemma4", "Gemma4RMSNorm", {}),
        ("gemma4", "Gemma4RMSNorm", {"with_scale": False}),
        ("t5", "T5LayerNorm", {}),
        ("nanochat", "NanoChatRMSNorm", {}),
        ("helium", "HeliumRMSNorm", {}),
    ],
)
def test_norms(model: str, kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    arguments = () if kind == "NanoChatRMSNorm" else (16,)
    norm = getattr(modeling, kind)(*arguments, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    exact, norm, x = copy.deepcopy(norm).double(), norm.to(dtype), X.to(dtype)
    with torch.no_grad():
        before = norm(x)
        # Their float32 is written into the forward, so the formula is taken in float64 by hand.
        truth = _exact_norm(exact, x.double(), kind)
        with fastattn.accelerate(norm) as handle:
            out = norm(x)
            (row,) = handle.report()
            assert (row.ops, row.calls, row.note) == ("rms_norm", 1, "")
            assert out.dtype is before.dtype
        assert_close(out, before, truth)


def _exact_norm(norm: Any, x: Tensor, kind: str) -> Tensor:
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    weight = getattr(norm, "weight", None)
    if weight is None:
        return out
    return out * (1.0 + weight if kind == "GemmaRMSNorm" else weight)
