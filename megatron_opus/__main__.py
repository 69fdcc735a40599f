"""`python -m megatron_opus COMMAND ...`: the same as `megatron-opus COMMAND ...`."""

import sys

from megatron_opus.cli import main

if __name__ == "__main__":
    sys.exit(main())
