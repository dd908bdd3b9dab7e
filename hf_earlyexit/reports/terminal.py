"""Terminal formatting: text coloured by exit layer, its legend, tables.

All functions take plain values and return strings. Independent of models, tokenizers and files.
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
    """The 256-colour code of tokens that exited after `layer`; None (plain) if they ran all layers."""
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
    """Text whose tokens show the layer after which they exited.

    Args:
        tokens: Unigram pieces; `▁` is a space.
        layers: Number of layers that each token ran. Tokens that ran all `num_layers` are plain.
        num_layers: Number of decoder layers.
        colour: Show the layer as a background colour by ANSI escape codes; else as a superscript after the token.
        marked: Indices into `tokens` of those that are followed by `*`.
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
    """A piece split into leading spaces and the rest. Spaces stay uncoloured, so that lines can be wrapped there."""
    text = piece.replace(SPACE, " ")
    return text[: len(text) - len(text.lstrip(" "))], text.lstrip(" ")


def legend(layers: Iterable[int], num_layers: int, colour: bool, marked: str) -> str:
    """Legend of the token styles: each of `layers`, full depth, and the mark."""
    early = sorted(set(layers) - {num_layers})
    if colour:
        samples = [_painted(f"layer\N{NO-BREAK SPACE}{layer}", layer, num_layers, "") for layer in early]
    else:
        samples = [_annotated("word", layer, num_layers, "") + f" = layer {layer}" for layer in early]
    return "  ".join([*samples, f"plain = all {num_layers}", f"{MARK} = {marked}"])


def labelled(label: str, text: str, width: int, label_width: int) -> str:
    """`text` after `label`, wrapped at spaces into lines of `width` visible characters with the same indent."""
    lines = wrap(text, width - label_width) or [""]
    return ("\n" + " " * label_width).join([label.ljust(label_width) + lines[0], *lines[1:]])


def wrap(text: str, width: int) -> list[str]:
    """Split `text` at spaces into lines of at most `width` visible characters; escape codes have no width."""
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
    """`part` as a multiple of `whole`, as in `0.86x`; `-` if `whole` is 0."""
    return f"{part / whole:.2f}x" if whole else "-"
