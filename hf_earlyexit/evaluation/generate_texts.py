"""Generate texts for many inputs with given exit settings: texts, tokens, layers run, and the work by layer.

Inputs are padded into batches in their order. Completed batches are kept in a journal, so an interrupted run can
resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_earlyexit.common.data import Example
from hf_earlyexit.common.journal import Journal
from hf_earlyexit.common.tokenizer import check_tokenizer
from hf_earlyexit.decoding.candidates import Candidate


WORK = ("layer_rows", "filled_positions", "head_rows")


@dataclass(frozen=True)
class Text:
    """The text generated for one input.

    Attributes:
        text: Without special tokens.
        tokens: The new ids, the end token included.
        layers_run: Layers run by each of these tokens.
    """

    text: str
    tokens: list[int]
    layers_run: list[int]


@dataclass(frozen=True)
class Generations:
    """The texts generated for all inputs, in their order, and the work executed for them, by layer."""

    texts: list[Text]
    work: dict[str, list[int]]


class TextGenerator:
    """Generates texts for inputs, batch by batch.

    Args:
        model: In eval mode, on its device.
        tokenizer: Of the model; it must have a padding token.
        batch_size: Inputs per batch.
        generation: Keywords of `generate` besides the exit settings, such as `max_new_tokens`.
        max_source_tokens: Longer inputs are truncated; None: never.
        journal: Keeps completed batches.

    Raises:
        ValueError: The tokenizer belongs to another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        generation: dict[str, Any] | None = None,
        max_source_tokens: int | None = None,
        journal: Journal | None = None,
    ):
        check_tokenizer(tokenizer, model.config, type(model).__name__)
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_source_tokens = batch_size, max_source_tokens
        self.generation = generation or {}
        self.journal = journal or Journal(None, {})

    def batches(self, examples: Sequence[Example], size: int | None = None) -> Iterator[dict[str, Any]]:
        """Padded batches of inputs in order, with the keywords of `generate` besides the exit settings."""
        size = size or self.batch_size
        for start in range(0, len(examples), size):
            texts = [example.source for example in examples[start : start + size]]
            cut = {"truncation": True, "max_length": self.max_source_tokens} if self.max_source_tokens else {}
            encoded = self.tokenizer(texts, return_tensors="pt", padding=True, **cut).to(self.model.device)
            yield {**encoded, **self.generation}

    def write(self, examples: Sequence[Example], candidate: Candidate, part: str) -> Generations:
        """Generate texts for all inputs with the candidate's settings.

        Args:
            examples: The inputs, in the same order in every run with this journal.
            candidate: The exit settings.
            part: The name of these inputs in the journal.
        """
        entries = []
        with tqdm(total=len(examples), desc=f"{part}: {candidate.name}", unit="input", leave=False) as progress:
            for number, batch in enumerate(self.batches(examples)):
                key = f"{part} | {candidate.name} | batch {number} of {self.batch_size}"
                if key not in self.journal:
                    self.journal.add(key, self._write_batch(batch, candidate))
                entries.append(self.journal[key])
                progress.update(len(batch["input_ids"]))
        texts = [Text(**text) for entry in entries for text in entry["texts"]]
        work = {
            name: [sum(counts) for counts in zip(*(entry["work"][name] for entry in entries), strict=True)]
            for name in WORK
        }
        return Generations(texts, work)

    def _write_batch(self, batch: dict[str, Any], candidate: Candidate) -> dict[str, Any]:
        """The texts and the work of one batch, as plain values."""
        output = self.model.generate(**batch, **candidate.keywords, return_dict_in_generate=True)
        if output.get("layers_run") is None:
            raise ValueError(
                "The model's generation_config has settings that early exit does not support: remove them there."
            )
        if len(output.sequences) != len(batch["input_ids"]):
            raise ValueError("`num_return_sequences` must be 1: quality is measured on one text per input.")
        texts = self.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        new_tokens = output.sequences[:, -output.layers_run.shape[1] :].tolist()
        written = starmap(_text_of, zip(texts, new_tokens, output.layers_run.tolist(), strict=True))
        return {
            "texts": [asdict(text) for text in written],
            "work": {name: getattr(output, name).tolist() for name in WORK},
        }


def _text_of(text: str, tokens: list[int], layers_run: list[int]) -> Text:
    """The text without the padding after its end, where no layer ran."""
    layers = [layer for layer in layers_run if layer]
    return Text(text, tokens[: len(layers)], layers)
