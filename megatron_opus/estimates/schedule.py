"""How many micro-batches a pipeline stage keeps for their backward passes, and how long stages wait for each other.

Megatron's schedules, on stage s of p with m micro-batches, of which the first stage keeps most:

    one stage            1
    1F1B                 p - s - 1 forward passes before the first backward pass: min(p - s, m) are kept
    interleaved          of v pieces, 2 (p - s - 1) + (v - 1) p passes through one piece before the first backward pass:
                         min(that + 1, m v) are kept, each 1 / v of the stage
"""

from __future__ import annotations

from megatron_opus.layout.parallel_layout import ParallelLayout


def in_flight(layout: ParallelLayout, stage: int, micro_batches: int) -> float:
    """Count the micro-batches whose activations a stage keeps at its fullest, a piece of v as 1 / v of one."""
    p, v = layout.pp, layout.pieces
    if p == 1:
        return 1.0
    before = p - stage - 1 if v == 1 else 2 * (p - stage - 1) + (v - 1) * p
    return min(before + 1, micro_batches * v) / v


def idle(layout: ParallelLayout, micro_batches: int) -> float:
    """Give the share of a pass in which a stage waits for others, all stages taken as equally fast."""
    return (layout.pp - 1) / (micro_batches * layout.pieces + layout.pp - 1)
