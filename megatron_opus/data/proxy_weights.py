"""Divide the proxy sequences of every step among the proxy domains by `data.proxy_weights`.

    w_d     share of domain d, sum 1; the heaviest comes first
    R_d     w_d + w_{d+1} + ...: the share of the domains from d on
    C_d(T)  of the first T sequences of the run, how many are of domain d

The domains take their part one after the other, each of what the ones before it have left:

    C_1(T) = round(T w_1),   C_2(T) = round((T - C_1(T)) w_2 / R_2),   ...,   the last takes all that is left

So the counts sum to T, none ever falls, and the count of a step is a difference of two of them. One rounding is wrong
by at most 1/2, and of the error of an earlier one a domain inherits its share w_d / R_j:

    |C_d(T) - T w_d| <= (1 + w_d / R_2 + ... + w_d / R_d) / 2,   without the 1 for the last domain

which is below 1 for up to three domains and below 2 for up to eleven. The arithmetic is exact, in fractions.

Counts that are so regular have periods. A run that scores every other step would meet one half of the period only, and
perhaps never a domain that is due at every fourth step. Steps therefore take the places of their block of 16 in a
shuffled order: after every block the totals are the ones above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_opus.config import ConfigError
from megatron_opus.data.permutation import key, permute

BLOCK = 16  # steps whose places are shuffled
_HALF = Fraction(1, 2)


@dataclass(frozen=True)
class _Part:
    """One proxy domain that has a weight."""

    name: str
    first_id: int
    sequences: int
    share: Fraction  # of all proxy sequences
    of_left: Fraction  # of what the domains before it have left
    error: Fraction  # the most by which its total and its share of the total differ


class WeightedProxy:
    """Draws proxy sequences by weights, as a function of (seed, step) alone. Read-only."""

    def __init__(self, domains: Mapping[str, tuple[int, int]], weights: Mapping[str, float]) -> None:
        """domains: proxy domain -> id of its first sequence, number of them. weights: of some of these, positive."""
        total = sum(Fraction(weight) for weight in weights.values())
        heaviest_first = sorted(weights, key=lambda name: -weights[name])
        parts, left, rests = [], Fraction(1), list[Fraction]()
        for place, name in enumerate(heaviest_first):
            share = Fraction(weights[name]) / total
            rests += [left] if place else []
            # a set: what the last domain takes of is its own share, and nothing is rounded there
            error = _HALF * sum((share / rest for rest in {*rests, share}), Fraction(0))
            parts.append(_Part(name, *domains[name], share, share / left, error))
            left -= share
        self._parts = tuple(parts)

    def totals(self, drawn: int) -> dict[str, int]:
        """Count, for each domain, its sequences among the first `drawn` ones; domains in falling order of weight."""
        found, left = {}, drawn
        for part in self._parts:
            found[part.name] = math.floor(left * part.of_left + _HALF)
            left -= found[part.name]
        return found

    def ids(self, step: int, count: int, seed: int) -> np.ndarray:
        """[count] int64: the proxy sequences of a step, shuffled, so that each half of them is a draw from all domains.

        Each domain is walked in a shuffled order of its own, reshuffled when what is left may not do: none of its
        sequences comes twice within one draw or between two shuffles. Raises ConfigError where a domain has fewer
        sequences than one step may ask of it, whatever the step is.
        """
        block, within = divmod(step, BLOCK)
        place = block * BLOCK + int(permute(np.array([within]), BLOCK, key("proxy steps", seed, block))[0])
        before, after = self.totals(place * count), self.totals((place + 1) * count)
        found = []
        for part in self._parts:
            # its sequences in n places are fewer than n * count * share + 2 * error, for roundings go half up
            places = math.floor((part.sequences + 1 - 2 * part.error) / (count * part.share))
            if places < 1:
                self._refuse(part, count)
            epoch = place // places
            start = self.totals(epoch * places * count)[part.name]
            positions = np.arange(before[part.name] - start, after[part.name] - start)
            shuffled = permute(positions, part.sequences, key("proxy", seed, part.name, epoch))
            found.append(part.first_id + shuffled)
        return np.sort(np.concatenate(found))[permute(np.arange(count), count, key("proxy order", seed, step))]

    def _refuse(self, part: _Part, count: int) -> None:
        most = math.ceil(count * part.share + 2 * part.error) - 1
        raise ConfigError(
            f"data.proxy_weights: expected at least {most} sequences in proxy domain {part.name}, which a step may ask "
            f"of it (share {float(part.share):.2g} of selection.proxy_batch_size={count}), got {part.sequences}; lower "
            "its weight or selection.proxy_batch_size, or prepare more of its text"
        )
