"""Write files atomically, and refuse to overwrite inputs.

Output goes to a file beside the target, named with the suffix `.partial`, which replaces the target when it is
complete. If a run is cut off, the old file is unchanged and the partial output is kept.
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
CERTIFICATE_FILE = "exit_certificate.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
# Files of a model folder that are read. Others there, such as results of an evaluation, may be overwritten.
OF_A_MODEL = (
    *("*config*.json", *WEIGHTS, "*.pt", "*.pth"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.py"),
    *(CERTIFICATE_FILE, "exit_certificates.jsonl", "exit_seen_inputs.json"),
    *("exits.json", "chat_template*", "README.md"),
)


@contextmanager
def written_beside(path: str | Path, mode: str = "w", **how) -> Iterator[IO]:
    """Yield a file to write to; it replaces `path` when the block ends without an error.

    A path that is not a regular file, such as a pipe or a terminal, is written to directly.

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
    """Yield a new folder to write into; its files move to `folder` when all are written.

    The new folder lies inside `folder`, whose parent may be on another disk or read-only. Leftovers of an earlier run
    that was cut off are removed. A certificate in `folder` is removed first and the new one is moved last, so that no
    certificate lies beside other weights if the process is killed in between. Weights of an earlier model that the new
    files do not replace are removed: loading could prefer them. Other files in `folder` stay.
    """
    place = Path(folder)
    partial = place / PARTIAL
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    (place / CERTIFICATE_FILE).unlink(missing_ok=True)
    new = [Path(root, name).relative_to(partial) for root, _, names in os.walk(partial) for name in names]
    if any(_is_weights(file) for file in new):
        for file in place.iterdir():
            if _is_weights(file) and Path(file.name) not in new:
                file.unlink()
    for file in sorted(new, key=lambda one: one.name == CERTIFICATE_FILE):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / file, place / file)
    shutil.rmtree(partial)


def _is_weights(file: Path) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in WEIGHTS)


def write_text(path: str | Path, text: str) -> None:
    """Write a text atomically. Line endings are written unchanged."""
    with written_beside(path, newline="") as file:
        file.write(text)


def refuse_overwriting(outputs: Mapping[str, str | None], inputs: Iterable[str | Path | int | None]) -> None:
    """Refuse, before any work, to overwrite an input or to write two outputs into one file.

    Args:
        outputs: Files to be written, by the name that the user knows them by. None: not written.
        inputs: Files that are read, open ones as file descriptors, and model folders. Hub ids are ignored.

    Raises:
        ValueError: A file would be overwritten, also through a link, another path, or a name in different case.
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
        ValueError: The folder is a model's folder, or lies inside it.
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
    """Whether both are the same existing file or folder. False for devices and pipes, which cannot be overwritten."""
    try:
        there = os.stat(other)
        is_kept = os.path.isfile(one) or os.path.isdir(one)
        return is_kept and os.path.samestat(os.stat(one), there)
    except OSError:
        return False
