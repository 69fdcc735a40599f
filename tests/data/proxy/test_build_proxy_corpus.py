"""A built proxy: what is in it, what has left the candidates, interrupted and repeated runs. Nothing is mocked."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import run, spec
from proxy_helpers import LEAKED, TOPICS, built, config, corpus_texts, make_corpus, plain, science_questions, sentence

from megatron_opus.backends.formats import indexed
from megatron_opus.config import DataConfig
from megatron_opus.data import excluded_documents, unlearned_spans
from megatron_opus.data import manifest as manifests
from megatron_opus.data.benchmarks.items import BenchmarkError
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.manifest import ManifestError
from megatron_opus.data.prepare.records import ReadOptions
from megatron_opus.data.proxy import similarity
from megatron_opus.data.proxy.build import build, parse_tokens
from megatron_opus.data.proxy.encoders import LexicalEncoder
from megatron_opus.data.proxy.similarity import ProxyError
from megatron_opus.data.tokenizers import base as tokenizers


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_PIECE_TOKENS", 1500)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("proxied"))


@pytest.fixture(scope="module")
def proxy(corpus: Path) -> Path:
    output = corpus.parent / "bench"
    built(corpus, output)
    return output


def fingerprints(directory: Path) -> dict[str, str]:
    """Everything but the locks."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and not p.name.startswith(".lock")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_proxy_is_what_resembles_the_benchmark(corpus: Path, proxy: Path) -> None:
    """Fault: least similar documents, too few or too many of them, or text that the corpus never had."""
    manifest = manifests.read(proxy)
    (entry,) = manifest.of_role("proxy")
    chosen = plain(proxy, "proxy", "bench_proxy")
    science = set(plain(corpus, "candidates", "science"))
    assert set(chosen) <= science
    rows = [json.loads(line) for line in (proxy / "proxy" / "documents.jsonl").read_text().splitlines()]
    assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)
    assert entry.tokens == sum(r["tokens"] for r in rows) >= 2000 > entry.tokens - rows[-1]["tokens"]
    assert [plain(corpus, "candidates", r["domain"])[r["document"]] for r in rows] == chosen
    assert {r["nearest"]["benchmark"] for r in rows} == {"mmlu"}


def test_nothing_of_the_proxy_is_left_in_the_candidates(corpus: Path, proxy: Path) -> None:
    """Fault: a proxy document, or a copy of it in another domain with other spaces, stays in the candidate stream; or
    documents leave that should not; or validation changes."""
    manifest = manifests.read(proxy)
    chosen = corpus_texts(proxy, "proxy", manifest)
    left = corpus_texts(proxy, "candidates", manifest)
    before = [text for topic in TOPICS for text in plain(corpus, "candidates", topic)]
    assert not set(chosen) & set(left)
    assert left == [text for text in before if text not in set(chosen)]
    assert len(chosen) == len(set(chosen))
    assert {sentence("science", 11), sentence("science", 13)} <= set(chosen)
    assert manifest.provenance["proxy"]["copies_removed"] == 2  # they are among the sports, too
    assert corpus_texts(proxy, "validation", manifest) == plain(corpus, "validation", "sports")
    assert not any(e.name == "goal" for e in manifest.datasets)  # the proxy that the corpus was prepared with


