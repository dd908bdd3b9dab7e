"""The certificate on a report's page: its promise, its limits, and the reason if nothing is certified."""

from __future__ import annotations

import re

import pytest


pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from tests.reports.pages import page_of
from tests.reports.results import make_results


def words_of(kind: str, **changes) -> str:
    results = make_results(kind)
    results["certificate"] |= changes
    return " ".join(page_of(results).words.split())


def test_a_certificate_says_what_it_promises_and_what_not():
    words = words_of("certified")
    assert (
        "With 90 % confidence over the draw of the 219 calibration inputs, the mean drop of ROUGE-L (best of the "
        "references) against full depth is at most 2 points on inputs like these, where softmax:2,4,6 0.5 is used."
    ) in words
    assert "On 219 further inputs that nothing was chosen on, the mean was 1.00 points (0.20 to 1.80)" in words
    assert "inputs of another kind" in words and "single texts may lose much more" in words
    assert "The cost, measured on the select part (cpu), is 0.66 of stock's time, batch 1." in words
    assert "the cost is of stock's time, batch 1, measured on the select part." in words
    assert "up to 10 in 100" in words and "certificate is about max" not in words and "Other " not in words


@pytest.mark.parametrize(
    "delta, sure, fails", ((0.001, "99.9", "0.1"), (0.025, "97.5", "2.5"), (1e-5, "99.999", "0.001"))
)
def test_confidence_is_never_rounded_up(delta, sure, fails):
    words = words_of("certified", delta=delta)
    assert f"With {sure} % confidence" in words and f"up to {fails} in 100" in words
    assert f"show with {sure} % confidence" in words_of("nothing safe", delta=delta)


def test_the_order_of_the_tests_is_told():
    chain, curves = words_of("certified"), words_of("certified, two curves")
    assert "One chain of settings of all curves, tested by ltt with the bound wsr, each at the full delta 0.1" in chain
    assert (
        "The 9 settings that were tested" in chain
        and "select part's, of 9 settings, less those that another beats" in chain
    )
    assert "shared" not in chain and "careful" not in chain
    assert "Each curve is walked from its most careful threshold on" in curves and "One chain" not in curves
    assert "The 6 settings that were tested" in curves and "delta 0.1 shared among 2 curves" in curves


NONE_SHOWN = (
    "Nothing was certified. No setting was shown to keep the target. For none of the 9 tested did 219 calibration"
)
PASSED = (
    "costs less than full depth. 4 of the 6 tested passed: 219 calibration inputs show with 90 % confidence that the"
)
UNTESTED = (
    "costs less than full depth. Of 9 settings looked at on the select part none was tested. What remains is full"
)


@pytest.mark.parametrize(
    "kind, said", (("nothing safe", NONE_SHOWN), ("nothing cheaper", PASSED), ("empty table", UNTESTED))
)
def test_what_was_not_certified_is_not_promised(kind, said):
    words = words_of(kind)
    assert said in words and ("For none of" in words) == (kind == "nothing safe")
    assert ("settings that were tested" in words) == (kind != "empty table")
    assert "What remains is full depth" in words and "What it does not promise" not in words
    assert "has a certificate" not in words and "further inputs" not in words


def test_an_expectation_is_no_confidence():
    words = words_of("crc")
    assert "In expectation, the drop of ROUGE-L" in words and "There is no confidence" in words
    assert "% confidence" not in words and "has a certificate" not in words and "delta" not in words
    assert "the mean over a batch of 8 inputs of the drop of ROUGE-L" in words_of("crc", unit="batch of 8 inputs")


def test_no_certificate_is_said():
    assert "No certificate. What follows was measured on these inputs" in page_of(make_results(None)).words


def test_a_promise_about_groups_is_none_about_inputs():
    words = words_of("groups")
    assert "calibration groups of inputs, the mean over groups of inputs of the drop of ROUGE-L (best" in words
    assert "2 points on groups of inputs like these" in words and "a group of inputs counts once" in words
    loss = {"description": "distance from full depth's text"}
    assert "the mean over batches of 8 inputs of the distance from full depth's text is at most" in words_of(
        "certified", unit="batch of 8 inputs", loss=loss
    )


@pytest.mark.parametrize("name, other", (("weights", "ef" * 32), ("max_new_tokens", 32), ("dtype", "bfloat16")))
def test_a_certificate_of_something_else_is_told(name, other):
    results = make_results("certified")
    results["asked"][name] = other
    assert re.findall(r"Other \w+\.", page_of(results).words) == [f"Other {name}."]
