"""The report of an evaluation: its sentences, that the page is self-contained, and that its figures show data."""

from __future__ import annotations

import copy
import html
import io
import json
import re
import shutil
import subprocess

import pytest


pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from matplotlib.image import imread

from hf_earlyexit.evaluation.questions import Choice, Point, choices
from hf_earlyexit.reports.figures import FIGURES, layer_colour
from hf_earlyexit.reports.report import best_of, fixed, read_results, render, signed, spans, summary, write_report
from tests.reports.pages import Page, page_of
from tests.reports.results import NUM_LAYERS, make_results


SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADINGS = ("What is promised", "Quality against time", "Quality against layers", "Is confidence worth its name?")
HEADINGS += ("How far is each criterion from what is possible?", "Latency and throughput", "Texts, token by token")
HEADINGS += ("Three open questions", "All cells", "How it was made")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(make_results(), folder / "report.html", folder / "png")


@pytest.fixture(scope="module")
def source(written):
    return written[0].read_text(encoding="utf-8")


# --- the page is self-contained -------------------------------------------------------------------------------------


def test_the_page_is_whole_and_asks_for_nothing(source):
    page = Page(source)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "http://" not in source and "https://" not in source and "@import" not in source and "url(" not in source
    sources = re.findall(r'\bsrc\s*=\s*"(.{22})', source)
    assert sources == ["data:image/png;base64,"] * len(FIGURES) and source.count("src=") == len(FIGURES)
    assert all(page.having("img", "alt")) and len(page.having("img", "alt")) == len(FIGURES)
    targets = page.having("a", "href")
    assert targets and {target.removeprefix("#") for target in targets} <= set(page.having("h2", "id"))


def test_what_others_wrote_is_escaped(source):
    assert "<script" not in source
    assert html.escape("describe: <script>alert(1)</script> & more") in source
    assert "A &lt;fast&gt; one &amp; two cores" in source


def test_every_section_is_there(source):
    words = Page(source).words
    assert tuple(re.findall("<h2.*?>(.*)</h2>", source)) == HEADINGS
    assert "None" not in words and "{{" not in source and "{%" not in source
    for made in ("abc1234", "2026-11-25", "2.13.0+cpu", "1, 8", "ab" * 32, "1.10 to 1.80, "):
        assert made in words


# --- figures --------------------------------------------------------------------------------------------------------


def test_every_figure_is_written_and_shows_something(written):
    assert [path.name for path in written] == ["report.html", *(f"{name}.png" for name in FIGURES)]
    for path in written[1:]:
        data = path.read_bytes()
        assert data.startswith(SIGNATURE)
        assert imread(io.BytesIO(data), format="png").std() > 0.05


def test_what_was_not_measured_is_said(tmp_path):
    bare = make_results(certificate=None, sizes=(4,), curves={}) | {"reliability": {}, "oracle": None, "examples": []}
    paths = write_report(bare, tmp_path / "report.html")
    assert paths == [tmp_path / "report.html"] and paths[0].read_text(encoding="utf-8").count("Not measured.") == 7


# --- the summary ----------------------------------------------------------------------------------------------------


def chosen(ratio: float, size: int = 1, difference: float = -1.5) -> Choice:
    return Choice("a", "row", size, Point("a 0.5", 0.5, ratio, 0.02, difference, 4.25))


def test_the_page_opens_with_the_best_setting_and_its_cost(source):
    results = make_results()
    best = best_of(choices(results)).point
    page = Page(source)
    assert f"is {best.name}" in page.words and f"{best.ratio:.2f}×" in page.words
    assert f"{signed(best.difference)}points of ROUGE-L" in page.words
    assert page.words.index(best.name) < page.words.index("What is promised")


def test_the_summary_is_honest():
    results = make_results(certificate=None)
    full = results["quality"]["full depth"]["scores"]["rougeL"]["mean"]
    faster = summary(results, [chosen(0.75), chosen(1.2, 8)])
    assert faster[0] == (
        "The fastest setting that stays within 2 points of full depth's ROUGE-L is a 0.5, one text at a time: it "
        f"takes 0.75 of stock's time by the CPU clock, runs 4.2 of 8 layers per token, and its ROUGE-L is "
        f"{full - 1.5:.1f}, 1.5 below full depth's {full:.1f}."
    )
    assert (
        faster[1]
        == "By batch size, the time of the best within the limit is 0.75 at 1 and 1.20 at 8 (slower than stock)."
    )
    assert faster[-1].endswith("; nothing is certified.")
    assert summary(make_results(), [chosen(0.75)])[-1].endswith("; the certificate is about softmax:2,4,6 0.5.")
    slower = summary(results, [chosen(1.01, 8)])[0]
    assert slower.startswith("Nothing that stays within 2 points of full depth's ROUGE-L is faster than stock Transf")
    assert (
        "in batches of 8, leaving by rule row: it takes 1.01 of stock's time by the CPU clock (which the spread"
        in slower
    )
    none = summary(results, [Choice("a", "row", 1, None), Choice("a", "row", 8, None)])
    assert none[0].startswith("No early-exit setting that was tried stays within 2 points")
    assert "By batch size" not in " ".join(none)
    some = summary(results, [chosen(0.75), Choice("a", "row", 8, None)])
    assert some[1].endswith("is 0.75 at 1; there is none at 8.")