def test_benchmark_text_never_enters_the_proxy(proxy: Path) -> None:
    """Fault: the document that contains a question, the most similar of all, becomes the target."""
    manifest = manifests.read(proxy)
    assert not any(LEAKED in text for text in corpus_texts(proxy, "proxy", manifest))
    assert any(LEAKED in text for text in corpus_texts(proxy, "candidates", manifest))
    (line,) = (proxy / "with_benchmark_text.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["domain"], found["document"], found["contains"]["id"]) == ("science", 40, "questions:3")
    assert manifest.provenance["proxy"]["with_benchmark_text"] == 1


def test_the_random_proxy(corpus: Path) -> None:
    """Fault: a `std` proxy that depends on similarity, is not random over domains, or has benchmark text."""
    parts = {}
    for name, seed in (("std", 1), ("again", 1), ("other", 2)):
        manifest = built(corpus, corpus.parent / name, kind="std", seed=seed, token_budget=3_000, encoder=None)
        assert manifest is not None
        parts[name] = corpus_texts(corpus.parent / name, "proxy", manifest)
        (entry,) = manifest.of_role("proxy")
        assert (entry.name, entry.tokens >= 3_000) == ("std_proxy", True)
        assert not set(parts[name]) & set(corpus_texts(corpus.parent / name, "candidates", manifest))
        assert not any(LEAKED in text for text in parts[name])
        assert set(manifest.provenance["proxy"]["tokens_by_domain"]) == set(TOPICS)
        assert min(manifest.provenance["proxy"]["tokens_by_domain"].values()) > 0
    assert parts["std"] == parts["again"] != parts["other"]
    without = built(corpus, corpus.parent / "nobench", kind="std", seed=1, encoder=None, benchmarks=())
    assert without is not None


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    corpus: Path, proxy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a run stopped while counting words, while scoring, or before the manifest begins again, or ends otherwise
    than one that was never stopped."""
    output = corpus.parent / "stopped"
    calls: dict[str, int] = {}
    stop_at = {"count": 7, "encode_documents": 5}

    def stopping(name: str, function: Any) -> Any:
        def called(self: Any, texts: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            if calls[name] == stop_at.get(name):
                raise KeyboardInterrupt
            return function(self, texts)

        return called

    for name in stop_at:
        monkeypatch.setattr(LexicalEncoder, name, stopping(name, getattr(LexicalEncoder, name)))
    for name in ("count", "encode_documents"):
        with pytest.raises(KeyboardInterrupt):
            built(corpus, output)
        assert calls[name] == stop_at[name]
        assert not (output / manifests.FILE_NAME).exists()
    monkeypatch.setattr(manifests, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        built(corpus, output)
    monkeypatch.undo()
    counted = dict(calls)
    built(corpus, output)
    assert calls == counted  # everything was scored
    assert fingerprints(output) == fingerprints(proxy)


def test_parts_make_the_whole(corpus: Path, proxy: Path) -> None:
    """Fault: pieces that two processes leave out or score otherwise."""
    output, scores = corpus.parent / "parts", corpus.parent / "shared_scores"
    settings = {"scores": scores}
    with pytest.raises(ProxyError, match="counts the words of the whole corpus"):
        built(corpus, output, part=(0, 2), **settings)
    scores.mkdir(exist_ok=True)
    shutil.copy(proxy / "scores" / "counts.npz", scores / "counts.npz")
    assert built(corpus, output, part=(1, 2), **settings) is None
    assert 0 < len(list(scores.glob("0*.npy"))) < len(list((proxy / "scores").glob("0*.npy")))
    assert built(corpus, output, part=(0, 2), **settings) is None
    manifest = built(corpus, output, **settings)
    assert manifest == manifests.read(proxy)
    # Other budgets need no scoring: an encoder that cannot encode is never asked.
    other = built(corpus, corpus.parent / "budget", token_budget=300, **settings)
    assert other is not None
    assert other.of_role("proxy")[0].tokens < manifest.of_role("proxy")[0].tokens


def test_training_reads_it_like_a_corpus_without_those_documents(corpus: Path, proxy: Path) -> None:
    """Fault: sequences across a gap, ids, fingerprints or digests that ignore what was left out. The oracle is the
    concatenation of the documents that stay."""
    data = DataConfig(seq_length=16)
    whole, view = (Corpus.open(d, data, indexed.open_documents) for d in (corpus, proxy))
    assert view.fingerprint != whole.fingerprint
    manifest = manifests.read(proxy)
    stream = indexed.open_documents("science", corpus / "candidates" / "science")
    (entry,) = [e for e in manifest.of_role("candidates") if e.name == "science"]
    spans = np.load(proxy / entry.excluded)
    keep = np.ones(stream.num_tokens, dtype=bool)
    for _, start, stop in spans.tolist():
        keep[start:stop] = False
    expected = stream.tokens(0, stream.num_tokens)[keep]
    first = int(view.first_ids("candidates")[list(view.domains["candidates"]).index("science")])
    count = int(view.sequences("candidates")[list(view.domains["candidates"]).index("science")])
    batch = view.batch(np.arange(first, first + count))
    assert np.array_equal(batch.tokens.numpy().reshape(-1), expected[: count * 16])
    assert view.describe(first + count - 1).last_document <= entry.documents
    digests, before = view.content_digests(), whole.content_digests()
    assert digests["candidates/science"] != before["candidates/science"]
    assert digests["validation/sports"] == before["validation/sports"]
    assert view.domains["proxy"] == ("bench_proxy",)
    assert len(view.proxy_ids(0, 4, 1)) == 4


def test_the_corpus_that_it_refers_to(corpus: Path, proxy: Path, tmp_path: Path) -> None:
    """Fault: a corpus that was moved, or prepared anew, is read with the old list of documents; or a pair of
    directories cannot be moved together, or be reached by a link."""
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(proxy, tmp_path / "bench")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "link").symlink_to(tmp_path / "bench")
    data = DataConfig(seq_length=16)
    fingerprint = Corpus.open(proxy, data, indexed.open_documents).fingerprint
    for directory in (tmp_path / "bench", tmp_path / "far" / "link"):
        assert Corpus.open(directory, data, indexed.open_documents).fingerprint == fingerprint
    path = tmp_path / "corpus" / manifests.FILE_NAME
    path.write_text(path.read_text().replace('"bin_sha256": "', '"bin_sha256": "0'))
    with pytest.raises(ManifestError, match="prepared anew since"):
        Corpus.open(tmp_path / "bench", data, indexed.open_documents)
    path.unlink()
    with pytest.raises(ManifestError, match="which is not there; the two directories belong together"):
        Corpus.open(tmp_path / "bench", data, indexed.open_documents)


def test_other_settings_are_refused(corpus: Path, proxy: Path, tmp_path: Path) -> None:
    """Fault: results of two encoders, budgets or benchmark sets in one directory."""
    said: list[str] = []
    assert build(config(corpus, proxy), indexed, said.append) == manifests.read(proxy)
    assert "already built" in said[-1]
    with pytest.raises(ProxyError, match=r"token_budget: then 2000, now 900.*--scores can be shared"):
        built(corpus, proxy, token_budget=900)
    more = science_questions(tmp_path / "questions2.jsonl")
    shared = {"scores": proxy / "scores"}
    both = (*config(corpus, proxy).benchmarks, ("arc_easy_like", str(_stored(more))))
    with pytest.raises(ProxyError, match=r"scores was made with other settings \(benchmarks: then "):
        built(corpus, tmp_path / "out", benchmarks=both, **shared)
    with pytest.raises(ProxyError, match=r"columns: then 262144, now 1024"):
        built(corpus, tmp_path / "out", encoder=LexicalEncoder(columns=1024), **shared)
    shutil.copytree(corpus, tmp_path / "prepared")
    with pytest.raises(ProxyError, match="already holds prepared data of another kind"):
        built(corpus, tmp_path / "prepared")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ProxyError, match=r"holds thesis\.tex, which is not of this tool"):
        built(corpus, tmp_path / "mine")


def _stored(path: Path) -> Path:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    other = [{"query": r["question"], "choices": r["choices"], "gold": r["answer"]} for r in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in other))
    return path


def test_what_cannot_be_built(corpus: Path, proxy: Path, tmp_path: Path) -> None:
    """Fault: an empty or endless result, or a directory that trains although it is incomplete."""
    output = tmp_path / "out"
    for settings, error, message in (
        ({"benchmarks": ()}, BenchmarkError, "no benchmark given"),
        ({"encoder": None}, ProxyError, "needs an encoder"),
        ({"token_budget": 0}, ProxyError, "expected a positive number, got 0"),
        ({"part": (2, 2)}, ProxyError, "expected 0 <= I < N"),
        ({"token_budget": 10**6}, ProxyError, r"at most the \d+ tokens of the candidates that can be proxy"),
    ):
        with pytest.raises(error, match=message):
            built(corpus, output, **settings)
        assert not (output / manifests.FILE_NAME).exists()
    with pytest.raises(ProxyError, match="another directory than the corpus"):
        built(corpus, corpus)
    with pytest.raises(ProxyError, match="already is a corpus with a built proxy"):
        built(proxy, output)
    old = tmp_path / "old"
    shutil.copytree(corpus, old)
    path = old / manifests.FILE_NAME
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(ManifestError, match="expected version 1, found 0"):
        built(old, output)
    largest = sum(e.tokens for e in manifests.read(corpus).of_role("candidates") if e.name == "science")
    with pytest.raises(ProxyError, match="domain science: all of its 41 documents would become proxy"):
        # Without the document that contains a question the domain can be used up.
        built(corpus, tmp_path / "all", token_budget=largest, benchmarks=(("x", str(_stored(_harmless(tmp_path)))),))


def _harmless(folder: Path) -> Path:
    path = science_questions(folder / "harmless.jsonl")
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if LEAKED not in line))
    return path


def test_damaged_scores_are_named(corpus: Path, proxy: Path, tmp_path: Path) -> None:
    """Fault: a truncated file of scores is an empty piece."""
    shutil.copytree(proxy / "scores", tmp_path / "scores")
    (tmp_path / "scores" / "000001.npy").write_bytes(b"x")
    with pytest.raises(ProxyError, match=r"000001\.npy: not readable"):
        built(corpus, tmp_path / "out", scores=tmp_path / "scores")
    np.save(tmp_path / "scores" / "000001.npy", np.zeros(1, dtype=similarity.RECORD))
    with pytest.raises(ProxyError, match=r"expected \d+ records, found 1"):
        built(corpus, tmp_path / "out", scores=tmp_path / "scores")


def test_the_report(corpus: Path, proxy: Path) -> None:
    """Fault: shares that do not belong to the tokens, or a picture that is none."""
    text = (proxy / "report.txt").read_text()
    manifest = manifests.read(proxy)
    (entry,) = manifest.of_role("proxy")
    science = next(e for e in manifests.read(corpus).of_role("candidates") if e.name == "science")
    (row,) = [line.split() for line in text.splitlines() if line.startswith("  science ")]
    total = sum(e.tokens for e in manifests.read(corpus).of_role("candidates"))
    assert [row[1], row[3]] == [f"{science.tokens:,}", f"{entry.tokens:,}"]
    assert (row[2], row[4]) == (f"{science.tokens / total:.1%}", "100.0%")
    for heading in ("=== best", "=== last that were taken", "=== first that were not", "=== worst", "=== with benchm"):
        assert heading in text
    bars = text[text.index("tokens by score") :].splitlines()[1:]
    counts = [int(line.split()[1].replace(",", "")) for line in bars[: bars.index("")]]
    assert sum(counts) == total
    assert (proxy / "report.png").read_bytes().startswith(b"\x89PNG")


def test_loss_masks_stay_with_their_documents(tmp_path: Path) -> None:
    """Fault: headers are learned, or text is not, in the proxy or beside a gap; a copy under another header stays."""
    bodies = [sentence(topic, i) for topic in ("science", "sports") for i in range(30)]
    rows = [{"title": f"Title {i}", "text": body} for i, body in enumerate(bodies)]
    copies = [{"title": f"Mirror {i}", "text": bodies[i]} for i in range(12)] + rows[40:]
    header = ReadOptions(metadata_template="{title}\n\n")
    for name, some in (("web", rows[:40]), ("mirror", copies)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    corpus = tmp_path / "corpus"
    run(corpus, *(spec(n, "candidates", tmp_path / f"{n}.jsonl") for n in ("web", "mirror")), duplicates="keep",
        read=header)  # fmt: skip
    manifest = built(corpus, tmp_path / "out", token_budget=1500)
    assert manifest is not None
    found: dict[str, list[str]] = {}
    tokenizer = tokenizers.reopen_tokenizer(tmp_path / "out" / "tokenizer", manifest.tokenizer)
    for entry in manifest.datasets:
        documents = excluded_documents.open_entry(tmp_path / "out", entry, indexed.open_documents)
        spans = excluded_documents.open_unlearned(tmp_path / "out", entry, documents)
        assert entry.masked_tokens == (spans[:, 1] - spans[:, 0]).sum() > 0
        start = 0
        for stop in documents.document_ends.tolist():
            learned = documents.tokens(start, stop - start)[~unlearned_spans.within(spans, start, stop - start)]
            found.setdefault(entry.role, []).append(tokenizer.decode(learned.tolist()).strip())
            start = stop
    assert set(found["proxy"]) < set(bodies)
    assert set(found["candidates"]) == set(bodies) - set(found["proxy"])
    assert manifest.provenance["proxy"]["copies_removed"] == len(set(found["proxy"]) & set(bodies[:12])) > 0
    batch = Corpus.open(tmp_path / "out", DataConfig(seq_length=64), indexed.open_documents).batch([0, 1, 2])
    assert 0 < batch.loss_mask.sum() < batch.loss_mask.numel()


@pytest.mark.parametrize(("text", "tokens"), [("30M", 30_000_000), ("1.5b", 1_500_000_000), ("2k", 2_000), ("77", 77)])
def test_budgets(text: str, tokens: int) -> None:
    """Fault: 30M read as 30."""
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "-3", "0", "1.5", "nan", "infM", "30 MB"])
def test_what_is_no_budget(text: str) -> None:
    """Fault: a proxy of no tokens, or of a guess."""
    with pytest.raises(ProxyError, match="expected a positive number such as 30M"):
        parse_tokens(text)
