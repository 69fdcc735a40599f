"""OPUS data selection for Megatron-core and DeepSpeed pre-training."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["build_scorer", "score"]


def __getattr__(name: str) -> Any:
    # megatron-core and deepspeed take seconds to import: only on first use
    if name in __all__:
        from megatron_opus import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
