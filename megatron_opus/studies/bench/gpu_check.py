"""Check on one GPU what every other machine leaves unmeasured: tests, precision, cost, memory, synchronisations.

    tests        the tests that wait for CUDA, by pytest
    precision    candidates that bf16 and float32 weights rank among the best half, and how many they share
    cost         tax of the scoring pass and overhead of a selecting step, with peak memory of both
    syncs        host waits for the device during one scoring pass, by torch.profiler

Token ids are random: what a pass costs does not depend on the text. Every part can run alone. On a machine without
GPU, `--rehearse` runs the same lines with tiny sizes, so that nothing is tried for the first time on a rented card;
its numbers say nothing about a GPU, and the files say so.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from megatron_opus.backends.engines.base import WholeModelRunner
from megatron_opus.backends.engines.optimizer_state import optimizer_state
from megatron_opus.backends.engines.processes import init_distributed
from megatron_opus.backends.model.gpt import build_gpt, forward_loss
from megatron_opus.backends.model.parallel import init_parallel
from megatron_opus.backends.model.scored_layers import megatron_layers
from megatron_opus.config import ModelConfig, ParallelConfig, SelectionConfig
from megatron_opus.files import write_json, write_text
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.selection.strategies.opus import OpusStrategy
from megatron_opus.studies.bench import report, workbench
from megatron_opus.types import Batch, Candidates, Groups

PARTS = ("tests", "precision", "cost", "syncs")
VOCABULARY = 50_304
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and the settings of one selecting step."""

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    train_length: int  # L_train
    score_length: int = 512
    candidates: int = 32  # N
    chosen: int = 16  # K
    proxy: int = 8  # K_p
    micro_batch_size: int = 1  # of the update
    score_micro_batch_size: int = 8
    vocabulary: int = VOCABULARY


GPT2 = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
SHAPES = (
    Shape(name="GPT-2 124M", **GPT2, train_length=512, micro_batch_size=8, score_micro_batch_size=40),
    Shape(name="GPT-2 124M", **GPT2, train_length=1024, micro_batch_size=8, score_micro_batch_size=40),
    Shape(
        name="GPT-2 Large", num_layers=36, hidden_size=1280, num_attention_heads=20, train_length=24576,
        score_micro_batch_size=40,
    ),
    Shape(name="GPT-2 XL", num_layers=48, hidden_size=1600, num_attention_heads=25, train_length=6144),
)  # fmt: skip
TINY = Shape(
    name="rehearsal", num_layers=2, hidden_size=64, num_attention_heads=4, train_length=64, score_length=32,
    candidates=8, chosen=4, proxy=2, score_micro_batch_size=4, vocabulary=512,
)  # fmt: skip


class Stand:
    """One model with its optimizer, candidates and proxy on the device, ready to be scored and trained."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape, self.device = shape, device
        config = ModelConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=shape.train_length,
        )
        self.model = build_gpt(config, seq_length=shape.train_length, params_dtype=dtype, seed=seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95))
        self.candidates = self._random(shape.candidates, seed + 1)
        self.proxy = self._random(shape.proxy, seed + 2)
        self.selection = SelectionConfig(
            score_length=shape.score_length, score_micro_batch_size=shape.score_micro_batch_size
        )
        self.update(self.candidates.rows(0, shape.micro_batch_size))  # without state there is no preconditioner

    def _random(self, count: int, seed: int) -> Batch:
        length = self.shape.train_length
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.shape.vocabulary, (count, length + 1), generator=generator)
        return Batch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=torch.ones(count, length),
            position_ids=torch.arange(length).expand(count, length).contiguous(),
        ).to(self.device)

    def scorer(self) -> ScoringPass:
        return ScoringPass(
            WholeModelRunner(self.model, forward_loss, self.device),
            megatron_layers(self.model, selection=self.selection),
            optimizer_state(self.optimizer),
            self.selection,
            groups=Groups(),
            device=self.device,
        )

    def plain(self) -> None:
        """Run the forward and activation-gradient backward passes that scoring cannot do without."""
        together = Batch.cat([self.candidates, self.proxy]).window(self.shape.score_length)
        size = self.shape.score_micro_batch_size
        weights = [p for p in self.model.parameters() if p.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            for first in range(0, len(together), size):
                micro = together.rows(first, min(first + size, len(together)))
                leaves: list[torch.Tensor] = []

                def leaf(module: Any, args: Any, output: torch.Tensor, found: list[torch.Tensor] = leaves) -> Any:
                    found.append(output.detach().requires_grad_())
                    return found[0]

                with torch.enable_grad():
                    handle = self.model.embedding.register_forward_hook(leaf)
                    try:
                        losses = forward_loss(self.model, micro)
                    finally:
                        handle.remove()
                    torch.autograd.grad(losses.sum(), leaves)
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    def update(self, batch: Batch) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        size = self.shape.micro_batch_size
        for first in range(0, len(batch), size):
            (forward_loss(self.model, batch.rows(first, min(first + size, len(batch)))).mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def run(parts: Sequence[str], shapes: Sequence[Shape], repeats: int, say: Callable[[str], object]) -> dict[str, Rows]:
    """Run the named parts and return their rows."""
    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig(), seed=0)
    found: dict[str, Rows] = {}
    for part in parts:
        started = time.perf_counter()
        say(f"{part}: running")
        found[part] = {
            "tests": tests,
            "precision": lambda: [precision(shape, device) for shape in _small(shapes)],
            "cost": lambda: [cost(shape, device, repeats, say) for shape in shapes],
            "syncs": lambda: [syncs(shape, device) for shape in _small(shapes)],
        }[part]()
        say(f"{part}: {time.perf_counter() - started:.0f} s")
    return found


def _small(shapes: Sequence[Shape]) -> Sequence[Shape]:
    """Return the first shape: what is counted there does not depend on the size."""
    return shapes[:1]


def tests() -> Rows:
    """Run the tests that wait for a GPU; one row with pytest's closing line."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/backends/model"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    said = lines[-1] if lines else done.stderr[-200:]
    return [{"command": " ".join(command[1:]), "status": done.returncode, "said": said}]


