"""What is kept of a corpus: the rules, the views, the list of what leaves, and training on the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_helpers import run as prepared
from data_helpers import spec, write_jsonl
from proxy_helpers import built, corpus_texts, sentence
from score_helpers import opened, scored, topic_corpus

from megatron_opus.corpus_scores.documents import Block, ScoreError
from megatron_opus.corpus_scores.duplicates import copies
from megatron_opus.corpus_scores.keep import KeepConfig, keep
from megatron_opus.corpus_scores.lexical import Dsir
from megatron_opus.corpus_scores.rules import _gumbel, parse_rules, principal_axes, ranks
from megatron_opus.corpus_scores.scorer import DocumentScorer
from megatron_opus.data.manifest import Manifest

TOKENS = np.array([10, 20, 30, 40])
DOMAINS = np.array([0, 0, 1, 1])
SCORES = np.array([1.0, 4.0, 2.0, 3.0], dtype=np.float32)


class Length(DocumentScorer):
    """Tokens of a document; nothing for those of an odd length where `odd` is False."""

    name = "length"

    def __init__(self, odd: bool = True) -> None:
        self._odd = odd

    def identity(self) -> dict[str, object]:
        return {"odd": self._odd}

    def score(self, block: Block) -> np.ndarray:
        sizes = np.diff(block.ends, prepend=0).astype(np.float64)
        return sizes if self._odd else np.where(sizes % 2 == 0, sizes, np.nan)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topic_corpus(tmp_path_factory.mktemp("keep"))


@pytest.fixture(scope="module")
def lengths(corpus: Path) -> Path:
    directory = corpus.parent / "lengths"
    scored(corpus, Length(), directory)
    return directory


def kept(corpus: Path, output: Path, rule: str, **settings: object) -> Manifest:
    values = {"scores": {"s": corpus.parent / "lengths"}, **settings}
    return keep(KeepConfig(corpus=corpus, output=output, rule=rule, **values), opened(corpus), lambda _: None)  # type: ignore[arg-type]


def rank(text: str, **scores: np.ndarray) -> list[float]:
    return ranks(parse_rules(text), scores or {"s": SCORES}, DOMAINS, TOKENS, seed=0).tolist()


def test_ranks_are_shares_of_the_tokens_before() -> None:
    """Guards against ranks by documents instead of tokens, an order that is turned, and a band of the wrong end."""
    assert rank("top") == pytest.approx([0.9, 0.0, 0.6, 0.2])
    assert rank("bottom") == pytest.approx([0.0, 0.8, 0.1, 0.4])
    # in ascending order the tokens lie at 0-0.1, 0.1-0.4, 0.4-0.8, 0.8-1: the middle of each decides
    assert rank("band:0.2-0.8") == pytest.approx([np.inf, np.inf, 0.0, 0.2])
    assert rank("per-domain:top") == pytest.approx([2 / 3, 0.0, 4 / 7, 0.0])


def test_and_takes_the_worse_rank_and_or_the_better_one() -> None:
    """Guards against `and` and `or` exchanged, and against documents outside of a band that come back by `and`."""
    other = np.array([4.0, 3.0, 2.0, 1.0], dtype=np.float32)  # ranks 0, 0.1, 0.3, 0.6
    both = {"s": SCORES, "t": other}
    assert rank("top@s and top@t", **both) == pytest.approx([0.9, 0.1, 0.6, 0.6])
    assert rank("top@s or top@t", **both) == pytest.approx([0.0, 0.0, 0.3, 0.2])
    assert np.isinf(rank("band:0.2-0.8@s and top@t", **both)).tolist() == [True, True, False, False]


def test_a_document_without_score_is_never_kept() -> None:
    """Guards against NaN that sorts as the best or the worst score."""
    values = np.array([1.0, np.nan, 2.0, np.nan], dtype=np.float32)
    for rule in ("top", "bottom", "band:0-1", "gumbel:1", "per-domain:bottom"):
        assert np.isinf(rank(rule, s=values)).tolist() == [False, True, False, True]


def test_gumbel_noise_draws_in_proportion_to_the_exponential() -> None:
    """Guards against noise of another distribution, by which a temperature means nothing.

    The largest of score + Gumbel noise is document i with probability exp(s_i) / sum. 20,000 draws of 2 documents with
    probabilities 0.731 and 0.269 have a standard error of 0.0031; 4 of them are allowed.
    """
    noise = np.stack([_gumbel(np.arange(2), seed) for seed in range(20_000)])
    assert (noise[:, 0] + 1.0 > noise[:, 1]).mean() == pytest.approx(np.e / (1 + np.e), abs=0.0125)
    many = _gumbel(np.arange(100_000), 0)
    assert many.mean() == pytest.approx(0.5772, abs=0.02)
    assert rank("gumbel:0.000001") == rank("top")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("best", "expected top, bottom, band:A-B"),
        ("top:3", "expected top, bottom, band:A-B"),
        ("band:0.8-0.2", "0 <= A < B <= 1"),
        ("band:x-y", "expected top, bottom, band:A-B"),
        ("gumbel:0", "positive temperature"),
        ("gumbel:nan", "positive temperature"),
        ("top bottom", "with `and` or `or` between them"),
        ("top and", "with `and` or `or` between them"),
        ("", "with `and` or `or` between them"),
    ],
)
def test_rules_that_are_none_are_refused(text: str, said: str) -> None:
    """Guards against a rule that is misread as another one."""
    with pytest.raises(ScoreError, match=said):
        parse_rules(text)


def test_a_rule_must_say_which_scores() -> None:
    """Guards against the first of several scores being taken silently."""
    with pytest.raises(ScoreError, match="one of s, t; got no @NAME"):
        rank("top", s=SCORES, t=SCORES)
    with pytest.raises(ScoreError, match="one of s; got @u"):
        rank("top@u")


def test_the_longest_documents_are_kept(corpus: Path, lengths: Path, tmp_path: Path) -> None:
    """Guards against views that leave out other documents than those dropped, and a budget that is missed.

    The budget is 40% of the tokens; what is kept is read again as training reads it.
    """
    before = {name: np.load(lengths / "candidates" / f"{name}.npy") for name in ("mixed", "science", "sports")}
    budget = int(0.4 * sum(v.sum() for v in before.values()))
    manifest = kept(corpus, tmp_path / "kept", "top", token_budget=budget)
    tokens = sum(e.tokens for e in manifest.of_role("candidates"))
    longest = max(v.max() for v in before.values())
    assert budget <= tokens < budget + longest
    table = pq.read_table(tmp_path / "kept" / "dropped.parquet").to_pylist()
    assert {row["reason"] for row in table} == {"beyond the budget"}
    texts = corpus_texts(tmp_path / "kept", "candidates", manifest)
    documents = opened(corpus)
    gone = {(row["domain"], row["document"]) for row in table}
    expected = [
        " ".join(documents.text(documents.one(number, i)).split())
        for number, entry in enumerate(documents.entries)
        for i in range(entry.documents)
        if (entry.name, i) not in gone
    ]
    assert texts == expected
    staying = [v[[i for i in range(len(v)) if (n, i) not in gone]] for n, v in before.items()]
    assert min(v.min() for v in staying if len(v)) >= max(row["score_s"] for row in table)


def test_proxy_and_validation_are_not_touched(corpus: Path, lengths: Path, tmp_path: Path) -> None:
    """Guards against a rule that reaches beyond the candidates, and files that are copied instead of referred to."""
    manifest = kept(corpus, tmp_path / "kept", "bottom", share=0.2)
    for role, name in (("proxy", "goal"), ("validation", "money")):
        (entry,) = manifest.of_role(role)  # type: ignore[arg-type]
        assert (entry.name, entry.excluded) == (name, "")
        assert corpus_texts(tmp_path / "kept", role, manifest) == corpus_texts(corpus, role, opened(corpus).manifest)
    assert not list((tmp_path / "kept").rglob("*.bin"))


def test_a_view_of_a_view(corpus: Path, tmp_path: Path) -> None:
    """Guards against documents counted in the wrong files where the corpus has a built proxy, or was kept before."""
    built(corpus, tmp_path / "proxied", token_budget=600)
    scored(tmp_path / "proxied", Length(), tmp_path / "proxied_scores")
    config = {"scores": {"s": tmp_path / "proxied_scores"}, "share": 0.5}
    first = kept(tmp_path / "proxied", tmp_path / "half", "top", **config)
    before = corpus_texts(tmp_path / "proxied", "candidates", opened(tmp_path / "proxied").manifest)
    half = corpus_texts(tmp_path / "half", "candidates", first)
    assert set(half) < set(before)
    scored(tmp_path / "half", Length(), tmp_path / "half_scores")
    second = kept(tmp_path / "half", tmp_path / "quarter", "top", scores={"s": tmp_path / "half_scores"}, share=0.5)
    quarter = corpus_texts(tmp_path / "quarter", "candidates", second)
    assert set(quarter) < set(half)
    dropped = pq.read_table(tmp_path / "quarter" / "dropped.parquet")["tokens"].to_pylist()
    sizes = np.concatenate([np.diff(s.document_ends, prepend=0) for s in opened(tmp_path / "quarter").streams])
    assert sizes.min() >= max(dropped)
    assert corpus_texts(tmp_path / "quarter", "proxy", second) == corpus_texts(
        tmp_path / "proxied", "proxy", opened(tmp_path / "proxied").manifest
    )


def test_documents_without_score_are_listed_as_such(corpus: Path, tmp_path: Path) -> None:
    """Guards against a reason that blames the budget where the scorer had nothing to say."""
    scored(corpus, Length(odd=False), tmp_path / "even")
    manifest = kept(corpus, tmp_path / "kept", "top and band:0.3-1", scores={"s": tmp_path / "even"})
    rows = pq.read_table(tmp_path / "kept" / "dropped.parquet").to_pylist()
    assert {row["reason"] for row in rows} == {"no score", "outside of the band"}
    assert all((row["reason"] == "no score") == (row["tokens"] % 2 == 1) for row in rows)
    assert all(entry.tokens > 0 for entry in manifest.datasets)


def test_settings_that_cannot_work(corpus: Path, lengths: Path, tmp_path: Path) -> None:
    """Guards against budgets that are silently cut, two budgets, an output that is the corpus or another one's."""
    for settings, said in (
        ({"token_budget": 10**9}, "expected at most the"),
        ({"token_budget": 0}, "expected a positive number"),
        ({"share": 1.5}, "at most 1"),
        ({"share": 0.5, "token_budget": 5}, "got both"),
        ({"scores": {}}, "at least one directory"),
    ):
        with pytest.raises(ScoreError, match=said):
            kept(corpus, tmp_path / "bad", "top", **settings)
    with pytest.raises(ScoreError, match="another directory than the corpus"):
        kept(corpus, corpus, "top", share=0.5)
    kept(corpus, tmp_path / "good", "top", share=0.5)
    again = kept(corpus, tmp_path / "good", "top", share=0.5)
    assert again.settings["keep"]["rule"] == "top"
    with pytest.raises(ScoreError, match="made with other settings"):
        kept(corpus, tmp_path / "good", "bottom", share=0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ScoreError, match=r"holds notes\.txt"):
        kept(corpus, tmp_path / "full", "top", share=0.5)


