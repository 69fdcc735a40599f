"""Runs of Megatron-LM's own training loop on gloo, hooked or not; the ranks are forked from one prepared process."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from launched import ROOT, Launched, Server

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

SCRIPT = ROOT / "examples" / "megatron_pretrain.py"
VOCABULARY, LENGTH = 127, 32
CPU = (
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--use-cpu-initialization", "--num-workers", "0"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-bias-gelu-fusion"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-persist-layer-norm", "--no-rope-fusion"),
)
TINY = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", f"{LENGTH}"),
    *("--max-position-embeddings", f"{LENGTH}", "--micro-batch-size", "1"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--log-interval", "1"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", f"{VOCABULARY}", "--make-vocab-size-divisible-by", "64"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--eval-iters", "2", "--eval-interval", "1000"),
    *("--save-interval", "1000", "--ckpt-format", "torch"),
)
SPLIT = ("--split", "80,20,0")
MOCK = ("--mock-data", *SPLIT)
DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
SELECTION: dict[str, Any] = {
    "rho": 0.5,
    "proxy_batch_size": 4,
    "score_micro_batch_size": 2,
    "sketch": {"dim": 512, "one_sided_dim": 16},
}
_LINE = re.compile(r"iteration +(\d+)/ .*lm loss: (\S+) \|.*grad norm: (\S+) \|")


def prepare() -> None:
    """Import Megatron's training loop and the hook, with the stand-ins for an accelerator."""
    import megatron_cpu

    megatron_cpu.install()
    import pyarrow

    import megatron_opus.integrations.megatron_lm.__main__
    import megatron_opus.integrations.megatron_lm.patches  # noqa: F401

    pyarrow.array([0.0])  # imports pandas where it is installed
    for late in ("megatron.core.tokenizers.text.text_tokenizer", "megatron.core.models.mimo"):
        with contextlib.suppress(ImportError):  # not in every release
            importlib.import_module(late)


def program(arguments: list[str], _recipe: str) -> int:
    """Run a script on this rank; its exit status."""
    import megatron_cpu

    status = 0
    try:
        megatron_cpu.run(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for (
        worker
    ) in multiprocessing.active_children():  # of Megatron's checkpoints: a forked rank ends without ending them
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


@dataclass(frozen=True)
class Outcome:
    """What a run that has ended has left."""

    folder: Path  # --save
    log: str  # of the last rank, on which Megatron prints its steps
    first_log: str  # of the first rank
    statuses: dict[int, int]

    @property
    def steps(self) -> dict[int, tuple[str, str]]:
        """Iteration -> (loss, gradient norm), as they were printed."""
        return {int(step): (loss, norm) for step, loss, norm in _LINE.findall(self.log)}

    def drawn(self) -> dict[int, list[int]]:
        """Step -> the ids that were trained on, ascending."""
        table = read_ledger(self.folder / "opus" / "ledger")
        found: dict[int, list[int]] = {}
        for step, sample, selected in zip(
            *(table[name].to_pylist() for name in ("step", "sample_id", "selected")), strict=True
        ):
            found.setdefault(step, []).extend([sample] if selected else [])
        return {step: sorted(ids) for step, ids in found.items()}

    def alignments(self) -> np.ndarray:
        """Alignments of all candidates in the order of steps and of the buffer."""
        return read_ledger(self.folder / "opus" / "ledger")["alignment"].to_numpy()

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "opus")


class LoopRuns:
    """Starts runs of the example script, or of another one, in folders of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._server = Server(prepare, program)

    def start(
        self,
        name: str,
        *more: str,
        world: int = 1,
        opus: Mapping[str, Any] | None = None,
        script: Path = SCRIPT,
        data: Sequence[str] = MOCK,
        length: Sequence[str] = ("--train-iters", "4"),
        batch: Sequence[str] = ("--global-batch-size", "4"),
        folder: Path | None = None,
    ) -> tuple[Path, Launched]:
        """Start a run; opus: the keys of its opus.yaml, None for a run without the hook."""
        folder = folder or self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [
            str(script),
            *TINY,
            *CPU,
            *data,
            *length,
            *batch,
            "--save",
            str(folder),
            "--data-cache-path",  # of its own: runs side by side read each other's half-written index files
            str(folder / "index_cache"),
        ]
        if opus is not None:
            path = self.root / f"{name}.yaml"
            path.write_text(yaml.safe_dump(dict(opus)))
            arguments += ["--opus-config", str(path)]
        return folder, self._server.launch(world, [*arguments, *more], self.root / "logs" / name)

    def finish(self, started: tuple[Path, Launched], expected: int = 0) -> Outcome:
        """Wait for a run, whose ranks must all end with the status `expected`."""
        folder, launched = started
        statuses = launched.wait()
        logs = [launched.log(rank) for rank in range(len(statuses))]
        assert set(statuses.values()) == {expected}, f"{statuses}\n" + "\n".join(log[-3000:] for log in logs)
        return Outcome(folder, logs[-1], logs[0], statuses)

    def run(self, name: str, *more: str, expected: int = 0, **where: Any) -> Outcome:
        return self.finish(self.start(name, *more, **where), expected)

    def close(self) -> None:
        self._server.close()


def loop_runs(root: Path) -> Iterator[LoopRuns]:
    """Give `LoopRuns` for a fixture, or skip where megatron-core's wheel has no training loop."""
    import importlib.util

    import pytest

    if importlib.util.find_spec("megatron.training") is None:
        pytest.skip("megatron.training is not installed: megatron-core's wheel contains it from 0.17 on (Python 3.12)")
    runs = LoopRuns(root)
    yield runs
    runs.close()
