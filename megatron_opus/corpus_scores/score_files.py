"""The files of one scoring, the same for every scorer.

    scores.json                 scorer, settings, fingerprint of the corpus, and per domain: documents, digest, range
    candidates/DOMAIN.npy       [documents] float32 in the order of the corpus; NaN: the document has no score

`scores.json` is written last: a directory that has one is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.corpus_scores.documents import CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.scorer import array_digest
from megatron_opus.files import atomic_file, write_json

FORMAT = "megatron_opus.scores"
VERSION = 1
FILE_NAME = "scores.json"
FOLDER = "candidates"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one corpus by one scorer. of: candidate domain -> [documents] float32."""

    directory: Path
    scorer: str
    settings: dict[str, Any]
    corpus: str  # fingerprint
    of: dict[str, np.ndarray]


def write_scores(
    directory: Path, scorer: str, settings: Mapping[str, Any], corpus: CorpusDocuments, of: Mapping[str, np.ndarray]
) -> None:
    """Write the files atomically, `scores.json` last. The same scores give the same bytes."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    domains = {}
    for name, values in of.items():
        with atomic_file(folder / f"{name}.npy") as stream:
            np.save(stream, values.astype(np.float32))
        known = values[~np.isnan(values)].astype(np.float64)
        domains[name] = {
            "file": f"{FOLDER}/{name}.npy",
            "documents": len(values),
            "without_score": len(values) - len(known),
            "min": float(known.min()) if len(known) else None,
            "mean": float(known.mean()) if len(known) else None,
            "max": float(known.max()) if len(known) else None,
            "sha256": array_digest(values.astype(np.float32)),
        }
    write_json(
        directory / FILE_NAME,
        {
            "format": FORMAT,
            "version": VERSION,
            "scorer": scorer,
            "corpus": corpus.manifest.fingerprint(),
            "settings": dict(settings),
            "domains": domains,
        },
    )


def read_scores(directory: Path, corpus: CorpusDocuments | None = None) -> Scores:
    """Read a complete scoring, and check that it is of `corpus`.

    Raises ScoreError where the directory is no scoring, is not complete, is damaged, or is of another corpus.
    """
    path = directory / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        begun = (directory / "settings.json").is_file()
        what = "a scoring whose parts are not all there; run the missing ones" if begun else "none"
        raise ScoreError(f"{path}: expected a complete scoring (megatron-opus score-corpus), found {what}") from None
    except ValueError as error:
        raise ScoreError(f"{path}: not valid JSON ({error}); score the corpus again") from error
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise ScoreError(f"{path}: expected {FORMAT!r} of version {VERSION}; this is another kind of file")
    if corpus is not None and data["corpus"] != corpus.manifest.fingerprint():
        raise ScoreError(
            f"{directory}: the scores are of another corpus than {corpus.directory} (fingerprint "
            f"{data['corpus'][:16]}, this one has {corpus.manifest.fingerprint()[:16]}); score this corpus, or name "
            "the one that was scored"
        )
    found: dict[str, np.ndarray] = {}
    for name, entry in data["domains"].items():
        file = directory / entry["file"]
        try:
            values = np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise ScoreError(f"{file}: not readable ({error}); remove {path} and score the corpus again") from error
        if values.shape != (entry["documents"],) or array_digest(values) != entry["sha256"]:
            raise ScoreError(f"{file}: not the file that {FILE_NAME} means; remove {path} and score the corpus again")
        found[name] = values
    return Scores(
        directory=directory, scorer=data["scorer"], settings=data["settings"], corpus=data["corpus"], of=found
    )
