"""Writing files that are either whole or not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path`, and puts it in place once it is on the disk.

    Whatever happens meanwhile, a kill or a full disk, what was at `path` stays whole. What a kill leaves
    behind, libraries' own temporary files too, lies in one folder, which the next call empties.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    room = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(room, ignore_errors=True)
    try:
        room.mkdir()
        new = room / path.name
        new.touch()
        mode = new.stat().st_mode  # the user's umask, which not every library asks
        write(new)
        new.chmod(mode)
        _sync(new)
        os.replace(new, path)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    if os.name == "posix":
        _sync(path.parent)  # the new name, too, must survive a power cut


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
