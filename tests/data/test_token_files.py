"""Token files against their manifest: contents and ids, by name of the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_opus.backends.formats import indexed
from megatron_opus.config import DataConfig
from megatron_opus.data import manifest as manifests
from megatron_opus.data import token_files
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.manifest import ManifestError
from megatron_opus.data.token_files import TokenFileError, sampled_sha256, verify_contents


@pytest.fixture
def prepared(embedded_cache: Path, tmp_path: Path) -> Path:
    """A copy of the embedded corpus, to be damaged."""
    (found,) = (path.parent for path in embedded_cache.rglob(manifests.FILE_NAME))
    return Path(shutil.copytree(found, tmp_path / "data"))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("whole", [False, True])
def test_changed_contents_of_the_same_size_are_named(prepared: Path, suffix: str, whole: bool) -> None:
    """Guards against a run on tokens that are not those that were prepared, in files whose sizes are right."""
    manifest = manifests.read(prepared)
    entry = manifest.datasets[0]
    path = Path(f"{prepared / entry.prefix}{suffix}")
    size = sum(
        f.stat().st_size
        for e in manifest.datasets
        for f in prepared.glob(f"{e.prefix}.*")
        if f.suffix in (".bin", ".idx")
    )
    assert verify_contents(prepared, manifest, whole=whole) == size
    flip(path, path.stat().st_size - 1)
    with pytest.raises(TokenFileError, match=rf"{path}: its contents are not those that manifest\.json records"):
        verify_contents(prepared, manifest, whole=whole)


def test_a_sample_has_both_ends_and_a_whole_file_has_everything(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a sample that stops before the end of a file, which a full disk cuts first, and against a whole
    comparison that is a sample, too."""
    monkeypatch.setattr(token_files, "BLOCK", 64)
    entry = manifests.read(prepared).datasets[0]
    path = Path(f"{prepared / entry.prefix}.bin")
    size, digest = path.stat().st_size, sampled_sha256(path)
    assert size > 64 * 64 * 4
    for at, seen in ((0, True), (size - 1, True), (65, False)):
        flip(path, at)
        assert (sampled_sha256(path) != digest) == seen
        with pytest.raises(TokenFileError):
            verify_contents(prepared, manifests.read(prepared), whole=True)
        flip(path, at)
    verify_contents(prepared, manifests.read(prepared), whole=True)


def test_ranks_divide_the_files(prepared: Path) -> None:
    """Guards against a file that no rank reads."""
    manifest = manifests.read(prepared)
    parts = [verify_contents(prepared, manifest, whole=True, share=(i, 3)) for i in range(3)]
    assert sum(parts) == verify_contents(prepared, manifest, whole=True)
    assert max(parts) < sum(parts)


def test_ids_out_of_the_vocabulary_name_their_file(prepared: Path) -> None:
    """Guards against an IndexError of the embedding, deep in a step, for a file that another tokenizer has made."""
    path = prepared / manifests.FILE_NAME
    data = json.loads(path.read_text())
    entry = next(entry for entry in data["datasets"] if entry["role"] == "candidates")
    tokens = np.memmap(f"{prepared / entry['prefix']}.bin", entry["dtype"], "r+")
    tokens[40] = 65535
    tokens.flush()
    corpus = Corpus.open(prepared, DataConfig(seq_length=32), indexed.open_documents)
    first = int(corpus.first_ids("candidates")[0])
    corpus.batch([first])
    with pytest.raises(TokenFileError, match=rf"{prepared / entry['prefix']}\.bin: token 40 of .* is 65535, expected"):
        corpus.batch([first + 1])


@pytest.mark.parametrize("name", ["manifest.json", "index"])
def test_a_pipe_is_refused(prepared: Path, name: str) -> None:
    """Guards against a start that waits for ever: reading a pipe that nobody writes to does."""
    entry = manifests.read(prepared).datasets[0]
    path = prepared / name if name == "manifest.json" else Path(f"{prepared / entry.prefix}.idx")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((ManifestError, indexed.IndexedDataError), match=str(path)):
        Corpus.open(prepared, DataConfig(seq_length=32), indexed.open_documents)


def test_a_base_that_is_the_directory_itself(prepared: Path) -> None:
    """Guards against directories that name each other as their base without end."""
    path = prepared / manifests.FILE_NAME
    data = json.loads(path.read_text())
    data["datasets"][0]["base"] = "."
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match="which has been prepared anew since"):
        Corpus.open(prepared, DataConfig(seq_length=32), indexed.open_documents)
