#!/usr/bin/env python3
"""Starts `megatron-opus prepare-data`: turn text into Megatron token files."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