def test_a_cut_decoder_that_is_faster_is_named():
    results = make_results()
    static = {one.batch_size: one.point for one in choices(results, ["static decoder"])}
    text = " ".join(summary(results, [chosen(0.1, 1), chosen(0.9, 8)]))
    assert f"cut to fewer layers is faster within the limit: {static[8].ratio:.2f} with 6 layers at 8." in text
    assert "is nowhere both within the limit and faster" in " ".join(
        summary(results, [chosen(0.1, 1), chosen(0.1, 8)])
    )
    results["cells"] = [cell for cell in results["cells"] if cell["curve"] != "static decoder"]
    assert "cut to fewer layers" not in " ".join(summary(results, [chosen(0.1)]))


def test_slower_cells_are_marked():
    results = make_results()
    slower = [cell for cell in results["cells"] if cell["time"]["ratio"]["cpu"]["median"] > 1]
    page = page_of(results)
    assert 0 < page.having("tr", "class").count("slower") == len(slower) < len(results["cells"])
    here = [sum(cell["batch_size"] == size for cell in slower) for size in (1, 8)]
    assert f"Batch size 1: 26 cells, {here[0]} slower than stock" in page.words
    assert f"Batch size 8: 26 cells, {here[1]} slower than stock" in page.words


def test_times_are_by_the_clock_that_was_asked_for():
    results = make_results()
    results["asked"]["clock"] = "wall"
    slower = [cell for cell in results["cells"] if cell["time"]["ratio"]["wall"]["median"] > 1]
    source = render(results, {})
    assert source.count('<tr class="slower">') == len(slower) and "CPU clock" not in source
    assert (
        "of stock&#39;s time by the wall clock, runs" in source and "took turns with ours, by the wall clock" in source
    )
    with pytest.raises(ValueError, match="by the clock 'sun', known are cpu, wall"):
        render(results | {"asked": {**results["asked"], "clock": "sun"}}, {})


def test_a_cell_says_what_was_measured():
    results = make_results()
    (cell,) = [one for one in results["cells"] if (one["name"], one["batch_size"]) == ("static decoder 4", 8)]
    quality, full = (results["quality"][name] for name in (cell["quality"], "full depth"))
    rouge, ours = quality["scores"]["rougeL"], cell["time"]["ours"]
    start = '<th scope="row">static decoder 4</th><td class="text">row</td>'
    rows = re.findall(f"{start}(.*?)</tr>", render(results, {}), re.DOTALL)
    cells = re.findall("<td.*?>(.*?)</td>", rows[1], re.DOTALL)
    values = [" ".join(re.sub("<[^>]*>", "", value).split()) for value in cells]
    assert values[:3] == [
        f"{cell['time']['ratio']['cpu']['median']:.2f} 0.04",
        "4.00",
        f"{rouge['mean']:.1f} {rouge['low']:.1f}–{rouge['high']:.1f}",
    ]
    work = [f"{sum(quality['work'][name]) / sum(full['work'][name]):.2f}" for name in ("layer_rows", "head_rows")]
    assert values[7:9] == work
    assert values[9] == f"{ours['tokens_per_second']:.0f}"
    assert values[11] == f"{ours['inter_token_ms']['median']:.1f} / {ours['inter_token_ms']['p95']:.1f}"


# --- texts, lengths -------------------------------------------------------------------------------------------------


