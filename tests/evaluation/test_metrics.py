"""Quality metrics: values by hand, refused input, and no network or disk access."""

from __future__ import annotations

import socket
import sys
from math import exp, sqrt

import evaluate
import pytest

from hf_earlyexit.evaluation.metrics import (
    METRICS,
    Bleu,
    ExactMatch,
    Rouge,
    TextualConsistency,
    exact_match,
    rouge_scores,
    textual_consistency,
)


# Six words, "the" twice, five bigrams.
PREDICTION = "the cat sat on the mat"


class Characters:
    """A tokenizer that works for every script."""

    def tokenize(self, text):
        return list(text)


@pytest.mark.parametrize(
    "reference, expected",
    [
        # Four words: all in the prediction; "the cat" and "the mat" of three bigrams; "the cat the mat" in order.
        ("The cat, the mat!", [2 * 4 / 10, 2 * 2 / 8, 2 * 4 / 10]),
        # Four words: all in the prediction; "the mat" of three bigrams; "sat the mat" in order.
        ("sat the mat cat", [2 * 4 / 10, 2 * 1 / 8, 2 * 3 / 10]),
        # "the" counts once, as it is once in the reference.
        ("the dog", [2 * 1 / 8, 0.0, 2 * 1 / 8]),
        ("dogs run", [0.0, 0.0, 0.0]),
        ("", [0.0, 0.0, 0.0]),
    ],
)
def test_rouge_of_one_reference(reference, expected):
    assert list(rouge_scores(PREDICTION, reference).values()) == pytest.approx(expected)
    assert rouge_scores(PREDICTION, [reference]) == rouge_scores(PREDICTION, reference)
    result = Rouge().compute(predictions=[PREDICTION], references=[reference])
    assert list(result) == ["rouge1", "rouge2", "rougeL"] and list(result.values()) == pytest.approx(expected)


# The prediction backwards: all its words, none of its bigrams, and three words in order, such as "the on the".
BAG = "mat the on sat cat the"
# Five of the words, three of the bigrams ("sat on", "on the", "the mat"), and "sat on the mat" in order.
BIGRAMS = "sat on the mat, the dog"
# Eleven words, all six in order among them, and no bigram.
ORDER = "the big cat often sat there on all the red mat"


def test_each_rouge_type_takes_the_reference_that_is_best_for_it():
    by_type = {
        BAG: [1.0, 0.0, 2 * 3 / 12],
        BIGRAMS: [2 * 5 / 12, 2 * 3 / 10, 2 * 4 / 12],
        ORDER: [2 * 6 / 17, 0.0, 2 * 6 / 17],
    }
    for reference, expected in by_type.items():
        assert list(rouge_scores(PREDICTION, reference).values()) == pytest.approx(expected)
    for references in ([BAG, BIGRAMS, ORDER], [ORDER, BIGRAMS, BAG]):
        best = [1.0, 2 * 3 / 10, 2 * 6 / 17]
        assert list(rouge_scores(PREDICTION, references).values()) == pytest.approx(best)
        result = Rouge().compute(predictions=[PREDICTION], references=[references])
        assert list(result.values()) == pytest.approx(best)


def test_a_corpus_score_is_the_mean_over_predictions_of_the_maximum():
    predictions, references = ["a b", "c d"], [["a b", "x"], ["y", "c x", "z"]]
    result = Rouge().compute(predictions=predictions, references=references)
    assert result == pytest.approx({"rouge1": 0.75, "rouge2": 0.5, "rougeL": 0.75})


def test_stemming_and_tokenizers_are_asked_for():
    assert rouge_scores("cats running", "cat runs")["rouge1"] == 0.0
    assert rouge_scores("cats running", "cats runs", use_stemmer=True)["rouge1"] == 1.0
    assert rouge_scores("кот", "кот")["rouge1"] == 0.0
    assert rouge_scores("кот", "кит", tokenizer=Characters()) == pytest.approx(
        {"rouge1": 2 / 3, "rouge2": 0.0, "rougeL": 2 / 3}
    )
    assert textual_consistency("кот", "кит", tokenizer=Characters()) == pytest.approx(2 / 3)
    corpus = {"predictions": ["cats running", "кот"], "references": ["cats runs", "кит"]}
    assert Rouge().compute(**corpus, use_stemmer=True)["rougeL"] == 0.5
    assert Rouge().compute(**corpus, tokenizer=Characters())["rougeL"] > 0.6
    assert TextualConsistency().compute(**corpus, tokenizer=Characters())["textual_consistency"] > 0.6


