"""Files that are either absent, old, or complete: never torn, whenever the process is killed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
FULL_BYTES = 1 << 20  # a disk with less free than this is called full where a library does not say what stopped it
NO_SPACE = "no space is left: free some, or move the folder to a larger disk"
REMEDIES = {
    errno.ENOSPC: NO_SPACE,
    errno.EDQUOT: "the quota is used up: free some space, or write to another disk",
    errno.EFBIG: "the file may not grow: raise the limit on its size (ulimit -f)",
    errno.EROFS: "the file system is mounted read-only: write to another one, or mount it to be written",
    errno.EACCES: "this user may not write there: change its permissions, or write to another folder",
    errno.EPERM: "this user may not write there: change its permissions, or write to another folder",
    errno.ENOENT: "it has vanished: was it moved or removed, is its disk still mounted?",
    errno.ESTALE: "it has vanished: was it moved or removed, is its disk still mounted?",
    errno.ENOTDIR: "a part of this path is a file: expected folders",
    errno.EIO: "the disk reports an error: write to another one",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENAMETOOLONG: "the path is too long: shorten output_dir or name",
    errno.ELOOP: "its symbolic links lead in a circle",
}
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|file write failed|unexpected pos|Parent directory|iostream error")


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


def explain(error: BaseException, folder: Path) -> str:
    """Say in one line which file could not be written, why, and the remedy; "" for an error of another kind.

    torch's writer of checkpoints does not say what stopped it: then the state of `folder`, which it wrote into, does.
    """
    if isinstance(error, OSError) and error.errno in REMEDIES:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not _concerns(error.filename, folder):
            return ""  # a file that is missing elsewhere is no fault of this disk
        return f"{error.filename or folder}: {error.strerror}; {REMEDIES[error.errno]}"
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        if not folder.exists():
            return f"{folder}: cannot be written; {REMEDIES[errno.ENOENT]}"
        if shutil.disk_usage(folder).free < FULL_BYTES:
            return f"{folder}: cannot be written; {NO_SPACE}"
        first = str(error).splitlines()[0]
        return f"{folder}: cannot be written ({first}); is its disk full, over a quota or read-only?"
    return ""


def _concerns(filename: object, folder: Path) -> bool:
    if not isinstance(filename, str):
        return False
    path = Path(filename)
    return path.is_relative_to(folder) or folder.is_relative_to(path)


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
