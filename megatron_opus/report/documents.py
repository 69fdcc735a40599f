"""The corpus that a run was trained on, found again, and its documents in the order in which they were preferred.

A run chooses sequences. A sequence counts for every document that has a token in it, so that a long document is
offered many times and short ones share their sequences with their neighbours.

    surplus = times chosen - times offered * (chosen / offered over the whole run)

Most chosen: the largest surplus; ties by the mean standardised utility, then by place in the corpus.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_opus.config import DataConfig, schema
from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import ManifestError
from megatron_opus.data.prepare.embedded import embedded_directory
from megatron_opus.errors import CheckpointError
from megatron_opus.report.decisions import Tally
from megatron_opus.report.record import RunRecord
from megatron_opus.runs import checkpoints

if TYPE_CHECKING:
    from megatron_opus.data.corpus import Corpus

EXCERPT_TOKENS, EXCERPT_CHARACTERS = 400, 900


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a run's texts come from. `corpus` is None where none was found, or not the one that the run read."""

    corpus: Corpus | None
    targets: tuple[str, ...]  # validation domains of which there is a proxy; empty: unknown
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ListedDocument:
    """One document, or one sequence where there is no corpus."""

    domain: str
    name: str
    offered: int
    chosen: int
    surplus: float
    utility: float  # mean standardised; NaN without utilities
    text: str
    tokens: int  # of the whole document; 0: unknown
    cut: bool  # the text is its beginning only


def find(record: RunRecord, data: Path | None) -> Source:
    """Open the corpus of a run: `data` where it is given, else what config.yaml names. Never raises, never prepares."""
    notes: list[str] = []
    directory = _directory(record, data)
    if directory is None:
        wanted = record.setting("data.path", "a corpus that config.yaml would name")
        return Source(
            corpus=None,
            targets=(),
            notes=(
                f"The corpus ({wanted}) is not where the settings say, so texts are not shown and sequences are "
                "listed by id; give its directory with --data.",
            ),
        )
    try:
        manifest = manifests.read(directory)
    except ManifestError as error:
        return Source(corpus=None, targets=(), notes=(f"The corpus cannot be read, so texts are not shown: {error}",))
    validation = {entry.name for entry in manifest.of_role("validation")}
    targets = tuple(e.name for e in manifest.of_role("proxy") if e.name in validation)
    corpus: Corpus | None = None
    try:
        corpus = _open(record, directory)
    except (ValueError, OSError, ImportError) as error:
        notes.append(f"The corpus cannot be opened, so texts are not shown: {error}")
    if corpus is not None:
        expected = _fingerprint(record.directory)
        if expected is None:
            notes.append("No checkpoint says which data was read: that these are its texts could not be checked.")
        elif expected != corpus.fingerprint:
            notes.append(
                f"{directory} is not the data that this run was trained on (the fingerprint in its checkpoint "
                "differs), so texts are not shown; give the right directory with --data."
            )
            corpus, targets = None, ()
    return Source(corpus=corpus, targets=targets, notes=tuple(notes))


def _directory(record: RunRecord, data: Path | None) -> Path | None:
    if data is not None:
        return data
    path = record.setting("data.path")
    if not isinstance(path, str):
        return None
    if path == "embedded":
        path = str(embedded_directory(str(record.setting("data.cache_dir", "data"))))
    # relative to where the run was started: here, or where its output_dir is found again from its folder
    places = [Path(path)]
    output = Path(str(record.setting("output_dir", "runs"))) / str(record.setting("name", record.label))
    folder = record.directory.resolve()
    if not output.is_absolute() and folder.parts[-len(output.parts) :] == output.parts:
        places.append(Path(*folder.parts[: -len(output.parts)]) / path)
    return next((place for place in places if (place / manifests.FILE_NAME).is_file()), None)


def _open(record: RunRecord, directory: Path) -> Corpus:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that token files do not need
        from megatron_opus.backends.formats import indexed
        from megatron_opus.data.corpus import Corpus
    config: DataConfig = schema.build(DataConfig, record.setting("data"))
    window, windows = record.setting("selection.score_length"), record.setting("selection.score_windows", 1)
    proxy = min(window, config.seq_length) * windows if isinstance(window, int) and isinstance(windows, int) else None
    return Corpus.open(directory, config, indexed.open_documents, proxy_length=proxy)


def _fingerprint(run: Path) -> str | None:
    marker = newest_marker(run)
    found = None if marker is None else marker.get("fingerprints", {}).get("data")
    return found if isinstance(found, str) else None


