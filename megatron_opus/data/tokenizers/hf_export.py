"""The tokenizer of a corpus as files that `transformers.AutoTokenizer` reads, with the same ids for every text.

    gpt2            its byte-level merges, written as tokenizer.json
    hf              the file itself without what adds tokens of its own: post-processor, truncation, padding
    sentencepiece   its pieces as the merges (BPE) or the log probabilities (unigram) of a tokenizer.json

The class is named in tokenizer_config.json, because `AutoTokenizer` otherwise takes the one of the model: Qwen3's would
read GPT-2's vocabulary with Qwen's rules. Special tokens typed in a text stay text, as they do in the corpus.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_opus.data.tokenizers.base import (
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
)

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_SPACE = "\u2581"  # what SentencePiece writes for a space
# Where two readings of one definition usually part: runs of spaces, line ends, digits, unknown letters, special names.
PROBES = (
    "The quick brown fox's 12345 jumps; isn't it?",
    "def f(x):\n\treturn  x  # two\n\n\n    indented\n",
    " leading and trailing  ",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642 \u0416\u043e\u0436\u043e \u0660\u0661 e\u0301 \ufb01",
    "<|endoftext|></s><s><unk> [INST] <0x41>",
    "https://example.org/a?b=c&d=%20 \x00\x07 \r\n tab\tend",
    "",
)


def hf_files(tokenizer: Tokenizer, model_max_length: int | None = None) -> dict[str, bytes]:
    """File name -> content. `model_max_length`: of the model that the files go with, in tokens.

    Raises TokenizerError where the files would not give the tokenizer's own ids for PROBES: some SentencePiece models
    normalise text in a way that tokenizer.json cannot say.
    """
    definition = _definition(tokenizer)
    name = _token_of(definition, tokenizer.eod)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": name,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if model_max_length is not None:
        settings["model_max_length"] = model_max_length
    _refuse_other_ids(tokenizer, definition)
    return {
        TOKENIZER_FILE: _json(definition),
        CONFIG_FILE: _json(settings),
    }


def _definition(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        definition = json.loads(_from_sentencepiece(tokenizer.files["sentencepiece.model"]).to_str())
    elif isinstance(tokenizer, GPT2Tokenizer):
        definition = json.loads(tokenizer.definition())
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        definition = json.loads(tokenizer.files[TOKENIZER_FILE])
    else:
        raise TokenizerError(f"tokenizer kind {tokenizer.kind!r}: no files for transformers are known for it")
    return {**definition, "post_processor": None, "truncation": None, "padding": None}


def _from_sentencepiece(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as messages
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    proto = messages.ModelProto.FromString(content)
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise TokenizerError("this SentencePiece model keeps spaces as suffixes or unescaped; tokenizer.json cannot")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = pieces[trainer.unk_id][0]
    model: Any
    if trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        kinds = messages.ModelProto.SentencePiece
        whole = {p.piece: p.score for p in proto.pieces if p.type == kinds.NORMAL}
        model = models.BPE(
            vocab={piece: number for number, (piece, _) in enumerate(pieces)},
            merges=_merges(whole),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        kind = messages.TrainerSpec.ModelType.Name(trainer.model_type)
        raise TokenizerError(f"SentencePiece model of type {kind}: expected UNIGRAM or BPE")
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if trainer.model_type == trainer.UNIGRAM and trainer.split_by_whitespace:
        # No piece crosses a space, and the search over a whole document at once takes minutes.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=True)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    return backend


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: SentencePiece keeps pieces and their order only."""
    found = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(found, key=lambda pair: (-scores[pair[0] + pair[1]], len(pair[0])))


def _token_of(definition: dict[str, Any], number: int) -> str:
    """The token with this id, which is entered as a special one: decoding can then leave it out."""
    added = definition.setdefault("added_tokens", [])
    for token in added:
        if token["id"] == number:
            return token["content"]
    vocabulary = definition["model"]["vocab"]
    items = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
    name = next((piece for piece, i in items if i == number), None)
    if name is None:
        raise TokenizerError(f"end-of-document id {number} is not in the vocabulary")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added.append({"id": number, "content": name, **plain, "special": True})
    return name


def _refuse_other_ids(tokenizer: Tokenizer, definition: dict[str, Any]) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(definition))
    backend.encode_special_tokens = True
    for text in PROBES:
        expected, found = tokenizer.encode(text), backend.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise TokenizerError(
                f"the corpus's {tokenizer.kind} tokenizer cannot be written as tokenizer.json: for {text!r} expected "
                f"ids {expected}, it would give {found}; name a directory with files that do by --tokenizer"
            )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
