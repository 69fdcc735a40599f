"""Finds the package for the files beside it."""

import sys

try:
    from megatron_opus.cli import tool
except ModuleNotFoundError as error:
    if error.name != "megatron_opus":
        raise
    sys.exit(f"megatron_opus is not installed for {sys.executable}: run `pip install -e .` in the checkout first")

__all__ = ["tool"]
