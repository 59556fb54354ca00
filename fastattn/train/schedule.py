"""The learning rate: up in a line, then down along half a cosine."""

import math

from fastattn.train.options import Options


def learning_rate(step: int, options: Options) -> float:
    """Of step 0 ... steps - 1; the last one of the warm-up has the highest."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    lowest = options.lr * options.min_lr
    passed = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)
    return lowest + (options.lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, passed)))
