"""Files that are either absent, old, or complete: never torn, whenever the process is killed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary stream that becomes `path` when the block ends without an exception; else nothing is left.

    Content and name are on the disk when the block has ended, so that a later file may vouch for this one.
    """
    path = Path(path)
    # The process id keeps two writers of the same file apart: the last one wins with a whole file.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_directory(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file atomically. A lone surrogate, which has no UTF-8, becomes a question mark."""
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8", errors="replace"))


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; the same data gives the same bytes."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[bool]:
    """Hold an exclusive lock on `path` (made where it is missing); the system releases it however the process ends.

    Waits for it, or raises BlockingIOError with `busy` where that is given. Gives False, without a lock, on file
    systems that have none (Lustre mounted without `flock`): the caller must be correct, or say so, without it.
    """
    import fcntl

    with path.open("ab") as stream:
        held = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise BlockingIOError(busy) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            held = False
        yield held
