"""Run a Megatron-LM script with selection:

torchrun ... -m megatron_opus.integrations.megatron_lm pretrain_gpt.py <its arguments> --opus-config opus.yaml
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.errors import Refusal

USAGE = "usage: python -m megatron_opus.integrations.megatron_lm SCRIPT [its arguments] --opus-config FILE"


def main(argv: Sequence[str]) -> None:
    """Run `SCRIPT arguments` as `python SCRIPT arguments` would, with selection by the file of --opus-config.

    Raises SystemExit with status 2 for a command line or a setting that cannot be used, and as the script does.
    """
    try:
        script, arguments, config = split(argv)
    except ValueError as error:
        print(f"{error}\n{USAGE}", file=sys.stderr)
        raise SystemExit(2) from None
    sys.argv = [script, *arguments]
    # as python itself does for a script: the megatron beside it comes before an installed one, so nothing may have
    # imported megatron before this line
    sys.path.insert(0, str(Path(script).resolve().parent))
    from megatron_opus.integrations.megatron_lm.patches import selecting

    try:
        with selecting(config):
            runpy.run_path(script, run_name="__main__")
    except Refusal as error:
        print(f"megatron_opus: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def split(argv: Sequence[str]) -> tuple[str, list[str], str]:
    """Split a command line into script, the script's arguments and the file of --opus-config.

    Raises ValueError where one of them is missing.
    """
    rest, config = [], ""
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--opus-config":
            config = value or next(words, "")
        else:
            rest.append(word)
    if not config:
        raise ValueError("--opus-config: expected a file, got none")
    if not rest or not Path(rest[0]).is_file():
        raise ValueError(f"expected a Megatron-LM script first, got {rest[0] if rest else 'nothing'}")
    return rest[0], rest[1:], config


if __name__ == "__main__":
    main(sys.argv[1:])
