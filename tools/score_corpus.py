#!/usr/bin/env python3
"""Starts `megatron-opus score-corpus`: give every candidate document of a corpus a score."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
