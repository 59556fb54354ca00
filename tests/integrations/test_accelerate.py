"""accelerate: what it reaches, what it reports, and that remove() leaves no trace."""

import copy
import filecmp
import pickle
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.testing.compare import assert_close

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(7))
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(8))

# torch.nn.TransformerEncoder makes one of its own accord where its fast path is on.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Attention(nn.Module):
    """As in timm: one call of torch's SDPA, looked up when it is made."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2))


class Network(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attention(dropout), nn.GELU(), Attention(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(1)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ByHand(nn.Module):
    """Neither SDPA nor an interface."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


class HandMadeAttention(ByHand):
    pass


def _network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(**options).eval()


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def _attention(handle: Any) -> Any:
    return handle.report().of("attention")


def _calls(handle: Any) -> list[int]:
    return [layer.calls for layer in _attention(handle)]


class TestTransformers:
    @pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5", "vit", "whisper"])
    def test_layers_are_served_and_restored(
        self, new_model: Callable[..., Any], choose: Callable[[Any, str], None], name: str
    ) -> None:
        model = new_model(name)
        choose(model, "eager")
        inputs: dict[str, Tensor] = {"input_ids": IDS}
        if name == "t5":
            inputs["decoder_input_ids"] = IDS
        if name == "vit":
            inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
        if name == "whisper":
            inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": IDS}
        keys = list(model.state_dict())
        with torch.no_grad():
            before = model(**inputs)[0]
            handle = fastattn.accelerate(model)
            out = model(**inputs)[0]
        assert all(layer.served and layer.calls == 1 for layer in _attention(handle))
        assert len(_attention(handle)) == {"t5": 6, "whisper": 6}.get(name, 2)
        assert_close(out, before, before.double())
        handle.remove()
        handle.remove()
        with torch.no_grad():
            assert torch.equal(model(**inputs)[0], before)
        assert list(model.state_dict()) == keys
        assert not any(layer.served for layer in _attention(handle))
        assert _calls(handle) == [1] * len(_attention(handle))

    def test_saved_files_are_the_same(self, new_model: Callable[..., Any], tmp_path: Path) -> None:
        model = new_model("llama")
        model.save_pretrained(tmp_path / "before")
        with fastattn.accelerate(model):
            model(IDS)
            model.save_pretrained(tmp_path / "while")
        model.save_pretrained(tmp_path / "after")
        names = sorted(file.name for file in (tmp_path / "before").iterdir())
        assert "config.json" in names
        for folder in ("while", "after"):
            same, *different = filecmp.cmpfiles(tmp_path / "before", tmp_path / folder, names, shallow=False)
            assert (sorted(same), *different) == (names, [], [])

    def test_generates(self, new_model: Callable[..., Any]) -> None:
        model = new_model("mistral")
        expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
        with fastattn.accelerate(model) as handle:
            assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)
            assert _calls(handle) == [8, 8]

    def test_counts_start_at_zero(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        for _ in range(2):
            with fastattn.accelerate(model) as handle:
                model(IDS)
                assert _calls(handle) == [1, 1]

    def test_two_models_in_one_process(self, new_model: Callable[..., Any]) -> None:
        one, other = new_model("llama"), new_model("llama")
        with fastattn.accelerate(one) as handle:
            other(IDS)
            assert _calls(handle) == [0, 0]
            assert other.config._attn_implementation != "fastattn"

    @pytest.mark.parametrize("name", ["bloom", "gptj"])
    def test_models_out_of_reach_are_named(self, new_model: Callable[..., Any], name: str) -> None:
        model = new_model(name)
        with fastattn.accelerate(model) as handle:
            model(IDS)
            assert [(layer.served, layer.calls) for layer in _attention(handle)] == [(False, 0)] * 2
            assert "computes attention itself" in str(_attention(handle))

    def test_falcon_calls_sdpa_itself(self, new_model: Callable[..., Any]) -> None:
        model = new_model("falcon")
        generate = partial(model.generate, IDS, max_new_tokens=8, do_sample=False)
        with torch.no_grad():
            before, tokens, parameters = model(IDS).logits, generate(), signature(model.forward)
            with fastattn.accelerate(model) as handle:
                out = model(IDS).logits
                assert _calls(handle) == [1, 1]
                assert torch.equal(generate(), tokens)
                assert _calls(handle) == [9, 9]
                assert signature(model.forward) == parameters  # generate() reads it
            assert_close(out, before, before.double())
            assert torch.equal(model(IDS).logits, before)

    def test_filter_by_part(self, new_model: Callable[..., Any]) -> None:
        model = new_model("t5")
        with fastattn.accelerate(model, filter_fn=lambda _, name: name.startswith("decoder")) as handle:
            model(IDS, decoder_input_ids=IDS)
            assert {x.name.split(".")[0]: x.served for x in _attention(handle)} == {
                "encoder": False, "decoder": True
            }  # fmt: skip
            assert all(layer.calls == layer.served for layer in _attention(handle))
            assert "left out by filter_fn" in str(_attention(handle))

    def test_filter_cannot_split_a_config(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match="shares its config"):
            fastattn.accelerate(model, filter_fn=lambda _, name: ".0." in name)
        assert model.config._attn_implementation == before
        fastattn.accelerate(model).remove()

    def test_what_the_user_chose_since_stays(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        handle = fastattn.accelerate(model)
        model.set_attn_implementation("eager")
        assert "attn_implementation='eager'" in str(_attention(handle))
        handle.remove()
        assert model.config._attn_implementation == "eager"

    def test_inside_another_module(self, new_model: Callable[..., Any]) -> None:
        wrapped = nn.ModuleDict({"text": new_model("llama"), "image": new_model("vit")})
        with fastattn.accelerate(wrapped) as handle:
            wrapped["text"](IDS)
            assert _calls(handle) == [1, 1, 0, 0]
        assert wrapped["text"].config._attn_implementation != "fastattn"

    def test_exception_in_the_model(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        before = model(IDS).logits
        with pytest.raises(IndexError), fastattn.accelerate(model):
            model(IDS + 1000)
        assert torch.equal(model(IDS).logits, before)

    def test_compiles_whole(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        with torch.no_grad(), fastattn.accelerate(model):
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            out, expected = compiled(IDS).logits, model(IDS).logits
        assert_close(out, expected, expected.double())


class TestTorch:
    def test_multihead_attention_in_an_encoder(self) -> None:
        """In inference torch would take its fast path, and make nested tensors of a padded batch."""
        model = _encoder()
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[0, 3:] = True
        with torch.no_grad():
            before = model(X, src_key_padding_mask=padding)
            with fastattn.accelerate(model) as handle:
                out = model(X, src_key_padding_mask=padding)
                assert _calls(handle) == [1, 1]
                direct = model.layers[0](X)
                assert _calls(handle) == [2, 1]
            assert torch.equal(model(X, src_key_padding_mask=padding), before)
            exact = _encoder().double()
            assert_close(direct, model.layers[0](X), exact.layers[0](X.double()))
            truth = exact(X.double(), src_key_padding_mask=padding)
        assert_close(out[~padding], before[~padding], truth[~padding])

    def test_root_that_is_the_layer(self) -> None:
        model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
        with fastattn.accelerate(model) as handle:
            model(X, X, X, need_weights=False)
            assert _calls(handle) == [1]
            assert _attention(handle)[0].name == ""

    def test_weights_asked_for(self) -> None:
        model = nn.MultiheadAttention(16, 4, batch_first=True)
        with fastattn.accelerate(model) as handle:
            model(X, X, X)
            assert "need_weights=True" in _attention(handle)[0].note

    def test_training_with_dropout(self) -> None:
        model = _network(dropout=0.2).train()
        with fastattn.accelerate(model) as handle:
            torch.manual_seed(0)
            first = model(X)
            first.sum().backward()
            torch.manual_seed(0)
            assert torch.equal(model(X), first)
            assert _calls(handle) == [2, 2]
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_entered_below_the_root(self) -> None:
        model = _network()
        expected = model.forward_features(X)
        with fastattn.accelerate(model) as handle:
            out = model.forward_features(X)
            assert _calls(handle) == [1, 1]
        assert_close(out.detach(), expected.detach(), expected.detach().double())

    def test_filter_by_layer(self) -> None:
        model = _network()
        with fastattn.accelerate(model, filter_fn=lambda _, name: name == "blocks.0") as handle:
            model(X)
            assert [(x.served, x.calls) for x in _attention(handle)] == [(True, 1), (False, 0)]

    def test_refused_calls_are_torchs_and_reported(self) -> None:
        if fastattn.dispatch.DEFAULT == fastattn.dispatch.REFERENCE:
            pytest.skip("the reference takes everything")
        model = _network().double()
        expected = model(X.double())
        with fastattn.accelerate(model) as handle:
            assert torch.equal(model(X.double()), expected)
            assert "1 to torch" in _attention(handle)[0].note
            assert "float64" in _attention(handle)[0].note

    def test_remove_leaves_no_trace(self) -> None:
        model = _network()
        own = model.blocks[0].forward  # an instance may have a forward of its own
        model.blocks[0].__dict__["forward"] = own
        traces = [dict(module.__dict__) for module in model.modules()]
        function, before = F.scaled_dot_product_attention, model(X)
        handle = fastattn.accelerate(model)
        model(X)
        handle.remove()
        assert [module.__dict__ for module in model.modules()] == traces
        assert F.scaled_dot_product_attention is function
        assert torch.equal(model(X), before)

    def test_copies_are_not_accelerated(self) -> None:
        model = _network()
        expected = model(X)
        with fastattn.accelerate(model) as handle:
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            for twin in copies:
                assert torch.equal(twin(X), expected)
            assert _calls(handle) == [0, 0]
            assert list(model.state_dict()) == list(copies[0].state_dict())

    def test_compiled_around_the_layers(self) -> None:
        model = _network()
        with torch.no_grad(), fastattn.accelerate(model):
            expected = model(X)
            torch._dynamo.reset()
            graphs: list[str] = []

            def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
                graphs.append(graph.code)
                return graph.forward

            out = torch.compile(model, backend=backend)(X)
        assert_close(out, expected, expected.double())
        assert not any("scaled_dot_product" in graph for graph in graphs)


class TestRefusals:
    @pytest.mark.parametrize("model", ["llama", None, 3, {}])
    def test_not_a_module(self, model: Any) -> None:
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
            fastattn.accelerate(model)

    def test_nothing_to_serve(self) -> None:
        with pytest.raises(TypeError, match="found nothing to serve in ByHand"):
            fastattn.accelerate(ByHand())

    def test_by_hand(self) -> None:
        with fastattn.accelerate(HandMadeAttention()) as handle:
            assert not _attention(handle)[0].served

    def test_compiled_first(self) -> None:
        with pytest.raises(TypeError, match="then compile it"):
            fastattn.accelerate(torch.compile(_network()))

    def test_twice(self) -> None:
        model = _network()
        with fastattn.accelerate(model):
            for part in (model, model.blocks, nn.Sequential(model)):
                with pytest.raises(ValueError, match="accelerated already"):
                    fastattn.accelerate(part)
        fastattn.accelerate(model).remove()


def test_report_is_a_readable_table() -> None:
    model = nn.Sequential(_network(), HandMadeAttention())
    with fastattn.accelerate(model) as handle:
        model[0](X)
        lines = str(handle.report()).splitlines()
    assert lines == [
        "layer              part       class              runs       calls  note",
        "0.blocks.0,2       attention  Attention          attention      2",
        "0.blocks.0,2.qkv   linear     Linear             linear         2",
        "0.blocks.0,2.proj  linear     Linear             linear         2",
        "1                  attention  HandMadeAttention  -              0  computes attention itself, "
        "without transformers' interface or torch's SDPA",
        "2 of 3 attention, 4 of 4 linear layers served, 6 calls",
    ]


def test_import_is_light(run_python: Callable[..., Any]) -> None:
    done = run_python(
        """
        import sys, torch
        function = torch.nn.functional.scaled_dot_product_attention
        import fastattn
        assert "transformers" not in sys.modules
        assert "torch._dynamo" not in sys.modules
        assert torch.nn.functional.scaled_dot_product_attention is function
        """
    )
    assert done.returncode == 0, done.stderr
