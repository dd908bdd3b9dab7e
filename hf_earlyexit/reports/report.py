"""The report of an evaluation: one self-contained HTML page, and its figures as PNG files.

The page embeds its figures, loads nothing external and needs no script. Every sentence with a number is generated from
the results. Independent of models. Figures are drawn by `reports/figures.py`; the analyses behind the questions on the
page are in `evaluation/questions.py`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_earlyexit.common.extras import require
from hf_earlyexit.common.json_text import read_json
from hf_earlyexit.common.output_files import write_text, written_beside
from hf_earlyexit.decoding.candidates import FULL_DEPTH, STATIC
from hf_earlyexit.evaluation.questions import (
    CLOCKS,
    Choice,
    Results,
    batch_reading,
    by_length,
    choices,
    clock,
    curves,
    full_depth,
    length_reading,
    listed,
    most_eager,
    thirds,
    time_ratio,
    tolerance,
)
from hf_earlyexit.generation.certificate import confidence, plural
from hf_earlyexit.reports.figures import FIGURES, layer_colour
from hf_earlyexit.reports.oracle_report import oracle_view


FORMAT = 1
NEEDED = ("asked", "environment", "num_layers", "inputs", "quality", "cells")
ASSETS = Path(__file__).parent.parent / "assets"
TEMPLATE = "report.html"
DPI = 200
SPACE, MINUS, NONE = "▁", "\N{MINUS SIGN}", "\N{EN DASH}"


# --- reading and writing --------------------------------------------------------------------------------------------


def read_results(path: str | Path) -> Results:
    """Read the results of an evaluation.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a results file, or has another format.
    """
    try:
        results = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Name the results.json of an evaluation.") from error
    if not isinstance(results, dict) or "format" not in results:
        raise ValueError(f"{path} is no results file: a JSON object with a `format` is expected.")
    try:
        check_results(results)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return results


def check_results(results: Results) -> None:
    """Check that a report can be made from these results.

    Raises:
        ValueError: Format or clock are unknown, something is missing, or the scores per input contradict the means.
    """
    if results.get("format") != FORMAT:
        raise ValueError(f"the results have format {results.get('format')!r}, known is {FORMAT}.")
    missing = [name for name in NEEDED if name not in results]
    if missing:
        raise ValueError(f"the results lack {', '.join(missing)}: run the evaluation to its end.")
    if all(one["curve"] != FULL_DEPTH for one in results["quality"].values()):
        raise ValueError(f"the results lack the quality of {FULL_DEPTH}, which all else is held against.")
    unknown = sorted({cell["quality"] for cell in results["cells"]} - set(results["quality"]))
    if unknown:
        raise ValueError(f"the results have times of {unknown[0]!r}, whose quality they lack.")
    clock(results)
    full = full_depth(results)
    mean, of_inputs = full["scores"]["rougeL"]["mean"], fmean(full["per_input"]["rougeL"])
    if abs(of_inputs - mean) > 0.01:
        raise ValueError(
            f"ROUGE-L of {FULL_DEPTH} is {mean:.3f} on the whole and {of_inputs:.3f} in the mean of its inputs: both "
            "must be times 100 and of the same inputs."
        )


def write_report(results: Results, html_path: str | Path, png_folder: str | Path | None = None) -> list[Path]:
    """Write the page, and each figure that has something to show.

    Args:
        results: As returned by `read_results`. Reliability, examples and certificate may be missing.
        html_path: Path of the page.
        png_folder: Folder for the figures as PNG files, created if needed. None: figures are in the page only.

    Returns:
        The files written, the page first.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
        ValueError: As `check_results`.
    """
    check_results(results)
    pictures = {name: _png(figure) for name, draw in FIGURES.items() if (figure := draw(results)) is not None}
    page = Path(html_path)
    write_text(page, render(results, pictures))
    if png_folder is None:
        return [page]
    folder = Path(png_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with written_beside(folder / f"{name}.png", "wb") as file:
            file.write(picture)
    return [page, *(folder / f"{name}.png" for name in pictures)]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def render(results: Results, pictures: dict[str, bytes]) -> str:
    """The page as HTML.

    Args:
        results: As returned by `read_results`.
        pictures: PNG files, by their names in `FIGURES`.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {one.__name__: one for one in (fixed, signed, plural, confidence, promise, refusal, walk)}
    inline = {name: _inline(picture) for name, picture in pictures.items()}
    return environment.get_template(TEMPLATE).render(view(results), pictures=inline)


