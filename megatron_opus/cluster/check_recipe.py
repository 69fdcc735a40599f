"""Check a recipe before it is queued: `python -m megatron_opus.cluster.check_recipe RECIPE --ranks N [key=value ...]`.

The same checks that every rank makes at its start, on a machine that needs no more than Python and PyYAML for it; with
--gpu-memory-gib also whether the recipe fits GPUs of that size, which needs torch, megatron-core and deepspeed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_opus import config as configs
from megatron_opus.config import ConfigError, RunConfig

ROOT = Path(__file__).resolve().parents[2]
REFUSED = 2
GIB = 2**30


def load(recipe: str, overrides: Sequence[str], ranks: int) -> RunConfig:
    """The resolved recipe: a name in configs/ or a YAML file. Raises ConfigError where `ranks` cannot run it."""
    path = Path(recipe) if recipe.endswith(".yaml") else ROOT / "configs" / f"{recipe}.yaml"
    config = configs.load(path, overrides)
    configs.validate_world(config, ranks)
    return config


def memory_lines(config: RunConfig, ranks: int, gpu_memory_gib: float) -> list[str]:
    """What a rank needs of a GPU with so many GiB. Raises PreflightError where it does not fit."""
    from megatron_opus.estimates.fit import Machine, start_up_report

    if config.model.vocab_size is None:
        return [
            "memory per rank: not checked, for the size of the vocabulary comes from the data; set model.vocab_size"
        ]
    machine = Machine(device="cuda", bytes_found=gpu_memory_gib * GIB, local_ranks=1, source="GPU_MEMORY_GIB")
    return start_up_report(config, ranks, machine)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Check a recipe for a number of ranks.")
    parser.add_argument("recipe", help="a name in configs/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the recipe")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpu-memory-gib", type=float, help="refuse what does not fit a GPU of this size")
    parser.add_argument("--show", choices=("recipe", "name", "output_dir"), default="recipe")
    arguments = parser.parse_intermixed_args(argv)
    refusals: tuple[type[Exception], ...] = (ConfigError,)
    try:
        config = load(arguments.recipe, arguments.overrides, arguments.ranks)
        if arguments.gpu_memory_gib is not None:
            from megatron_opus.estimates.fit import PreflightError

            refusals += (PreflightError,)
            print(*memory_lines(config, arguments.ranks, arguments.gpu_memory_gib), sep="\n", file=sys.stderr)
    except refusals as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    print(configs.dump(config).rstrip() if arguments.show == "recipe" else getattr(config, arguments.show))
    return 0


if __name__ == "__main__":
    sys.exit(main())
