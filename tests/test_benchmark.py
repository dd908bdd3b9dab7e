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
