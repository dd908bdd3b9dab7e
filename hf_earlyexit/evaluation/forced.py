"""Teacher-forced evaluation of exits on given texts: their agreement with full depth, and their confidences.

Every layer runs for every token and no token exits. Keys and values are those of full depth, not projected from kept
hidden states as in a text with exits. The result of one pass over the inputs is used by `evaluation/reliability.py`,
`evaluation/oracle.py` and `evaluation/oracle_curves.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from hf_earlyexit.common.data import Example
from hf_earlyexit.evaluation.generate_texts import Text, TextGenerator
from hf_earlyexit.exits.criteria import CRITERIA, ExitCriterion
from hf_earlyexit.exits.patience import Streaks
from hf_earlyexit.generation.refusals import refuse_training_mode
from hf_earlyexit.generation.teacher_forced import IGNORED, TeacherForcedExits


@dataclass(frozen=True)
class ForcedTokens:
    """The tokens of teacher-forced texts at every exit point. N tokens in text order, E exit points.

    A choice is the `argmax` of the logits in the model's own dtype, as in greedy search: the lowest id of equal
    logits, which are frequent in half precision. Full depth's choice is from the same pass, so that all layers are
    rounded alike.

    Attributes:
        layers: The exit points, as counts of layers run, ascending.
        num_layers: Layers of the decoder.
        choices: `[N, E]`, the exit's top choice, an id.
        agrees: `[N, E]`, whether that is full depth's choice.
        confidences: By name of the criterion `[N, E]`, fp64.
        tied: `[N]`, whether full depth's two best logits are equal, so that the id decides.
        rewritten: `[N]`, whether full depth's choice here differs from the token in the text: a near tie when it was
            written step by step, or a token preferred by a logits processor or a beam.
    """

    layers: tuple[int, ...]
    num_layers: int
    choices: torch.Tensor
    agrees: torch.Tensor
    confidences: dict[str, torch.Tensor]
    tied: torch.Tensor
    rewritten: torch.Tensor

    def asked_at(self, layers: Sequence[int]) -> ForcedTokens:
        """The same tokens with only these exit points."""
        columns = [self.layers.index(layer) for layer in layers]
        choices = self.choices[:, columns]
        confidences = {name: values[:, columns] for name, values in self.confidences.items()}
        for name in confidences:
            if replay := getattr(CRITERIA.get(name), "replay", None):
                confidences[name] = replay(choices)
        agrees = self.agrees[:, columns]
        return replace(self, layers=tuple(layers), choices=choices, agrees=agrees, confidences=confidences)


class AskExits:
    """An `exit_objective` that evaluates exits and criteria on every labelled token, as `ForcedTokens`.

    Args:
        criteria: By name. None may have `candidates`: those are chosen token by token as layers are walked.
        exit_layers: The exit points to evaluate, ascending; all of the model if None.

    Raises:
        ValueError: A criterion has candidates.
    """

    def __init__(self, criteria: Mapping[str, ExitCriterion], exit_layers: Sequence[int] | None = None):
        for name, criterion in criteria.items():
            if getattr(criterion, "candidates", None) is not None:
                raise ValueError(
                    f"The criterion {name!r} has candidates={criterion.candidates}, which forced texts do not go "
                    "with: ask the whole vocabulary, `candidates=None`."
                )
        self.criteria = dict(criteria)
        self.exit_layers = None if exit_layers is None else tuple(exit_layers)

    def __call__(self, exits: TeacherForcedExits) -> ForcedTokens:
        last = exits.logits(exits.num_layers)
        best = last.topk(2, dim=-1).values
        choices, confidences, streaks = [], {name: [] for name in self.criteria}, Streaks()
        for layer in exits.layers if self.exit_layers is None else self.exit_layers:
            point = exits.exit_point(layer, streaks)
            for name, criterion in self.criteria.items():
                confidences[name].append(criterion.confidence(point).double().cpu())
            choices.append(point.first_choices().cpu())
        count = len(exits.labels)
        chosen = _columns(choices, count).long()
        return ForcedTokens(
            layers=exits.layers if self.exit_layers is None else self.exit_layers,
            num_layers=exits.num_layers,
            choices=chosen,
            agrees=chosen == exits.full_depth_choices.cpu()[:, None],
            confidences={name: _columns(values, count) for name, values in confidences.items()},
            tied=(best[:, 0] == best[:, 1]).cpu(),
            rewritten=(exits.full_depth_choices != exits.labels).cpu(),
        )


def _columns(values: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """`[count, E]`, also for a model without exit points."""
    return torch.stack(list(values), dim=1) if values else torch.zeros(count, 0, dtype=torch.float64)


@torch.no_grad()
def force(
    writer: TextGenerator,
    examples: Sequence[Example],
    texts: Sequence[Text],
    criteria: Mapping[str, ExitCriterion],
    exit_layers: Sequence[int] | None = None,
) -> ForcedTokens:
    """Run a model teacher-forced on texts, batch by batch.

    Args:
        writer: Of the model, in eval mode.
        examples: The inputs.
        texts: The texts to force, one for each input; usually full depth's.
        criteria: The criteria to evaluate, by name.
        exit_layers: The exit points to evaluate, ascending; all of the model if None.

    Raises:
        ValueError: There is no input, a criterion has candidates, or the model is in training mode.
    """
    refuse_training_mode(writer.model)
    if not examples or len(texts) != len(examples):
        raise ValueError(f"`texts` must have one for each input, of which there is at least one: got {len(texts)}.")
    ask, found, start = AskExits(criteria, exit_layers), [], 0
    for batch in tqdm(writer.batches(examples), desc="forcing", unit="batch", leave=False):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens = [text.tokens for text in texts[start : start + len(inputs["input_ids"])]]
        start += len(tokens)
        found.append(writer.model(**inputs, labels=_labels(tokens).to(writer.model.device), exit_objective=ask).loss)
    return join(found)


def _labels(tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[batch, longest]`, without labels after the end of a text."""
    longest = max(map(len, tokens))
    return torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in tokens])


def join(parts: Sequence[ForcedTokens]) -> ForcedTokens:
    """Concatenate the tokens of at least one batch."""
    return replace(
        parts[0],
        choices=torch.cat([part.choices for part in parts]),
        agrees=torch.cat([part.agrees for part in parts]),
        confidences={name: torch.cat([part.confidences[name] for part in parts]) for name in parts[0].confidences},
        tied=torch.cat([part.tied for part in parts]),
        rewritten=torch.cat([part.rewritten for part in parts]),
    )
