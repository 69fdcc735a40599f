"""Scoring in Transformer Engine's fp8, beside a run that trains in bf16.

Every tensor is scaled by its own largest value (Float8CurrentScaling). Delayed scaling would scale by values that
earlier tensors had, and a pass would enter its own into their history: it is never used here.

Only layers of Transformer Engine compute in fp8; routers, norms, attention and the output layer stay in the model's
precision. The factors that hooks read are those before they are rounded to fp8.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from megatron_opus.config import ConfigError

_KEY = "selection.score_precision: fp8"
_REMEDY = "set model or bf16"


class Fp8:
    """Runs forward passes in fp8; their backward passes follow by themselves."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        """Raises ConfigError without Transformer Engine, without its layers or without hardware for fp8, and in a run
        that trains in fp8."""
        try:
            self._te: Any = importlib.import_module("transformer_engine.pytorch")
            recipes: Any = importlib.import_module("transformer_engine.common.recipe")
        except ImportError as error:
            raise ConfigError(f"{_KEY}: expected Transformer Engine, found none ({error}); {_REMEDY}") from error
        if not hasattr(recipes, "Float8CurrentScaling"):
            raise ConfigError(f"{_KEY}: expected Transformer Engine 2.2 or later, with Float8CurrentScaling; {_REMEDY}")
        available, reason = importlib.import_module(
            "transformer_engine.pytorch.fp8"
        ).FP8GlobalStateManager.is_fp8_available()
        if not available:
            raise ConfigError(f"{_KEY}: expected a GPU that computes in fp8, got none: {reason}; {_REMEDY}")
        if any(getattr(getattr(chunk, "config", None), "fp8", None) for chunk in chunks):
            raise ConfigError(
                f"{_KEY}: expected a run in bf16, got one that trains in fp8; set model, which is fp8 there"
            )
        self._layers: list[Any] = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "fp8_meta")]
        if not self._layers:
            raise ConfigError(f"{_KEY}: expected layers of Transformer Engine in the model, found none; {_REMEDY}")
        self._recipe = recipes.Float8CurrentScaling()

    def forward(self) -> AbstractContextManager[object]:
        """Compute in fp8 inside the context."""
        if hasattr(self._te, "autocast"):
            context: AbstractContextManager[object] = self._te.autocast(enabled=True, recipe=self._recipe)
        else:
            context = self._te.fp8_autocast(enabled=True, fp8_recipe=self._recipe)
        return context

    @contextlib.contextmanager
    def forgotten(self) -> Iterator[None]:
        """Put back, on leaving, what makes a checkpoint of a layer say that it computed in fp8."""
        kept = [(m, m.fp8, m.fp8_meta.get("fp8_checkpoint", False)) for m in self._layers]
        try:
            yield
        finally:
            for module, enabled, saved in kept:
                module.fp8 = enabled
                module.fp8_meta["fp8_checkpoint"] = saved
