"""Answers for how outputs look on a terminal: text coloured by exit layer, its legend, tables.

Everything here takes plain values and gives strings. Knows nothing of models, tokenizers or files.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import TextIO


# 256-colour backgrounds from the first layer to the last but one: blue is early, orange late. All are light, so black
# letters stand out on dark and on light terminals.
PALETTE = (75, 117, 158, 192, 227, 221, 215)
BLACK = 16
MARK = "*"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SPACE = "▁"


def use_colour(choice: str, stream: TextIO) -> bool:
    """Whether to write escape codes to `stream`.

    Args:
        choice: `"always"`, `"never"`, or `"auto"`: to terminals, unless the environment sets `NO_COLOR`.
    """
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def colour_of(layer: int, num_layers: int) -> int | None:
    """The 256-colour of tokens that left after `layer`; None, plain, for those that ran all layers."""
    if layer >= num_layers:
        return None
    return PALETTE[round((layer - 1) / max(1, num_layers - 2) * (len(PALETTE) - 1))]


def colour_tokens(
    tokens: Sequence[str],
    layers: Sequence[int],
    num_layers: int,
    colour: bool,
    marked: Collection[int] = (),
) -> str:
    """Text whose tokens show the layer they left at.

    Args:
        tokens: Unigram pieces; `▁` is a space.
        layers: The layers that each token ran. Tokens that ran all `num_layers` look plain.
        colour: A background by ANSI escape codes; else the layer in superscript behind the token.
        marked: Places in `tokens` that are followed by `*`.
    """
    paint = _painted if colour else _annotated
    marks = [MARK if place in marked else "" for place in range(len(tokens))]
    pieces = [paint(token, layer, num_layers, mark) for token, layer, mark in zip(tokens, layers, marks, strict=True)]
    return "".join(pieces).removeprefix(" ")


def _painted(piece: str, layer: int, num_layers: int, mark: str) -> str:
    space, word = _split_space(piece + mark)
    background = colour_of(layer, num_layers)
    if background is None or not word:
        return space + word
    return f"{space}\x1b[38;5;{BLACK};48;5;{background}m{word}\x1b[0m"


def _annotated(piece: str, layer: int, num_layers: int, mark: str) -> str:
    space, word = _split_space(piece)
    return space + word + (str(layer).translate(SUPERSCRIPTS) if layer < num_layers else "") + mark


def _split_space(piece: str) -> tuple[str, str]:
    """A piece as its leading space, if any, and the rest: spaces stay uncoloured, so that lines can be cut there."""
    text = piece.replace(SPACE, " ")
    return text[: len(text) - len(text.lstrip(" "))], text.lstrip(" ")


def legend(layers: Iterable[int], num_layers: int, colour: bool, marked: str) -> str:
    """Says what the look of a token means: each of `layers`, full depth, and being marked."""
    early = sorted(set(layers) - {num_layers})
    if colour:
        samples = [_painted(f"layer\N{NO-BREAK SPACE}{layer}", layer, num_layers, "") for layer in early]
    else:
        samples = [_annotated("word", layer, num_layers, "") + f" = layer {layer}" for layer in early]
    return "  ".join([*samples, f"plain = all {num_layers}", f"{MARK} = {marked}"])


def labelled(label: str, text: str, width: int, label_width: int) -> str:
    """`text` behind `label`, cut at spaces into lines of `width` visible characters, all indented alike."""
    lines = wrap(text, width - label_width) or [""]
    return ("\n" + " " * label_width).join([label.ljust(label_width) + lines[0], *lines[1:]])


def wrap(text: str, width: int) -> list[str]:
    """`text` as lines of at most `width` visible characters where spaces allow it; escape codes take no room."""
    lines: list[str] = []
    room = 0
    for word in text.split(" "):
        length = len(ESCAPES.sub("", word))
        if lines and length < room:
            lines[-1] += f" {word}"
            room -= length + 1
        else:
            lines.append(word)
            room = width - length
    return lines


def paragraph(text: str, width: int) -> str:
    """`text` filled to lines of `width`."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under `header`, the first one left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_table_line(line, widths) for line in lines)


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if place else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def ratio(part: float, whole: float) -> str:
    """`part` as a multiple of `whole`: `0.86x`; `-` of nothing."""
    return f"{part / whole:.2f}x" if whole else "-"
