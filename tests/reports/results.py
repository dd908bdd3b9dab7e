"""Synthetic evaluation results: small, complete and deterministic.

Lower thresholds exit earlier. Early exits lose ROUGE-L, more on long inputs. Evaluating exits costs time, more in
larger batches, so that early exit is faster than stock one text at a time and slower in batches.
"""

from __future__ import annotations

from dataclasses import asdict
from operator import mul
from random import Random
from statistics import fmean, stdev
from typing import Any

from hf_earlyexit.calibration.model_calibration import NONE_FASTER, NONE_SAFE
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.generation.certificate import Certificate


NUM_LAYERS = 8
CURVES = {"softmax:2,4,6": (0.3, 0.5, 0.9), "state": (0.93, 0.97, 0.99), "classifier": (0.5, 0.8, 0.95)}
ASKING = {"softmax": 0.16, "state": 0.02, "classifier": 0.05}
LOSING = {"full depth": 0, "static decoder": 45, "softmax:2,4,6": 20, "state": 42, "classifier": 26}
TOKENS = ["▁The", "▁Vau", "lt", "▁is", "▁a", "▁cheap", "▁pub", "▁near", "▁Caf", "é", "▁Adriatic", ".", "</s>"]


def make_results(
    certificate: str | None = "certified",
    count: int = 24,
    sizes: tuple[int, ...] = (1, 8),
    curves: dict[str, tuple[float, ...]] = CURVES,
) -> dict[str, Any]:
    """The values of a results file.

    Args:
        certificate: A kind of `make_certificate`, or None.
        count: Number of inputs.
        sizes: Batch sizes.
        curves: Thresholds by curve.
    """
    made = Maker(count)
    made.add("full depth", None, "row", sizes, NUM_LAYERS)
    for depth in range(1, NUM_LAYERS):
        made.add("static decoder", depth, "row", sizes, depth)
    for curve, thresholds in curves.items():
        for place, threshold in enumerate(sorted(thresholds), 1):
            layers = 2.5 + 5.3 * place / len(thresholds)
            made.add(curve, threshold, "row", sizes, layers)
            for size in sizes:
                made.add(curve, threshold, "batch", [size], min(NUM_LAYERS, layers + 0.5 * (size - 1) ** 0.5))
    return {
        "format": 1,
        "asked": {
            "model": "t5-e2e",
            "data": "validation.csv",
            "weights": "ab" * 32,
            "inputs": "cd" * 32,
            "max_new_tokens": 64,
            "max_source_tokens": None,
            "dtype": "float32",
            "batch_sizes": list(sizes),
            "batch_rules": ["row", "batch"],
            "rounds": 31,
            "points": 2.0,
        },
        "environment": {"python": "3.11.7", "torch": "2.13.0+cpu", "cpu": "A <fast> one & two cores", "cores": "2"},
        "commit": "abc1234",
        "started": "2026-11-25",
        "num_layers": NUM_LAYERS,
        "inputs": {"count": count, "source_tokens": made.source_tokens, "full_depth_tokens": made.full_depth_tokens},
        "quality": made.quality,
        "cells": made.cells,
        "reliability": {
            name: _reliability(first) for name, first in (("softmax", 0), ("state", 6), ("classifier", 0))
        },
        "oracle": _oracle(curves),
        "examples": [_example("describe: <script>alert(1)</script> & more"), _example("describe: name[The Vault]")],
        "certificate": None if certificate is None else make_certificate(certificate, curves),
    }


