"""Answers for files that are written: whole or not at all, and never over what is read.

What is being written stands beside its place, under the name with `.partial` behind it, and takes the place when it is
whole. After a run that was cut off the old file is as it was, and what was written so far is still there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO


PARTIAL = ".partial"
# What is read of a folder with a model. Other files there, such as the results of an evaluation, may be written over.
OF_A_MODEL = (
    *("*config*.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.py"),
    *("exit_certificate.json", "exit_certificates.jsonl", "exit_seen_inputs.json"),
    *("exits.json", "chat_template*", "README.md"),
)


@contextmanager
def written_beside(path: str | Path, mode: str = "w", **how) -> Iterator[IO]:
    """A file to write to, which takes the place of `path` when all is written.

    What is no regular file, such as a pipe or a terminal, is written to as it is.

    Args:
        mode: "w" for text in UTF-8, "wb" for bytes.
        how: Further keywords of `open`.
    """
    how = how if "b" in mode else {"encoding": "utf-8", **how}
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        with open(place, mode, **how) as file:
            yield file
        return
    partial = place.with_name(place.name + PARTIAL)
    with open(partial, mode, **how) as file:
        yield file
    if place.exists():
        shutil.copymode(place, partial)
    os.replace(partial, place)


@contextmanager
def folder_written_whole(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, whose files take their places in `folder` when all are written.

    It is made in `folder`, whose parent may be on another disk or not to be written to. What else is in `folder`
    stays; what an earlier run that was cut off has left there is removed.
    """
    place = Path(folder)
    partial = place / PARTIAL
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    for root, _, names in os.walk(partial):
        target = place / Path(root).relative_to(partial)
        target.mkdir(exist_ok=True)
        for name in names:
            os.replace(Path(root, name), target / name)
    shutil.rmtree(partial)


def write_text(path: str | Path, text: str) -> None:
    """Write a text, whole or not at all. Ends of lines are written as they are."""
    with written_beside(path, newline="") as file:
        file.write(text)


def refuse_overwriting(outputs: Mapping[str, str | None], inputs: Iterable[str | Path | int | None]) -> None:
    """Refuse, before any work, to write over what is read, or two outputs into one file.

    Args:
        outputs: Files that will be written, by what the user calls them. None: not written.
        inputs: Files that are read, open ones as numbers, and folders with models. Names of a Hub are none.

    Raises:
        ValueError: A file would be written over, under whatever name: by a link, by another path, in other case.
    """
    read = [file for path in inputs if path is not None for file in _files_of(path)]
    earlier: dict[str, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        for place in (path, os.path.realpath(path) + PARTIAL):
            if (same := next((file for file in read if _is_same(place, file)), None)) is not None:
                shown = "standard input" if isinstance(same, int) else same
                raise ValueError(f"{name} {path} would write over {shown}, which is read: name another file")
        for other, another in earlier.items():
            if _is_same(path, another) or os.path.realpath(path) == os.path.realpath(another):
                raise ValueError(f"{name} and {other} are the same file, {path}: name two files")
        earlier[name] = path


def refuse_folder_of_model(name: str, folder: str | Path, models: Iterable[str | Path | None]) -> None:
    """Refuse, before any work, to save a model over one that is read, or inside its folder.

    Raises:
        ValueError: The folder is the one of a model, or lies in it.
    """
    place = Path(os.path.realpath(folder))
    for model in models:
        if model is None or not Path(model).is_dir():
            continue
        around = [place, *place.parents] if _is_model(model) else [place]
        if any(_is_same(one, model) for one in around):
            raise ValueError(f"{name} {folder} is, or is in, the folder of the model that is read: name another one")


def _is_model(folder: str | Path) -> bool:
    return (Path(folder) / "config.json").is_file()


def _files_of(path: str | Path | int) -> list[str | Path | int]:
    if isinstance(path, int) or not Path(path).is_dir():
        return [path]
    return [file for file in Path(path).iterdir() if any(fnmatch(file.name, pattern) for pattern in OF_A_MODEL)]


def _is_same(one: str | Path, other: str | Path | int) -> bool:
    """Whether both are one file or folder that is there. What is no regular file cannot be written over."""
    try:
        there = os.stat(other)
        is_kept = os.path.isfile(one) or os.path.isdir(one)
        return is_kept and os.path.samestat(os.stat(one), there)
    except OSError:
        return False
