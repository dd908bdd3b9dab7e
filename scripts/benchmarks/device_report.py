"""Rows, ratios and tables of the device benchmark."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.device_models import FULL_DEPTH
from hf_earlyexit.common.machine import cpu_model


# Each entry: name of the ratio, contender, reference, and upper limits by (shape, rows). "fastest" is the fastest of
# ours at full depth; "full depth" is the same, timed again together with its exits.
RATIOS: tuple[tuple[str, str, str, dict[tuple[str, int], float]], ...] = (
    *((f"{kind} / whole step graph", kind, "whole step graph", {}) for kind in FULL_DEPTH[2:]),
    ("fastest / whole step graph", "fastest", "whole step graph", {("large", 1): 1.3, ("large", 8): 1.15}),
    *((f"{kind} / stock eager", kind, "stock eager", {}) for kind in FULL_DEPTH),
    ("fastest / stock eager", "fastest", "stock eager", {("large", 1): 0.5, ("large", 8): 0.5}),
    ("fastest / stock static + compile", "fastest", "stock static + compile", {}),
    ("fastest / floor", "fastest", "floor", {}),
    ("exit 1/4 / full depth", "exit 1/4", "full depth", {}),
    ("exit 1/2 / full depth", "exit 1/2", "full depth", {("large", 1): 0.62}),
    ("exit 3/4 / full depth", "exit 3/4", "full depth", {}),
    ("exit 1/2 / stock cut to 1/2", "exit 1/2", "stock cut to 1/2", {}),
    ("replay, rule row / full depth", "replay, rule row", "full depth", {}),
    ("replay, rule batch / full depth", "replay, rule batch", "full depth", {}),
    ("replay, rule row / stock eager", "replay, rule row", "stock eager", {}),
    ("classifier in vain / full depth", "classifier in vain", "full depth", {("large", 1): 1.10}),
    ("softmax in vain / full depth", "softmax in vain", "full depth", {}),
)
COUNTS = ("host_waits", "reads", "uploads", "kernel_launches", "graph_launches", "copy_launches", "kernels")


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and arguments, for the report."""
    found = {
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
    }
    if args.device == "cuda":
        found |= {"card": torch.cuda.get_device_name(), "driver": driver(), "capability": cuda_capability()}
    arguments = {name: value for name, value in vars(args).items() if name != "json_out"}
    return found | {"arguments": arguments}


def cuda_capability() -> str:
    return ".".join(map(str, torch.cuda.get_device_capability()))


