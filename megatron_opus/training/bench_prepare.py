"""How fast preparation is beside Megatron-LM's approach: the same file, one process, taking turns."""

from __future__ import annotations

import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_opus.backends import indexed
from megatron_opus.backends.preprocess import megatron_preprocess
from megatron_opus.data import tokenizers
from megatron_opus.data.decontaminate import Decontamination
from megatron_opus.data.plan import DatasetSpec, PrepareConfig
from megatron_opus.data.prepare import prepare
from megatron_opus.data.records import ReadOptions


class BenchError(ValueError):
    """What was prepared is not the same on both sides."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over the repeats; `cpu`: seconds of all processes together, which other work on the machine changes less
    than it changes `wall`. The ratios are medians of a turn's ratios to Megatron's in the same turn: above 1 is faster.
    """

    name: str
    tokens: int
    wall: float
    cpu: float
    workers: int
    wall_ratio: float
    cpu_ratio: float


def compare(
    source: Path,
    tokenizer: str,
    *,
    workers: int,
    repeats: int,
    text_key: str = "text",
    benchmarks: tuple[str, ...] = (),
    directory: Path | None = None,
) -> list[Timing]:
    """Megatron's approach, ours with the same output, ours as it is by default, and with decontamination where
    benchmark files are given. Raises BenchError unless the first two give the same bytes.
    """
    with tempfile.TemporaryDirectory(dir=directory) as made:
        root = Path(made)
        opened = tokenizers.load(tokenizer)

        def ours(name: str, config: PrepareConfig) -> int:
            entry = prepare(config, indexed, log=lambda _: None).datasets[0]
            return entry.tokens

        def config(name: str) -> PrepareConfig:
            return PrepareConfig(
                output=root / name,
                tokenizer=tokenizer,
                datasets=(DatasetSpec(name="x", role="candidates", sources=(str(source),)),),
                read=ReadOptions(text_key=text_key),
                duplicates="keep" if name == "ours, the same output" else "drop",
                decontamination=Decontamination(files=benchmarks if name == "ours, decontaminated" else ()),
                workers=workers,
                # A file gives each worker a few pieces, as a larger one would at the default size.
                shard_bytes=max(1 << 20, min(16 << 20, source.stat().st_size // (4 * workers))),
                progress=False,
            )

        theirs = root / "megatron"
        sides: dict[str, Callable[[], int]] = {
            "Megatron-LM's approach": lambda: megatron_preprocess(
                source, theirs, opened.vocab_size, partial(tokenizers.load, tokenizer), workers, text_key
            )
        }
        names = ["ours, the same output", "ours, by default", *(["ours, decontaminated"] if benchmarks else [])]
        for name in names:
            sides[name] = partial(ours, name, config(name))
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        tokens: dict[str, int] = {}
        for _ in range(repeats):
            for name in names:
                shutil.rmtree(root / name, ignore_errors=True)
            for name, run in sides.items():
                wall, cpu = time.perf_counter(), _cpu()
                tokens[name] = run()
                turns[name].append((time.perf_counter() - wall, _cpu() - cpu))
        for suffix in (".bin", ".idx"):
            mine = (root / names[0] / "candidates" / f"x{suffix}").read_bytes()
            if mine != theirs.with_name(theirs.name + suffix).read_bytes():
                raise BenchError(f"{source}: the {suffix} files differ; the times would not be of the same work")
    base = next(iter(turns.values()))
    return [
        Timing(
            name=name,
            tokens=tokens[name],
            wall=statistics.median(wall for wall, _ in own),
            cpu=statistics.median(cpu for _, cpu in own),
            workers=workers,
            wall_ratio=statistics.median(b[0] / a[0] for a, b in zip(own, base, strict=True)),
            cpu_ratio=statistics.median(b[1] / a[1] for a, b in zip(own, base, strict=True)),
        )
        for name, own in turns.items()
    ]


def table(timings: list[Timing]) -> str:
    """One row for each side. A core's rate is that of a second of processor time, whichever process spent it."""
    head = ("", "tokens", "seconds", "tokens/s", "tokens/s per core", "wall, x Megatron", "core, x Megatron")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for t in timings:
        cells = (
            t.name,
            f"{t.tokens:,}",
            f"{t.wall:.2f}",
            f"{t.tokens / t.wall:,.0f}",
            f"{t.tokens / t.cpu:,.0f}",
            f"{t.wall_ratio:.2f}",
            f"{t.cpu_ratio:.2f}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cpu() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(s.ru_utime + s.ru_stime for s in spent)