CONSISTENCIES = [
    ("the cat the mat", PREDICTION, 0.8),
    ("sat the mat cat", PREDICTION, 0.6),
    (PREDICTION, PREDICTION, 1.0),
    ("", "", 1.0),
    ("", " \n", 1.0),
    ("", PREDICTION, 0.0),
    ("кот", " кот", 1.0),
    ("кот", "кит", 0.0),
]


@pytest.mark.parametrize("early, full, expected", CONSISTENCIES)
def test_textual_consistency(early, full, expected):
    assert textual_consistency(early, full) == pytest.approx(expected)
    assert textual_consistency(full, early) == pytest.approx(expected)


def test_textual_consistency_of_a_corpus_is_the_mean_over_inputs():
    early, full, expected = zip(*CONSISTENCIES)
    result = TextualConsistency().compute(predictions=early, references=full)
    assert result == {"textual_consistency": pytest.approx(sum(expected) / len(expected))}


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        (" Paris\n", "Paris", 1.0),
        ("Paris", ["London", "Paris "], 1.0),
        ("Paris", ["paris", "Paris."], 0.0),
        ("Paris", "in Paris", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match(prediction, references, expected):
    assert exact_match(prediction, references) == expected
    corpus = {"predictions": [prediction, "a", "b", "c"], "references": [references, "no", ["no"], ["no", "c"]]}
    assert ExactMatch().compute(**corpus) == {"exact_match": (expected + 1) / 4}


def test_bleu_counts_over_the_corpus_and_over_differing_numbers_of_references():
    pytest.importorskip("sacrebleu")
    # "a b d c" has its 4 words and 2 of 3 bigrams, "a b" and "b d", in the first and the last reference, and nothing
    # longer; the others have all. 11 words against 4, 5 and 5: a missing reference has no length either.
    predictions = ["a b d c", "p q r s t", "p q"]
    references = [["a b c d", "zz", "b d"], ["p q r s t"], "p q r s t"]
    precisions = (4 + 5 + 2) / 11 * (2 + 4 + 1) / 8 * (0 + 3) / 5 * (0 + 2) / 3
    expected = 100 * exp(1 - 14 / 11) * sqrt(sqrt(precisions))
    assert Bleu().compute(predictions=predictions, references=references) == {"bleu": pytest.approx(expected)}
    swapped = Bleu().compute(predictions=predictions[::-1], references=references[::-1])
    assert swapped["bleu"] == pytest.approx(expected)


def test_bleu_of_short_texts_pays_for_their_brevity():
    pytest.importorskip("sacrebleu")
    result = Bleu().compute(predictions=["a b c d"], references=["a b c d e f"])
    assert result["bleu"] == pytest.approx(100 * exp(1 - 6 / 4))
    chinese = {"predictions": ["今天天气很好"], "references": ["今天天气不好"]}
    assert Bleu().compute(**chinese)["bleu"] < 1 < Bleu().compute(**chinese, tokenize="char")["bleu"]


def test_bleu_without_sacrebleu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"needs `sacrebleu`: pip install hf-earlyexit\[metrics\]"):
        Bleu()
    assert Rouge().compute(predictions=["a"], references=["a"])["rouge1"] == 1.0


def make(name: str):
    if name == "bleu":
        pytest.importorskip("sacrebleu")
    return METRICS[name]()


def results_close(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[key] == pytest.approx(other[key]) for key in one)


@pytest.mark.parametrize("name", METRICS)
def test_batches_and_single_additions_score_as_one_corpus(name):
    several = METRICS[name].has_several_references
    predictions = ["a b c d e", "c d", "e f g h"]
    references = ["a b c d f", ["c", "c d"] if several else "d c", ["e f g h"] if several else "e f g h"]
    whole = make(name).compute(predictions=predictions, references=references)
    assert all(0 < value < 100 for value in whole.values())

    metric = make(name)
    for _ in range(2):  # a metric is reset after it has computed
        metric.add_batch(predictions=predictions[:1], references=references[:1])
        metric.add_batch(predictions=tuple(predictions[1:]), references=tuple(references[1:]))
        assert len(metric) == 3 and results_close(metric.compute(), whole)
    for prediction, reference in zip(predictions, references):
        metric.add(prediction=prediction, reference=reference)
    assert results_close(metric.compute(), whole)
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    assert results_close(metric.compute(predictions=predictions[2:], references=references[2:]), whole)


