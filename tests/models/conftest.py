"""Tiny models of transformers with random weights, of each family that fastattn.models knows."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {**_SIZES, "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


# name: (transformers' class, its config)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2, untied, inner": ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "llama": ("LlamaForCausalLM", _SIZES),
    "llama, grouped, tied": (
        "LlamaForCausalLM",
        {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama, biases, one key head": (
        "LlamaForCausalLM",
        {**_SIZES, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, head_dim, theta": ("LlamaForCausalLM", {**_rope("default", rope_theta=500.0), "head_dim": 16}),
    "llama, linear": ("LlamaForCausalLM", _rope("linear", factor=2.0)),
    "llama, llama3": (
        "LlamaForCausalLM",
        _rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama, yarn": ("LlamaForCausalLM", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama, yarn, all": (
        "LlamaForCausalLM",
        _rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0,
            mscale=0.7, mscale_all_dim=0.5, truncate=False,
        ),
    ),
    "qwen2": ("Qwen2ForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    "mistral, window": ("MistralForCausalLM", {**_SIZES, "num_key_value_heads": 2, "sliding_window": 5}),
    "mistral": ("MistralForCausalLM", {**_SIZES, "num_key_value_heads": 2, "sliding_window": None}),
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "decoder" in metafunc.fixturenames:
        metafunc.parametrize("decoder", DECODERS)


def _build(name: str) -> Any:
    kind, sizes = DECODERS[name]
    config = getattr(transformers, kind.replace("LMHeadModel", "").replace("ForCausalLM", "") + "Config")(
        **sizes
    )
    model = getattr(transformers, kind)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual 0.02, and biases that are not 0: what is left out must show.
            mean = 1.0 if parameter.ndim == 1 and parameter.min() == 1 else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Nothing here is large enough for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def theirs() -> Callable[[str], Any]:
    """`theirs(name)`: transformers' model, one for all tests, in float32 and in evaluation."""
    return cache(_build)


@pytest.fixture(scope="session")
def folder(theirs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder(name)`: where transformers has saved it; not to be changed."""

    @cache
    def save(name: str) -> Path:
        path = tmp_path_factory.mktemp("model")
        theirs(name).save_pretrained(path)
        return path

    return save


@pytest.fixture
def edited(folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`edited(name, tensors, **keys)`: a copy with other tensors, None takes one out, and with other keys in
    config.json, ... takes one out.
    """

    def run(name: str, tensors: dict[str, Any] | None = None, **keys: Any) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(folder(name), path, dirs_exist_ok=True)
        if tensors is not None:
            changed = {**load_file(path / "model.safetensors"), **tensors}
            kept = {key: x.contiguous() for key, x in changed.items() if x is not None}
            save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        file = path / "config.json"
        json_keys = {**json.loads(file.read_text()), **keys}
        file.write_text(json.dumps({key: x for key, x in json_keys.items() if x is not ...}))
        return path

    return run