def newest_marker(run: Path) -> dict[str, Any] | None:
    """What the newest complete checkpoint says about itself; None where there is none to read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
    for path in reversed(checkpoints.complete(run / "checkpoints")):
        try:
            marker = checkpoints.read_marker(path)
        except (CheckpointError, OSError):
            continue
        if isinstance(marker, dict):
            return marker
    return None


# --- in order of preference -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Documents, or sequences, that were offered, with the most preferred first. [n] each."""

    domain: np.ndarray  # names
    stream: np.ndarray  # number in the corpus; of sequences: -1
    key: np.ndarray  # document within its stream, or id of the sequence
    offered: np.ndarray
    chosen: np.ndarray
    surplus: np.ndarray
    within: np.ndarray  # the same against the rate of the own domain
    utility: np.ndarray


def rank(tally: Tally, domains: Sequence[str], rate: float, corpus: Corpus | None) -> Ranking:
    """rate: chosen / offered over the whole run. Raises CorpusError for ids that the corpus does not have."""
    names = np.array(domains, dtype=object)
    stream, key = np.full(len(tally.ids), -1), tally.ids
    pick = np.arange(len(tally.ids))  # row of the tally for each (sequence, document)
    if corpus is not None:
        number, first, last = corpus.documents_of(tally.ids)
        count = last - first + 1
        pick = np.repeat(pick, count)
        within = np.arange(len(pick)) - np.repeat(np.cumsum(count) - count, count)
        stream, key = number[pick], first[pick] + within
    pairs, place = np.unique(np.stack([stream, key]), axis=1, return_inverse=True)
    place = place.reshape(-1)

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values[pick], pairs.shape[1])

    offered, chosen, scored = summed(tally.offered), summed(tally.chosen), summed(tally.scored)
    surplus = chosen - offered * rate
    utility = np.divide(summed(tally.utility), scored, out=np.full(len(scored), np.nan), where=scored > 0)
    domain = np.empty(pairs.shape[1], dtype=np.int64)
    domain[place] = tally.domain[pick]
    of_domain = np.bincount(domain, chosen, len(names)) / np.maximum(np.bincount(domain, offered, len(names)), 1)
    order = _falling(surplus, utility)
    return Ranking(
        domain=names[domain[order]],
        stream=pairs[0][order],
        key=pairs[1][order],
        offered=offered[order].astype(np.int64),
        chosen=chosen[order].astype(np.int64),
        surplus=surplus[order],
        within=(chosen - offered * of_domain[domain])[order],
        utility=utility[order],
    )


def _falling(surplus: np.ndarray, utility: np.ndarray) -> np.ndarray:
    """Rounded: equal counts must tie whatever the last bits of the rate are."""
    return np.lexsort((np.arange(len(surplus)), -np.nan_to_num(utility), -np.round(surplus, 9)))


def choices(ranking: Ranking, places: Sequence[int], corpus: Corpus | None) -> list[ListedDocument]:
    """The documents at these places of the ranking, with the beginning of their text."""
    return [_choice(ranking, i, corpus) for i in places]


def _choice(ranking: Ranking, i: int, corpus: Corpus | None) -> ListedDocument:
    key, text, tokens = int(ranking.key[i]), "", 0
    if corpus is not None:
        text, tokens = corpus.document_text(int(ranking.stream[i]), key, EXCERPT_TOKENS)
        text = text.strip("\n ") or "(nothing but white space)"
    return ListedDocument(
        domain=str(ranking.domain[i]),
        name=f"document {key:,}" if corpus is not None else f"sequence {key:,}",
        offered=int(ranking.offered[i]),
        chosen=int(ranking.chosen[i]),
        surplus=float(ranking.surplus[i]),
        utility=float(ranking.utility[i]),
        text=text[:EXCERPT_CHARACTERS],
        tokens=tokens,
        cut=tokens > EXCERPT_TOKENS or len(text) > EXCERPT_CHARACTERS,
    )


def ends(ranking: Ranking, count: int, domain: str | None = None) -> tuple[list[int], list[int]]:
    """Places of the `count` most and the `count` least chosen ones, of all or of one domain by its own rate.

    None stands in both.
    """
    places = np.arange(len(ranking.key))
    if domain is not None:
        places = np.flatnonzero(ranking.domain == domain)
        places = places[_falling(ranking.within[places], ranking.utility[places])]
    each = min(count, len(places) // 2)
    return places[:each].tolist(), places[::-1][:each].tolist()
