"""Measurements of the scoring pass: its tax, its fidelity and its memory. `tools/bench_scoring.py` is the command line.

    tax         scoring pass / the same forward and activation-gradient backward without capture and sketch
    fidelity    Spearman and Pearson correlation of the alignment with the float64 oracle, and the overlap of the top K
    memory      peak of live tensors above what was there before, relative to that of the plain forward and backward

The three are taken in one process, times alternating between what is compared, so that a noisy machine slows both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_opus.backends.engines.base import WholeModelRunner
from megatron_opus.backends.engines.optimizer_state import optimizer_state
from megatron_opus.backends.formats.indexed import open_documents
from megatron_opus.backends.model.gpt import build_gpt, forward_loss
from megatron_opus.backends.model.scored_layers import megatron_layers
from megatron_opus.config import ConfigError, DataConfig, ModelConfig, SelectionConfig
from megatron_opus.data.buffer import CandidateBuffer
from megatron_opus.data.corpus import Corpus
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.scoring.undisturbed import undisturbed
from megatron_opus.selection import reference
from megatron_opus.types import AdamHyper, Batch, Groups, ScoredLayer

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Candidates of one step and the proxy that they are scored against."""

    name: str
    candidates: Batch
    proxy: Batch


class Workbench:
    """A Megatron GPT in one process, trained for some steps with AdamW on a prepared corpus."""

    def __init__(self, model: ModelConfig, corpus_dir: Path, *, length: int, device: torch.device, seed: int) -> None:
        self.corpus = Corpus.open(corpus_dir, DataConfig(seq_length=length), open_documents)
        rows = self.corpus.tokenizer.vocab_size
        self.config = dataclasses.replace(model, vocab_size=rows, max_position_embeddings=length)
        self.length, self.device, self.seed = length, device, seed
        self.model = build_gpt(self.config, seq_length=length, seed=seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        self.layers = megatron_layers(self.model)
        self._seen: set[int] = set()  # sequences that training has used

    def train(
        self, steps: int, batch_size: int, *, mixture: Mapping[str, float] | None, further: int = 0
    ) -> list[Batch]:
        """Take optimizer steps: a linear warm-up over a tenth of them, then a constant learning rate of 1e-3.

        Return the batches of `further` steps, which are drawn and not taken: pools leave out their sequences too.
        """
        buffer = CandidateBuffer(self.corpus, batch_size, self.seed, dict(mixture) if mixture else None)
        left = []
        for step in range(steps + further):
            rate = min(1.0, (step + 1) / max(1, steps // 10))
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * rate
            candidates = buffer.draw(step)
            buffer.settle(candidates, range(buffer.size))
            self._seen.update(candidates.sample_ids.tolist())
            batch = self.corpus.batch(candidates.sample_ids).to(self.device)
            if step < steps:
                self.update(batch, len(batch))
            else:
                left.append(batch)
        return left

    def update(self, batch: Batch, micro_batch_size: int) -> float:
        """One optimizer step on the mean over sequences of their mean token losses; that mean. Clips at norm 1."""
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        for first in range(0, len(batch), micro_batch_size):
            micro = batch.rows(first, min(first + micro_batch_size, len(batch)))
            losses = forward_loss(self.model, micro)
            means = (losses * micro.loss_mask).sum(1) / micro.loss_mask.sum(1)
            loss = means.sum() / len(batch)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def pool(self, name: str, n: int, k_p: int, weights: Mapping[str, float] | None) -> Pool:
        """n candidates of the given mixture that training has not used, and k_p proxy sequences.

        Raises ValueError where a domain has too few left.
        """
        buffer = CandidateBuffer(self.corpus, n, self.seed + 1, dict(weights) if weights else None)
        counts = np.bincount(buffer.draw(0).domains, minlength=len(buffer.domains)).tolist()
        starts, sizes = self.corpus.first_ids("candidates"), self.corpus.sequences("candidates")
        random = np.random.default_rng(self.seed + 1)
        ids = []
        for domain, count, start, size in zip(buffer.domains, counts, starts, sizes, strict=True):
            unused = [i for i in range(start, start + size) if i not in self._seen]
            if len(unused) < count:
                raise ConfigError(
                    f"{name} pool: expected {count} sequences of {domain} that training has not used, {len(unused)} of "
                    f"{size} are left; lower its weight, --train-steps, --batch-size or --candidates"
                )
            ids.append(random.choice(np.array(unused, dtype=np.int64), count, replace=False))
        proxy = self.corpus.proxy_ids(0, k_p, self.seed)
        return Pool(
            name=name,
            candidates=self.corpus.batch(random.permutation(np.concatenate(ids))).to(self.device),
            proxy=self.corpus.batch(proxy).to(self.device),
        )

    def scorer(self, config: SelectionConfig) -> ScoringPass:
        layers = megatron_layers(self.model, selection=config)
        state = optimizer_state(self.optimizer)
        return ScoringPass(
            WholeModelRunner(self.model, forward_loss, self.device),
            layers,
            state,
            config,
            groups=Groups(),
            device=self.device,
        )

    def plain(self, batch: Batch) -> None:
        """Forward and activation-gradient backward down to the lowest scored output: what scoring cannot do without."""
        plain_pass(self.model, self.layers, batch)

    def oracle(self, pool: Pool) -> Tensor:
        """[N] float64: the alignment of reference.py, one candidate's gradients in memory at a time."""
        target: reference.Gradients = {}
        for one in self._gradients(pool.proxy):
            for name, g in one.items():
                target[name] = target.get(name, 0) + g / len(pool.proxy)
        wanted = self._precondition()(target)  # P is symmetric: <P G, g> = <G, P g>
        result = [sum((one[name] * wanted[name]).sum() for name in wanted) for one in self._gradients(pool.candidates)]
        return torch.stack([torch.as_tensor(x) for x in result]).cpu()

    def _precondition(self) -> Callable[[reference.Gradients], reference.Gradients]:
        """The whole second moment in AdamW's P."""
        weights = {x.name: x.weight for x in self.layers}
        hypers = optimizer_state(self.optimizer).hypers(list(weights.values()))
        named = {n: h for n, h in zip(weights, hypers, strict=True) if isinstance(h, AdamHyper)}
        v = {n: self.optimizer.state[w]["exp_avg_sq"] for n, w in weights.items()}
        return reference.adamw_preconditioner(v, named)

    def _gradients(self, batch: Batch) -> Iterator[reference.Gradients]:
        weights = {x.name: x.weight for x in self.layers}
        for z in range(len(batch)):
            yield reference.per_sequence_gradients(self._losses, batch.rows(z, z + 1), weights)[0]

    def _losses(self, batch: Batch) -> Tensor:
        return forward_loss(self.model, batch)


def plain_pass(model: nn.Module, layers: Sequence[ScoredLayer], batch: Batch) -> None:
    """Forward and activation-gradient backward down to the lowest of `layers`' outputs, without capture and sketch."""
    leaves: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        if out.requires_grad:
            return None
        leaves.append(out.detach().requires_grad_())
        fresh = leaves[-1].clone()
        return (fresh, *output[1:]) if isinstance(output, tuple) else fresh

    handles = [layer.module.register_forward_hook(hook) for layer in layers]
    try:
        with undisturbed([model]):
            losses = forward_loss(model, batch)
            torch.autograd.grad((losses * batch.loss_mask).sum(), leaves)
    finally:
        for handle in handles:
            handle.remove()


# --- numbers --------------------------------------------------------------------------------------------------------


def top_overlap(x: Tensor, y: Tensor, k: int) -> float:
    """Share of the k largest of y that are among the k largest of x."""
    return torch.isin(y.topk(k).indices, x.topk(k).indices).double().mean().item()


def fidelity(found: Tensor, truth: Tensor) -> dict[str, float]:
    return {
        "spearman": float(stats.spearmanr(found.double(), truth.double()).statistic),
        "pearson": float(stats.pearsonr(found.double(), truth.double()).statistic),
        "top_k": top_overlap(found, truth, len(truth) // 2),
    }


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 1):
        for name, run in runs.items():
            found = timed(run, device, clock)
            if index:
                seconds[name].append(found)
    return seconds


def timed(run: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds of one run. `time.process_time` counts what this process's threads work: on a machine that is busy with
    other work, the ratios of one thread hold where the wall clock's do not."""
    _wait(device)
    started = clock()
    run()
    _wait(device)
    return clock() - started


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and quartiles of the pairwise ratios of neighbouring runs."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": middle, "low": low, "high": high, "seconds": statistics.median(seconds[name])}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of what `run` allocates and holds at once: device memory, or on a CPU the storages that torch makes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        run()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations inside the block return and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:  # views and in-place results
                self._see(x)
        return result

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