class Maker:
    """Makes qualities and their cells."""

    def __init__(self, count: int):
        self.random = Random(0)
        self.source_tokens = [20 + self.random.randrange(60) for _ in range(count)]
        self.full_depth_tokens = [10 + tokens // 3 + self.random.randrange(12) for tokens in self.source_tokens]
        self.base = [self.random.uniform(50, 90) for _ in range(count)]
        self.quality: dict[str, Any] = {}
        self.cells: list[dict[str, Any]] = []

    def add(self, curve: str, threshold: float | None, rule: str, sizes: tuple[int, ...], layers: float) -> None:
        name = curve if threshold is None else f"{curve} {threshold:g}"
        shared = {"name": name, "curve": curve, "threshold": threshold, "batch_exit": rule}
        key = name if rule == "row" else f"{name} batch {sizes[0]}"
        size = None if rule == "row" else sizes[0]
        self.quality[key] = {**shared, "keywords": {}, "batch_size": size, **self._quality(curve, layers)}
        self.cells += [
            {**shared, "quality": key, "batch_size": size, "load": [1.0 + size / 10, 1.1, 1.2]}
            | {"time": self._time(curve, rule, size, layers)}
            for size in sizes
        ]

    def _quality(self, curve: str, layers: float) -> dict[str, Any]:
        skipped = 1 - layers / NUM_LAYERS
        lost = LOSING[curve] * skipped**2.2
        own = [
            {
                "rougeL": base - lost * self.random.gauss(1, 1.5) * (0.7 + tokens / 100),
                "consistency": 100 - 90 * skipped**1.3 * self.random.uniform(0.6, 1.2) if lost else 100.0,
                "layers": min(NUM_LAYERS, layers + (tokens - 30) / 40 * (curve in CURVES)),
                "tokens": max(1, tokens - self.random.randrange(3) * bool(lost)),
            }
            for base, tokens in zip(self.base, self.full_depth_tokens)
        ]
        columns = {key: [one[key] for one in own] for key in own[0]}
        tokens = sum(columns["tokens"])
        rouge, layers = columns["rougeL"], sum(map(mul, columns["layers"], columns["tokens"])) / tokens
        scores = {"rouge1": [one + 12 for one in rouge], "rouge2": [one - 8 for one in rouge], "rougeL": rouge}
        scores |= {"consistency": columns["consistency"], "equal_texts": [100.0 * (not lost) for _ in own]}
        rows = [round(tokens * min(1.0, max(0.0, layers - layer + 1))) for layer in range(1, NUM_LAYERS + 1)]
        return {
            "scores": {name: _mean(values) for name, values in scores.items()}
            | {"bleu": {"mean": 67.0 - lost, "low": None, "high": None}},
            "mean_layers": {"mean": layers, "low": layers - 0.1, "high": layers + 0.1},
            "tokens": tokens,
            "distribution": _distribution(layers, curve),
            "work": {"layer_rows": rows, "filled_positions": [0] * NUM_LAYERS, "head_rows": [*rows, tokens]},
            "per_input": columns,
        }

    def _time(self, curve: str, rule: str, size: int, layers: float) -> dict[str, Any]:
        asking = ASKING.get(curve.partition(":")[0], 0.0)
        split = 0.0 if rule == "batch" or not asking else 0.09 * (size - 1) ** 0.55
        ratio = 0.08 + 0.9 * layers / NUM_LAYERS + asking + split * (1 - layers / (NUM_LAYERS + 2))
        ratio *= self.random.uniform(0.98, 1.02)
        stock = 0.4 * size**0.3
        return {
            "ratio": {"wall": {"median": 1.2 * ratio, "iqr": 0.05}, "cpu": {"median": ratio, "iqr": 0.04}},
            "ours": _seconds(stock * ratio, size, ratio),
            "stock": _seconds(stock, size, 1.0),
        }


def _mean(values: list[float]) -> dict[str, float]:
    mean, error = fmean(values), stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def _distribution(layers: float, curve: str) -> list[float]:
    if curve in ("full depth", "static decoder"):
        return [float(layer == layers) for layer in range(1, NUM_LAYERS + 1)]
    last = (layers - 2) / (NUM_LAYERS - 2)
    early = [2.0 ** -abs(layer - layers / 2) for layer in range(1, NUM_LAYERS)]
    return [(1 - last) * share / sum(early) for share in early] + [last]


def _seconds(seconds: float, size: int, ratio: float) -> dict[str, Any]:
    spread, step = {"median": seconds, "iqr": 0.03}, 6.0 * ratio * size**0.3
    return {
        "seconds": {"wall": spread, "cpu": spread},
        "tokens_per_second": 28 * size / seconds,
        "inter_token_ms": {"median": step, "p95": 1.7 * step},
        "first_token_ms": {"median": 2 * step, "p95": 3 * step},
        "encoder_ms": {"median": 18.0 * size**0.3, "p95": 25.0 * size**0.3},
    }


def _reliability(first: int) -> dict[str, list[dict[str, float]]]:
    """Bins of confidence from `first` on, overconfident in early layers."""
    return {
        str(layer): [
            {
                "confidence": (place + 0.5) / 10,
                "agreement": ((place + 0.5) / 10) ** (2.2 - 0.2 * layer) * (0.8 + 0.025 * layer),
                "count": 15 * place**2 + 9,
            }
            for place in range(first, 10)
        ]
        for layer in range(1, NUM_LAYERS)
    }


def _oracle(curves: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Oracle values: at equal layers, fewer exit points agree less with full depth, and criteria less than oracles."""
    everywhere = list(range(1, NUM_LAYERS))
    places = {name: [int(one) for one in name.partition(":")[2].split(",") if one] or everywhere for name in curves}
    oracles = {",".join(map(str, one)): one for one in (everywhere, *places.values())}
    return {
        "tokens": 480,
        "tied": 0.0,
        "rewritten": 0.0025,
        "same_layer": [_reached(layer, 0.4 + 0.6 * layer / NUM_LAYERS) for layer in range(1, NUM_LAYERS + 1)],
        "oracles": {name: _bound(layers) for name, layers in oracles.items()},
        "curves": {
            name: {
                "exit_layers": places[name],
                "asked": sorted(thresholds, reverse=True),
                "points": [
                    _reached(float(NUM_LAYERS), 1.0),
                    *(
                        _reached(2.5 + 5.3 * threshold**2, 0.5 + 0.49 * threshold ** (1 + place / 3), threshold)
                        for threshold in sorted({*thresholds, *(step / 20 for step in range(21))}, reverse=True)
                    ),
                ],
            }
            for place, (name, thresholds) in enumerate(curves.items())
        },
    }


def _bound(layers: list[int]) -> dict[str, Any]:
    """Points and mean layers of an oracle with these exit points. Its shares add up to 1."""
    shares = {str(layer): 0.6 / len(layers) for layer in layers} | {str(NUM_LAYERS): 0.4}
    first = sum(int(layer) * share for layer, share in shares.items()) / 1.6
    corners = [(first + (layers[0] - first) * step / 4, 1 - 0.1 * step) for step in range(5)]
    return {
        "exit_layers": layers,
        "first": {"layers": first, "shares": shares},
        "stable": {"layers": first + 1, "shares": shares},
        "points": [_reached(*corner) for corner in corners],
    }


def _reached(layers: float, agreement: float, threshold: float | None = None) -> dict[str, float | None]:
    return {"layers": layers, "agreement": agreement, "threshold": threshold}


def _example(text: str) -> dict[str, Any]:
    layers = [2, 6, 4, 2, 2, NUM_LAYERS, 4, 6, NUM_LAYERS, 2, 4, 2, 2]
    return {
        "name": "softmax:2,4,6 0.5",
        "input": text,
        "full_text": "The Vaults is a cheap pub near Café Adriatic.",
        "references": ["The Vaults pub near Café Adriatic is cheap."],
        "tokens": TOKENS,
        "layers": layers,
        "confidences": [None if layer == NUM_LAYERS else 0.5 + layer / 20 for layer in layers],
        "differs": [2],
    }


def make_certificate(kind: str, curves: dict[str, tuple[float, ...]] = CURVES) -> dict[str, Any]:
    """A certificate of one of `KINDS`, as the plain values in results."""
    order, accepted, reason = KINDS[kind]
    table = [] if kind == "empty table" else ORDERS[order](curves, accepted)
    if kind == "nothing cheaper":
        table = [row | {"cost": 1.05} for row in table]
    if kind == "crc":
        table = [row | {"p_value": None} for row in table]
    passed = [row for row in table if row["accepted"] and not reason]
    chosen = min(passed, key=lambda row: row["cost"], default=None)
    certificate = Certificate(
        certified=chosen is not None,
        reason=reason,
        name=chosen["name"] if chosen else "full depth",
        setting=_setting(chosen) if chosen else {"early_exit": False},
        loss=RiskTarget(0.02, "rougeL_drop").described(),
        target=0.02,
        delta=None if kind == "crc" else 0.1,
        method="crc" if kind == "crc" else "ltt",
        bound=None if kind == "crc" else "wsr",
        n=219,
        unit="group of inputs" if kind == "groups" else "input",
        risk=chosen and {name: chosen[name] for name in ("mean", "upper_bound", "p_value", "cost")},
        cost={"name": "time", "unit": "of stock's time, batch 1"},
        search={
            "order": order,
            "curves": 2 if order == "threshold" else 1,
            "candidates": sum(map(len, curves.values())),
        },
        table=table,
        split={"counts": {"select": 109, "calibrate": 219, "report": 219}, "hashes": {}},
        data={"name": "validation.csv", "fingerprint": "cd" * 32, "max_source_tokens": None},
        weights="ab" * 32,
        generation=_generation(chosen),
        versions={"hf_earlyexit": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"},
        created="2026-11-25",
        report=chosen and {"n": 219, "mean": 0.01, "low": 0.002, "high": 0.018, "mean_layers": 4.6, "cost": 0.6},
    )
    return asdict(certificate)


def _setting(row: dict[str, Any]) -> dict[str, Any]:
    criterion, _, layers = row["curve"].partition(":")
    exits = {"exit_layers": [int(layer) for layer in layers.split(",")]} if layers else {}
    return {"exit_criterion": criterion, **exits, "exit_threshold": row["threshold"]}


def _generation(chosen: dict[str, Any] | None) -> dict[str, Any]:
    setting = _setting(chosen) if chosen else {"exit_criterion": "softmax", "exit_threshold": 0.9}
    return {
        "exit_criterion": setting["exit_criterion"],
        "exit_threshold": setting["exit_threshold"],
        "exit_schedule": "constant",
        "exit_points": setting.get("exit_layers", list(range(1, NUM_LAYERS))),
        "batch_exit": "row",
        "batch_size": None,
        "max_new_tokens": 64,
        "dtype": "float32",
        "device": "cpu",
    }


def _one_chain(curves: dict[str, tuple[float, ...]], accepted: int) -> list[dict[str, Any]]:
    """Tests of all curves' settings as one chain, conservative ones first, each cheaper than the one before."""
    careful = [(curve, sorted(thresholds, reverse=True)) for curve, thresholds in curves.items()]
    most = max(map(len, curves.values()))
    chain = [(curve, own[place]) for place in range(most) for curve, own in careful if place < len(own)]
    return _tested(chain, accepted)


def _curve_by_curve(curves: dict[str, tuple[float, ...]], accepted: int) -> list[dict[str, Any]]:
    """Tests of the first two curves, each from its most conservative threshold on."""
    chains = [[(curve, threshold) for threshold in sorted(curves[curve], reverse=True)] for curve in [*curves][:2]]
    return [row for chain in chains for row in _tested(chain, accepted)]


def _tested(chain: list[tuple[str, float]], accepted: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{curve} {threshold:g}",
            "curve": curve,
            "threshold": threshold,
            "mean": 0.002 * place,
            "upper_bound": 0.002 * place + (0.012 if place < accepted else 0.022),
            "p_value": 0.01 if place < accepted else 0.4,
            "cost": 0.9 - 0.08 * place,
            "accepted": place < accepted,
        }
        for place, (curve, threshold) in enumerate(chain)
    ]


ORDERS = {"pareto": _one_chain, "threshold": _curve_by_curve}
# By kind: order of the tests, how many of a chain pass, and the reason why nothing is certified.
KINDS = {
    "certified": ("pareto", 4, ""),
    "certified, two curves": ("threshold", 2, ""),
    "nothing safe": ("pareto", 0, NONE_SAFE),
    "nothing cheaper": ("threshold", 2, NONE_FASTER),
    "empty table": ("pareto", 0, NONE_FASTER),
    "crc": ("pareto", 4, ""),
    "groups": ("pareto", 4, ""),
}
