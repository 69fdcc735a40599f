"""Convert Hugging Face checkpoints to sharded weights of ours, and weights or checkpoints of ours to Hugging Face.

Tensor by tensor: memory stays near one whole parameter. The output is written beside its place, under a name that ends
in `.partial`, and renamed when it is whole: a conversion that is killed leaves no directory that looks like a model.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_opus.backends.formats import hf_config, hf_layout
from megatron_opus.backends.formats.safetensors_files import INDEX, SINGLE, SafetensorsWriter, tensor_bytes
from megatron_opus.config import ConfigError, ModelConfig
from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import TOKENIZER_DIRECTORY
from megatron_opus.data.prepare.embedded import embedded_directory
from megatron_opus.data.tokenizers.base import TokenizerError, reopen_tokenizer
from megatron_opus.data.tokenizers.hf_export import hf_files
from megatron_opus.files import PARTIAL, write_json
from megatron_opus.layout.model_layout import model_layout
from megatron_opus.runs import checkpoints
from megatron_opus.weights.sources import (
    FORMAT,
    WEIGHTS_FILE,
    HfWeights,
    WeightSource,
    checkpoint_config,
    open_weights,
    shard_file,
)

Precision = Literal["keep", "fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ORIGIN = "megatron_opus.json"  # beside exported weights: what they are of
SOURCE_CONFIG = "source_config.json"  # a converted directory's: no other program should take it for a model's own
# What makes a directory usable beside its weights; copied where it is found.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """Says what a conversion wrote."""

    output: Path
    tensors: int
    bytes: int
    companions: tuple[str, ...]  # tokenizer and other files beside the weights
    notice: str = ""  # what a user of the output has to know


def hf_to_opus(
    source: Path,
    output: Path,
    *,
    tp_size: int = 1,
    make_vocab_size_divisible_by: int = 128,
    precision: Precision = "keep",
    overwrite: bool = False,
) -> Converted:
    """Write tp_RR_of_TT.safetensors with the local shards of every rank, and weights.json last.

    Raises ConfigError (before any tensor is read) for an output that exists, a degree that does not divide the model,
    files that are not those of a GPT-2, Qwen3 or Llama model.
    """
    _refuse_existing(output, overwrite)
    raw = hf_config.read_config(source)
    model = hf_config.model_config(raw, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    layout = model_layout(model, tp_size=tp_size)
    weights = HfWeights(source, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    total, count = 0, 0
    with _new_directory(output, overwrite) as partial:
        for rank in range(tp_size):
            tensors = {
                p.name: (_dtype(weights, p.name, precision), layout.local_shape(p.name)) for p in layout.parameters
            }
            with SafetensorsWriter(partial / shard_file(rank, tp_size), tensors) as out:
                for name, (dtype, _) in tensors.items():
                    out.write(name, weights.read(name, *layout.shard(name, rank)).to(dtype))
            total += sum(tensor_bytes(*t) for t in tensors.values())
            count += len(tensors)
        shutil.copyfile(source / hf_config.CONFIG_FILE, partial / SOURCE_CONFIG)
        copied = _copy_companions(source, partial)
        marker = {"format": FORMAT, "tensor_model_parallel_size": tp_size, "model": dataclasses.asdict(model)}
        write_json(partial / WEIGHTS_FILE, marker)
    return Converted(output=output, tensors=count, bytes=total, companions=copied)


def opus_to_hf(
    source: Path,
    output: Path,
    *,
    precision: Precision = "keep",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Converted:
    """Write a directory for `transformers.AutoModelForCausalLM.from_pretrained` from converted weights, a run folder or
    one of its checkpoints.

    tokenizer: a directory whose tokenizer files are copied; default: the one that the weights or the data came from.
    The tokenizer of prepared data is written so that `AutoTokenizer` gives its ids (data/hf_tokenizers.py).
    origin: written beside the weights as ORIGIN. Raises ConfigError and CheckpointError.
    """
    _refuse_existing(output, overwrite)
    if tokenizer is not None and not any((tokenizer / name).is_file() for name in COMPANIONS):
        raise ConfigError(f"{tokenizer}: expected tokenizer files, found none of {', '.join(COMPANIONS)}")
    weights = open_weights(source)
    model = weights.model
    placed = hf_layout.layouts(model, weights.layout)
    published = hf_layout.published_shapes(placed, weights.layout)
    sources = _rows_of_tensors(placed)
    tensors = {name: (_dtype(weights, sources[name][0][0], precision), shape) for name, (shape, _) in published.items()}
    files = _plan_files(tensors, max_shard_bytes)
    total = sum(tensor_bytes(*t) for t in tensors.values())
    _refuse_full_disk(output, total)
    with _new_directory(output, overwrite) as partial:
        for file, names in files.items():
            with SafetensorsWriter(partial / file, {n: tensors[n] for n in names}) as out:
                for name in names:
                    shape, transposed = published[name]
                    out.write(name, _assemble(weights, sources[name], shape, transposed).to(tensors[name][0]))
        if list(files) != [SINGLE]:
            where = {name: file for file, names in files.items() for name in names}
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        origins = _origins(weights)
        dtypes = {dtype for dtype, _ in tensors.values()}
        dtype = str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
        base = next((found for found in map(_base_config, origins) if found is not None), None)
        config = hf_config.published_config(model, dtype, base)
        beside = _Companions()
        for directory in [tokenizer] if tokenizer else origins:
            try:
                beside = _companions(directory, partial, model)
            except ConfigError as error:
                if tokenizer is not None:
                    raise
                # the weights are good whatever has become of the data since
                beside = _Companions(notice=f"exported without a tokenizer: {error}")
            if beside.names:
                break
        if base is None and beside.eod is not None:  # it stands before every document, and after it
            config |= {"bos_token_id": beside.eod, "eos_token_id": beside.eod}
        write_json(partial / hf_config.CONFIG_FILE, config)
        if origin is not None:
            write_json(partial / ORIGIN, origin)
    return Converted(output=output, tensors=len(tensors), bytes=total, companions=beside.names, notice=beside.notice)


# --- tensors --------------------------------------------------------------------------------------------------------


def _dtype(weights: WeightSource, name: str, precision: Precision) -> torch.dtype:
    return weights.dtype(name) if precision == "keep" else _DTYPES[precision]


# published tensor -> (parameter of ours, its first row, first row in the published tensor, rows), in order
_RowMap = list[tuple[str, int, int, int]]


def _rows_of_tensors(placed: Mapping[str, hf_layout.HfLayout]) -> dict[str, _RowMap]:
    found: dict[str, _RowMap] = {}
    for name, layout in placed.items():
        at = 0
        for piece in layout.pieces:
            found.setdefault(piece.tensor, []).append((name, at, piece.start, piece.length))
            at += piece.length
    return found


def _assemble(weights: WeightSource, rows: _RowMap, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """Read one published tensor. All of its rows lie in one parameter of ours, which is read once."""
    (name,) = {source for source, *_ in rows}
    if len(rows) == 1:
        _, start, _, length = rows[0]
        whole = weights.read(name, ((start, length),), None)
    else:
        order = sorted(rows, key=lambda row: row[2])
        whole = weights.read(name, tuple((start, length) for _, start, _, length in order), None)
    whole = whole.T if transposed else whole
    assert tuple(whole.shape) == shape, (name, whole.shape, shape)
    return whole


def _plan_files(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> dict[str, list[str]]:
    """Share the tensors among files, none larger than `limit` bytes unless a single tensor is."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        size = tensor_bytes(*tensor)
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