def test_opus_trains_on_what_is_kept(tmp_path: Path) -> None:
    """Guards against a kept corpus that the trainer cannot read, or that gives it documents which have left."""
    from tiny_runs import recipe, run

    texts = {t: [sentence(t, i, 40) for i in range(60)] for t in ("science", "sports")}
    both = [text for pair in zip(*texts.values(), strict=True) for text in pair]
    sets = [
        spec("web", "candidates", write_jsonl(tmp_path / "web.jsonl", both)),
        spec("goal", "proxy", write_jsonl(tmp_path / "goal.jsonl", [sentence("science", 500 + i) for i in range(20)])),
        spec(
            "held", "validation", write_jsonl(tmp_path / "held.jsonl", [sentence("science", 900 + i) for i in range(9)])
        ),
    ]
    prepared(tmp_path / "corpus", *sets)
    scored(tmp_path / "corpus", Dsir(["proxy"], per="ngram"), tmp_path / "scores")
    manifest = kept(tmp_path / "corpus", tmp_path / "kept", "top", scores={"s": tmp_path / "scores"}, share=0.45)
    assert all("science" in text for text in corpus_texts(tmp_path / "kept", "candidates", manifest))
    config = recipe(
        tmp_path,
        tmp_path / "runs",
        "static_opus",
        data={"path": str(tmp_path / "kept")},
        training={"train_steps": 3},
        selection={"strategy": "opus"},
    )
    found = run(config)
    assert len(found["losses"]) == 3
    assert all(np.isfinite(found["losses"]))
    assert 0 < sum(found["selected"]) < len(found["selected"])


