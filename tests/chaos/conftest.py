from __future__ import annotations

from pathlib import Path

import pytest
from chaos import Arena
from launched import Server


@pytest.fixture(scope="session")
def arena(server: Server, embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """DeepSpeed's engine with ZeRO 1 on two ranks, and its undisturbed run."""
    return Arena(server, embedded_cache, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="session")
def megatron_arena(server: Server, embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """Megatron's engine with the distributed optimizer."""
    return Arena(server, embedded_cache, tmp_path_factory.mktemp("megatron"), "parallel.engine=megatron")
