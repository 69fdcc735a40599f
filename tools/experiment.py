#!/usr/bin/env python3
"""Starts `megatron-opus experiment`: run arms times seeds, and report on them."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
