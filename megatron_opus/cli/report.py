"""One HTML page about a run, or several side by side, from their folders alone.

    megatron-opus report runs/opus
    megatron-opus report runs/random runs/opus --output comparison.html

Differences are to the first run: name the baseline first. The file needs nothing beside itself: no scripts, no network.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of


def main(argv: Sequence[str], program: str) -> int:
    parser = parser_of("report", program, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the prepared corpus, where it has moved")
    arguments = parser.parse_args(argv)
    from megatron_opus.report.page import write_report

    command = f"{program} {shlex.join(argv)}"
    for note in write_report(arguments.runs, arguments.output, data=arguments.data, command=command):
        print(f"note: {note}", file=sys.stderr)
    print(arguments.output)
    return 0
