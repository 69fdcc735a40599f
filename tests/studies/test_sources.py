"""What a corpus hides within a domain, found again from what was trained on."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_opus.backends.formats import indexed
from megatron_opus.config import from_dict
from megatron_opus.data.prepare import stdlib_text
from megatron_opus.runs.data import open_corpus
from megatron_opus.runs.ledger import LedgerWriter
from megatron_opus.studies.lab.corpora import HIDDEN, prepare_lab
from megatron_opus.studies.lab.experiment import LabError
from megatron_opus.studies.lab.sources import source_shares
from megatron_opus.types import Candidates, Selection, Signals

MODEL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}


def test_the_report_says_where_trained_sequences_come_from(tmp_path, monkeypatch):
    """Guards against labels that are shifted against the prepared documents, or counted over what was only offered."""
    texts = {name: documents[:120] for name, documents in stdlib_text.documents().items()}
    monkeypatch.setattr(stdlib_text, "documents", lambda: texts)
    directory = prepare_lab("hidden", tmp_path / "cache", indexed, progress=False)
    config = from_dict({"name": "x", "model": MODEL, "data": {"path": str(directory), "seq_length": 64}})
    corpus = open_corpus(config, say=lambda text: None)
    assert corpus.domains["candidates"] == (HIDDEN,)
    ids = np.random.default_rng(0).permutation(int(corpus.sequences("candidates")[0]))[:40]
    writer = LedgerWriter(tmp_path / "run/ledger", corpus.domains["candidates"])
    candidates = Candidates(step=0, sample_ids=ids, domains=np.zeros(40, dtype=np.int32))
    writer.append(candidates, Signals(), Selection(indices=torch.arange(0, 40, 2)))
    writer.flush()

    lines = (directory / f"text/candidates-{HIDDEN}.jsonl").read_text(encoding="utf-8").splitlines()
    labelled = [json.loads(line) for line in lines]
    found: Counter[str] = Counter()
    for sample in ids[::2]:
        document = corpus.describe(int(sample)).first_document
        text, _ = corpus.document_text(0, document, 20)
        letters = "".join(c for c in text if c.isalnum())
        assert "".join(c for c in labelled[document]["text"] if c.isalnum()).startswith(letters[:20])
        found[labelled[document]["source"]] += 1
    shares = source_shares(tmp_path / "run", config)
    assert shares == pytest.approx({source: count / 20 for source, count in found.items()})

    (directory / f"text/candidates-{HIDDEN}.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    with pytest.raises(LabError, match=r"expected \d+ labels of text, found"):
        source_shares(tmp_path / "run", config)
    (directory / f"text/candidates-{HIDDEN}.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    assert source_shares(tmp_path / "run", config) == {}
