#!/usr/bin/env python3
"""Starts `megatron-opus bench-scoring`: measure what scoring costs and how well it ranks."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
