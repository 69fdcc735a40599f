"""Where the text that a run has trained on comes from, in a corpus that hides it within a domain (`hidden`).

The labels lie beside the prepared corpus, in the text that it was made of; no run reads them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_opus.config import RunConfig
from megatron_opus.runs.data import open_corpus
from megatron_opus.runs.ledger import read_ledger
from megatron_opus.studies.lab.experiment import LabError


def source_shares(directory: Path, config: RunConfig) -> dict[str, float]:
    """Return source -> share of the trained sequences that begin in a document of it; empty without labels.

    Raises LabError where the labels are not those of the prepared documents.
    """
    if config.data.path == "embedded":
        return {}
    labels = {name: found for name in _candidates(config) if (found := _labels(Path(config.data.path), name))}
    if not labels:
        return {}
    corpus = open_corpus(config, say=lambda text: None)
    documents = {e["name"]: e["documents"] for e in corpus.summary() if e["role"] == "candidates"}
    for name, found in labels.items():
        if len(found) != documents[name]:
            raise LabError(f"{config.data.path}: expected {documents[name]} labels of {name}, found {len(found)}")
    ledger = read_ledger(directory / "ledger")
    trained = ledger["sample_id"].to_numpy()[ledger["selected"].to_numpy(zero_copy_only=False)]
    ids, times = np.unique(trained, return_counts=True)
    streams, first, _ = corpus.documents_of(ids)
    names = corpus.domains["candidates"]  # candidates are the first streams
    counts: dict[str, int] = {}
    for stream, document, number in zip(streams.tolist(), first.tolist(), times.tolist(), strict=True):
        if names[stream] in labels:
            source = labels[names[stream]][document]
            counts[source] = counts.get(source, 0) + number
    return {source: count / sum(counts.values()) for source, count in sorted(counts.items())}


def _candidates(config: RunConfig) -> list[str]:
    return sorted(
        path.stem.removeprefix("candidates-") for path in Path(config.data.path).glob("text/candidates-*.jsonl")
    )


def _labels(directory: Path, domain: str) -> list[str]:
    """The source of every document in the order of the domain; empty where none is written."""
    sources = []
    with (directory / "text" / f"candidates-{domain}.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            if (source := json.loads(line).get("source")) is None:
                return []
            sources.append(source)
    return sources
