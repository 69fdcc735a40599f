"""A frozen model that scores documents: any weights that a run can start from, on one process.

    Hugging Face directory (GPT-2, Qwen3, Llama)   converted weights   run folder   checkpoint

A document of n tokens is cut into windows of `window` tokens, each of which predicts the tokens that follow its own:

    window w    inputs ids[w L : w L + L], labels ids[w L + 1 : w L + L + 1], no context from before it

So every token but the first is predicted once. The token that ends the document is not text and not predicted. A
document with more than `windows` windows is read in that many of them, evenly spread from the first to the last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megatron_opus.backends.engines.processes import init_distributed
from megatron_opus.backends.formats.hf_config import CONFIG_FILE
from megatron_opus.backends.model.build import build_model
from megatron_opus.backends.model.gpt import forward_loss
from megatron_opus.backends.model.parallel import init_parallel
from megatron_opus.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_opus.corpus_scores.documents import Block, CorpusDocuments, ScoreError
from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import TOKENIZER_DIRECTORY
from megatron_opus.data.prepare.embedded import embedded_directory
from megatron_opus.data.prepare.records import file_sha256
from megatron_opus.data.tokenizers.base import Tokenizer, load_tokenizer, reopen_tokenizer
from megatron_opus.runs import checkpoints
from megatron_opus.types import Batch, Groups
from megatron_opus.weights.initial_weights import load_initial_weights
from megatron_opus.weights.sources import checkpoint_config, open_weights

Precision = Literal["fp32", "bf16"]
_LOGITS = 1 << 27  # numbers: what a forward pass may hold of them, 0.5 GB in float32
_COMPARED = 4  # documents of each domain whose ids are compared with those of the model's own tokenizer
_COMPARED_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Windowing:
    """How documents are cut. tokens: of a window. most: windows of a document that are read."""

    tokens: int = 512
    most: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.most < 1:
            raise ScoreError(
                f"windows: expected at least 2 tokens and 1 window (--window, --windows), got {self.tokens} tokens and "
                f"{self.most}"
            )

    def cut(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return the windows of a document [tokens] whose last token ends it: each with the label after its inputs.

        None for a document of fewer than two tokens of text, in which nothing is predicted.
        """
        text = ids[:-1]
        count = -(-(len(text) - 1) // self.tokens)
        chosen = range(count) if count <= self.most else np.linspace(0, count - 1, self.most).round().astype(int)
        return [text[w * self.tokens : (w + 1) * self.tokens + 1] for w in chosen]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of some documents, all of one document together.

    ids: each [inputs + 1] int64. owners: [windows] int64, the document of each. documents: how many there are.
    """

    ids: list[np.ndarray]
    owners: np.ndarray
    documents: int

    @staticmethod
    def of(block: Block, windowing: Windowing) -> Windows:
        """Cut the documents of a block."""
        cut = [windowing.cut(ids) for ids in block.documents()]
        owners = np.repeat(np.arange(len(cut)), [len(some) for some in cut])
        return Windows(ids=[ids for some in cut for ids in some], owners=owners, documents=len(cut))


def batch_of(windows: Sequence[np.ndarray]) -> Batch:
    """Put windows side by side, filled up on the right to the longest one; what fills up does not count."""
    longest = max(len(ids) for ids in windows) - 1
    tokens = torch.zeros(len(windows), longest, dtype=torch.int64)
    labels, mask = torch.zeros_like(tokens), torch.zeros(len(windows), longest)
    for row, ids in enumerate(windows):
        values = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = values[:-1], values[1:]
        mask[row, : len(ids) - 1] = 1.0
    positions = torch.arange(longest).expand_as(tokens)
    return Batch(tokens=tokens, labels=labels, loss_mask=mask, position_ids=positions)


class ReferenceModel:
    """The weights in `path`, read once, in evaluation mode, on the accelerator or the CPU."""

    def __init__(self, path: Path, windowing: Windowing, precision: Precision = "fp32") -> None:
        """Raise WeightsError where `path` holds no such model, ScoreError where it is too short for the windows."""
        self.path, self.windowing = path, windowing
        self.device, self.groups = one_process()
        source = open_weights(path)
        self.shape: ModelConfig = source.model
        _check_window(path, self.shape, windowing)
        config = reference_recipe(dataclasses.replace(self.shape, init_from=str(path)), windowing.tokens, precision)
        self.module: nn.Module = build_model(config).eval()
        load_initial_weights(self.module, config, self.groups)

    def check_corpus(self, corpus: CorpusDocuments) -> None:
        """Raise ScoreError unless the ids of the corpus are those that the model was trained with."""
        check_tokenizer(self.path, self.shape, corpus)

    @torch.no_grad()
    def losses(self, windows: Windows) -> list[np.ndarray]:
        """Return the losses of every window's predicted tokens, each [inputs] float32 in nats."""
        found: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(windows.ids)
        for rows, batch in self.batches(windows):
            losses = forward_loss(self.module, batch).float().cpu().numpy()
            for row, values in zip(rows, losses, strict=True):
                found[row] = values[: len(windows.ids[row]) - 1]
        return found

    def batches(self, windows: Windows) -> Iterator[tuple[list[int], Batch]]:
        """Yield (numbers of the windows, their batch on the device): similar lengths, as many as logits have room."""
        room = max(1, _LOGITS // int(self.shape.vocab_size or 1))
        lengths = [len(ids) - 1 for ids in windows.ids]
        rows: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
            if rows and (len(rows) + 1) * lengths[row] > room:
                yield rows, self._batch(windows, rows)
                rows = []
            rows.append(row)
        if rows:
            yield rows, self._batch(windows, rows)

    def _batch(self, windows: Windows, rows: Sequence[int]) -> Batch:
        return batch_of([windows.ids[row] for row in rows]).to(self.device)


def one_process() -> tuple[torch.device, Groups]:
    """Return the device of this process and groups without communication. Raises ScoreError beside other ranks."""
    parallel = ParallelConfig()
    device = init_distributed(parallel)
    if dist.get_world_size() != 1:
        raise ScoreError(
            f"score-corpus: expected to run as one process, found itself as one of {dist.get_world_size()} ranks; "
            "start it without a launcher, once for each --part I/N"
        )
    return device, init_parallel(parallel)


def take_gpu(part: int) -> None:
    """Let part I of a scoring have GPU I of this machine, in turn; LOCAL_RANK says otherwise where it is set."""
    if torch.cuda.is_available():
        os.environ.setdefault("LOCAL_RANK", str(part % torch.cuda.device_count()))


def reference_recipe(model: ModelConfig, length: int, precision: Precision) -> RunConfig:
    """Return a recipe that builds `model` for windows of `length` tokens."""
    return RunConfig(
        name="reference",
        model=model,
        data=DataConfig(seq_length=length),
        training=TrainingConfig(precision=precision),
    )


def _check_window(path: Path, model: ModelConfig, windowing: Windowing) -> None:
    positions = model.max_position_embeddings
    if positions is not None and windowing.tokens > positions:
        raise ScoreError(
            f"{path}: expected windows of at most the model's {positions} positions, got {windowing.tokens}; lower "
            "--window"
        )


# --- which model ----------------------------------------------------------------------------------------------------


def model_identity(path: Path) -> dict[str, str]:
    """Describe a model by the contents of its files, wherever they lie. Raises ScoreError where there is none."""
    found = newest(path)
    if (found / checkpoints.MARKER).is_file():  # it has the digests of all others
        return {"sha256": file_sha256(found / checkpoints.MARKER)}
    files = sorted(
        [*found.glob("*.safetensors"), *(p for p in (found / CONFIG_FILE, found / "weights.json") if p.is_file())]
    )
    if not files:
        raise ScoreError(
            f"model {path}: expected a Hugging Face directory with safetensors, a converted one, a run folder or a "
            "checkpoint; found none of them"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return {"sha256": digest.hexdigest()}


def newest(path: Path) -> Path:
    """Return a run folder's newest complete checkpoint, anything else as it is."""
    if (path / "checkpoints").is_dir():
        return checkpoints.latest(path / "checkpoints") or path
    return path


def check_tokenizer(path: Path, model: ModelConfig, corpus: CorpusDocuments) -> None:
    """Raise ScoreError unless the ids of the corpus are those of the model's own tokenizer.

    Compared are the sizes, and the first documents of each domain where the tokenizer is known: that in the model's
    directory, or that of the data which the run of a checkpoint was trained on, while it is there.
    """
    there = corpus.tokenizer.vocab_size
    if model.vocab_size is not None and there > model.vocab_size:
        raise ScoreError(
            f"{path}: expected a corpus of at most the model's {model.vocab_size} token ids, found {there}: it was "
            f"prepared with another tokenizer; {_REMEDY}"
        )
    tokenizer = _tokenizer(newest(path))
    if tokenizer is None or tokenizer.fingerprint == corpus.tokenizer.fingerprint:
        return
    for number, entry in enumerate(corpus.entries):
        for document in range(min(_COMPARED, entry.documents)):
            text = corpus.text(corpus.one(number, document), 0, _COMPARED_TOKENS)
            theirs, ours = tokenizer.encode(text), corpus.tokenizer.encode(text)
            if theirs != ours:
                raise ScoreError(
                    f"{path}: expected a corpus prepared with the model's own tokenizer, found other ids for the text "
                    f"{text[:40]!r} of {entry.name} ({ours[:4]}..., the model's: {theirs[:4]}...); {_REMEDY}"
                )


_REMEDY = "prepare the corpus with `megatron-opus prepare-data --tokenizer` of the model, or score it by another model"


def _tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer that a model was trained with, where its files are there."""
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(f"hf:{path}")
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return load_tokenizer(f"gpt2:{path}")
    if not (path / checkpoints.MARKER).is_file():
        return None
    config, _ = checkpoint_config(path)
    embedded = config.data.path == "embedded"
    data = embedded_directory(config.data.cache_dir) if embedded else Path(config.data.path)
    if not (data / manifests.FILE_NAME).is_file():
        return None
    return reopen_tokenizer(data / TOKENIZER_DIRECTORY, manifests.read(data).tokenizer)


def reading_identity(paths: Sequence[Path], windowing: Windowing, precision: Precision) -> dict[str, Any]:
    """Describe several models, in their order, and how they read."""
    return {
        "models": [model_identity(path) for path in paths],
        "window": windowing.tokens,
        "windows": windowing.most,
        "precision": precision,
    }


def open_models(
    paths: Sequence[Path], windowing: Windowing, precision: Precision, corpus: CorpusDocuments
) -> list[ReferenceModel]:
    """Open models that read this corpus. Raises ScoreError where a tokenizer is not the corpus's."""
    models = [ReferenceModel(path, windowing, precision) for path in paths]
    for model in models:
        model.check_corpus(corpus)
    return models
