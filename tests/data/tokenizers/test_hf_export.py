"""The corpus's tokenizer as files of transformers: the same ids, whatever model they lie beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_text

from megatron_opus.data.tokenizers import base as tokenizers
from megatron_opus.data.tokenizers.base import Tokenizer, TokenizerError
from megatron_opus.data.tokenizers.hf_export import PROBES, hf_files


def write(tokenizer: Tokenizer, folder: Path) -> None:
    for name, content in hf_files(tokenizer, 64).items():
        (folder / name).write_bytes(content)


def loaded(folder: Path, model_type: str) -> Any:
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


def same_ids(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> None:
    write(tokenizer, folder)
    for model_type in ("gpt2", "qwen3"):
        found = loaded(folder, model_type)
        assert found.eos_token_id == tokenizer.eod
        assert len(found) == tokenizer.vocab_size
        for text in (*PROBES, *texts):
            ids = tokenizer.encode(text)
            assert found.encode(text) == ids  # as lm-eval calls it: special tokens would be added here
            assert found.decode([*ids, tokenizer.eod], skip_special_tokens=True) == text


def test_sentencepiece(tmp_path: Path) -> None:
    """Fault: AutoTokenizer fails on a GPT-2 with SentencePiece ids, or merges, spaces and bytes are read otherwise."""
    source = Path(__file__).read_text(encoding="utf-8")
    trained = tokenizers.train_sentencepiece([*(make_text(i) for i in range(40)), source], 600)
    same_ids(trained, tmp_path, [source, make_text(99), "\t\t    ==  aaaa  aaaaa\n\n\n"])


def test_gpt2(shared_data: Path, tmp_path: Path) -> None:
    """Fault: beside a Qwen3 the vocabulary is read with Qwen's rules (digits one by one); a typed <|endoftext|> ends
    the document."""
    tokenizer = tokenizers.load_tokenizer(f"gpt2:{shared_data / 'tokenizer_gpt2'}")
    lines = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    same_ids(tokenizer, tmp_path, lines)


def test_a_tokenizer_json_that_adds_tokens(tmp_path: Path) -> None:
    """Fault: its post-processor puts a token before every text, which the corpus never had."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    backend = Backend(models.BPE(vocab={"<eos>": 0, **{c: i + 1 for i, c in enumerate("abc<>eos|ndofxt")}}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("-", "removed")
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    backend.enable_truncation(4)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    tokenizer = tokenizers.load_tokenizer(f"hf:{tmp_path / 'tokenizer.json'}", "<eos>")
    write(tokenizer, tmp_path)
    found = loaded(tmp_path, "gpt2")
    assert found.encode("abcabcabc") == tokenizer.encode("abcabcabc")
    assert len(found.encode("abcabcabc")) == 9


def test_what_cannot_be_written_is_refused(shared_data: Path) -> None:
    """Fault: a model whose normalisation tokenizer.json cannot say is exported with ids that are nearly right."""
    path = shared_data / "tokenizer_sentencepiece/test_model.model"
    with pytest.raises(TokenizerError, match=r"cannot be written as tokenizer\.json: for .* expected ids"):
        hf_files(tokenizers.load_tokenizer(f"sentencepiece:{path}"))
