"""The one base class of everything that is refused before work is lost."""

from __future__ import annotations

from typing import ClassVar


class Refusal(Exception):
    """Input or a setting that cannot be used: the message says what was expected, what was found, and the remedy.

    A program that meets one before anything was built prints the message and ends with status 2, without a traceback.
    """

    # Ranks that read the same recipe find the same fault, and rank 0 alone says it. Where ranks may find different
    # faults (their own files, their own memory), each one speaks.
    of_one_rank: ClassVar[bool] = False


class UnsupportedOptimizer(Refusal, TypeError):
    """An optimizer whose update the selector cannot describe."""


class CheckpointError(Refusal, RuntimeError):
    """A checkpoint that is damaged, absent, or of another run."""

    of_one_rank = True
