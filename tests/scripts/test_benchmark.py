"""The benchmark script runs, ends in one JSON line, and does the work it names. Counts are checked, times are not."""

from __future__ import annotations

import json

import pytest

from tests.scripts import SCRIPTS, run_script


@pytest.mark.once
def test_quick_run(tmp_path):
    run = run_script("benchmark.py", "--quick", "--no-ctranslate2", cwd=tmp_path)
    assert run.returncode == 0
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


@pytest.mark.once
def test_quick_grid_and_its_picture(tmp_path):
    """Replayed exits do the recorded work, every way to decode has its ratio to stock, and the plot is drawn."""
    results, png = tmp_path / "grid.json", tmp_path / "grid.png"
    chosen = ["--quick", "--cases", "grid,vain", "--batch", "2", "--only", "stock,plain,prepared", "--no-ctranslate2"]
    assert run_script("benchmark.py", *chosen, "--json-out", str(results), cwd=tmp_path).returncode == 0
    grid, vain = json.loads(results.read_text())["cases"]
    work = grid["work"]["prepared replay"]
    assert work["layer_rows"] == sorted(work["layer_rows"], reverse=True) and work["layer_rows"][0] == 2 * 8
    assert sum(work["head_rows"]) == 2 * 8 and sum(work["filled_positions"]) > 0
    bars = {bar["name"]: bar for bar in grid["bars"]}
    assert {"plain never / stock", "prepared exit after 1 / prepared cut to 1", "prepared replay / stock"} <= set(bars)
    assert bars["prepared exit after 2 / prepared cut to 2"]["limit"] == 1.15
    assert {bar["name"]: bar["limit"] for bar in vain["bars"]}["state / never"] == 1.05
    drawn = run_script("benchmark_plot.py", str(results), "--png", str(png), cwd=tmp_path)
    assert drawn.returncode == 0
    assert "| prepared never |" in drawn.stdout and png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.once
def test_quick_run_of_a_device(tmp_path):
    """On a CPU every way to decode is measured, ratios follow from times, and operations per step are counted."""
    results = tmp_path / "device.json"
    chosen = ["--device", "cpu", "--quick", "--batch", "1", "--json-out", str(results)]
    run = run_script("benchmark.py", *chosen, cwd=tmp_path)
    assert run.returncode == 0
    result = json.loads(results.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert all(row["status"] == "measured" for row in rows.values()), "nothing failed or was left out"
    assert {"stock eager", "plain", "prepared", "graphs", "graphs + compile", "exit 1/2", "floor"} <= set(rows)
    depths = {"exit 1/4": 1, "exit 1/2": 2, "exit 3/4": 3, "plain": 4, "softmax in vain": 4, "classifier in vain": 4}
    assert {name: rows[name]["mean_layers"] for name in depths} == depths
    launches = {name: rows[name]["per_step"]["kernel_launches"] for name in ("stock eager", "plain", "exit 1/4")}
    assert launches["exit 1/4"] < launches["plain"] and launches["stock eager"] > 0
    ratios = {one["name"]: one["ratio"] for one in result["ratios"]}
    expected = rows["exit 1/2"]["ms_per_step"] / rows["full depth"]["ms_per_step"]
    assert ratios["exit 1/2 / full depth"] == pytest.approx(expected)
    assert "ms per step" in run.stdout and result["bandwidth_bytes_per_s"] > 0


def test_counts_of_a_trace(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks.device_counts import counts_of_trace

    calls = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch", "cudaStreamSynchronize", "cudaMalloc"]
    events = [{"cat": "cuda_runtime", "name": name} for name in calls]
    events += [{"cat": "cuda_driver", "name": "cuLaunchKernel"}, {"cat": "kernel", "name": "gemm"}, {"ph": "M"}]
    events += [{"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)"}]
    expected = {"kernel_launches": 3, "graph_launches": 1, "host_waits": 1, "kernels": 1, "reads": 1}
    assert counts_of_trace(events) == expected
