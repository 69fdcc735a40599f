from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from distributed import DistributedPool  # noqa: E402
from launched import Server  # noqa: E402
from partitions import PartitionTable  # noqa: E402

torch.set_num_threads(1)
# the same examples in every run: one that fails is found where it was written, not in somebody else's change
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Files and folders that start no process, train nothing and build no engine: `./tests/run.sh --fast` runs these.
FAST = tuple((ROOT / "tests/fast.txt").read_text(encoding="utf-8").split())


# Ranks that wait cost a fifth of a core for every ten of them, since their gloo threads wake a hundred times a second:
# none outlives the module that it was made for. To fork them anew is cheap.
@pytest.fixture(scope="module")
def world2() -> Iterator[DistributedPool]:
    """Two gloo processes: `world2.run(function, *args)` gives the results in rank order."""
    pool = DistributedPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def world4() -> Iterator[DistributedPool]:
    pool = DistributedPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts real runs, a process for each rank: `server.launch(world, arguments, logs)`."""
    server = Server()
    yield server
    server.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--partition-table", metavar="FILE", help="write the deviations of every tested layout to FILE")
    parser.addoption("--experiments", action="store_true", help="training runs of a quarter of an hour")
    parser.addoption("--whole", action="store_true", help="every case of every test, not the short form alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # the table of partitions has a row for every case
    whole = config.getoption("--whole") or config.getoption("--partition-table")
    for item in items:
        if item.get_closest_marker("whole") and not whole:
            item.add_marker(pytest.mark.skip(reason="in the whole form"))
        place = item.path.relative_to(ROOT)
        if any(place.is_relative_to(fast) for fast in FAST):
            item.add_marker(pytest.mark.fast)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; `-m 'not slow'` leaves it out")
    config.addinivalue_line("markers", "whole: a case of the whole form, `tests/run.sh --whole`")
    if config.getoption("--partition-table") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--partition-table: every worker would write its own; add -n 0")


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether everything is wanted (`tests/run.sh --whole`), or the short form."""
    return bool(request.config.getoption("--whole"))


@pytest.fixture(scope="session")
def partition_table(request: pytest.FixtureRequest) -> Iterator[PartitionTable]:
    table = PartitionTable()
    yield table
    if path := request.config.getoption("--partition-table"):
        table.write(Path(path))


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data.cache_dir` with the embedded corpus in it, made once for all tests that train, whichever worker runs them:
    the first makes it under a lock of the corpus's own while the others wait."""
    from megatron_opus.backends.formats import indexed
    from megatron_opus.data.prepare.embedded import prepare_embedded

    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "embedded_cache"
    prepare_embedded(cache, indexed, progress=False)
    return cache


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text beside the checkout; tests that use it skip where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data on this machine")
    return path