def _inline(picture: bytes) -> dict[str, Any]:
    """A PNG file as embedded in the page: base64 data, and its size at 96 pixels per inch.

    The size in pixels is read from the PNG header.
    """
    width, height = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))
    return {
        "data": base64.b64encode(picture).decode(),
        "width": round(width * 96 / DPI),
        "height": round(height * 96 / DPI),
    }


# --- numbers --------------------------------------------------------------------------------------------------------


def fixed(value: float | None, digits: int = 1) -> str:
    """`value` with this many decimals; an en dash for None."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 1) -> str:
    """Like `fixed`, with a sign also for positive values."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


# --- the summary ----------------------------------------------------------------------------------------------------


def best_of(found: Iterable[Choice]) -> Choice | None:
    """The fastest choice within tolerance; None if there is none."""
    return min((one for one in found if one.point), key=lambda one: one.point.ratio, default=None)


def batches_of(size: int) -> str:
    """A batch size in words."""
    return "one text at a time" if size == 1 else f"in batches of {size}"


def summary(results: Results, found: Sequence[Choice]) -> list[str]:
    """The results in sentences: the best setting and its cost, other batch sizes, static decoders, a caution."""
    sizes = sorted({one.batch_size for one in found})
    by_size = {size: best_of(one for one in found if one.batch_size == size) for size in sizes}
    sentences = [_opening(results, best_of(found)), _size_sentence(by_size), _static_sentence(results, by_size)]
    return [*filter(None, sentences), _caution(results)]


def _opening(results: Results, best: Choice | None) -> str:
    limit = f"{tolerance(results):g} points of full depth's ROUGE-L"
    if best is None:
        return f"No early-exit setting that was tried stays within {limit}: there is none to recommend."
    point, full = best.point, full_depth(results)["scores"]["rougeL"]["mean"]
    rule = "" if best.batch_size == 1 else f", leaving by rule {best.batch_exit}"
    what = f"{point.name}, {batches_of(best.batch_size)}{rule}"
    if point.ratio < 1:
        start = f"The fastest setting that stays within {limit} is {what}: it takes"
    else:
        start = (
            f"Nothing that stays within {limit} is faster than stock Transformers. The least slow is {what}: it takes"
        )
    unsure = " (which the spread of the times hardly tells from 1)" if abs(point.ratio - 1) < point.spread else ""
    against = f"{abs(point.difference):.1f} {'below' if point.difference < 0 else 'above'} full depth's {full:.1f}"
    return (
        f"{start} {point.ratio:.2f} of stock's time by the {CLOCKS[clock(results)]}{unsure}, runs {point.layers:.1f} "
        f"of {results['num_layers']} layers per token, and its ROUGE-L is {full + point.difference:.1f}, {against}."
    )


def _size_sentence(by_size: dict[int, Choice | None]) -> str | None:
    points = {size: best.point for size, best in by_size.items() if best is not None}
    if len(by_size) < 2 or not points:
        return None
    parts = [
        f"{point.ratio:.2f} at {size}" + (" (slower than stock)" if point.ratio >= 1 else "")
        for size, point in points.items()
    ]
    nothing = [size for size, best in by_size.items() if best is None]
    end = f"; there is none at {listed(nothing)}" if nothing else ""
    return f"By batch size, the time of the best within the limit is {listed(parts)}{end}."