def test_metrics_combine():
    combined = evaluate.combine([Rouge(), ExactMatch()])
    combined.add(prediction="a b", reference="a b")
    combined.add_batch(predictions=["c d"], references=[["d e", "e f"]])
    assert combined.compute() == {"rouge1": 0.75, "rouge2": 0.5, "rougeL": 0.75, "exact_match": 0.5}


BAD_CORPORA = [
    ({"predictions": [], "references": []}, r"`predictions` must have an entry for each input, got \[\]"),
    ({}, "`predictions` and `references` must be given, .* got none"),
    ({"predictions": ["a"]}, "`references` must be a list with an entry for each input, got None"),
    ({"references": ["a"]}, "`predictions` must be a list with an entry for each input, got None"),
    ({"predictions": "a", "references": ["a"]}, "`predictions` must be a list .* got 'a'"),
    ({"predictions": ["a", "b"], "references": ["a"]}, "must have one entry for each input, got 2 and 1: give"),
    ({"predictions": ["a", None], "references": ["a", "b"]}, r"`predictions\[1\]` must be a text, got None: pass"),
    ({"predictions": ["a", ["b"]], "references": ["a", "b"]}, r"`predictions\[1\]` must be a text, got \['b'\]"),
]
BAD_SEVERAL = [
    (
        {"predictions": ["a", "b"], "references": [["a"], []]},
        r"`references\[1\]` must have at least one text, got \[\]",
    ),
    ({"predictions": ["a"], "references": [["b", 3]]}, r"`references\[0\]\[1\]` must be a text, got 3"),
    (
        {"predictions": ["a", "b"], "references": ["a", 3]},
        r"`references\[1\]` must be a text or a list of texts, got 3",
    ),
]
BAD_SINGLE = [({"predictions": ["a"], "references": [["a"]]}, r"`references\[0\]` must be a text, got \['a'\]: pass")]


@pytest.mark.parametrize("name", METRICS)
def test_a_bad_corpus_is_refused_and_nothing_of_it_stays(name):
    metric = make(name)
    for corpus, message in BAD_CORPORA + (BAD_SEVERAL if metric.has_several_references else BAD_SINGLE):
        with pytest.raises(ValueError, match=message):
            metric.compute(**corpus)
        assert len(metric) == 0
    good = {"predictions": ["a b c d"], "references": ["a b c d"]}
    assert all(value == pytest.approx(100 if name == "bleu" else 1) for value in metric.compute(**good).values())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rouge_scores(None, "a"), "`prediction` must be a text, got None"),
        (lambda: rouge_scores("a", []), r"`references` must have at least one text, got \[\]: leave"),
        (lambda: rouge_scores("a", ["b", None]), r"`references\[1\]` must be a text, got None"),
        (lambda: rouge_scores("a", "a", use_stemmer=True, tokenizer=Characters()), "`use_stemmer=True` does not go"),
        (lambda: textual_consistency("a", ["a"]), r"`full_depth` must be a text, got \['a'\]"),
        (lambda: textual_consistency(["a"], "a"), r"`prediction` must be a text, got \['a'\]"),
        (lambda: exact_match("a", {}), r"`references` must be a text or a list of texts, got {}"),
        (lambda: exact_match(1, "1"), "`prediction` must be a text, got 1"),
    ],
)
def test_a_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", METRICS)
def test_neither_network_nor_disk_is_touched(name, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a metric has reached for the network")

    for verb in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, verb, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first, second = make(name), make(name)
    for metric in (first, second):
        metric.add_batch(predictions=["a b c d"], references=["a b c d"])
    assert first.compute() == second.compute()
    assert list(tmp_path.iterdir()) == []


def test_on_disk_is_there_for_who_asks(tmp_path):
    metric = Rouge(cache_dir=str(tmp_path), keep_in_memory=False)
    metric.add_batch(predictions=["a b"], references=[["a b", "c"]])
    assert list(tmp_path.rglob("*.arrow"))
    assert metric.compute()["rougeL"] == 1.0
    assert not Rouge(cache_dir=str(tmp_path), num_process=2).keep_in_memory
