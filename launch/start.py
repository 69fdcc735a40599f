"""The Python half of launch/pretrain_*.sh, cpt_*.sh: what has to happen before torch is imported, then the trainer.

`python launch/start.py RECIPE [key=value ...] [--resume]` starts one rank of any recipe: launch/slurm/rank.sh does.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFUSED = 2  # the trainer's status for a run that it will not start


def start(recipe: str) -> int:
    """Run configs/<recipe>.yaml, or the YAML file of that path, with this process's arguments; the exit status."""
    # The script's own folder is replaced: its files must not shadow installed modules, and the checkout's package
    # comes before an installed one.
    sys.path[0] = str(ROOT)
    from megatron_opus.ranks.launchers import watch_launchers

    watch_launchers()  # at once: what has already ended cannot be recognised as a launcher

    # Without this every rank spins on all cores; torch reads it once, when it is imported.
    local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_ranks)))

    # Overlapping tensor-parallel communication relies on kernels starting in issue order; CUDA reads this once, too.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    from megatron_opus.training.main import main

    argv = sys.argv[1:]
    if os.environ.get("DRY_RUN", "0") not in ("", "0"):
        argv.append("--dry-run")
    config = Path(recipe) if recipe.endswith(".yaml") else ROOT / "configs" / f"{recipe}.yaml"
    status = main(config, argv)
    if status == REFUSED and int(os.environ.get("RANK", "0")) > 0:
        # The launcher ends all ranks as soon as one has failed, and only rank 0 says why: let it.
        time.sleep(10)
    if status:
        # At once: an orderly end would close process groups in which other ranks may still wait.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":  # worker processes of data loading import this file again
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: start.py RECIPE [key=value ...] [--resume]")
    sys.exit(start(sys.argv.pop(1)))
