"""Each kind of difference between ranks is found at start, by rank and by key, on every rank."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_runs import recipe

from megatron_opus.config import RunConfig
from megatron_opus.ranks import agreement
from megatron_opus.runs import data
from megatron_opus.training import session


def start(config: RunConfig, versions: dict[str, str]) -> str:
    """The error of a Session on this rank."""
    try:
        session.Session(config, resume=False, versions=versions, say=lambda text: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def other_configuration(config: RunConfig) -> str:
    if last():
        config = dataclasses.replace(config, selection=dataclasses.replace(config.selection, temperature=0.5))
    return start(config, {})


def other_version(config: RunConfig) -> str:
    return start(config, {"torch": "2.13.0", "numpy": "1.0" if last() else "2.0"})


def other_environment(config: RunConfig) -> str:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if last() else "highest")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "1" if last() else "0"
    try:
        return start(config, {})
    finally:
        del os.environ["NVIDIA_TF32_OVERRIDE"]
        torch.set_float32_matmul_precision(before)


def other_data(config: RunConfig) -> str:
    """The last rank's files hold one other token, and its manifest says so: that machine prepared its own data."""
    if last():
        source = next(p.parent for p in sorted(Path(config.data.cache_dir).rglob("manifest.json")))
        mine = Path(config.output_dir) / f"damaged{dist.get_world_size()}"
        shutil.copytree(source, mine)
        stream = next(p for p in sorted(mine.rglob("*.bin")) if p.parent.name == "validation")
        content = bytearray(stream.read_bytes())
        content[100] ^= 1
        stream.write_bytes(content)
        manifest = (mine / "manifest.json").read_text(encoding="utf-8")
        was, now = (
            hashlib.sha256((folder / stream.relative_to(mine)).read_bytes()).hexdigest() for folder in (source, mine)
        )
        assert was in manifest
        (mine / "manifest.json").write_text(manifest.replace(was, now), encoding="utf-8")
        original = data.prepare_embedded
        data.prepare_embedded = lambda *args, **options: mine  # type: ignore[assignment]
        try:
            return start(config, {})
        finally:
            data.prepare_embedded = original
    return start(config, {})


def with_changed_weight(config: RunConfig, wanted: str) -> str:
    original = session.build_model

    def changed(recipe: RunConfig) -> torch.nn.Module:
        model = original(recipe)
        if last():
            weight = dict(model.named_parameters())[wanted]
            with torch.no_grad():
                weight.flatten()[3] += 1e-3
        return model

    session.build_model = changed
    try:
        return start(config, {})
    finally:
        session.build_model = original


def other_norm(config: RunConfig) -> str:
    return with_changed_weight(config, "decoder.final_layernorm.weight")


def other_matrix(config: RunConfig) -> str:
    return with_changed_weight(config, "decoder.layers.1.mlp.linear_fc1.weight")


def missing_data(config: RunConfig) -> str:
    if last():
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="/nowhere"))
        original = session.check_agreement
        session.check_agreement = lambda facts, **peers: original({}, **peers)
        try:
            return start(config, {})
        finally:
            session.check_agreement = original
    original = session.check_agreement
    session.check_agreement = lambda facts, **peers: original({}, **peers)
    try:
        return start(config, {})
    finally:
        session.check_agreement = original


KINDS: list[tuple[Callable[[RunConfig], str], str, int]] = [
    (other_configuration, "rank {last}: configuration.selection.temperature is 0.5, rank 0 has 0.3", 1),
    (other_version, "rank {last}: version.numpy is '1.0', rank 0 has '2.0'", 1),
    (other_environment, "rank {last}: environment.NVIDIA_TF32_OVERRIDE is '1', rank 0 has '0'", 2),
    (other_data, "rank {last}: data.validation/", 2),  # and the fingerprint
    (other_norm, "rank {last}: initial weight.decoder.final_layernorm.weight is", 1),
]


@pytest.mark.parametrize(("kind", "message", "count"), KINDS, ids=[k[0].__name__ for k in KINDS])
def test_two_ranks_that_differ(world2, embedded_cache, tmp_path, kind, message, count):
    """Fault: a rank with other settings, versions, switches, files or weights trains along, and the results are of no
    run at all; or the error shows two whole configurations and leaves the search to the reader."""
    check(world2, kind, message, count, recipe(embedded_cache, tmp_path, "differ"))


@pytest.mark.parametrize(("kind", "message", "count"), KINDS, ids=[k[0].__name__ for k in KINDS])
def test_four_ranks_of_which_one_differs(world4, embedded_cache, tmp_path, kind, message, count):
    """Fault: only neighbours, or only rank 0's group, are compared."""
    config = recipe(embedded_cache, tmp_path, "differ", parallel={"tensor_model_parallel_size": 2})
    check(world4, kind, message, count, config)


def test_a_shard_is_compared_with_those_of_its_kind(world4, embedded_cache, tmp_path):
    """Fault: shards of different tensor-parallel ranks compared with each other, which always differ; or not at all.
    Rank 3 holds the same shard as rank 1 (tensor parallel 2 x data parallel 2)."""
    config = recipe(embedded_cache, tmp_path, "differ", parallel={"tensor_model_parallel_size": 2})
    check(
        world4,
        other_matrix,
        "rank 3: initial weight.decoder.layers.1.mlp.linear_fc1.weight is",
        1,
        config,
        "rank 1 has",
    )


def check(pool: Any, kind: Any, message: str, count: int, config: RunConfig, also: str = "rank 0 has") -> None:
    said = pool.run(kind, config)
    for text in said:
        assert text.startswith("RankMismatch"), said
        assert message.format(last=pool.world_size - 1) in text, text
        assert also in text
        assert text.count("\n") == count, text  # what is the same is not listed


def test_a_rank_that_cannot_open_its_data_is_named_to_the_others(world2, embedded_cache, tmp_path):
    """Fault: one node without the data ends, and the others wait in a collective until its time is over."""
    first, second = world2.run(missing_data, recipe(embedded_cache, tmp_path, "missing"))
    assert first.startswith("OtherRankFailed: another rank failed while opening the data:\n  rank 1: "), first
    assert "/nowhere" in first
    assert "/nowhere" in second
    assert not second.startswith("OtherRankFailed")


def test_equal_ranks_pass_and_say_nothing(world2, embedded_cache, tmp_path):
    """Fault: a fact that differs between healthy ranks (a path, an address, an order) refuses every run."""
    config = recipe(embedded_cache, tmp_path, "same", parallel={"tensor_model_parallel_size": 2})
    assert world2.run(with_software, config) == ["", ""]


def with_software(config: RunConfig) -> str:
    return start(config, agreement.software())


def test_own_source_is_part_of_the_version(tmp_path):
    """Fault: a checkout with a local change on one node has the same version number as the others."""
    (tmp_path / "a.py").write_text("x = 1\n")
    before = agreement.source_hash(tmp_path)
    (tmp_path / "data.txt").write_text("not code")
    assert agreement.source_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    changed = agreement.source_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({before, changed, agreement.source_hash(tmp_path)}) == 3
    assert set(agreement.software()) >= {
        "python",
        "torch",
        "deepspeed",
        "megatron-core",
        "numpy",
        "megatron_opus source",
    }
