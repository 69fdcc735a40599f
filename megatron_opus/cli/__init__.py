"""The command `megatron-opus`, which is `python -m megatron_opus` too. A file in tools/ starts one of its commands."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_opus.errors import Refusal
from megatron_opus.files import explain

COMMANDS = {
    "prepare-data": "turn text into Megatron token files",
    "build-proxy": "take a proxy out of a prepared corpus",
    "score-corpus": "give every candidate document of a corpus a score",
    "keep": "take part of a corpus by its scores",
    "score-report": "write one HTML page about the scores of a corpus",
    "score-auc": "print how well scores tell two domains apart",
    "train": "train by one recipe, in this process alone",
    "convert-checkpoint": "convert Hugging Face weights to sharded ones, and back",
    "evaluate": "run benchmarks and perplexity of a checkpoint, offline",
    "report": "write one HTML page about one or several runs",
    "compare-runs": "print the losses, tokens and seconds of runs side by side",
    "experiment": "run arms times seeds, and report on them",
    "bench-scoring": "measure what scoring costs and how well it ranks",
    "gpu-check": "measure on one GPU what is unmeasured elsewhere",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `megatron-opus COMMAND ...` and return its exit status. No library is loaded before a command is known."""
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog="megatron-opus",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Optimizer-aware online data selection for Megatron-core and DeepSpeed pre-training.",
        epilog="commands:\n" + "".join(f"  {name:<{width}}{text}\n" for name, text in COMMANDS.items())
        + "\n`megatron-opus COMMAND --help` explains a command.",
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    arguments = parser.parse_args(argv)
    return start(arguments.command, arguments.arguments)


def start(command: str, argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one command and return its exit status.

    What is refused ends with one line on stderr and status 1, an interrupt with status 130. A fault of the program
    itself keeps its traceback. `argv` is the process's own by default. `program` is how the user started the command;
    the usage text repeats it.
    """
    module = importlib.import_module(f"megatron_opus.cli.{command.replace('-', '_')}")
    name = module.__name__.rpartition(".")[2]
    try:
        status: int = module.main(sys.argv[1:] if argv is None else argv, program or f"megatron-opus {command}")
    except (Refusal, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
        print(f"{name}: {(full and explain(error, Path.cwd())) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return status


def tool(file: str) -> Callable[..., int]:
    """Return the `main` of a file in tools/, named like its command with underscores."""
    name = file.rpartition("/")[2]
    return functools.partial(start, name.removesuffix(".py").replace("_", "-"), program=f"python tools/{name}")


def parser_of(command: str, program: str, text: str | None) -> argparse.ArgumentParser:
    """Make the parser of a command; the examples in its `text` name the program that the user started."""
    description = (text or "").replace(f"megatron-opus {command}", program)
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
