"""Runs side by side: validation loss at the end, tokens and seconds it took.

    megatron-opus compare-runs runs/opus runs/random

The first run is compared with each of the others: by how much its loss differs, and after which share of the other's
update tokens it had reached the other's final loss (interpolated between the evaluations of metrics.jsonl).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of
from megatron_opus.runs.curves import Run, first_reached, read_run


def table(runs: Sequence[Run]) -> str:
    """A line per run; below, a column per validation domain: difference to the first run, share of tokens needed."""
    first = runs[0]
    domains = [d for d in first.curves if all(d in run.curves for run in runs)]
    width = 2 + max(len(run.name) + len("update tokens first run needed to reach ") for run in runs)

    def line(title: str, cells: Sequence[str]) -> str:
        return f"{title:<{width}}" + "".join(f"{c:>{max(len(d) + 3, 11)}}" for c, d in zip(cells, domains, strict=True))

    lines = [f"{'run':<{width}}{'strategy':<10}{'steps':>8}{'update tokens':>16}{'seconds':>10}"]
    for run in runs:
        lines.append(
            f"{run.name:<{width}}{run.strategy:<10}{run.steps:>8,}{run.update_tokens:>16,}{run.seconds:>10.1f}"
        )
    lines += ["", line("validation loss, nats per token", domains)]
    lines += [line(run.name, [f"{run.final(d):.4f}" for d in domains]) for run in runs]
    for other in runs[1:]:
        lines.append(line(f"first run - {other.name}", [f"{first.final(d) - other.final(d):+.4f}" for d in domains]))
        shares = [first_reached(first.curves[d], other.final(d)) for d in domains]
        lines.append(
            line(
                f"update tokens first run needed to reach {other.name}",
                ["never" if share is None else f"{share / other.update_tokens:.0%}" for share in shares],
            )
        )
    for other in runs[1:]:
        if first.update_tokens != other.update_tokens:
            lines.append(f"note: {first.name} and {other.name} trained on different numbers of tokens")
    return "\n".join(lines)


def main(argv: Sequence[str], program: str) -> int:
    parser = parser_of("compare-runs", program, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with metrics.jsonl and config.yaml")
    arguments = parser.parse_args(argv)
    print(table([read_run(directory) for directory in arguments.runs]))
    return 0
