#!/usr/bin/env python3
"""Starts `megatron-opus evaluate`: run benchmarks and perplexity of a checkpoint, offline."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
