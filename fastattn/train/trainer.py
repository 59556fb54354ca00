"""The loop: steps, evaluations, checkpoints."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.models import DecoderLM, ModelConfig
from fastattn.testing.plain_model import PlainLM
from fastattn.train import checkpoint, corpus
from fastattn.train.checkpoint import BEST, LAST, NotSaved, Progress
from fastattn.train.log import LOG, Display, Log
from fastattn.train.options import Options, Refusal
from fastattn.train.parallel import Ranks, whole
from fastattn.train.roof import flops_per_token, peak_flops
from fastattn.train.schedule import learning_rate
from fastattn.train.windows import Windows, dropout_seed


class NextToken(nn.Module):
    """A model's mean loss as its forward, which is what DDP and FSDP2 put their hooks around.

    bf16 is autocast: the products and attention run in it, on weights, gradients and a residual stream in
    float32.
    """

    def __init__(self, model: DecoderLM, options: Options) -> None:
        super().__init__()
        self.lm = PlainLM(model) if options.ops == "torch" else model
        self.is_bf16 = options.dtype == "bf16"

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids [B, S], targets [B, S] -> a scalar."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
            return self.lm.loss(ids, targets)


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW in one pass over its numbers; what is no matrix does not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, options.beta2), fused=True)


class Trainer:
    """One run.

    Args:
        facts: of the tokens in the folder.
        folder: for the log and checkpoints.
    Raises:
        Refusal: windows cannot be shared out evenly among processes and micro-batches.
    """

    def __init__(self, options: Options, facts: corpus.Facts, folder: Path, ranks: Ranks) -> None:
        self.options, self.folder, self.ranks, self.facts = options, folder, ranks, facts
        self.micro_batch = share(options, ranks)
        self.config = options.config(facts.vocab_size)
        torch.default_generator.manual_seed(options.seed)
        self.model = DecoderLM(self.config)
        self.module = ranks.spread(NextToken(self.model, options), self.model.layers)
        self.optimizer = make_optimizer(self.model, options)
        self.train_data, self.valid_data = (
            Windows(folder / name, facts.token_type, options.context) for name in (corpus.TRAIN, corpus.VALID)
        )
        self.progress = Progress()
        self.saved_step = 0

    def restore(self) -> None:
        """Goes on where the last checkpoint is, if there is one."""
        path = self.folder / LAST
        if not path.exists():
            return
        facts = checkpoint.read_facts(path)
        checkpoint.check_facts(path, facts, self.config, self.facts.tokenizer_hash)
        checkpoint.load(path, self.model, self.optimizer)
        self.progress = Progress(**facts["progress"])
        self.saved_step = self.progress.step

    def train(self) -> bool:
        """All steps that are left, and whether none of them is left now.

        Raises:
            Refusal: the loss is not finite, or the last checkpoint could not be written.
        """
        options, progress = self.options, self.progress
        log = Log(self.folder / LOG if self.ranks.is_first else None, progress.step)
        with Display(self.ranks.is_first, options.steps, progress.step) as display, stop_signals() as stop:
            self.begin(display)
            while progress.step < options.steps and not self.is_stale:
                line = self.step()
                self._tell(display, log.write(**line))
                display.step(progress.step, describe(line))
                is_last, stopped = progress.step == options.steps, self._agree(stop)
                if progress.step % options.eval_every == 0 or is_last:
                    self._tell(display, log.write(**self.evaluation(display)))
                if progress.step % options.saves_every == 0 or is_last or stopped or self.is_stale:
                    self._tell(display, self.save(LAST))
                if stopped:
                    break
        if self.saved_step != progress.step:
            raise Refusal(
                f"the checkpoint of step {progress.step} could not be written; {self._kept()}", code=1
            )
        return progress.step >= options.steps or self.is_stale

    def begin(self, display: Display) -> None:
        """Says what is about to run."""
        count = sum(p.numel() for p in self.model.parameters())
        self.flops = flops_per_token(self.config, self.options.context)
        peaks = self.ranks.sum(peak_flops(self.options.dtype))
        self.peak = sum(peaks)
        processes = f"{self.ranks.size} processes, " if self.ranks.size > 1 else ""
        display.say(
            f"{count / 1e6:.1f} million weights, {self.facts.train_tokens / 1e6:.2f} million tokens, "
            f"{processes}{torch.get_num_threads()} threads, peak {self.peak / 1e9:.0f} GFLOP/s, "
            f"from step {self.progress.step} to {self.options.steps}"
        )

    def step(self) -> dict[str, Any]:
        """One step of the optimizer; what there is to tell of it."""
        options, progress, start = self.options, self.progress, time.perf_counter()
        lr = learning_rate(progress.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.ranks.sum(self._backward())[0] / self.ranks.size
        largest = options.clip or math.inf
        norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), largest)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Refusal(
                f"step {progress.step + 1}: the loss is {loss} and its gradient's norm {norm}; "
                f"{self._kept()}; a lower --lr may help",
                code=1,
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        progress.step += 1
        progress.seconds += seconds
        tokens = options.batch * options.context
        speed = tokens / seconds
        return {
            "step": progress.step, "tokens": progress.step * tokens, "loss": loss, "lr": lr,
            "gradient_norm": norm, "seconds": seconds, "tokens_per_second": speed,
            "share_of_peak": speed * self.flops / self.peak if self.peak else None,
        }  # fmt: skip

    def _backward(self) -> float:
        """Adds up the gradients of this process's windows; their mean loss."""
        options, step = self.options, self.progress.step
        starts = self.train_data.random(options.seed, step, options.batch)
        mine = options.batch // self.ranks.size
        first, total = self.ranks.rank * mine, 0.0
        self.module.train()
        for at in range(first, first + mine, self.micro_batch):
            if options.dropout:
                # By the window's number: which process has it makes no difference.
                torch.default_generator.manual_seed(dropout_seed(options.seed, step, at))
            is_last = at + self.micro_batch == first + mine
            with self.ranks.accumulate(self.module, is_last):
                loss = self.module(*self.train_data.at(starts[at : at + self.micro_batch]))
                share = self.micro_batch / mine
                (loss * share).backward()
            total += float(loss.detach()) * share
        return total

    def evaluation(self, display: Display) -> dict[str, Any]:
        """The loss on held back windows; keeps the weights where it is the lowest so far."""
        progress = self.progress
        loss = evaluate(self.module, self.valid_data, self.options.eval_windows, self.micro_batch, self.ranks)
        note, reason = "", None
        if progress.best_loss is None or loss < progress.best_loss:
            before = progress.best_loss, progress.best_step, progress.stale
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            note, reason = ", the lowest", self.save(BEST)
            if reason is not None:
                # What has no checkpoint is not the best.
                progress.best_loss, progress.best_step, progress.stale = before
        else:
            progress.stale += 1
        bits = loss / math.log(2.0) / self.facts.bytes_per_token
        display.say(
            f"step {progress.step}: held back {loss:.4f} nats per token, {bits:.3f} bits per byte{note}"
        )
        self._tell(display, reason)
        return {"step": progress.step, "tokens": progress.step * self.options.batch * self.options.context,
                "valid_loss": loss, "valid_bits_per_byte": bits}  # fmt: skip

    @property
    def is_stale(self) -> bool:
        """Whether it has waited long enough for a lower loss."""
        return 0 < self.options.patience <= self.progress.stale

    def save(self, name: str) -> str | None:
        """Writes a checkpoint; returns why it could not, where it could not. All processes take part."""
        tensors = checkpoint.gather(self.model, self.optimizer if name == LAST else None)
        facts = {
            "progress": asdict(self.progress), "config": checkpoint.config_facts(self.config),
            "tokenizer": self.facts.tokenizer_hash,
        }  # fmt: skip
        reason = None
        if self.ranks.is_first:
            try:
                checkpoint.save(self.folder / name, tensors, facts)
            except NotSaved as error:
                reason = f"{error}; {self._kept()}"
        failed = bool(self.ranks.sum(float(reason is not None))[0])
        if not failed and name == LAST:
            self.saved_step = self.progress.step
        return (reason or "not saved") if failed else None

    def _kept(self) -> str:
        if not self.saved_step:
            return "there is no checkpoint yet"
        return f"the one of step {self.saved_step} is whole, and --resume goes on from it"

    def _agree(self, stop: list[int]) -> bool:
        """Whether any process was told to stop: each of them must know."""
        return bool(self.ranks.sum(float(len(stop)))[0])

    @staticmethod
    def _tell(display: Display, reason: str | None) -> None:
        if reason is not None:
            display.say(f"warning: {reason}")


