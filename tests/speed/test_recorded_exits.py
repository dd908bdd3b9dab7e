"""Recorded exits are read as the package writes them, and malformed files are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_earlyexit.families.shipped import CHECKPOINT, default_exits
from hf_earlyexit.speed.recorded_exits import RecordedExits, read_exits


def written(tmp_path, *values):
    path = tmp_path / "exits"
    path.write_text("\n".join(map(json.dumps, values)) + "\n", encoding="utf-8")
    return path


def test_the_shipped_model_s():
    found = read_exits(CHECKPOINT / "exits.json")
    assert found.layers_run == default_exits()["layers_run"]
    assert (found.num_layers, found.exit_layers, found.criterion) == (8, (2, 4, 6), "softmax")
    found.check_against(8, (2, 4, 6))


def test_lines_of_the_verb_generate(tmp_path):
    lines = [{"input": "a", "layers_run": [2, 8]}, {"input": "b", "layers_run": [4]}]
    assert read_exits(written(tmp_path, *lines)) == RecordedExits([[2, 8], [4]])
    assert read_exits(written(tmp_path, lines[0])) == RecordedExits([[2, 8]])


def test_a_distribution_is_drawn_from(tmp_path):
    path = written(tmp_path, {"distribution": [0.5, 0.25, 0.25], "setting": {"exit_layers": [1, 2]}})
    found = read_exits(path)
    tokens = np.concatenate(found.layers_run)
    assert [(tokens == layer).mean() for layer in (1, 2, 3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert found.num_layers == 3 and found.exit_layers == (1, 2)
    assert read_exits(path, seed=0) == found != read_exits(path, seed=1)


@pytest.mark.parametrize(
    "values, message",
    (
        ([{"layers": [1]}], "it needs `layers_run`"),
        ([{"layers_run": []}], "it needs `layers_run`"),
        ([{"layers_run": [[1], []]}], "must list the layers of each token"),
        ([{"layers_run": [0, 2]}], "must list the layers of each token"),
        ([{"layers_run": [1]}, {"output": "x"}], "record 2: `layers_run` must list"),
        ([{"distribution": [0, 0]}], "`distribution` must list the share"),
        ([{"distribution": [0.5, 0.5], "num_layers": 3}], "has 2 shares for 3 layers"),
    ),
)
def test_what_is_neither_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        read_exits(written(tmp_path, *values))


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "exits"
    path.write_text('{"layers_run": [1]}\n{"layers_run"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_exits(path)


def test_exits_of_another_decoder_are_refused():
    with pytest.raises(ValueError, match="a decoder of 8 layers, this one has 6"):
        RecordedExits([[1]], 8).check_against(6, (1,))
    with pytest.raises(ValueError, match=r"left after \[3\].* --exit-layers"):
        RecordedExits([[1, 3, 6]]).check_against(6, (1, 2))


def test_inputs_of_an_object_go_with_its_texts(tmp_path):
    path = tmp_path / "exits.json"
    values = {"layers_run": [[2, 8], [4]], "num_layers": 8, "inputs": ["a", "b"]}
    path.write_text(json.dumps(values))
    assert read_exits(path, reads=lambda record: record["input"] == "b").layers_run == [[4]]
    assert read_exits(path).layers_run == [[2, 8], [4]]
    with pytest.raises(ValueError, match="has 2 records, all of inputs in other parts"):
        read_exits(path, reads=lambda record: False)
    for inputs in (["a"], "ab", ["a", 1], {}):
        path.write_text(json.dumps({**values, "inputs": inputs}))
        with pytest.raises(ValueError, match="`inputs` must list the input of each text"):
            read_exits(path)
