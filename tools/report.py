#!/usr/bin/env python3
"""Starts `megatron-opus report`: write one HTML page about one or several runs."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
