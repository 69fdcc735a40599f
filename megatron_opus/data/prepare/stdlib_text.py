"""Text that every machine with Python has: the standard library, read as four kinds of documents.

prose: the language reference that `pydoc` carries; docstrings: of the pure Python modules; source: their code without
docstrings; tables: character maps and entity tables. No size is assumed: builds of Python leave different parts out.
"""

from __future__ import annotations

import ast
import importlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_opus.errors import Refusal

DOMAINS = ("prose", "docstrings", "source", "tables")
# Some builds ship the tests and some do not; without them the corpus depends less on who packaged Python.
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"})
_LOCAL = ("_sysconfigdata", "sitecustomize", "usercustomize")  # written by who installed Python
_PROSE_CHARACTERS = 1200  # per document, about; small ones make a split by documents even
_CODE_CHARACTERS = 3000
_REPEATED_CHARACTERS = 60  # from this length on a paragraph that came before is a copy, not a coincidence


class StandardLibraryError(Refusal, RuntimeError):
    """This Python has not the files that the embedded corpus is made of."""


def documents() -> dict[str, list[str]]:
    """Domain -> documents, in an order that depends on the files alone. No paragraph of the prose comes twice.

    Raises StandardLibraryError where the language reference or the modules are missing.
    """
    seen: set[str] = set()
    prose = list(_prose(_topics(), seen))
    docstrings: list[str] = []
    source: list[str] = []
    tables: list[str] = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT & set(parts) or parts[0].startswith("config-") or parts[-1].startswith(_LOCAL):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # files that exist to be wrong, and those of other encodings
        if parts[0] == "encodings" or parts == ("html", "entities.py"):
            tables += _pack(text.splitlines(keepends=True), _CODE_CHARACTERS)
        else:
            docstrings += _docstrings(tree, seen)
            source += _source(tree, text)
    found = {"prose": prose, "docstrings": docstrings, "source": source, "tables": tables}
    for domain, texts in found.items():
        if not texts:
            raise StandardLibraryError(
                f"the standard library in {root} has no text for the domain {domain!r}; use a complete Python, or "
                "prepare other text with tools/prepare_data.py and pass data=DIR"
            )
    return found


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError as error:
        raise StandardLibraryError(
            "this Python has no pydoc_data (the language reference); use a complete Python, or prepare other text "
            "with tools/prepare_data.py and pass data=DIR"
        ) from error


def _prose(topics: dict[str, str], seen: set[str]) -> Iterator[str]:
    # Topics contain one another; sorted, and each paragraph kept where it comes first.
    for _, text in sorted(topics.items()):
        yield from _pack(_unseen(text, seen), _PROSE_CHARACTERS)


def _docstrings(tree: ast.Module, seen: set[str]) -> Iterator[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found += list(_unseen(text, seen))
    yield from _pack(found, _PROSE_CHARACTERS)


def _source(tree: ast.Module, text: str) -> Iterator[str]:
    """The module without its docstrings, cut between top-level statements."""
    lines = text.splitlines(keepends=True)
    keep = [True] * len(lines)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                keep[first.lineno - 1 : first.end_lineno] = [False] * ((first.end_lineno or 0) - first.lineno + 1)
    pieces, start = [], 0
    for stop in [*(node.end_lineno or 0 for node in tree.body), len(lines)]:
        pieces.append("".join(line for line, kept in zip(lines[start:stop], keep[start:stop], strict=True) if kept))
        start = max(start, stop)
    yield from _pack(pieces, _CODE_CHARACTERS)


def _unseen(text: str, seen: set[str]) -> Iterator[str]:
    """Paragraphs that did not come before, each with the empty line that ends it."""
    for paragraph in text.split("\n\n"):
        plain = " ".join(paragraph.split())
        if not plain or (len(plain) >= _REPEATED_CHARACTERS and plain in seen):
            continue
        seen.add(plain)
        yield paragraph.strip("\n") + "\n\n"


def _pack(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """Documents of at least `characters` from consecutive pieces, without a short rest of blanks."""
    held = ""
    for piece in pieces:
        held += piece
        if len(held) >= characters:
            yield held.rstrip()
            held = ""
    if held.strip():
        yield held.rstrip()