def test_tokens_show_their_layer_and_what_full_depth_would_not_have_written():
    source = render(make_results(), {})
    tokens = source.partition('<p class="tokens">')[2].partition("</p>")[0]
    assert tokens.startswith(
        ' <span class="token layer-2" data-layer="2" title="left after layer 2 of 8, confidence 0.60">The'
    )
    assert re.sub("<[^>]*>", "", tokens) == " The Vault is a cheap pub near Café Adriatic.&lt;/s&gt;"
    assert tokens.count(" marked") == 1 and 'another token here">lt</span>' in tokens
    assert '<span class="token last" title="ran all 8 layers"> cheap' not in tokens and ">cheap</span>" in tokens
    styles = re.findall(r"\.layer-(\d) \{ background: (#\w{6}); \}", source)
    assert styles == [(str(layer), layer_colour(layer, NUM_LAYERS)) for layer in range(1, NUM_LAYERS)]
    legend = source.partition('<p class="legend">')[2].partition("</p>")[0]
    assert re.findall(r"layer-(\d)", legend) == [layer for layer, _ in styles]


def test_a_space_inside_a_token_stays():
    example = {"tokens": ["▁a▁b", "▁"], "layers": [1, 8], "confidences": [0.5, None], "differs": []}
    assert [(one["space"], one["text"]) for one in spans(example, 8)] == [(True, "a b"), (True, "")]


def test_thirds_come_with_their_number_of_inputs():
    page = page_of(make_results(count=24))
    assert len(re.findall(r"short \d+–\d+ tokens, n = \d+", page.words)) == 3
    assert "± " in page.words and "Tokens run " in page.words


def test_numbers_look_alike():
    assert [fixed(-1.25, 1), fixed(None), fixed(2, 2)] == ["−1.2", "–", "2.00"]
    assert [signed(0.04), signed(-3.0, 2), signed(None)] == ["+0.0", "−3.00", "–"]


# --- missing and invalid values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "without",
    (["reliability"], ["oracle"], ["examples"], ["certificate", "commit", "started"], ["reliability", "examples"]),
)
def test_a_page_without_some_sections(without):
    results = {name: value for name, value in make_results(sizes=(1,)).items() if name not in without}
    page = page_of(results)
    assert all(heading in page.words for heading in HEADINGS) and page.open == []
    missing = {name for name, draw in FIGURES.items() if draw(results) is None}
    assert missing == {"reliability", "oracle"} & set(without)


def test_a_page_of_one_rule_and_one_input_each_third():
    results = make_results(count=3, sizes=(4,))
    results["cells"] = [cell for cell in results["cells"] if cell["batch_exit"] == "row"]
    words = page_of(results).words
    assert "± –" in words and "Under rule batch" not in words


def test_results_are_read_back(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(make_results()), encoding="utf-8")
    assert read_results(path) == make_results()


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda results: "{", "is not JSON"),
        (lambda results: json.dumps([results]), "is no results file"),
        (lambda results: json.dumps({"cells": []}), "is no results file"),
        (lambda results: json.dumps(results | {"format": 2}), "format 2, known is 1"),
        (
            lambda results: json.dumps({"format": 1, "asked": {}}),
            "lack environment, num_layers, inputs, quality, cells",
        ),
        (lambda results: json.dumps(results | {"quality": {}}), "lack the quality of full depth"),
    ),
)
def test_other_files_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "other.json"
    path.write_text(change(make_results()), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)


def test_results_that_contradict_themselves_are_refused(tmp_path):
    shares = copy.deepcopy(make_results())
    own = shares["quality"]["full depth"]["per_input"]
    own["rougeL"] = [value / 100 for value in own["rougeL"]]
    with pytest.raises(ValueError, match="must be times 100"):
        write_report(shares, tmp_path / "report.html")
    lost = make_results()
    lost["cells"][0]["quality"] = "gone"
    with pytest.raises(ValueError, match="times of 'gone'"):
        write_report(lost, tmp_path / "report.html")


# --- in a browser ---------------------------------------------------------------------------------------------------


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: one of {', '.join(names)}")
    return found


def browse(page, *options: str, profile) -> str:
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", timeout=120).stdout


def test_a_browser_shows_the_page(written, tmp_path):
    shown = Page(browse(written[0], "--dump-dom", profile=tmp_path / "profile"))
    assert all(heading in shown.words for heading in HEADINGS)
    assert len(shown.having("img", "src")) == len(FIGURES)
    assert "alert(1)" in shown.words and "script" not in {tag for tag, _ in shown.tags}


def test_a_browser_draws_the_page(written, tmp_path):
    picture = tmp_path / "page.png"
    options = [f"--screenshot={picture}", "--window-size=1200,4000", "--hide-scrollbars"]
    browse(written[0], *options, profile=tmp_path / "profile")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (4000, 1200)
    # Every 500 rows of pixels have some variation, and the coloured lines of figures are present.
    assert all(stretch.std() > 0.02 for stretch in (pixels[start : start + 500] for start in range(0, 4000, 500)))
    assert ((pixels.max(axis=2) - pixels.min(axis=2)) > 0.4).sum() > 1000
