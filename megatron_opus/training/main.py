"""What `launch/pretrain_*.sh` starts on every rank: read the recipe, check it, build everything, train or resume."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opus import config as configs
from megatron_opus.config import ConfigError, RunConfig
from megatron_opus.errors import Refusal


def main(config: Path, argv: Sequence[str]) -> int:
    """Run one recipe. `argv`: key=value overrides, --resume and its options, --dry-run, the launcher's --local_rank.

    Returns the exit status: 0 done, 1 failed while running, 2 refused before anything was built, 75 stopped in order by
    a signal or `training.exit_duration_minutes`, with a checkpoint. After a failure the process groups are left as they
    are, for other ranks may wait in them: the caller must end the process.
    """
    arguments, overrides = _parse(argv)
    rank = int(os.environ.get("RANK", "0"))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; without a launcher this is the only process
    try:
        recipe = configs.load(config, overrides)
        if "WORLD_SIZE" in os.environ or not arguments.dry_run:  # a dry run without a launcher cannot know
            configs.validate_world(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        if rank == 0:
            print(configs.dump(recipe), end="")
        return 0
    return _run(recipe, arguments, rank)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="%(prog)s [key=value ...] [--verify-data] [--resume [--no-verify] [--trust-checkpoint]] [--dry-run]",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument(
        "--no-verify", action="store_true", help="resume without comparing checkpoint and data with their digests"
    )
    parser.add_argument("--verify-data", action="store_true", help="compare all of the data with its digests first")
    parser.add_argument("--trust-checkpoint", action="store_true", help="resume from files that could run code")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the deepspeed launcher's
    arguments = parser.parse_intermixed_args(list(argv))
    return arguments, list(arguments.overrides)


def _run(recipe: RunConfig, arguments: argparse.Namespace, rank: int) -> int:
    # megatron-core warns six times that Apex and Transformer Engine are absent; the run reports both in its own words
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # imported late: a mistyped key should not take the seconds that torch, megatron-core and deepspeed need
    from megatron_opus.files import explain
    from megatron_opus.ranks.agreement import software
    from megatron_opus.ranks.lost_ranks import Watch, failure_message, is_lost_peer, prepare_nccl
    from megatron_opus.ranks.stopping import STOPPED, SignalWatch
    from megatron_opus.runs.lock import RunLock
    from megatron_opus.runs.record import compare_record

    if refusal := _refused_release(rank):
        print(f"error: {refusal}", file=sys.stderr, flush=True)
        return 2
    from megatron_opus.training.session import Session

    folder = Path(recipe.output_dir) / recipe.name
    lock = RunLock(folder)

    def claim(run_dir: Path) -> str:
        try:
            lock.acquire()
            for line in compare_record(run_dir) if arguments.resume else ():
                print(line, file=sys.stderr, flush=True)
        except (Refusal, OSError) as error:
            return explain(error, run_dir) or str(error)
        return ""

    watch, signals, timeout = Watch(), SignalWatch(), recipe.parallel.distributed_timeout_minutes
    signals.install()
    watch.start(60 * timeout)
    prepare_nccl()
    session: Session | None = None
    try:
        session = Session(
            recipe,
            resume=arguments.resume,
            verify=not arguments.no_verify,
            verify_data=arguments.verify_data,
            trust_checkpoint=arguments.trust_checkpoint,
            versions=software(),
            say=_say(rank),
            stop_requested=lambda: signals.received,
            watch=watch,
            claim=claim,
        )
        completed = session.train()
        signals.ignore()  # a launcher ends the others when the first rank ends: they shall end by themselves, too
        watch.now("ending the run")
        dist.barrier()
    except Exception as error:
        why = str(error) if isinstance(error, Refusal) else explain(error, folder)
        if session is None and why:
            if rank == 0 or getattr(error, "of_one_rank", True):
                print(f"error: {'' if rank == 0 else f'rank {rank}: '}{why}", file=sys.stderr, flush=True)
            return 2
        if not (why or is_lost_peer(error)):
            traceback.print_exc()  # nobody foresaw this one: where it came from is all there is to go by
        said = failure_message(error, watch.doing, timeout, why)
        print(f"error: rank {rank}: {said}", file=sys.stderr, flush=True)
        return 1
    finally:
        lock.release()
    dist.destroy_process_group()
    return 0 if completed else STOPPED


def _refused_release(rank: int) -> str:
    """Import the part that speaks to the hosts. Rank 0 says which of their releases were not tested.

    Returns why a release cannot be used, "" where all can.
    """
    from megatron_opus.backends.model import releases

    found = releases.installed()
    try:
        untested = releases.check(found)
        for line in untested:
            _say(rank)(f"warning: {line}")
    except Refusal as error:
        return str(error)
    try:
        importlib.import_module("megatron_opus.training.session")
    except (ImportError, AttributeError, Refusal) as error:
        if not untested:
            raise
        return f"{error} ({'; '.join(untested)}); install a tested combination: pip install -c constraints.txt -e ."
    return ""


def _say(rank: int) -> Callable[[str], Any]:
    return functools.partial(print, file=sys.stderr, flush=True) if rank == 0 else lambda text: None
