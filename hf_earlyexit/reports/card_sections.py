"""Model-card sections: the evaluation results of the exits, and the promise of their certificate.

Each section is generated from measured values and replaces the card's earlier section of the same title. Independent
of models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_earlyexit.common.json_text import decode
from hf_earlyexit.common.output_files import write_text
from hf_earlyexit.evaluation.questions import CLOCKS, Results, choices, clock, point_of
from hf_earlyexit.generation.certificate import Certificate
from hf_earlyexit.reports.report import fixed, summary
from hf_earlyexit.training.model_card import markdown_table


WORTH, PROMISE = "What early exit is worth", "What is promised"
ENVIRONMENT = ("cpu", "cores", "torch threads", "cuda", "hf_earlyexit", "transformers", "torch")  # those shown


def write_section(path: str | Path, title: str, body: str | None) -> None:
    """Write a section into a card's file (see `with_section`)."""
    card = Path(path)
    write_text(card, with_section(decode(card.read_bytes(), str(card)), title, body))


def with_section(card: str, title: str, body: str | None) -> str:
    """Return the card with this section; `body=None` removes the section.

    The section replaces the one with the same title, or is appended. A section ends at the next heading of level 1
    or 2.
    """
    section = "" if body is None else f"## {title}\n\n{body.strip()}\n"
    found = headings(card)
    start = next((place for place, heading in found if heading == f"## {title}"), None)
    if start is None:
        return f"{card.rstrip()}\n\n{section}" if section else card
    rest = card[next((place for place, _ in found if place > start), len(card)) :]
    return card[:start] + section + ("\n" if section and rest else "") + rest


def headings(card: str) -> list[tuple[int, str]]:
    """Headings of levels 1 and 2 outside code blocks, each with its offset in the text."""
    found, place, fenced = [], 0, False
    for line in card.splitlines(keepends=True):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and line.startswith(("# ", "## ")):
            found.append((place, line.rstrip()))
        place += len(line)
    return found


# --- what is promised -----------------------------------------------------------------------------------------------


def promise_section(certificate: Certificate) -> str:
    """The certificate in words, and a table of every setting that was tested."""
    words = certificate.in_words()
    header, rows = table_of_tests(certificate)
    return f"{words}\n\n{markdown_table(header, rows)}" if rows else words


def table_of_tests(certificate: Certificate) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The tests of a certificate in their order, as header and rows of a table."""
    header = ("tested", "mean loss", "upper bound", "p-value", certificate.cost["unit"], "keeps the target")
    rows = [
        (
            row["name"],
            f"{row['mean']:.4f}",
            f"{row['upper_bound']:.4f}",
            "-" if row["p_value"] is None else f"{row['p_value']:.3g}",
            f"{row['cost']:.2f}",
            "yes" if row["accepted"] else "no",
        )
        for row in certificate.table
    ]
    return header, rows


# --- what early exit is worth ---------------------------------------------------------------------------------------


def worth_section(results: Results) -> str:
    """Section about an evaluation: its summary, a row per setting, and how it was measured."""
    sizes = sorted({cell["batch_size"] for cell in results["cells"]})
    header = ["", "layers", "ROUGE-L (95 %)", "as full depth", *(f"time, batch {size}" for size in sizes)]
    rows = [_row(results, key, sizes) for key in results["quality"]]
    return "\n\n".join(
        [" ".join(summary(results, choices(results))), markdown_table(header, rows), _measured(results)]
    )


def _row(results: Results, key: str, sizes: list[int]) -> list[str]:
    """A setting's row. Under a batch rule other than `row`, its name includes the rule and it has one batch size."""
    quality = results["quality"][key]
    score, agreement = quality["scores"]["rougeL"], quality["scores"]["consistency"]["mean"]
    times = {cell["batch_size"]: _time(results, cell) for cell in results["cells"] if cell["quality"] == key}
    return [
        quality["name"] if quality["batch_exit"] == "row" else f"{quality['name']}, {quality['batch_exit']}",
        fixed(quality["mean_layers"]["mean"], 2),
        f"{fixed(score['mean'])} ({fixed(score['low'])} to {fixed(score['high'])})",
        fixed(agreement),
        *(times.get(size, "") for size in sizes),
    ]


def _time(results: Results, cell: dict[str, Any]) -> str:
    """Median time relative to stock, and half of its interquartile range."""
    point = point_of(results, cell)
    return f"{fixed(point.ratio, 2)}x ± {fixed(point.spread, 2)}"


def _measured(results: Results) -> str:
    """Sentences about inputs, conditions, machine and load of the measurement."""
    asked, here = results["asked"], results["environment"]
    loads = [cell["load"][0] for cell in results["cells"]]
    machine = ", ".join(f"{name} {here[name]}" for name in ENVIRONMENT if name in here)
    return (
        f"{results['inputs']['count']} inputs of {asked['data']}, at most {asked['max_new_tokens']} new tokens, "
        f"{asked['dtype']}. ROUGE-L and *as full depth*, which is ROUGE-L against full depth's text, are means over "
        "inputs; intervals are of resampled inputs, or of groups where inputs belong together. Times are "
        "`generate`'s, encoder included, over those of stock Transformers at full depth, taking turns: medians of "
        f"{asked['rounds']} batches by the {CLOCKS[clock(results)]} (in batches of 1, of {asked['rounds']} inputs), ± "
        f"half of the interquartile range; load average {fixed(min(loads))} to {fixed(max(loads))}. "
        f"{results['started']}; {machine}."
    )