def _static_sentence(results: Results, by_size: dict[int, Choice | None]) -> str | None:
    """Whether a static decoder is faster within tolerance, which would make early exit pointless."""
    static = choices(results, [STATIC])
    if not static:
        return None
    times = {size: best.point.ratio for size, best in by_size.items() if best is not None}
    good = [one for one in static if one.point]
    faster = [one for one in good if one.point.ratio < times.get(one.batch_size, math.inf)]
    if not faster:
        return "A stock decoder that is simply cut to fewer layers is nowhere both within the limit and faster."
    parts = [f"{one.point.ratio:.2f} with {one.point.threshold:g} layers at {one.batch_size}" for one in faster]
    return f"A stock decoder that is simply cut to fewer layers is faster within the limit: {listed(parts)}."


def _caution(results: Results) -> str:
    certificate = results.get("certificate")
    about = f"the certificate is about {certificate['name']}" if certificate and certificate["certified"] else None
    return (
        f"The best was picked on the same {results['inputs']['count']} inputs that it is shown on, which flatters it "
        f"a little; {about or 'nothing is certified'}."
    )


# --- the certificate ------------------------------------------------------------------------------------------------


def promise(certificate: dict[str, Any]) -> str:
    """The loss, what it is a mean over, and the target: `mean drop of ... is at most 2.0 points`."""
    loss, unit = certificate["loss"]["description"], certificate["unit"]
    against, expected = "" if "full depth" in loss else " against full depth", certificate["delta"] is None
    if unit == "input":
        mean = "" if expected else "mean "
    else:
        mean = f"mean over {f'a {unit}' if expected else plural(unit)} of the "
    return f"{mean}{loss}{against} is at most {100 * certificate['target']:g} points"


def refusal(certificate: dict[str, Any]) -> str:
    """Why nothing is certified, and what that does not imply."""
    reason, rows, n = certificate["reason"], certificate["table"], certificate["n"]
    accepted, delta = sum(row["accepted"] for row in rows), certificate["delta"]
    by = f"{n} calibration {plural(certificate['unit'])}"
    sure = "in expectation" if delta is None else f"with {confidence(delta)} confidence"
    if not rows:
        what = f"Of {certificate['search']['candidates']} settings looked at on the select part none was tested."
    elif accepted:
        what = f"{accepted} of the {len(rows)} tested passed: {by} show {sure} that the {promise(certificate)}."
    else:
        what = (
            f"For none of the {len(rows)} tested did {by} show {sure} that the {promise(certificate)}. That is no "
            "proof that they all lose more: more inputs might show less."
        )
    return f"{reason[:1].upper()}{reason[1:]}. {what} What remains is full depth, which by definition loses nothing."


def walk(certificate: dict[str, Any]) -> str:
    """The order in which settings were tested, and the error level of each test."""
    search, delta = certificate["search"], certificate["delta"]
    by = certificate["method"] + ("" if delta is None else f" with the bound {certificate['bound']}")
    if search["order"] == "pareto":
        each = "" if delta is None else f", each at the full delta {delta:g}"
        return (
            f"One chain of settings of all curves, tested by {by}{each}, from the smallest loss to the smallest cost; "
            "the walk ends before the first that is not shown to be safe. The order is the select part's, of "
            f"{search['candidates']} settings, less those that another beats in both or full depth in cost."
        )
    curves = f"{search['curves']} curve{'s' if search['curves'] > 1 else ''}"
    shared = "" if delta is None else f", delta {delta:g} shared among {curves}"
    return (
        f"Each curve is walked from its most careful threshold on, by {by}{shared}; the walk ends before the first "
        f"that is not shown to be safe. On the select part {search['candidates']} settings were looked at, and "
        f"{curves} chosen."
    )


def notices(results: Results) -> list[tuple[str, str]]:
    """Differences between evaluation and certificate: each difference's name, and a sentence about it."""
    asked, certified = results["asked"], results["certificate"]["generation"]
    found = [] if asked["weights"] == results["certificate"]["weights"] else [("weights", "other weights than these")]
    found += [
        (name, f"{name} {certified.get(name)}, not {asked[name]}")
        for name in ("max_new_tokens", "dtype")
        if name in asked and asked[name] != certified.get(name)
    ]
    return [(name, f"The certificate is about {what}: it promises nothing for what follows.") for name, what in found]