# --- directories ----------------------------------------------------------------------------------------------------


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ConfigError(f"{output} exists; choose another output, or say --overwrite to replace it")
    if not any((output / name).is_file() for name in (WEIGHTS_FILE, hf_config.CONFIG_FILE)):
        raise ConfigError(f"{output} is not a converted model; --overwrite does not delete anything else")


def _refuse_full_disk(output: Path, needed: int) -> None:
    there = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ConfigError(
            f"{output}: expected {needed / 1e9:.2f} GB of free space for the weights, found {free / 1e9:.2f} GB on the "
            f"disk of {there}; make room or choose another output"
        )


@contextmanager
def _new_directory(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a directory to fill; it becomes `output` when the block ends without an exception, else it is removed."""
    partial = output.with_name(output.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        _refuse_existing(output, overwrite)  # somebody else may have been here in the meantime
        old = output.with_name(output.name + ".old")
        if output.exists():
            os.rename(output, old)
        os.rename(partial, output)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy_companions(source: Path, target: Path) -> tuple[str, ...]:
    names = [name for name in COMPANIONS if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class _Companions:
    names: tuple[str, ...] = ()
    eod: int | None = None  # where the tokenizer is that of prepared data
    notice: str = ""


def _companions(source: Path, target: Path, model: ModelConfig) -> _Companions:
    """Put the files that make weights usable into `target`: copies, or a tokenizer of prepared data rewritten."""
    if source.name != TOKENIZER_DIRECTORY or not (source.parent / manifests.FILE_NAME).is_file():
        return _Companions(_copy_companions(source, target))
    try:
        tokenizer = reopen_tokenizer(source, manifests.read(source.parent).tokenizer)
    except (TokenizerError, manifests.ManifestError) as error:
        raise ConfigError(str(error)) from error
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{source}: expected at most the model's {model.vocab_size} tokens, found {tokenizer.vocab_size}: the data "
            "has been prepared anew; name the tokenizer that the model was trained with by --tokenizer DIR"
        )
    try:
        files = hf_files(tokenizer, model.max_position_embeddings)
    except TokenizerError as error:
        return _Companions(_copy_companions(source, target), tokenizer.eod, str(error))
    for name, content in files.items():
        (target / name).write_bytes(content)
    return _Companions(tuple(files), tokenizer.eod)


def _origins(weights: WeightSource) -> list[Path]:
    """List directories that may hold tokenizer files and the config.json that a model came from, best first."""
    found = [weights.where]
    if (weights.where / checkpoints.MARKER).is_file():
        config, _ = checkpoint_config(weights.where)
        found = [Path(config.model.init_from)] if config.model.init_from else []
        embedded = config.data.path == "embedded"
        data = embedded_directory(config.data.cache_dir) if embedded else Path(config.data.path)
        found.append(data / TOKENIZER_DIRECTORY)
    return found


def _base_config(origin: Path) -> dict[str, Any] | None:
    for name in (SOURCE_CONFIG, hf_config.CONFIG_FILE):
        if (origin / name).is_file():
            return hf_config.read_config(origin, name)
    return None
