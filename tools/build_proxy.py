#!/usr/bin/env python3
"""Starts `megatron-opus build-proxy`: take a proxy out of a prepared corpus."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
