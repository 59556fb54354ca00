"""One process of several, as torchrun starts it: in a module that it can import."""

import os
import sys

import torch

from fastattn.__main__ import main


def run(rank: int, size: int, port: int, command: list[str], errors: str) -> None:
    """Ends with the verb's exit code; what it says on stderr is in a file."""
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    with open(errors, "w", buffering=1) as sys.stderr:
        code = main(command)
    sys.stderr = sys.__stderr__
    sys.exit(code)
