"""The benchmark script runs, ends in one JSON line, and times what it says: counts are guarded here, seconds never."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parent.parent / "scripts/benchmark.py"


def test_quick_run():
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--no-ctranslate2"], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    layers = result["model"]["num_decoder_layers"]
    work = {case["name"]: case["work"] for case in result["cases"]}
    batch1 = next(calls for name, calls in work.items() if name.startswith("batch 1"))
    tokens = batch1["never"]["layer_rows"][0]
    assert batch1["never"]["layer_rows"] == [tokens] * layers
    assert batch1["exit after 2"]["layer_rows"] == [tokens] * 2 + [0] * (layers - 2)
    rows = next(calls for name, calls in work.items() if "k rows leave" in name)
    assert rows["k=7"]["layer_rows"] == [8 * tokens] + [tokens] * (layers - 1)
    assert all(bar["ratio"]["wall"]["median"] > 0 for case in result["cases"] for bar in case["bars"])
    assert "met" in run.stdout and "load" in run.stdout


def test_quick_grid_and_its_picture(tmp_path):
    """Replayed exits do the work that was recorded, every way to decode has its ratio to stock, and it is drawn."""
    results, png = tmp_path / "grid.json", tmp_path / "grid.png"
    chosen = ["--quick", "--cases", "grid,vain", "--batch", "2", "--only", "stock,plain,prepared", "--no-ctranslate2"]
    run = [sys.executable, str(SCRIPT), *chosen, "--json-out", str(results)]
    subprocess.run(run, capture_output=True, text=True, check=True)
    grid, vain = json.loads(results.read_text())["cases"]
    work = grid["work"]["prepared replay"]
    assert work["layer_rows"] == sorted(work["layer_rows"], reverse=True) and work["layer_rows"][0] == 2 * 8
    assert sum(work["head_rows"]) == 2 * 8 and sum(work["filled_positions"]) > 0
    bars = {bar["name"]: bar for bar in grid["bars"]}
    assert {"plain never / stock", "prepared exit after 1 / prepared cut to 1", "prepared replay / stock"} <= set(bars)
    assert bars["prepared exit after 2 / prepared cut to 2"]["limit"] == 1.15
    assert {bar["name"]: bar["limit"] for bar in vain["bars"]}["state / never"] == 1.05
    plot = SCRIPT.with_name("benchmark_plot.py")
    run = [sys.executable, str(plot), str(results), "--png", str(png)]
    drawn = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "| prepared never |" in drawn.stdout and png.read_bytes().startswith(b"\x89PNG")
