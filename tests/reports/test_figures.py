"""Figures of an evaluation: their data, nothing covered or cut off, readable colours."""

from __future__ import annotations

import re

import pytest


pytest.importorskip("matplotlib")

from hf_earlyexit.reports.figures import FIGURES, layer_colour, layers_run, quality_time
from tests.reports.results import make_results


@pytest.mark.parametrize("name", FIGURES)
def test_no_legend_covers_data_and_no_data_is_cut_off(name):
    figure = FIGURES[name](make_results())
    figure.draw_without_rendering()
    panels = [panel for panel in figure.axes if panel.get_visible()]
    for legend in figure.legends:
        others = [other.get_window_extent() for other in (*panels, *figure.texts)]
        assert others and not any(legend.get_window_extent().overlaps(other) for other in others)
    for panel in panels:
        bottom, top = panel.get_ylim()
        highest = [max(line.get_ydata()) for line in panel.lines if line.get_marker() != "None"]
        assert all(bottom <= value <= top for value in highest)


def test_figures_without_data_are_none():
    bare = make_results(certificate=None, sizes=(4,), curves={}) | {"reliability": {}, "oracle": None, "examples": []}
    assert {name for name, draw in FIGURES.items() if draw(bare) is not None} == {"quality_time", "quality_layers"}
    assert {name for name, draw in FIGURES.items() if draw(bare | {"cells": []}) is not None} == set()


def test_lines_are_the_curves_at_the_batch_size_of_their_panel():
    results = make_results()
    panel = quality_time(results).axes[1]
    assert panel.get_title() == "batch size 8"
    lines = {container.get_label(): container[0] for container in panel.containers}
    for rule in ("row", "batch"):
        key = ("state", rule, 8)
        cells = [one for one in results["cells"] if (one["curve"], one["batch_exit"], one["batch_size"]) == key]
        scores = [results["quality"][one["quality"]]["scores"]["rougeL"]["mean"] for one in cells]
        assert list(lines[f"state, {rule}"].get_xdata()) == [one["time"]["ratio"]["cpu"]["median"] for one in cells]
        assert list(lines[f"state, {rule}"].get_ydata()) == scores


def test_times_are_by_the_clock_that_was_asked_for_and_axes_name_it():
    results = make_results()
    assert "CPU clock" in quality_time(results).get_supxlabel()
    results["asked"]["clock"] = "wall"
    figure = quality_time(results)
    lines = {container.get_label(): container[0] for container in figure.axes[0].containers}
    key = ("state", "row", 1)
    cells = [one for one in results["cells"] if (one["curve"], one["batch_exit"], one["batch_size"]) == key]
    wall = [one["time"]["ratio"]["wall"]["median"] for one in cells]
    assert list(lines["state, row"].get_xdata()) == wall and "wall clock" in figure.get_supxlabel()
    assert all("wall clock" in FIGURES[name](make_results()).get_supylabel() for name in ("latency", "throughput"))


def test_every_lowest_panel_has_numbers_on_its_axis():
    panels = quality_time(make_results(sizes=(1, 4, 8))).axes
    shown = [any(label.get_visible() for label in panel.get_xticklabels()) for panel in panels if panel.get_visible()]
    assert shown == [False, True, True]


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("num_layers", (2, 3, 8, 24))
def test_letters_stand_out_on_the_colour_of_every_layer(num_layers):
    colours = [layer_colour(layer, num_layers) for layer in range(1, num_layers)]
    red, blue = ([int(colour[start : start + 2], 16) for colour in colours] for start in (1, 5))
    assert red[0] < blue[0] and (num_layers == 2 or red[-1] > blue[-1])
    assert len(set(colours)) == num_layers - 1 and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert min((luminance(colour) + 0.05) / (luminance("#14181c") + 0.05) for colour in colours) > 4.5


def test_histograms_are_of_the_certified_setting_the_texts_and_the_fastest_of_each_curve():
    results = make_results()
    results["examples"][0]["name"] = "state 0.93"
    names = [panel.get_title().partition("\n")[0] for panel in layers_run(results).axes]
    assert names[:2] == ["softmax:2,4,6 0.5", "state 0.93"]
    assert {name.partition(" ")[0] for name in names[2:]} == {"state", "classifier"}
    heights = [bar.get_height() for bar in layers_run(results).axes[0].patches]
    assert heights == results["quality"]["softmax:2,4,6 0.5"]["distribution"]
