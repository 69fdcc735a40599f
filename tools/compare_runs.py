#!/usr/bin/env python3
"""Starts `megatron-opus compare-runs`: print the losses, tokens and seconds of runs side by side."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