def driver() -> str | None:
    """The driver's version; None if `nvidia-smi` does not report it."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


class Report:
    """The result, printed row by row and written after each row.

    Args:
        path: Path of the JSON file; None: no file is written.
        about: Values that are known before anything is measured.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path = path
        self.result: dict[str, Any] = {**about, "cells": {}, "rows": [], "ratios": []}
        print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)

    def add(self, shape: str, rows: int, name: str, status: str = "measured", **values: Any) -> None:
        """Add a row, replacing an earlier one with the same shape, batch size and name."""
        row = {"shape": shape, "batch": rows, "name": name, "status": status, **values}
        if (same := self.row(shape, rows, name)) is not None:
            self.result["rows"].remove(same)
        self.result["rows"].append(row)
        parts = [f"{shape:6} x{rows:<3} {name:32}"]
        if "ms_per_step" in values:
            parts.append(f"{values['ms_per_step']:9.3f} ms/step")
        if "iqr_ms" in values:
            parts.append(f"+-{values['iqr_ms']:.3f} of {values['rounds']}, {values['tokens_per_s']:.0f} tokens/s")
            parts.append(f"warm-up {values['warm_up_s']:.1f} s")
        if "mean_layers" in values:
            parts.append(f"{values['mean_layers']:.1f} layers")
        print(" ".join(parts) + ("" if status == "measured" else f" {status}"), flush=True)
        self.write()

    def add_counts(self, shape: str, rows: int, name: str, counts: dict[str, Any] | None) -> None:
        """Add counts per step to the row with the contender's times."""
        if self.row(shape, rows, name) is None:
            self.add(shape, rows, name, status="counted")
        self.row(shape, rows, name)["per_step"] = counts
        print(f"{shape:6} x{rows:<3} {name:32} per step: {counts}", flush=True)
        self.write()

    def note(self, shape: str, rows: int, **values: Any) -> None:
        self.result["cells"].setdefault(f"{shape} x{rows}", {}).update(values)

    def row(self, shape: str, rows: int, name: str) -> dict[str, Any] | None:
        asked = (shape, rows, name)
        found = (one for one in self.result["rows"] if (one["shape"], one["batch"], one["name"]) == asked)
        return next(found, None)

    def cells(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys((row["shape"], row["batch"]) for row in self.result["rows"]))

    def ratios(self) -> list[dict[str, Any]]:
        """All ratios whose two times were measured, whether limits are met or missed."""
        found = []
        for shape, rows in self.cells():
            fastest = self.result["cells"].get(f"{shape} x{rows}", {}).get("fastest")
            ms = {
                row["name"]: row["ms_per_step"]
                for row in self.result["rows"]
                if (row["shape"], row["batch"]) == (shape, rows) and "ms_per_step" in row
            }
            ms |= {"fastest": ms[fastest]} if fastest in ms else {}
            for name, above, below, limits in RATIOS:
                if above in ms and ms.get(below, 0) > 0:
                    ratio, limit = ms[above] / ms[below], limits.get((shape, rows))
                    verdict = "beside" if limit is None else "met" if ratio <= limit else "missed"
                    one = {"shape": shape, "batch": rows, "name": name, "ratio": ratio, "limit": limit}
                    found.append(one | {"verdict": verdict, "fastest": fastest})
        return found

    def write(self) -> None:
        """Write the JSON atomically: to a file beside it, which then replaces it."""
        if self.path is not None:
            self.result["ratios"] = self.ratios()
            beside = self.path.with_name(self.path.name + ".part")
            beside.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            beside.replace(self.path)

    # --- tables ----------------------------------------------------------------------------------------------------

    def print_tables(self) -> None:
        """Print short tables, so that the end of the output summarises the run."""
        cells, rows = self.cells(), self.result["rows"]
        heads = [f"{shape} {batch}" for shape, batch in cells]
        times = {(row["name"], f"{row['shape']} {row['batch']}"): time_text(row) for row in rows}
        print_table("ms per step", heads, list(dict.fromkeys(row["name"] for row in rows)), times)
        ratios = {
            (one["name"], f"{one['shape']} {one['batch']}"): f"{one['ratio']:.2f}" + MARKS[one["verdict"]]
            for one in self.ratios()
        }
        print_table("ratio (+ met, ! missed)", heads, [name for name, *_ in RATIOS], ratios)
        counted = [row for row in rows if isinstance(row.get("per_step"), dict)]
        counts = {
            (f"{row['name']}, {row['shape']} {row['batch']}", count): f"{row['per_step'][count]:.1f}"
            for row in counted
            for count in COUNTS
            if count in row["per_step"]
        }
        print_table("per step", COUNTS, [f"{row['name']}, {row['shape']} {row['batch']}" for row in counted], counts)
        for row in rows:
            if row["status"].startswith("failed"):
                print(f"{row['shape']} {row['batch']} {row['name']}: {row['status']}"[:200])
        print(f"{self.result.get('seconds')} s in all", flush=True)


MARKS = {"met": "+", "missed": "!", "beside": ""}


def time_text(row: dict[str, Any]) -> str:
    return f"{row['ms_per_step']:.2f}" if "ms_per_step" in row else row["status"][:7]


def print_table(title: str, columns: Any, names: list[str], cells: dict[tuple[str, str], str]) -> None:
    """Print a table of the names that have at least one cell."""
    names = [name for name in names if any((name, column) in cells for column in columns)]
    if names:
        print(f"\n{title:34}" + "".join(f"{column:>16}" if len(column) > 9 else f"{column:>10}" for column in columns))
    for name in names:
        line = (cells.get((name, column), "").rjust(16 if len(column) > 9 else 10) for column in columns)
        print(f"{name:34}" + "".join(line))