# --- axes and copies ------------------------------------------------------------------------------------------------


def test_every_axis_keeps_its_share() -> None:
    """Guards against an axis that points down, one that takes the whole budget, and scores as large as they come."""
    random = np.random.default_rng(3)
    quality, other = random.normal(size=400), random.normal(size=400)
    scores = {
        "a": (1000 * (quality + 0.1 * random.normal(size=400))).astype(np.float32),
        "b": (quality + 0.1 * random.normal(size=400)).astype(np.float32),
        "c": other.astype(np.float32),
    }
    tokens, domains = np.full(400, 10), np.zeros(400, dtype=np.int64)
    rank = ranks(parse_rules("axes:2"), scores, domains, tokens, 0)
    kept = np.argsort(rank)[:80]
    first, second = principal_axes(scores, 2)
    assert np.corrcoef(first, quality)[0, 1] > 0.98
    assert np.corrcoef(second, other)[0, 1] > 0.98
    for axis in (first, second):
        best = set(np.argsort(-axis)[:40].tolist())
        assert len(best & set(kept.tolist())) >= 39
    scores["c"][7] = np.nan
    assert np.isinf(ranks(parse_rules("axes:2"), scores, domains, tokens, 0)[7])
    with pytest.raises(ScoreError, match="at most as many axes, got 3 scores"):
        ranks(parse_rules("axes:4"), scores, domains, tokens, 0)
    for wrong in ("axes:0", "axes:2@a", "axes"):
        with pytest.raises(ScoreError, match="rule 'axes"):
            parse_rules(wrong)


