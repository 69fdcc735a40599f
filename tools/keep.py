#!/usr/bin/env python3
"""Starts `megatron-opus keep`: take part of a corpus by its scores."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
