#!/usr/bin/env python3
"""Starts `megatron-opus score-report`: write one HTML page about the scores of a corpus."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
