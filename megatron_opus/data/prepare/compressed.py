"""Lines out of `.gz` and `.zst` files."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from megatron_opus.data.prepare.document import SourceError

_LONGEST = 31  # log2 of the largest window that zstd's format readers take: 2 GiB of memory in each worker
_TOO_LONG = "too much memory"  # zstd's own words where a window is above 128 MiB


@contextmanager
def open_compressed(path: str) -> Iterator[BinaryIO]:
    """Open the decompressed content of a .gz or .zst file as a binary stream of lines.

    Files of `zstd --long=28` to `--long=31` need a window above 128 MiB, which only the program `zstd` reads. Raises
    SourceError where such a file is met and the program is not installed.
    """
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as stream:
            yield stream  # type: ignore[misc]
    elif _long_window(path):
        yield from _through_program(path)
    else:
        import pyarrow as pa

        with pa.input_stream(path, compression="zstd") as source:
            yield io.BufferedReader(source, 1 << 20)


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Give (line from 1, content) of the lines that are not blank. Raises SourceError where the file is damaged."""
    line = 0
    try:
        with open_compressed(path) as stream:
            for line, raw in enumerate(stream, 1):
                content = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if content.strip():
                    yield line, content
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: damaged or truncated after line {line}: {error}; restore it") from error


def _long_window(path: str) -> bool:
    import pyarrow as pa

    try:
        with pa.input_stream(path, compression="zstd") as source:
            source.read(1)
    except OSError as error:
        return _TOO_LONG in str(error)
    return False


def _through_program(path: str) -> Iterator[BinaryIO]:
    if shutil.which("zstd") is None:
        raise SourceError(
            f"{path}: expected a zstd window of at most 128 MiB, found a larger one, which needs the program zstd: "
            f"install it, or unpack the file with `zstd -d --long={_LONGEST}` where it is"
        )
    with subprocess.Popen(
        ["zstd", "-dcq", f"--long={_LONGEST}", "--", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        try:
            yield program.stdout  # type: ignore[misc]
            if program.stdout.read(1) == b"" and program.wait():
                raise OSError(program.stderr.read().decode(errors="replace").strip())
        finally:
            program.kill()  # where the reader has stopped early
