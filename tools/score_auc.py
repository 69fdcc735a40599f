#!/usr/bin/env python3
"""Starts `megatron-opus score-auc`: print how well scores tell two domains apart."""

import sys

from _start import tool

main = tool(__file__)

if __name__ == "__main__":
    sys.exit(main())
