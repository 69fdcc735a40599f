#!/usr/bin/env python3
"""One HTML page about a run, or several side by side, from their folders alone.

    python tools/report.py runs/opus
    python tools/report.py runs/random runs/opus --output comparison.html

Differences are to the first run: name the baseline first. The file needs nothing beside itself: no scripts, no network.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_opus.report.record import ReportError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the prepared corpus, where it has moved")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "tools/report.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        from megatron_opus.report.page import write_report  # matplotlib may be missing

        notes = write_report(arguments.runs, arguments.output, data=arguments.data, command=command)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
