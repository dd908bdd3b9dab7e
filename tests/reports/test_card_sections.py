"""Model-card sections: a section replaces its predecessor, and its numbers are those of the results."""

from __future__ import annotations

from dataclasses import replace

from hf_earlyexit.evaluation.questions import full_depth, point_of
from hf_earlyexit.reports.card_sections import (
    PROMISE,
    WORTH,
    promise_section,
    with_section,
    worth_section,
    write_section,
)
from tests.certificates import certificate_for
from tests.reports.results import make_results
from tests.tiny import tiny_pair


CARD = "---\nlicense: mit\n---\n\n# Exits\n\nA T5.\n\n## How it was trained\n\n```bash\n# by hand\n```\n"
ROW = {"name": "softmax 0.5", "mean": 0.0123, "upper_bound": 0.0456, "p_value": None, "cost": 0.6, "accepted": True}


def test_a_section_takes_the_place_of_the_one_before_and_leaves_the_others():
    first = with_section(CARD, "What is promised", "Nothing.")
    assert first == f"{CARD}\n## What is promised\n\nNothing.\n"
    second = with_section(first, "What early exit is worth", "Little.\n")
    assert second == f"{first}\n## What early exit is worth\n\nLittle.\n"
    assert with_section(second, "What is promised", "All.") == second.replace("Nothing.", "All.")
    assert with_section(second, "How it was trained", "By others.") == second.replace(
        "```bash\n# by hand\n```", "By others."
    )
    assert with_section(first, "What is promised", "Nothing.") == first


def test_headings_without_blank_lines_at_the_start_and_at_the_end():
    assert with_section("## A\n## B\nb", "A", "a") == "## A\n\na\n\n## B\nb"
    assert with_section("# C\n\n## A\nold\n## B \t", "B", "b") == "# C\n\n## A\nold\n## B\n\nb\n"
    assert with_section("## AB\n\nab\n", "A", "a") == "## AB\n\nab\n\n## A\n\na\n"


def test_code_has_no_headings_and_a_title_ends_a_section():
    code = "```bash\n## A\n# by hand\n```\n"
    assert with_section(f"# T\n\n{code}", "A", "a") == f"# T\n\n{code}\n## A\n\na\n"
    assert with_section(f"## A\n\n{code}old\n# Other\n", "A", "a") == "## A\n\na\n\n# Other\n"


def test_a_section_is_taken_out():
    assert with_section("# T\n\n## A\n\na\n\n## B\n\nb\n", "A", None) == "# T\n\n## B\n\nb\n"
    assert with_section(CARD, "A", None) == CARD


def test_a_heading_in_a_sentence_is_none():
    card = f"{CARD}See ## What is promised below.\n"
    assert with_section(card, "What is promised", "All.") == f"{card}\n## What is promised\n\nAll.\n"


def test_the_promise_is_in_words_and_every_test_in_a_row():
    _, model = tiny_pair("untied", 0)
    certificate = certificate_for(model, {"exit_criterion": "softmax", "exit_threshold": 0.5})
    assert promise_section(certificate) == certificate.in_words()
    text = promise_section(replace(certificate, table=[ROW, ROW | {"p_value": 0.25, "accepted": False}]))
    assert text.startswith(f"{certificate.in_words()}\n\n| tested | mean loss | upper bound | p-value |")
    assert text.splitlines()[-2:] == [
        "| softmax 0.5 | 0.0123 | 0.0456 | - | 0.60 | yes |",
        "| softmax 0.5 | 0.0123 | 0.0456 | 0.25 | 0.60 | no |",
    ]
    nothing = promise_section(certificate_for(model, {}, certified=False))
    assert nothing.startswith("Nothing is promised of early exit")


def test_an_evaluation_has_a_row_for_each_setting_and_says_how_it_was_measured():
    results = make_results(sizes=(1, 8))
    text = worth_section(results)
    words, table, measured = text.split("\n\n")
    assert "fastest setting that stays within 2 points" in words
    header, _, *rows = table.splitlines()
    assert header == "|  | layers | ROUGE-L (95 %) | as full depth | time, batch 1 | time, batch 8 |"
    assert len(rows) == len(results["quality"])
    score = full_depth(results)["scores"]["rougeL"]
    assert rows[0].startswith(f"| full depth | 8.00 | {score['mean']:.1f} ({score['low']:.1f} to {score['high']:.1f})")
    cells = {(cell["quality"], cell["batch_size"]): point_of(results, cell) for cell in results["cells"]}
    times = {key: f"{point.ratio:.2f}x ± {point.spread:.2f}" for key, point in cells.items()}
    row = next(row for row in rows if row.startswith("| softmax:2,4,6 0.5 |"))
    assert row.endswith(f"| {times['softmax:2,4,6 0.5', 1]} | {times['softmax:2,4,6 0.5', 8]} |")
    quality, wanted = results["quality"], ("softmax:2,4,6 0.5", 8)
    key = next(key for key, one in quality.items() if (one["name"], one["batch_size"]) == wanted)
    waiting = rows[list(quality).index(key)]
    assert waiting.startswith("| softmax:2,4,6 0.5, batch |") and waiting.endswith(f"|  | {times[key, 8]} |")
    assert "24 inputs of validation.csv, at most 64 new tokens, float32." in measured
    assert f"medians of {results['asked']['rounds']} batches by the CPU clock" in measured
    assert measured.endswith("2026-11-25; cpu A <fast> one & two cores, cores 2, torch 2.13.0+cpu.")


def test_a_card_file_is_written_once_each(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(CARD)
    for body in ("One.", "Two."):
        write_section(card, WORTH, body)
        write_section(card, PROMISE, body)
    text = card.read_text()
    assert text.count("\n## ") == 3 and "One." not in text and text.count("Two.") == 2 and text.startswith(CARD)
