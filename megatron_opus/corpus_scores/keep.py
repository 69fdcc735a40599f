"""Part of a corpus, by its scores: a prepared directory that refers to the corpus's files, and copies nothing.

What leaves the candidates is listed in `dropped.parquet`. Proxies and validation sets stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.corpus_scores.documents import CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.duplicates import copies
from megatron_opus.corpus_scores.rules import RuleSet, named_scores, parse_rules, ranks
from megatron_opus.corpus_scores.score_files import Scores, read_scores
from megatron_opus.corpus_scores.scorer import Say
from megatron_opus.data import manifest as manifests
from megatron_opus.data.excluded_documents import WithoutDocuments, read_spans, write_spans
from megatron_opus.data.manifest import DatasetEntry, Manifest, base_directory
from megatron_opus.files import PARTIAL, atomic_file, locked

SETTINGS_KEY = "keep"
DROPPED = "dropped.parquet"
NO_SCORE, NOT_IN_BUDGET, OUTSIDE = "no score", "beyond the budget", "outside of the band"
COPY = "copy of an earlier document"
_OURS = ("excluded", "tokenizer", DROPPED, ".lock")


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """scores: name -> directory of `score-corpus`. One of token_budget and share; neither: all that the rule allows.

    share: of the candidates' tokens. seed: of the Gumbel noise. duplicates: `exact` or `near:SIMILARITY` leaves out
    copies of earlier documents before the rule chooses; empty: none are looked for.
    """

    corpus: Path
    scores: Mapping[str, Path]
    rule: str
    output: Path
    token_budget: int | None = None
    share: float | None = None
    seed: int = 0
    duplicates: str = ""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """kept: [n] bool over the candidates of all domains in order; reasons: [n] str, empty for what is kept."""

    domains: np.ndarray
    tokens: np.ndarray
    kept: np.ndarray
    reasons: np.ndarray


def choose(
    corpus: CorpusDocuments,
    scores: Mapping[str, Scores],
    rules: RuleSet,
    budget: int | None,
    seed: int = 0,
    barred: np.ndarray | None = None,
) -> Kept:
    """Take documents in the order of the rules until they have `budget` tokens; the one that reaches it is the last.

    budget: None takes every document that the rules allow. barred: [n] bool, copies that are not kept.
    Raises ScoreError where they allow too few tokens.
    """
    for rule in rules.rules:
        named_scores(rule, list(scores))
    sizes = [np.diff(stream.document_ends, prepend=0) for stream in corpus.streams]
    tokens = np.concatenate(sizes)
    domains = np.repeat(np.arange(len(sizes)), [len(s) for s in sizes])
    values = {n: np.concatenate([s.of[e.name] for e in corpus.entries]) for n, s in scores.items()}
    rank = ranks(rules, values, domains, tokens, seed)
    if barred is not None:
        rank = np.where(barred, np.inf, rank)
    allowed = np.isfinite(rank)
    kept = allowed.copy()
    if budget is not None:
        there = int(tokens[allowed].sum())
        if budget > there:
            raise ScoreError(
                f"token budget: expected at most the {there} tokens that rule {rules.text!r} allows, got {budget}; "
                "lower it or choose a wider rule"
            )
        order = np.lexsort((np.arange(len(rank)), rank))
        kept[order[int(np.searchsorted(np.cumsum(tokens[order]), budget)) + 1 :]] = False
    unknown = np.any([np.isnan(v) for v in values.values()], axis=0)
    reasons = np.where(kept, "", np.where(allowed, NOT_IN_BUDGET, np.where(unknown, NO_SCORE, OUTSIDE))).astype(object)
    if barred is not None:
        reasons[barred] = COPY
    return Kept(domains=domains, tokens=tokens, kept=kept, reasons=reasons)


def keep(config: KeepConfig, corpus: CorpusDocuments, say: Say) -> Manifest:
    """Write `config.output` and return its manifest. A directory made with the same settings is left as it is.

    Raises ScoreError for settings that cannot work, for scores that are not of this corpus, and for an output that
    holds something else.
    """
    rules = parse_rules(config.rule)
    scores = {name: read_scores(directory, corpus) for name, directory in config.scores.items()}
    if not scores:
        raise ScoreError("scores: expected at least one directory of score-corpus, got none (--scores)")
    budget = _budget(config, corpus)
    if config.output.resolve() == config.corpus.resolve():
        raise ScoreError(f"{config.output}: the output must be another directory than the corpus")
    settings = {
        "corpus": corpus.manifest.fingerprint(),
        "rule": config.rule,
        "token_budget": budget,
        "seed": config.seed,
        **({"duplicates": config.duplicates} if config.duplicates else {}),
        "scores": {n: {"scorer": s.scorer, "settings": s.settings} for n, s in scores.items()},
    }
    config.output.mkdir(parents=True, exist_ok=True)
    with locked(config.output / ".lock", f"{config.output}: another run is at work here; wait or stop it"):
        if (config.output / manifests.FILE_NAME).exists():
            return _finished(config.output, settings, say)
        for path in config.output.iterdir():
            if path.name not in _OURS and not path.name.endswith(PARTIAL):
                raise ScoreError(
                    f"{config.output} holds {path.name}, which is not of this tool; choose another --output"
                )
        barred = copies(corpus, config.duplicates, say) if config.duplicates else None
        choice = choose(corpus, scores, rules, budget, config.seed, barred)
        if not choice.kept.any():
            raise ScoreError(f"rule {config.rule!r}: no document is kept; choose a wider rule or a larger budget")
        manifest = _manifest(config, corpus, choice, settings, say)
        _list_dropped(config.output / DROPPED, corpus, scores, choice)
        manifests.write(config.output, manifest)
    return manifest


def _budget(config: KeepConfig, corpus: CorpusDocuments) -> int | None:
    if config.token_budget is not None and config.share is not None:
        raise ScoreError("budget: expected --token-budget or --share, got both")
    if config.share is None:
        if config.token_budget is not None and config.token_budget < 1:
            raise ScoreError(f"token budget: expected a positive number, got {config.token_budget}")
        return config.token_budget
    if not 0.0 < config.share <= 1.0:
        raise ScoreError(f"share: expected a number above 0 and at most 1, got {config.share}")
    return max(1, int(config.share * sum(stream.num_tokens for stream in corpus.streams)))


def _finished(output: Path, settings: dict[str, Any], say: Say) -> Manifest:
    done = manifests.read(output)
    before = done.settings.get(SETTINGS_KEY)
    if before is None:
        raise ScoreError(f"{output} already holds prepared data of another kind; choose another --output")
    for name, value in settings.items():
        if before.get(name) != value:
            raise ScoreError(
                f"{output} was made with other settings ({name}: then {before.get(name)}, now {value}); "
                "choose another --output or remove the directory"
            )
    say(f"{output}: already made with these settings")
    return done


# --- writing --------------------------------------------------------------------------------------------------------


def _manifest(
    config: KeepConfig, corpus: CorpusDocuments, choice: Kept, settings: dict[str, Any], say: Say
) -> Manifest:
    entries = []
    for number, entry in enumerate(corpus.entries):
        dropped = np.flatnonzero(~choice.kept[choice.domains == number])
        if len(dropped) == entry.documents:
            say(f"{entry.name}: nothing of this domain is kept; it is not in {config.output}")
            continue
        entries.append(_candidates(config, corpus, number, dropped))
    for entry in corpus.manifest.datasets:
        if entry.role != "candidates":
            entries.append(replace(entry, base=_base(config, entry)))
            if entry.excluded:
                raise ScoreError(
                    f"{config.corpus}: domain {entry.name} ({entry.role}) is a view with gaps; keep cannot"
                )
    return Manifest(
        tokenizer=corpus.tokenizer.save(config.output / manifests.TOKENIZER_DIRECTORY),
        datasets=entries,
        settings={SETTINGS_KEY: settings},
        provenance=corpus.manifest.provenance,
        decontamination=corpus.manifest.decontamination,
    )


def _base(config: KeepConfig, entry: DatasetEntry) -> str:
    """Return the directory that has the files of an entry, seen from the output."""
    return os.path.relpath(base_directory(config.corpus, entry).resolve(), config.output.resolve())


def _candidates(config: KeepConfig, corpus: CorpusDocuments, number: int, dropped: np.ndarray) -> DatasetEntry:
    """Return the entry of a domain without the documents `dropped`, counted in the corpus."""
    entry, stream = corpus.entries[number], corpus.streams[number]
    if not len(dropped) and not entry.excluded:
        return replace(entry, base=_base(config, entry))
    gone = np.empty((0, 3), dtype=np.int64)
    whole = stream
    if entry.excluded:  # the corpus is a view itself: everything is counted in the files that both refer to
        assert isinstance(stream, WithoutDocuments)
        gone, whole = read_spans(config.corpus / entry.excluded, entry.excluded_sha256), stream.base
    ends = whole.document_ends
    present = np.delete(np.arange(len(ends)), gone[:, 0])
    leaving = np.sort(np.concatenate([gone[:, 0], present[dropped]]))
    starts = np.where(leaving > 0, ends[np.maximum(leaving - 1, 0)], 0)
    spans = np.stack([leaving, starts, ends[leaving]], axis=1)
    path = config.output / "excluded" / f"{entry.name}.npy"
    path.parent.mkdir(exist_ok=True)
    digest = write_spans(path, spans)
    left = WithoutDocuments(whole, spans)
    masked = 0
    if (unlearned := corpus.unlearned[number]) is not None:
        sizes = np.diff(stream.document_ends, prepend=0)
        flags = np.zeros(len(sizes), dtype=bool)
        flags[dropped] = True
        document = np.searchsorted(stream.document_ends, unlearned[:, 0], side="right")
        masked = int(np.diff(unlearned, axis=1)[~flags[document]].sum())
    return replace(
        entry,
        base=_base(config, entry),
        documents=entry.documents - len(dropped),
        tokens=left.num_tokens,
        masked_tokens=masked,
        scores={},  # of the documents by their number, which is another one now
        excluded=path.relative_to(config.output).as_posix(),
        excluded_sha256=digest,
    )


def _list_dropped(path: Path, corpus: CorpusDocuments, scores: Mapping[str, Scores], choice: Kept) -> None:
    """Write one row per document that leaves: domain, its number in the corpus, tokens, scores, and why."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.array([entry.name for entry in corpus.entries])
    numbers = np.concatenate([np.arange(entry.documents) for entry in corpus.entries])
    gone = ~choice.kept
    columns = {
        "domain": names[choice.domains[gone]],
        "document": numbers[gone],
        "tokens": choice.tokens[gone],
        **{f"score_{n}": np.concatenate([s.of[e.name] for e in corpus.entries])[gone] for n, s in scores.items()},
        "reason": choice.reasons[gone],
    }
    with atomic_file(path) as stream:
        pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), stream)
