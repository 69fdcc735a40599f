"""What similarity is measured with. The model is a real sentence-transformers one, tiny and with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from proxy_helpers import built, config, make_corpus, tiny_encoder
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from megatron_opus.backends.formats import indexed
from megatron_opus.data.benchmarks.items import load_benchmarks
from megatron_opus.data.proxy import encoders, similarity
from megatron_opus.data.proxy.build import build
from megatron_opus.data.proxy.encoders import EncoderError, LexicalEncoder, Nearest, SentenceEncoder
from megatron_opus.data.proxy.similarity import ProxyError

TEXTS = [
    "Water freezes; water is cold water.",
    "The market sets a price for water and bread.",
    "The of and to.",
    "A planet has an orbit around the sun, and cold moons.",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("models") / "tiny")


def test_lexical_is_tfidf() -> None:
    """Fault: a wrong idf, or one that depends on how the corpus was cut. Oracle: scikit-learn's TfidfVectorizer."""
    encoder = LexicalEncoder(columns=1 << 18)
    for text in TEXTS:
        encoder.count([text])
    mine = encoder.encode_documents(TEXTS)
    oracle = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(TEXTS)
    assert np.allclose((mine @ mine.T).toarray(), (oracle @ oracle.T).toarray(), atol=1e-6)
    assert mine[2].nnz == 0  # nothing but function words


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_nearest_item(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Fault: blocks of items whose maxima or indices are mixed up."""
    monkeypatch.setattr(encoders, "_COLUMNS", 3)
    generator = torch.Generator().manual_seed(0)
    items, documents = (torch.randn(n, 6, generator=generator).numpy() for n in (10, 25))
    items, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (items, documents))
    items[7] = items[1]  # the first of two equal ones is told
    expected = documents @ items.T
    as_kind = sparse.csr_matrix if kind == "sparse" else np.asarray
    score, index = Nearest(as_kind(items)).best(as_kind(documents))
    assert np.allclose(score, expected.max(axis=1), atol=1e-6)
    assert index.tolist() == expected.argmax(axis=1).tolist()
    assert (score.dtype, index.dtype) == (np.float32, np.int32)
    with pytest.raises(EncoderError, match="no benchmark item"):
        Nearest(as_kind(items[:0]))


def test_a_model_by_directory(model: Path) -> None:
    """Fault: vectors without length 1, queries without the model's prompt, or cuts that nobody hears of."""
    encoder = SentenceEncoder(str(model), device="cpu", batch_size=2)
    assert encoder.window == 96
    vectors = encoder.encode_documents(["an atom", "market", "z " * 300])
    assert (vectors.shape, vectors.dtype) == ((3, 16), np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    queries = encoder.encode_items(["an atom"])
    assert not np.allclose(queries, vectors[:1], atol=1e-4)
    assert np.allclose(queries, encoder.encode_documents(["query: an atom"]), atol=1e-5)
    assert encoder.too_long(["an atom", "z " * 94, "z " * 95, "ab" * 60]).tolist() == [False, False, True, False]
    assert SentenceEncoder(str(model), device="cpu", window=7).window == 7


def test_identity_is_the_model_and_not_its_name(model: Path, tmp_path: Path) -> None:
    """Fault: another model under the same name goes on with the first one's scores."""
    encoder = SentenceEncoder(str(model), device="cpu")
    mine = encoder.identity()
    encoder.encode_items(["its tokenizer remembers the padding of the last call", "so"])
    assert mine == encoder.identity() == SentenceEncoder(str(model), device="cpu").identity()
    other = SentenceEncoder(str(tiny_encoder(tmp_path / "other", seed=1)), device="cpu").identity()
    assert mine["weights"] != other["weights"]
    assert mine["prompts"]["query"] == "query: "


def test_models_that_do_not_load(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a traceback of the library, or mean pooling put silently on a model that is no sentence encoder."""
    plain = model.with_name(model.name + "_bert")
    with pytest.raises(EncoderError, match=r"found no modules\.json in it; give the path .* --encoder lexical"):
        SentenceEncoder(str(plain), device="cpu")
    with pytest.raises(EncoderError, match="expected the directory of a sentence-transformers model, found none"):
        SentenceEncoder(str(tmp_path / "nowhere"), device="cpu")
    monkeypatch.setattr("sentence_transformers.util.is_sentence_transformer_model", lambda _: False)
    with pytest.raises(EncoderError, match="not in the local cache and not to be had from the Hub"):
        SentenceEncoder("someone/some-model", device="cpu")
    monkeypatch.undo()
    with pytest.raises(EncoderError, match=r"expected a model that loads on nodevice, got: .*lexical"):
        SentenceEncoder(str(model), device="nodevice")
    for settings, message in (
        ({"precision": "int4"}, "expected one of fp32"),
        ({"batch_size": 0}, "a positive number"),
    ):
        with pytest.raises(EncoderError, match=message):
            SentenceEncoder(str(model), device="cpu", **settings)  # type: ignore[arg-type]


def test_vectors_that_are_not_numbers(model: Path) -> None:
    """Fault: NaN is compared like a number, and the document is never or always chosen."""
    encoder = SentenceEncoder(str(model), device="cpu")
    with torch.no_grad():
        next(encoder._model.parameters()).fill_(float("nan"))
    with pytest.raises(EncoderError, match="NaN or infinite values in the vector of a text that begins 'an atom'"):
        encoder.encode_documents(["an atom"])


@pytest.mark.parametrize("windows", ["first", "all"])
def test_a_proxy_by_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: str) -> None:
    """Fault: scores that are not those of the documents' windows, or differ after an interruption. The oracle encodes
    every window of every document by itself."""
    monkeypatch.setattr(similarity, "_PIECE_TOKENS", 4_000)
    corpus = make_corpus(tmp_path)
    encoder = SentenceEncoder(str(model), device="cpu", window=150)
    settings = {"encoder": encoder, "windows": windows}
    manifest = built(corpus, tmp_path / "out", **settings)
    assert manifest is not None
    documents = similarity.CandidateDocuments(corpus, indexed.open_documents)
    scores = np.concatenate([np.load(p) for p in sorted((tmp_path / "out" / "scores").glob("0*.npy"))])
    asked = config(corpus, tmp_path / "out")
    texts = [i.text() for i in load_benchmarks(asked.benchmarks)]
    assert texts[0] == "What does an atom have?\nelectron\nplanet"
    items = encoder.encode_items(texts)
    everyone = [d for piece in documents.pieces() for d in documents.read(piece)]
    for row in range(0, len(scores), 11):
        length = len(everyone[row].ids)
        starts = [0] if windows == "first" else range(0, length, 150)
        own = encoder.encode_documents([documents.text(everyone[row], s, s + 150) for s in starts])
        assert scores["score"][row] == pytest.approx(float((own @ items.T).max()), abs=1e-5)
    assert scores["cut"].all() == (windows == "first" or scores["tokens"].min() > 150)

    calls = []
    encode = SentenceEncoder.encode_documents

    def stopping(self: SentenceEncoder, batch: list[str]) -> np.ndarray:
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(SentenceEncoder, "encode_documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        built(corpus, tmp_path / "stopped", **settings)
    assert built(corpus, tmp_path / "stopped", **settings) == manifest
    for path in (tmp_path / "out" / "scores").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / "scores" / path.name).read_bytes()
    with pytest.raises(ProxyError, match="windows: then "):
        build(config(corpus, tmp_path / "out", encoder=encoder, windows={"first": "all", "all": "first"}[windows]),
              indexed, log=print)  # fmt: skip