def copied_corpus(tmp_path: Path) -> Path:
    """Ten documents, the first of them again at place 10, and changed in two words of 60 at place 11."""
    random = np.random.default_rng(5)
    texts = [" ".join("".join(random.choice([*"abcdefghij"], 5)) for _ in range(60)) for _ in range(10)]
    words = texts[0].split()
    texts += [texts[0], " ".join([*words[:10], "changed", *words[11:40], "twice", *words[41:]])]
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    held = write_jsonl(tmp_path / "held.jsonl", [sentence("finance", i) for i in range(8)])
    goal = write_jsonl(tmp_path / "goal.jsonl", [sentence("sports", i) for i in range(8)])
    sets = [spec("web", "candidates", file), spec("money", "validation", held), spec("goal", "proxy", goal)]
    prepared(tmp_path / "corpus", *sets, duplicates="keep")
    return tmp_path / "corpus"


def test_copies_leave_before_the_rule_chooses(tmp_path: Path) -> None:
    """Guards against a copy that is kept because it scores high, and a first one that leaves in its place."""
    corpus = copied_corpus(tmp_path)
    said: list[str] = []
    assert np.flatnonzero(copies(opened(corpus), "exact", said.append)).tolist() == [10]
    assert "1 of 12 documents" in said[0]
    scored(corpus, Length(), tmp_path / "sizes")
    config = KeepConfig(
        corpus=corpus, scores={"s": tmp_path / "sizes"}, rule="top", output=tmp_path / "kept", duplicates="exact"
    )
    manifest = keep(config, opened(corpus), said.append)
    assert next(e.documents for e in manifest.datasets if e.name == "web") == 11
    rows = pq.read_table(tmp_path / "kept" / "dropped.parquet").to_pylist()
    assert [(row["document"], row["reason"]) for row in rows] == [(10, "copy of an earlier document")]
    for wrong in ("near", "near:0.99", "all"):
        with pytest.raises(ScoreError, match=f"duplicates '{wrong}'"):
            copies(opened(corpus), wrong, said.append)


def test_near_copies_are_found(tmp_path: Path) -> None:
    """Guards against a sketch of single tokens, by which all documents on a topic are copies of each other."""
    pytest.importorskip("datasketch", reason="near duplicates need the extra `duplicates`")
    corpus = copied_corpus(tmp_path)
    assert np.flatnonzero(copies(opened(corpus), "near:0.5", lambda _: None)).tolist() == [10, 11]
    assert np.flatnonzero(copies(opened(corpus), "near:0.9", lambda _: None)).tolist() == [10]
