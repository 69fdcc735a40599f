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
    """A binary stream that becomes `path` when the block ends without an exception; else nothing is left."""
    path = Path(path)
    # The process id keeps two writers of the same file apart: the last one wins with a whole file.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Atomically; the same data gives the same bytes."""
    with atomic_file(path) as stream:
        stream.write((json.dumps(data, indent=1) + "\n").encode("ascii"))


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
