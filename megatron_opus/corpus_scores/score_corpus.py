"""The pass over a corpus: pieces are scored, each to a file of its own, and then put together.

A process that is killed loses the piece at which it was. The next one scores the pieces that are missing. The last
part to end puts all pieces together.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_opus.corpus_scores.documents import CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.score_files import FILE_NAME, read_scores, write_scores
from megatron_opus.corpus_scores.scorer import DocumentScorer, Say
from megatron_opus.data.proxy.similarity import DocumentRange
from megatron_opus.files import PARTIAL, atomic_file, locked, write_json

SETTINGS = "settings.json"
PIECES = "pieces"


def score_corpus(
    corpus: CorpusDocuments,
    scorer: DocumentScorer,
    output: Path,
    *,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
    say: Say = tqdm.write,
) -> bool:
    """Score the pieces i, i + n, i + 2n, ... of a corpus into `output`; return whether all of it is now scored.

    part: (i, n). What an interrupted run left is taken up. Raises ScoreError for an `output` of other settings, and
    what the scorer raises; what was scored by then stays.
    """
    number, parts = part
    if parts < 1 or not 0 <= number < parts:
        raise ScoreError(f"part: expected I/N with 0 <= I < N, got {number}/{parts}")
    settings = {"scorer": scorer.name, **scorer.identity()}
    if (output / FILE_NAME).exists():
        done = read_scores(output, corpus)
        _refuse_difference(output, done.settings, settings)
        say(f"{output}: already scored with these settings")
        return True
    folder, pieces = output / PIECES, corpus.pieces(scorer.piece_tokens)
    _begin(output, corpus, {"pieces": len(pieces), **settings})
    folder.mkdir(exist_ok=True)
    busy = f"{output}: another run scores this part; wait or stop it"
    with locked(output / f".lock-{number}-of-{parts}", busy) as held:
        if not held:
            say(f"{output}: this file system has no locks; make sure that no other run scores this part")
        mine = [piece for piece in pieces if piece.number % parts == number]
        missing = [piece for piece in mine if not _path(output, piece).exists()]
        if missing:
            started, worked = time.perf_counter(), time.process_time()
            scorer.prepare(corpus, output, part)
            seconds, worked = time.perf_counter() - started, time.process_time() - worked
            say(f"{scorer.name}: ready after {seconds:.1f} s, {worked:.1f} of the processor")
            _score(corpus, scorer, output, mine, missing, progress, say)
    return _join(output, corpus, pieces, scorer.name, settings, say)


def _begin(output: Path, corpus: CorpusDocuments, settings: dict[str, object]) -> None:
    path = output / SETTINGS
    known = {"corpus": corpus.manifest.fingerprint(), **settings}
    if path.exists():
        _refuse_difference(output, json.loads(path.read_text(encoding="utf-8")), known)
        return
    if output.exists() and any(not p.name.startswith(".") and not p.name.endswith(PARTIAL) for p in output.iterdir()):
        raise ScoreError(f"{output}: expected a new directory or one with scores of this corpus, found other files")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, known)


def _refuse_difference(output: Path, then: dict[str, object], now: dict[str, object]) -> None:
    now = json.loads(json.dumps(now))  # tuples and lists compare equal
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key):
            raise ScoreError(
                f"{output}: the scores were made with other settings ({key}: then {then.get(key, 'absent')}, now "
                f"{now.get(key, 'absent')}); use the same ones, another --output, or remove the directory"
            )


def _score(
    corpus: CorpusDocuments,
    scorer: DocumentScorer,
    output: Path,
    mine: Sequence[DocumentRange],
    missing: Sequence[DocumentRange],
    progress: bool,
    say: Say,
) -> None:
    total, left = (sum(map(corpus.tokens_of, pieces)) for pieces in (mine, missing))
    started, worked = time.perf_counter(), time.process_time()
    with tqdm(
        total=total, initial=total - left, desc=f"scoring {scorer.name}", unit="tok", unit_scale=True,
        disable=not progress, mininterval=0.5,
    ) as bar:  # fmt: skip
        for piece in missing:
            found = []
            for block in corpus.blocks(piece, scorer.block_tokens):
                values = np.asarray(scorer.score(block))
                if values.shape != (len(block),):
                    raise ScoreError(
                        f"scorer {scorer.name}: expected {len(block)} scores of a block, got shape {values.shape}"
                    )
                found.append(values.astype(np.float32))
                bar.update(len(block.ids))
            with atomic_file(_path(output, piece)) as stream:
                np.save(stream, np.concatenate(found))
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    say(
        f"{scorer.name}: {left:,} tokens in {seconds:.1f} s on one process: {left / seconds:,.0f} tokens/s, "
        f"{left / max(worked, 1e-9):,.0f} per processor second"
    )


def _join(
    output: Path,
    corpus: CorpusDocuments,
    pieces: Sequence[DocumentRange],
    name: str,
    settings: dict[str, object],
    say: Say,
) -> bool:
    left = sum(not _path(output, piece).exists() for piece in pieces)
    with locked(output / ".lock") as held:
        if (output / FILE_NAME).exists():
            return True
        if left:
            say(f"{output}: this part is scored; {left} of {len(pieces)} pieces are left for the other parts")
            return False
        parts: dict[int, list[np.ndarray]] = {}
        for piece in pieces:
            parts.setdefault(piece.domain, []).append(_read(output, piece))
        of = {entry.name: np.concatenate(parts[i]) for i, entry in enumerate(corpus.entries)}
        write_scores(output, name, settings, corpus, of)
        if held:  # without locks another part may be reading them
            shutil.rmtree(output / PIECES)
            for stale in output.rglob(f"*{PARTIAL}"):  # of killed runs: a run that still writes has pieces left
                stale.unlink()
    return True


def _read(output: Path, piece: DocumentRange) -> np.ndarray:
    path = _path(output, piece)
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ScoreError(f"{path}: not readable ({error}); remove it and run again") from error
    if found.dtype != np.float32 or len(found) != piece.stop - piece.first:
        raise ScoreError(
            f"{path}: expected {piece.stop - piece.first} float32 scores, found {len(found)} of {found.dtype}; remove "
            "it and run again"
        )
    return found


def _path(output: Path, piece: DocumentRange) -> Path:
    return output / PIECES / f"{piece.number:06d}.npy"
