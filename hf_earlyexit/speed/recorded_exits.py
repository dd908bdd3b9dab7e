"""Recorded exits: the layers that each token of each text ran, and the settings they were recorded with.

Reads `exits.json` of the shipped checkpoint and the output lines of `hf-earlyexit generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_earlyexit.common.json_text import decode, parse_json
from hf_earlyexit.common.tables import read_json_lines
from hf_earlyexit.common.values import is_integer, is_number
from hf_earlyexit.speed.simulation import draw_layers


DRAWN_TEXTS, DRAWN_TOKENS = 256, 64


@dataclass(frozen=True)
class RecordedExits:
    """The layers after which tokens exited.

    Attributes:
        layers_run: Layers of every token, text by text.
        num_layers: Layers of the decoder; None if not recorded.
        exit_layers: Where exits were evaluated; None if not recorded.
        criterion: The criterion; None if not recorded.
    """

    layers_run: list[list[int]]
    num_layers: int | None = None
    exit_layers: tuple[int, ...] | None = None
    criterion: str | None = None

    def check_against(self, num_layers: int, exit_layers: Sequence[int]) -> None:
        """Refuse exits of another decoder, or at layers that are not exit points here.

        Raises:
            ValueError: The message says which, and what to do.
        """
        if self.num_layers not in (None, num_layers):
            raise ValueError(
                f"--exits was recorded with a decoder of {self.num_layers} layers, this one has {num_layers}: "
                "record this model's with `hf-earlyexit generate --output-file`."
            )
        ran = {layer for text in self.layers_run for layer in text}
        if foreign := sorted(ran - {*exit_layers, num_layers}):
            raise ValueError(
                f"--exits has tokens that left after {foreign}, but tokens are asked at {list(exit_layers)} of "
                f"{num_layers} layers: name with --exit-layers where they were asked when it was recorded."
            )


def read_exits(
    path: str | Path, seed: int = 0, reads: Callable[[dict[str, Any]], bool] = lambda record: True
) -> RecordedExits:
    """Read recorded exits.

    Args:
        path: A JSON object with `layers_run`, or with a `distribution` that layers are drawn from; or JSON lines with
            `layers_run`.
        seed: For drawing layers.
        reads: Selects the records to read, where records have an `input` or the object has `inputs`.

    Raises:
        ValueError: The file has none of these forms, or no record is selected.
    """
    text = decode(Path(path).read_bytes(), str(path))
    try:
        values = parse_json(text, str(path))
        records = values if isinstance(values, list) else [values]
    except ValueError:
        records = read_json_lines(text, str(path)).records
    if not records:
        raise ValueError(f"{path} has no recorded exits: name a file of `hf-earlyexit generate --output-file`.")
    if len(records) == 1 and isinstance(records[0], dict) and not _is_text(records[0].get("layers_run")):
        return _of_object(records[0], str(path), seed, reads)
    layers = [_layers_of(record, f"{path}, record {place}") for place, record in enumerate(records, 1)]
    return RecordedExits(_those_read(records, layers, reads, str(path)))


def _those_read(records: Sequence[dict[str, Any]], layers: Sequence[list[int]], reads, path: str) -> list[list[int]]:
    read = [one for record, one in zip(records, layers, strict=True) if "input" not in record or reads(record)]
    if layers and not read:
        raise ValueError(f"{path} has {len(layers)} records, all of inputs in other parts than those that are read.")
    return read


def _layers_of(record: Any, where: str) -> list[int]:
    layers = record.get("layers_run") if isinstance(record, dict) else None
    if not _is_text(layers):
        raise ValueError(f"{where}: `layers_run` must list the layers of each token, such as [2, 4, 8], got {layers}.")
    return layers


def _of_object(values: dict[str, Any], path: str, seed: int, reads) -> RecordedExits:
    """Exits from one object for all texts, the form of `exits.json`."""
    setting, num_layers = values.get("setting", {}), values.get("num_layers")
    asked = setting.get("exit_layers") if isinstance(setting, dict) else setting
    if not isinstance(setting, dict) or not (asked is None or _is_text(asked) or asked == []):
        raise ValueError(f"{path}: `setting` must be an object whose `exit_layers` lists layers, got {setting}.")
    known = (None if asked is None else tuple(asked), setting.get("exit_criterion"))
    if "layers_run" not in values and "distribution" in values:
        shares = _check_distribution(values["distribution"], num_layers, path)
        return RecordedExits(draw_layers(shares, DRAWN_TEXTS, DRAWN_TOKENS, seed), len(shares), *known)
    texts = values.get("layers_run")
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{path}: it needs `layers_run`, the layers of each token of each text, or `distribution`.")
    layers = [_layers_of({"layers_run": text}, path) for text in texts]
    if (inputs := values.get("inputs")) is not None:
        if not isinstance(inputs, list) or len(inputs) != len(texts) or not all(isinstance(x, str) for x in inputs):
            raise ValueError(f"{path}: `inputs` must list the input of each text in `layers_run`.")
        layers = _those_read([{"input": text} for text in inputs], layers, reads, path)
    return RecordedExits(layers, num_layers, *known)


def _check_distribution(shares: Any, num_layers: int | None, path: str) -> list[float]:
    if not isinstance(shares, list) or not all(is_number(share) and share >= 0 for share in shares) or not sum(shares):
        raise ValueError(f"{path}: `distribution` must list the share of tokens that run 1, 2, ... layers.")
    if num_layers not in (None, len(shares)):
        raise ValueError(f"{path}: `distribution` has {len(shares)} shares for {num_layers} layers.")
    return shares


def _is_text(layers: Any) -> bool:
    return isinstance(layers, list) and bool(layers) and all(is_integer(layer) and layer >= 1 for layer in layers)
