"""A small prepared corpus, benchmark files and an encoder model, for the tests that build proxies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from data_helpers import run, spec, texts_of, write_jsonl

from megatron_opus.backends.formats import indexed
from megatron_opus.data.manifest import Manifest
from megatron_opus.data.proxy.build import ProxyConfig, build
from megatron_opus.data.proxy.encoders import LexicalEncoder

TOPICS = {
    "science": "atom electron planet gravity cell energy molecule orbit heat light water oxygen force mass",
    "finance": "market stock price bank loan interest trade profit tax budget share bond money fund",
    "sports": "goal team match player coach season league score ball win stadium fans cup medal",
}
LEAKED = "Which force keeps every planet of the solar system moving in an orbit around the bright sun?"


def sentence(topic: str, seed: int, count: int = 40) -> str:
    """Text on a topic, unlike that of any other seed."""
    pool = TOPICS[topic].split()
    return " ".join(pool[(seed * 31 + i * i + i * seed) % len(pool)] for i in range(count)) + f" {topic}{seed}."


def make_corpus(root: Path) -> Path:
    """Domains of one topic each, a science one with benchmark text and copies in it; a proxy and a validation set."""
    texts = {topic: [sentence(topic, i) for i in range(40)] for topic in TOPICS}
    texts["science"] += [f"{sentence('science', 99)} {LEAKED}"]
    texts["sports"] += ["  ".join(texts["science"][11].split()), texts["science"][13]]
    goal = [sentence("finance", 500 + i) for i in range(20)]
    files = {name: write_jsonl(root / f"{name}.jsonl", some) for name, some in (*texts.items(), ("goal", goal))}
    datasets = [spec(topic, "candidates", files[topic]) for topic in TOPICS]
    output = root / "corpus"
    held = write_jsonl(root / "held.jsonl", [sentence("sports", 900 + i) for i in range(10)])
    others = (spec("goal", "proxy", files["goal"]), spec("sports", "validation", held))
    run(output, *datasets, *others, duplicates="keep")
    return output


def science_questions(path: Path) -> Path:
    rows = [
        {"question": "What does an atom have?", "choices": ["electron", "planet"], "answer": 0, "subject": "physics"},
        {"question": "What gives heat and light energy?", "choices": ["oxygen", "gravity"], "answer": 1},
        {"question": LEAKED, "choices": ["gravity", "heat"], "answer": 0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(corpus: Path, output: Path, **settings: object) -> ProxyConfig:
    questions = corpus.parent / "questions.jsonl"
    if not questions.exists():
        science_questions(questions)
    values = {"benchmarks": (("mmlu", str(questions)),), "encoder": LexicalEncoder(), "token_budget": 2000, **settings}
    return ProxyConfig(corpus=corpus, output=output, progress=False, **values)  # type: ignore[arg-type]


def built(corpus: Path, output: Path, **settings: object) -> Manifest | None:
    return build(config(corpus, output, **settings), indexed, log=lambda _: None)


def corpus_texts(directory: Path, role: str, manifest: Manifest) -> list[str]:
    """Documents of all domains of a role, read as training would: through views."""
    from megatron_opus.data.excluded_documents import open_entry
    from megatron_opus.data.tokenizers import base as tokenizers

    tokenizer = tokenizers.reopen_tokenizer(directory / "tokenizer", manifest.tokenizer)
    found = []
    for entry in manifest.of_role(role):  # type: ignore[arg-type]
        documents = open_entry(directory, entry, indexed.open_documents)
        assert (documents.num_tokens, len(documents.document_ends)) == (entry.tokens, entry.documents)
        starts = np.concatenate([[0], documents.document_ends[:-1]])
        for start, stop in zip(starts.tolist(), documents.document_ends.tolist(), strict=True):
            found.append(" ".join(tokenizer.decode(documents.tokens(start, stop - start).tolist()).split()))
    return found


def plain(directory: Path, role: str, name: str) -> list[str]:
    return [" ".join(text.split()) for text in texts_of(directory, role, name)]


def tiny_encoder(path: Path, seed: int = 0) -> Path:
    """A sentence-transformers model of 16 dimensions with random weights, with Arctic's prompts, saved to `path`."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), ":", "?", "."]
    plain_model = path.with_name(path.name + "_bert")
    plain_model.mkdir(parents=True)
    (plain_model / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(seed)
    shape = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128,
    )  # fmt: skip
    BertModel(shape).save_pretrained(plain_model)
    BertTokenizerFast(str(plain_model / "vocab.txt")).save_pretrained(plain_model)
    modules = [Transformer(str(plain_model), max_seq_length=96), Pooling(16, "cls")]
    model = SentenceTransformer(modules=modules, prompts={"query": "query: ", "document": ""}, device="cpu")
    model.save(str(path))
    return path