def precision(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Compare the ranking under bf16 weights with that under the same float32 weights."""
    alignments = []
    for dtype in (torch.float32, torch.bfloat16):
        stand = Stand(dataclasses.replace(shape, train_length=shape.score_length), dtype, device)
        alignments.append(stand.scorer()(stand.candidates, stand.proxy, interaction=False).alignment)
        del stand
        _empty(device)
    best = [set(torch.topk(a, shape.chosen).indices.tolist()) for a in alignments if a is not None]
    first, second = (a.numpy() for a in alignments if a is not None)
    return {
        "shape": shape.name,
        "score_length": shape.score_length,
        "of the best K shared": f"{len(best[0] & best[1])} of {shape.chosen}",
        "Spearman": float(stats.spearmanr(first, second).statistic),
    }


def cost(shape: Shape, device: torch.device, repeats: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Time a scoring pass against its own forward and backward, and a selecting step against a plain one."""
    say(f"  {shape.name}, {shape.train_length} tokens")
    stand = Stand(shape, torch.bfloat16, device)
    scorer, strategy = stand.scorer(), OpusStrategy(stand.selection)
    generator, n = torch.Generator().manual_seed(0), shape.candidates
    candidates = Candidates(step=0, sample_ids=np.arange(n), domains=np.zeros(n, dtype=np.int32))

    def selecting() -> None:
        signals = scorer(stand.candidates, stand.proxy)
        drawn = strategy.select(candidates, signals, shape.chosen, generator).indices.tolist()
        stand.update(Batch.cat([stand.candidates.rows(i, i + 1) for i in drawn]))

    runs = {
        "forward and backward": stand.plain,
        "scoring pass": lambda: scorer(stand.candidates, stand.proxy),
        "step": lambda: stand.update(stand.candidates.rows(0, shape.chosen)),
        "selecting step": selecting,
    }
    seconds = workbench.alternate(runs, repeats, device, time.perf_counter)
    tax = workbench.ratio(seconds, "scoring pass", "forward and backward")
    overhead = workbench.ratio(seconds, "selecting step", "step")
    return {
        "shape": shape.name,
        "L_train": shape.train_length,
        "N": n,
        "L_score": shape.score_length,
        "step s": workbench.ratio(seconds, "step", "step")["seconds"],
        "tax": tax["median"],
        "overhead": overhead["median"] - 1,
        "low": overhead["low"] - 1,
        "high": overhead["high"] - 1,
        **{f"GiB of the {name}": workbench.peak_bytes(action, device) / 2**30 for name, action in runs.items()},
    }


def syncs(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Count the host's waits for the device, and the kernels, of one scoring pass that is not the first."""
    stand = Stand(shape, torch.bfloat16, device)
    scorer = stand.scorer()
    scorer(stand.candidates, stand.proxy)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        scorer(stand.candidates, stand.proxy)
    counts = {event.key: event.count for event in profile.key_averages()}
    waits = {key: count for key, count in counts.items() if "Synchronize" in key or key == "aten::_local_scalar_dense"}
    launches = sum(count for key, count in counts.items() if key == "cudaLaunchKernel")
    return {"shape": shape.name, "waits": sum(waits.values()), "of which": waits, "kernel launches": launches}


def write(folder: Path, found: dict[str, Rows], command: Sequence[str], *, rehearsal: bool) -> list[Path]:
    """Write the rows as one JSON and one Markdown file, named by the card, and return the paths."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    name = "rehearsal" if rehearsal else card.replace(" ", "_").lower()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"gpu_check_{name}.json", folder / f"gpu_check_{name}.md"]
    about = {"command": list(command), "card": card, "rehearsal": rehearsal, "machine": report.machine()}
    write_json(paths[0], {**about, "parts": found})
    warning = "A rehearsal with tiny sizes: these numbers say nothing about a GPU.\n\n" if rehearsal else ""
    tables = "\n\n".join(f"## {part}\n\n{report.table(rows)}" for part, rows in found.items())
    write_text(paths[1], f"# GPU check: {card}\n\n{warning}    {' '.join(command)}\n\n{tables}\n")
    return paths


def _empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
