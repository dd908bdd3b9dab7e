"""The oracle in a report, checked on values worked out by hand and on synthetic results."""

from __future__ import annotations

import json
import re

import pytest


pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from hf_earlyexit.evaluation.questions import curves
from hf_earlyexit.reports.oracle_report import oracle, oracle_reading, oracle_rows
from hf_earlyexit.reports.report import read_results, render
from tests.reports.pages import page_of
from tests.reports.results import make_results


def point(layers: float, agreement: float, threshold: float | None = None) -> dict:
    return {"layers": layers, "agreement": agreement, "threshold": threshold}


@pytest.fixture
def found() -> dict:
    everywhere = {"exit_layers": [1, 2], "first": {"layers": 2.0}, "stable": {"layers": 2.5}}
    some = {"exit_layers": [2], "first": {"layers": 3.0}, "stable": {"layers": 3.25}}
    return {
        "tokens": 100,
        "tied": 0.0,
        "rewritten": 0.0,
        "same_layer": [point(1, 0.5), point(2, 0.97), point(4, 1.0)],
        "oracles": {
            "1,2": everywhere | {"points": [point(2.0, 1.0), point(1.0, 0.9)]},
            "2": some | {"points": [point(3.0, 1.0), point(2.5, 0.9), point(2.0, 0.5)]},
        },
        "curves": {
            "state": {
                "exit_layers": [1, 2],
                "asked": [0.5],
                "points": [point(4, 1.0), point(3, 0.96, 0.9), point(2.5, 0.955, 0.7), point(2.0, 0.8, 0.5)],
            },
            "softmax:2": {"exit_layers": [2], "asked": [0.5], "points": [point(4, 1.0), point(2.5, 0.95, 0.5)]},
        },
    }


def test_rows_are_at_equal_agreement(found):
    """At 90, 95, 98 and 99 %, oracles are interpolated between corners and criteria take their cheapest threshold."""
    rows = {row["name"]: [cell["layers"] for cell in row["cells"]] for row in oracle_rows(found)}
    assert rows == {
        "oracle": pytest.approx([1.0, 1.5, 1.8, 1.9]),
        "oracle, asked at 2": pytest.approx([2.5, 2.75, 2.9, 2.95]),
        "always after the same layer": [2, 2, 4, 4],
        "state": [2.5, 2.5, 4, 4],
        "softmax:2": [2.5, 2.5, 4, 4],
    }
    cells = {row["name"]: row["cells"] for row in oracle_rows(found) if row["curve"]}
    assert [cell["threshold"] for cell in cells["state"]] == [0.7, 0.7, None, None]
    assert [cell["oracle"] for cell in cells["softmax:2"]] == pytest.approx([2.5, 2.75, 2.9, 2.95])


def test_sentences_say_what_was_found(found):
    bound, distance = oracle_reading({"oracle": found, "num_layers": 4})
    assert bound == (
        "Of 100 tokens of full depth, the first exit to make the same choice is after 2.00 of 4 layers in the mean, "
        "and all from 2.50 layers on make it."
    )
    assert distance == (
        "For 95 % of tokens to be full depth's, the layers per token are: state 2.50 (its oracle 1.50) and softmax:2 "
        "2.50 (its oracle 2.75)."
    )
    ties = oracle_reading({"oracle": found | {"tied": 0.02, "rewritten": 0.001}, "num_layers": 4})[-1]
    assert ties.startswith("At 2.00 % of tokens full depth's two best logits are equal") and "at 0.10 % full" in ties
    assert len(oracle_reading({"oracle": found | {"curves": {}}, "num_layers": 4})) == 1


def test_the_page_shows_the_table_and_says_what_it_is_not():
    results = make_results()
    source, words = render(results, {}), " ".join(page_of(results).words.split())
    assert "What it is not: a saving. All layers ran" in words and "How to read it: " in words
    assert all(sentence in words for sentence in oracle_reading(results))
    assert all(f'<th scope="row">{row["name"]}</th>' in source for row in oracle_rows(results["oracle"]))
    (cells,) = re.findall('<th scope="row">always after the same layer</th>(.*?)</tr>', source, re.DOTALL)
    assert re.findall(r">(\d\.\d\d)<", cells) == ["7.00", "8.00", "8.00", "8.00"]
    state = next(row["cells"][0] for row in oracle_rows(results["oracle"]) if row["name"] == "state")
    assert f"{state['layers']:.2f} from {state['threshold']:.3g}, +{state['layers'] - state['oracle']:.2f}" in words


def test_lines_are_the_points_in_the_colours_of_other_figures():
    results = make_results()
    figure = oracle(results)
    assert [panel.get_title() for panel in figure.axes] == ["all", "from 90 % on"]
    for panel in figure.axes:
        lines = {line.get_label(): line for line in panel.lines}
        for curve, one in results["oracle"]["curves"].items():
            assert list(lines[curve].get_xdata()) == [point["layers"] for point in one["points"]]
            assert list(lines[curve].get_ydata()) == [100 * point["agreement"] for point in one["points"]]
            marked = [one["points"][place]["threshold"] for place in lines[curve].get_markevery()]
            assert marked == one["asked"]
        corners = results["oracle"]["oracles"]["2,4,6"]["points"]
        assert list(lines["oracle, asked at 2,4,6"].get_xdata()) == [point["layers"] for point in corners]
        assert len({lines[curve].get_color() for curve in curves(results)}) == len(curves(results))


def test_results_from_before_the_oracle_are_read_and_shown(tmp_path):
    results = {name: value for name, value in make_results().items() if name != "oracle"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert oracle(read_results(path)) is None and oracle_reading(results) == []
    assert page_of(read_results(path)).words.count("Not measured.") > 0