# --- what the page shows --------------------------------------------------------------------------------------------


def view(results: Results) -> dict[str, Any]:
    """The values of the template."""
    found, num_layers = choices(results), results["num_layers"]
    sizes = sorted({cell["batch_size"] for cell in results["cells"]})
    criteria = curves(results)
    lengths = {
        "source": ("source_tokens", criteria, "inputs"),
        "static": ("full_depth_tokens", [STATIC], "outputs"),
        "output": ("full_depth_tokens", criteria, "outputs"),
    }
    return {
        "results": results,
        **{name: results.get(name) for name in ("certificate", "started", "commit")},
        "notices": notices(results) if results.get("certificate") else [],
        "clock": CLOCKS[clock(results)],
        "full": full_depth(results),
        "limit": tolerance(results),
        "best": best_of(found),
        "summary": summary(results, found),
        "sizes": sizes,
        "choices": choice_rows(found, sizes),
        "batch_reading": batch_reading(found),
        "lengths": {name: length_view(results, *asked) for name, asked in lengths.items()},
        "cells": {size: cell_rows(results, size) for size in sizes},
        "load": sorted(cell["load"][0] for cell in results["cells"]),
        "oracle": oracle_view(results),
        "colours": {layer: layer_colour(layer, num_layers) for layer in range(1, num_layers)},
        "examples": [{**one, "spans": spans(one, num_layers)} for one in results.get("examples", ())],
    }


def choice_rows(found: Sequence[Choice], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row per curve and rule, with its choice for each batch size; None where that was not measured."""
    by_key = {(one.curve, one.batch_exit, one.batch_size): one for one in found}
    return [
        {"curve": curve, "rule": rule, "choices": [by_key.get((curve, rule, size)) for size in sizes]}
        for curve, rule in dict.fromkeys((one.curve, one.batch_exit) for one in found)
    ]


def length_view(results: Results, lengths: str, asked: Sequence[str], what: str) -> dict[str, Any]:
    """Results by length: the thirds, the settings on each, and each third's most eager threshold within tolerance."""
    rows = by_length(results, lengths, asked)
    return {
        "thirds": thirds(results["inputs"][lengths]),
        "rows": rows,
        "eager": most_eager(rows, tolerance(results)),
        "reading": length_reading(rows, what),
    }


def cell_rows(results: Results, size: int) -> list[dict[str, Any]]:
    """Every cell of a batch size, with its quality and its work relative to full depth."""
    full = full_depth(results)["work"]
    rows = []
    for cell in results["cells"]:
        quality = results["quality"][cell["quality"]]
        work = {name: sum(quality["work"][name]) / sum(full[name]) for name in ("layer_rows", "head_rows")}
        if cell["batch_size"] == size:
            ratio = time_ratio(results, cell)
            rows.append({**cell, **work, "quality": quality, "ratio": ratio, "slower": ratio["median"] > 1})
    return rows


def spans(example: dict[str, Any], num_layers: int) -> list[dict[str, Any]]:
    """The tokens of an example for the page: leading space, text, layer, tooltip, and whether full depth differs."""
    columns = zip(example["tokens"], example["layers"], example["confidences"], strict=True)
    return [
        {
            "space": token.startswith(SPACE),
            "text": token.removeprefix(SPACE).replace(SPACE, " "),
            "layer": layer,
            "title": _title(layer, num_layers, confidence, place in example["differs"]),
            "marked": place in example["differs"],
        }
        for place, (token, layer, confidence) in enumerate(columns)
    ]


def _title(layer: int, num_layers: int, confidence: float | None, marked: bool) -> str:
    where = f"left after layer {layer} of {num_layers}" if layer < num_layers else f"ran all {num_layers} layers"
    sure = "" if confidence is None else f", confidence {confidence:.2f}"
    return where + sure + ("; full depth would have written another token here" if marked else "")
