"""The section `data` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_opus.config.mixture import DomainScheduleConfig
from megatron_opus.config.schema import Section, above, at_least, positive, require

Tokens = Annotated[int, positive(10**7)]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, at="data"):
    """Where tokens come from and how sequences are cut. `data=NAME` on the command line means `data.path=NAME`."""

    path: str = "embedded"  # A directory made by tools/prepare_data.py, or `embedded` for text that comes with Python.
    cache_dir: str = "data"  # Where the embedded corpus is prepared, once.
    seq_length: Tokens = 1024  # Tokens per sequence of the update (L_train).
    # Share of each candidate domain in the buffer, in any unit. null: proportional to the domains' tokens.
    domain_weights: dict[str, Annotated[float, at_least(0, 10**15)]] | None = None
    domain_schedule: DomainScheduleConfig = field(default_factory=DomainScheduleConfig)
    # Candidate domain to how often its text is gone through at most; its share then falls to the others.
    domain_max_epochs: dict[str, Annotated[float, above(0, 10**6)]] = field(default_factory=dict, hash=False)
    # Proxy domain to its weight among the proxy sequences of the steps, in any unit; domains that are not named are not
    # drawn. Empty: every domain counts by its number of sequences.
    proxy_weights: dict[str, Annotated[float, above(0, 10**15)]] = field(default_factory=dict, hash=False)
    # What becomes of candidates that were not chosen: lost until the next epoch, or offered again.
    unselected: Literal["discard", "return"] = "discard"
    reset_attention_mask: bool = False  # No attention across document boundaries.
    reset_position_ids: bool = False  # Positions restart at each document.
    eod_mask_loss: bool = False  # No loss on predicting the first token after an end of document.

    def check_together(self) -> None:
        weights = self.domain_weights
        require(
            weights is None or sum(weights.values()) > 0,
            f"data.domain_weights: expected non-negative numbers with a positive sum, got {weights}",
        )
        require(
            weights is None or not self.domain_schedule.points,
            "data.domain_schedule.points: the schedule takes the place of data.domain_weights; expected one of the "
            "two, got both",
        )