def share(options: Options, ranks: Ranks) -> int:
    """Windows at a time in each process. Raises Refusal where they do not come out even."""
    if options.batch % ranks.size:
        raise Refusal(f"--batch must be a multiple of the {ranks.size} processes, got {options.batch}")
    mine = options.batch // ranks.size
    micro_batch = options.micro_batch or mine
    if mine % micro_batch:
        raise Refusal(
            f"--micro-batch must divide the {mine} windows of each process "
            f"(--batch {options.batch}, {ranks.size} processes), got {micro_batch}"
        )
    return micro_batch


@torch.no_grad()
def evaluate(module: nn.Module, data: Windows, count: int, batch: int, ranks: Ranks | None = None) -> float:
    """The mean loss of so many windows (0: all) in evaluation, shared out among processes."""
    rank, size = (ranks.rank, ranks.size) if ranks is not None else (0, 1)
    starts = data.spread(count)
    batches = [starts[i : i + batch] for i in range(0, len(starts), batch)]
    module.eval()
    total = 0.0
    for first in range(0, len(batches), size):
        mine = first + rank
        # Every process runs as often as the others, since FSDP2 waits for all: some do so for nothing.
        picked = batches[mine] if mine < len(batches) else batches[0]
        loss = float(module(*data.at(picked)))
        total += loss * len(picked) if mine < len(batches) else 0.0
    if ranks is not None:
        ranks.settle(module)
        total = ranks.sum(total)[0]
    return total / len(starts)


def describe(line: dict[str, Any]) -> str:
    """A step, for the bar."""
    of_peak = f", {line['share_of_peak']:.0%} of peak" if line["share_of_peak"] is not None else ""
    return f"loss {line['loss']:.3f}, lr {line['lr']:.1e}, {line['tokens_per_second']:.0f} tokens/s{of_peak}"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end up in a list, to stop after the step; a second one stops at once."""
    got: list[int] = []

    def note(number: int, _: object) -> None:
        got.append(number)
        for x, handler in before.items():
            signal.signal(x, handler)

    before = {x: signal.signal(x, note) for x in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for x, handler in before.items():
            signal.signal(x, handler)


def fresh(config: ModelConfig, path: Path) -> DecoderLM:
    """The model of a checkpoint, in evaluation."""
    model = DecoderLM(config)
    checkpoint.load(path, model, None)
    return model.eval()
