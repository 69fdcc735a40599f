"""Files of a directory, as a person who names it means them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.data.prepare.document import SourceError

# What tools leave beside data: editors and Hugging Face (a dot), Spark and Delta Lake (an underscore), trainers
_ASIDE = re.compile(r"[._].*|checkpoints?([-_]\d+)?")


def data_files(directory: str | Path, suffixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Give (files with one of these suffixes, what is left out) below a directory, both sorted.

    Links are followed, each folder once. Left out are names that begin with a dot or an underscore, folders named
    `checkpoints`, `checkpoint-500` and the like, and what is no regular file. A folder in the second list ends with a
    slash, and stands for all that it holds. Raises SourceError for a link to a data file that is not there, and for a
    folder that cannot be read.
    """
    files, aside, seen = [], [], set()

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(directory, followlinks=True, onerror=refuse):
        folders.sort()
        seen.add(os.path.realpath(place))
        for folder in list(folders):
            path = Path(place) / folder
            if _ASIDE.fullmatch(folder) or os.path.realpath(path) in seen:
                folders.remove(folder)
                aside.append(f"{path}/")
        for name in names:
            path = Path(place) / name
            if not name.endswith(tuple(suffixes)):
                continue
            if path.is_symlink() and not path.exists():
                raise SourceError(f"{path}: a link to {os.readlink(path)}, which is not there; restore or remove it")
            if _ASIDE.fullmatch(name) or not path.is_file():
                aside.append(str(path))
            else:
                files.append(str(path))
    return sorted(files), sorted(aside)
