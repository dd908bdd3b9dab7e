"""Quality metrics of generated texts, against references and against the full-depth texts.

Works on texts only, independent of models, exits and costs. Every metric that is a mean over inputs also has a
function for the score of one input, for resampling and calibration; corpus BLEU has none. Nothing is downloaded, and a
metric in one process leaves no files on disk.

    Rouge().compute(predictions=["a cat sat"], references=[["the cat sat", "a cat was sitting"]])
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any, Protocol

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

from hf_earlyexit.common.extras import require


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class Tokenizer(Protocol):
    """Splits a text into the words that are compared; tokenizers of Transformers qualify."""

    def tokenize(self, text: str) -> list[str]: ...


def rouge_scores(
    prediction: str, references: str | Sequence[str], *, use_stemmer: bool = False, tokenizer: Tokenizer | None = None
) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one text (Lin, 2004, as in the `rouge_score` package).

    Args:
        prediction: The generated text.
        references: One text or several. Each ROUGE type uses its best reference.
        use_stemmer: Whether words are reduced to their Porter stems first.
        tokenizer: Splits texts into words. Without it, words are runs of a-z and 0-9 in the lower-cased text, so other
            scripts score 0 and accented letters split words.

    Returns:
        F-measures in [0, 1], by the names in `ROUGE_TYPES`.

    Raises:
        ValueError: A value is not a text, there is no reference, or both a stemmer and a tokenizer are given.
    """
    _check_text("prediction", prediction)
    references = _read_references("references", references)
    scorer = _make_scorer(ROUGE_TYPES, use_stemmer, tokenizer)
    best = scorer.score_multi(references, prediction)
    return {name: float(best[name].fmeasure) for name in ROUGE_TYPES}


def textual_consistency(prediction: str, full_depth: str, *, tokenizer: Tokenizer | None = None) -> float:
    """ROUGE-L F-measure between the early-exit text and the full-depth text of the same input, in [0, 1].

    1 minus this is a dissimilarity, the quantity that CALM's textual consistency bounds (arXiv 2207.07061, section 4).
    It is symmetric and needs no human reference. Texts that are equal up to surrounding whitespace score 1, even where
    ROUGE-L finds no words in them: two empty texts, or other scripts.

    Args:
        prediction: The early-exit text.
        full_depth: The text that the same model writes at full depth.
        tokenizer: As in `rouge_scores`.

    Raises:
        ValueError: One of them is not a text.
    """
    _check_text("prediction", prediction)
    _check_text("full_depth", full_depth)
    if prediction.strip() == full_depth.strip():
        return 1.0
    scorer = _make_scorer(["rougeL"], False, tokenizer)
    return float(scorer.score(full_depth, prediction)["rougeL"].fmeasure)


def exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if a text equals one of its references up to surrounding whitespace, else 0.0. Case and punctuation count.

    Raises:
        ValueError: A value is not a text, or there is no reference.
    """
    _check_text("prediction", prediction)
    references = _read_references("references", references)
    return float(prediction.strip() in [reference.strip() for reference in references])


class TextMetric(evaluate.Metric):
    """Base class of the metrics: reads texts, and refuses bad input before any work.

    Args:
        settings: Settings of `evaluate.Metric`. In one process all data is kept in memory unless
            `keep_in_memory=False`.
    """

    has_several_references = True

    def __init__(self, **settings: Any):
        in_memory = settings.get("num_process", 1) == 1
        super().__init__(**{"keep_in_memory": in_memory, **settings})

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        one = datasets.Features({"predictions": text, "references": text})
        several = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)) or "",
            citation="",
            features=[several, one] if self.has_several_references else one,
        )

    def _build_data_dir(self) -> str:
        # `evaluate` creates this folder in the user's cache even for a metric that never writes to it.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float] | None:
        """Score these texts and those added before.

        Args:
            predictions: The generated texts, one for each distinct input.
            references: The references of each prediction: one text, or a list if the metric takes several. Their
                number may vary.
            options: Options of the metric.

        Raises:
            ValueError: There is nothing to score, the numbers differ, an input has no reference, or a value is not a
                text. The message says which.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if len(self) == 0:
            raise ValueError("`predictions` and `references` must be given, here or with `add_batch`, got none.")
        return super().compute(**options)

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Add generated texts and their references, as in `compute`. A batch with an error is not added."""
        predictions, references = _read_list("predictions", predictions), _read_list("references", references)
        if len(predictions) != len(references):
            raise ValueError(
                f"`predictions` and `references` must have one entry for each input, got {len(predictions)} and "
                f"{len(references)}: give the references of one prediction as a list of their own."
            )
        for place, prediction in enumerate(predictions):
            _check_text(f"predictions[{place}]", prediction)
        references = [self._read_reference(f"references[{place}]", one) for place, one in enumerate(references)]
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction: Any = None, reference: Any = None, **named: Any) -> None:
        """Add one generated text and its reference or references."""
        # `evaluate.combine` passes them under the names of `add_batch`.
        one = {"predictions": prediction, "references": reference, **named}
        self.add_batch(**{name: [value] for name, value in one.items()})

    def _read_reference(self, name: str, reference: Any) -> Any:
        return _read_references(name, reference)


class Rouge(TextMetric):
    """Mean over inputs of ROUGE-1, ROUGE-2 and ROUGE-L: `rouge1`, `rouge2` and `rougeL`, F-measures in [0, 1].

    The score of an input is the maximum over its references, for each ROUGE type. See `rouge_scores`, also for the
    options `use_stemmer` and `tokenizer` of `compute`.
    """

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[list[str]],
        use_stemmer: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> dict[str, float]:
        scores = [
            rouge_scores(prediction, its_references, use_stemmer=use_stemmer, tokenizer=tokenizer)
            for prediction, its_references in zip(predictions, references, strict=True)
        ]
        return {name: fmean(score[name] for score in scores) for name in ROUGE_TYPES}


class TextualConsistency(TextMetric):
    """Mean over inputs of `textual_consistency` between early-exit and full-depth texts, in [0, 1].

    The references are the full-depth texts, one for each input. See `textual_consistency`, also for the option
    `tokenizer` of `compute`.
    """

    has_several_references = False

    def _compute(
        self, *, predictions: list[str], references: list[str], tokenizer: Tokenizer | None = None
    ) -> dict[str, float]:
        scores = [
            textual_consistency(*pair, tokenizer=tokenizer) for pair in zip(predictions, references, strict=True)
        ]
        return {"textual_consistency": fmean(scores)}

    def _read_reference(self, name: str, reference: Any) -> str:
        _check_text(name, reference)
        return reference


class ExactMatch(TextMetric):
    """Share of the inputs whose text equals one of their references: `exact_match`, in [0, 1]."""

    def _compute(self, *, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return {"exact_match": fmean(exact_match(*pair) for pair in zip(predictions, references, strict=True))}


class Bleu(TextMetric):
    """Corpus BLEU (Papineni et al., 2002, as in sacreBLEU with its defaults): `bleu`, in [0, 100].

    It counts n-grams and lengths over the whole corpus, so it is not a mean of scores of inputs: to resample it,
    recompute it on each sample. The number of references may vary between inputs. The option `tokenize` of `compute`
    is the name of a sacreBLEU tokenizer; the default, "13a", does not split Chinese or Japanese.

    Raises:
        ImportError: sacreBLEU, which comes with the extra `metrics`, is not installed.
    """

    def __init__(self, **settings: Any):
        require("sacrebleu", "metrics")  # checked here too, to fail before hours of generating
        super().__init__(**settings)

    def _compute(
        self, *, predictions: list[str], references: list[list[str]], tokenize: str = "13a"
    ) -> dict[str, float]:
        # sacreBLEU takes the first reference of every input, then the second, and so on; None where one is missing.
        streams = list(zip_longest(*references))
        score = require("sacrebleu", "metrics").corpus_bleu(predictions, streams, tokenize=tokenize)
        return {"bleu": score.score}


METRICS: dict[str, type] = {
    "rouge": Rouge,
    "textual_consistency": TextualConsistency,
    "exact_match": ExactMatch,
    "bleu": Bleu,
}


def _make_scorer(names: Sequence[str], use_stemmer: bool, tokenizer: Tokenizer | None) -> RougeScorer:
    if use_stemmer and tokenizer is not None:
        raise ValueError(
            f"`use_stemmer=True` does not go with `tokenizer={reprlib.repr(tokenizer)}`, which has to do its own "
            "stemming: leave one of them out."
        )
    return RougeScorer(list(names), use_stemmer=use_stemmer, tokenizer=tokenizer)


def _read_list(name: str, values: Any) -> list[Any]:
    """The entries of an ordered collection, such as a list, a tuple, an array or a dataset's column."""
    if isinstance(values, (str, dict)) or not isinstance(values, Iterable):
        raise ValueError(f"`{name}` must be a list with an entry for each input, got {reprlib.repr(values)}.")
    values = list(values)
    if not values:
        raise ValueError(f"`{name}` must have an entry for each input, got []: give at least one input.")
    return values


def _read_references(name: str, references: Any) -> list[str]:
    """The references of one input as a list."""
    if isinstance(references, str):
        return [references]
    if isinstance(references, dict) or not isinstance(references, Iterable):
        raise ValueError(f"`{name}` must be a text or a list of texts, got {reprlib.repr(references)}.")
    references = list(references)
    if not references:
        raise ValueError(f"`{name}` must have at least one text, got []: leave an input without references out.")
    for place, reference in enumerate(references):
        _check_text(f"{name}[{place}]", reference)
    return references


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, got {reprlib.repr(value)}: pass decoded text, a single `str`.")
