#!/usr/bin/env python3
"""Starts `megatron-opus convert-checkpoint`: convert Hugging Face weights to sharded ones, and back."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
