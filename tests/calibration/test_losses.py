"""Losses: hand-computed values, ranges over all texts, and 0 for equal texts."""

from __future__ import annotations

import evaluate
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from hf_earlyexit.calibration.losses import LOSSES, Drop, Inconsistency, drop_of_metric, sentence_bleu, token_mismatch
from hf_earlyexit.evaluation.generate_texts import Text
from hf_earlyexit.evaluation.metrics import ExactMatch, TextMetric


def written(text: str, *tokens: int) -> Text:
    return Text(text, list(tokens), [1] * len(tokens))


EARLY, FULL = written("the cat sat", 5, 6, 7), written("the cat ran off", 5, 6, 8, 9)
REFERENCES = ("the cat sat on the mat", "it ran off")


@pytest.mark.parametrize(
    ("name", "expected"),
    (
        ("text_distance", 1 - 2 * 2 / 7),  # "the cat" of three words and four
        ("token_mismatch", 2 / 4),  # the third differs, the fourth is missing
        ("text_mismatch", 1),
        # Full depth matches the second reference best: two of three words ("ran off"), one of two bigrams. The early
        # text matches the first best: three of six words, two of five bigrams.
        ("rouge1_drop", 2 * 2 / (4 + 3) - 2 * 3 / (3 + 6)),
        ("rouge2_drop", 2 * 1 / (3 + 2) - 2 * 2 / (2 + 5)),
        ("rougeL_drop", 2 * 2 / (4 + 3) - 2 * 3 / (3 + 6)),
        ("exact_match_drop", 0),
    ),
)
def test_by_hand(name, expected):
    assert LOSSES[name].of(EARLY, FULL, REFERENCES) == pytest.approx(expected)


def test_tokens_by_hand():
    assert token_mismatch(written("", 1, 2, 3, 4, 5), written("", 1, 2)) == pytest.approx(3 / 5)
    assert token_mismatch(written(""), written("", 1)) == 1 and token_mismatch(written(""), written("")) == 0
    assert token_mismatch(written("", 2, 1), written("", 1, 2)) == 1, "a shift counts"


def test_bleu_by_hand():
    """All n-grams of the four words are in the reference, which is two words longer: exp(1 - 6/4).

    With two references the closer length counts.
    """
    brevity = 2.718281828459045 ** (1 - 6 / 4)
    assert sentence_bleu("the cat sat on", ["the cat sat on the mat"]) == pytest.approx(brevity)
    assert sentence_bleu("the cat sat on", ["the cat sat on the mat", "a b c d"]) == pytest.approx(1)
    early, full = written("the cat sat on"), written("the cat sat on the mat")
    assert LOSSES["bleu_drop"].of(early, full, ["the cat sat on the mat"]) == pytest.approx(1 - brevity)


def test_a_match_is_lost_or_won():
    loss, right, wrong = LOSSES["exact_match_drop"], written("it ran off"), written("It ran off")
    drops = [loss.of(*pair, REFERENCES) for pair in ((wrong, right), (right, wrong), (right, right))]
    assert drops == [1, -1, 0]
    clipped = Drop("exact_match_drop", "", loss.score, clipped=True)
    assert [clipped.of(*pair, REFERENCES) for pair in ((wrong, right), (right, wrong))] == [1, 0]
    assert (loss.lower, clipped.lower, loss.upper, clipped.upper) == (-1, 0, 1, 1)


def test_who_needs_references():
    needing = {name for name, loss in LOSSES.items() if loss.needs_references}
    assert needing == {"rouge1_drop", "rouge2_drop", "rougeL_drop", "bleu_drop", "exact_match_drop"}
    assert all(isinstance(loss, Drop if loss.needs_references else Inconsistency) for loss in LOSSES.values())
    assert all(loss.name == name and loss.description for name, loss in LOSSES.items())


words = some.lists(some.sampled_from(("the", "cat", "sat", "on", "a", "mat", "É", "!")), max_size=9).map(" ".join)
texts = some.builds(
    lambda text, tokens: written(text, *tokens), words | some.text(max_size=20), some.lists(some.integers(0, 3))
)
references = some.lists(words | some.text(max_size=20), min_size=1, max_size=3)
PERFECT, EMPTY = written("the cat sat on a mat", 1), written("")


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None)
@given(early=texts, full=texts, references=references)
@example(early=EMPTY, full=PERFECT, references=[PERFECT.text])
@example(early=PERFECT, full=EMPTY, references=[PERFECT.text])
def test_losses_are_within_their_range_and_0_for_equal_texts(name, early, full, references):
    loss = LOSSES[name]
    assert loss.lower <= loss.of(early, full, references) <= loss.upper
    assert loss.of(full, full, references) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_worst_is_the_upper_limit_and_the_best_the_lower(name):
    """No range is wider than necessary."""
    loss, other = LOSSES[name], written("dogs run", 2)
    references = [PERFECT.text]
    assert loss.of(other, PERFECT, references) == pytest.approx(loss.upper)
    best = loss.of(other if loss.lower == 0 else PERFECT, other, references)
    assert best == pytest.approx(loss.lower)


class Scores(TextMetric):
    """A metric that returns the result of a given function."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def _compute(self, *, predictions, references, **options):
        return self.found(predictions, references, **options)


def test_any_metric_of_the_library_is_a_loss():
    loss, right, wrong = drop_of_metric(ExactMatch(), "exact_match"), written("it ran off"), written("off")
    assert (loss.name, loss.lower, loss.upper, loss.needs_references) == ("exact_match_drop", -1, 1, True)
    assert "exact_match" in loss.description
    assert isinstance(ExactMatch(), evaluate.EvaluationModule)
    assert [loss.of(*pair, REFERENCES) for pair in ((wrong, right), (right, wrong), (wrong, wrong))] == [1, -1, 0]
    clipped = drop_of_metric(ExactMatch(), "exact_match", clipped=True)
    assert clipped.of(right, wrong, REFERENCES) == clipped.lower == 0


def test_a_metric_sees_one_text_with_all_its_references_and_its_options():
    seen = []
    metric = Scores(lambda *texts, **options: seen.append((*texts, options)) or {"f1": [25 * len(texts[0][0])]})
    loss = drop_of_metric(metric, "f1", scale=100, weight=2)
    assert loss.of(written("a"), written("abc"), REFERENCES) == pytest.approx((75 - 25) / 100)
    assert seen == [([text], [list(REFERENCES)], {"weight": 2}) for text in ("abc", "a")]


def test_metric_scores_are_checked():
    with pytest.raises(ValueError, match=r"`key='f1'` is not among the scores of exact_match: \['exact_match'\]"):
        drop_of_metric(ExactMatch(), "f1").of(EARLY, FULL, REFERENCES)
    for score, scale in ((1.5, 1), (-0.5, 1), (101, 100), (float("nan"), 1)):
        loss = drop_of_metric(Scores(lambda *_, score=score: {"s": score}), "s", scale=scale)
        with pytest.raises(
            ValueError, match=rf"`scale={scale}` does not fit scores: s is {score}, not in \[0, {scale}"
        ):
            loss.of(EARLY, FULL, REFERENCES)
    rounded = drop_of_metric(Scores(lambda texts, _: {"s": 100.00000000000004 * (texts == ["b"])}), "s", scale=100)
    assert rounded.of(written("a"), written("b"), REFERENCES) == 1
