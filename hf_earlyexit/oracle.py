"""Answers for where each token of full depth's own text could have left and still been the same token: the oracle.

CALM's oracle measure (arXiv 2207.07061, section 3.4): the first layer whose first choice is the last layer's. It is
hindsight: who it is cannot be known without running all layers. So it is a bound for criteria, and no saving: all
layers run, nothing leaves, no keys or values are written, and the layers counted here are executed by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_earlyexit.certified import uncertified
from hf_earlyexit.config import check_exit_layers
from hf_earlyexit.forced import AskExits, ForcedTokens
from hf_earlyexit.labelled import IGNORED
from hf_earlyexit.models import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.refusals import refuse_training_mode
from hf_earlyexit.settings import ExitSettings


NEEDED, PROMPT = ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")
NOT_GREEDY = ("do_sample", "num_beams", "num_return_sequences")


@dataclass(frozen=True)
class OracleExits:
    """Of each token of full depth's texts, the exits that agree. `T` new tokens at most, E exit points.

    A bound, not a saving. It holds along full depth's text and with full depth's keys and values: a text with exits
    has other keys and values above the layers that were skipped, and goes other ways after its first other token. So
    no criterion that decides by these states can leave earlier *here* without losing agreement *here*; what a text
    with exits comes to is measured by writing it.

    Attributes:
        sequences: `[batch, prompt + T]`, as full depth wrote them.
        exit_layers: Where tokens might leave, as counts of layers run, ascending.
        num_layers: Of the decoder.
        first: `[batch, T]`, the first exit layer whose choice is full depth's; `num_layers` where none is before, 0
            where the row had ended. Later exits may disagree again.
        stable: `[batch, T]`, the first exit layer from which on all agree; at least `first`.
        agrees: `[batch, T, E]`, whether the exit's choice is full depth's; False where the row had ended.
        tied: `[batch, T]`, whether full depth's two best logits were equal. Choices are by `argmax`, the lowest id of
            equal ones, at every layer alike; half precisions have such ties, and an exit that has the same two on
            top may count as one that disagrees.
        rewritten: `[batch, T]`, whether full depth's choice in this one pass is not the token that it wrote step by
            step: a tie within rounding, or a logits processor's doing. What exits are held against is the choice in
            this pass.
    """

    sequences: torch.Tensor
    exit_layers: tuple[int, ...]
    num_layers: int
    first: torch.Tensor
    stable: torch.Tensor
    agrees: torch.Tensor
    tied: torch.Tensor
    rewritten: torch.Tensor

    @property
    def is_token(self) -> torch.Tensor:
        """`[batch, T]`, where the row had not ended."""
        return self.first > 0

    @property
    def layers_per_token(self) -> float:
        """Mean of `first` over all tokens: the bound. Nobody has executed so few."""
        return float(self.first[self.is_token].double().mean())

    @property
    def stable_layers_per_token(self) -> float:
        """Mean of `stable` over all tokens."""
        return float(self.stable[self.is_token].double().mean())

    @property
    def shares(self) -> dict[int, float]:
        """Of every exit layer and the last one, the share of tokens that have it as `first`; they add up to 1."""
        return shares(self.first[self.is_token], self.exit_layers, self.num_layers)

    @property
    def stable_shares(self) -> dict[int, float]:
        """The same of `stable`."""
        return shares(self.stable[self.is_token], self.exit_layers, self.num_layers)

    @property
    def agreement(self) -> dict[int, float]:
        """Of every exit layer, the share of tokens that agree there, were they all to leave there."""
        means = self.agrees[self.is_token].double().mean(dim=0)
        return dict(zip(self.exit_layers, means.tolist(), strict=True))


def first_agreeing(agrees: torch.Tensor, layers: Sequence[int], num_layers: int) -> torch.Tensor:
    """`[N]`, the first of `layers` that agrees, `agrees [N, E]`; `num_layers` where none does."""
    ends = torch.tensor([*layers, num_layers])
    return ends[_with_full_depth(agrees).int().argmax(dim=-1)]


def stable_from(agrees: torch.Tensor, layers: Sequence[int], num_layers: int) -> torch.Tensor:
    """`[N]`, the first of `layers` from which on all agree, `agrees [N, E]`; `num_layers` where the last does not."""
    ends = torch.tensor([*layers, num_layers])
    agreeing_to_the_end = _with_full_depth(agrees).flip(-1).int().cumprod(dim=-1).sum(dim=-1)
    return ends[len(ends) - agreeing_to_the_end]


def _with_full_depth(agrees: torch.Tensor) -> torch.Tensor:
    """`[N, E + 1]`: the last layer agrees with itself."""
    return torch.cat([agrees, agrees.new_ones(len(agrees), 1)], dim=1)


def shares(chosen: torch.Tensor, layers: Sequence[int], num_layers: int) -> dict[int, float]:
    """Of every layer and the last one, the share of `chosen [N]`."""
    return {layer: float((chosen == layer).double().mean()) for layer in (*layers, num_layers)}


@torch.no_grad()
def oracle_exits(
    model: EarlyExitT5ForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    *,
    exit_layers: Sequence[int] | None = None,
    **generation: Any,
) -> OracleExits:
    """Let full depth write greedily, then ask every exit what it would have written at each place of that text.

    Args:
        model: In eval mode; left as it is.
        inputs: `input_ids` and `attention_mask`, `[batch, source]`; with a decoder prompt `decoder_input_ids` and
            `decoder_attention_mask`, too, `[batch, prompt]`.
        exit_layers: Of the model's exit points, those where tokens might leave; all if None.
        generation: Further keywords of `generate`, such as `max_new_tokens`.

    Returns:
        A bound on what criteria can choose, not what any has saved (see `OracleExits`).

    Raises:
        ValueError: The model is in training mode, an input is missing or unknown, a layer is no exit point, or a
            keyword asks for exits, sampling or beams. Before anything is generated.
    """
    layers = _checked(model, inputs, exit_layers, generation)
    bare = uncertified(model)  # stored exit settings would be in the way
    greedy = {"early_exit": False, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    output = bare.generate(**inputs, **generation, **greedy, return_dict_in_generate=True)
    if output.get("layers_run") is None:
        raise ValueError("The model's generation_config asks for what exits do not go with: clear it there.")
    labels = _labels_of(output.sequences, output.layers_run)
    forcing = _forcing(inputs, output.sequences, output.layers_run.shape[1])
    forced = bare(**forcing, labels=labels, exit_objective=AskExits({})).loss
    return _in_rows(forced.asked_at(layers), output.sequences, output.layers_run > 0)


def _checked(model, inputs: Mapping[str, Any], exit_layers: Sequence[int] | None, generation: Mapping[str, Any]):
    """The exit layers asked about, everything else being legal."""
    refuse_training_mode(model)
    missing, unknown = [name for name in NEEDED if name not in inputs], sorted({*inputs} - {*NEEDED, *PROMPT})
    if missing or unknown:
        raise ValueError(
            f"`inputs` must have {list(NEEDED)} and may have {list(PROMPT)}: {missing or unknown} "
            f"{'is missing' if missing else 'cannot be used'}."
        )
    for name in (*NOT_GREEDY, *ExitSettings.names(), "return_dict_in_generate"):
        if name in generation:
            raise ValueError(
                f"`{name}` does not go with an oracle, whose texts full depth writes greedily: leave it out."
            )
    if exit_layers is None:
        return model.early_exit.exit_layers
    check_exit_layers(exit_layers)
    if foreign := sorted(set(exit_layers) - set(model.early_exit.exit_layers)):
        raise ValueError(
            f"`exit_layers={list(exit_layers)}` has {foreign}, which are no exit points of this model: it has "
            f"{list(model.early_exit.exit_layers)}."
        )
    return exit_layers


def _labels_of(sequences: torch.Tensor, layers_run: torch.Tensor) -> torch.Tensor:
    """`[batch, prompt + T - 1]`, what is to be said behind each id: nothing inside the prompt and after the end."""
    new_tokens = layers_run.shape[1]
    labels = sequences[:, -new_tokens:].masked_fill(layers_run.to(sequences.device) == 0, IGNORED)
    return nn.functional.pad(labels, (sequences.shape[1] - new_tokens - 1, 0), value=IGNORED)


def _forcing(inputs: Mapping[str, torch.Tensor], sequences: torch.Tensor, new_tokens: int) -> dict[str, torch.Tensor]:
    """What `forward` takes to have `sequences [batch, prompt + new_tokens]` forced on it."""
    forcing = {name: inputs[name] for name in NEEDED} | {"decoder_input_ids": sequences[:, :-1]}
    mask = inputs.get("decoder_attention_mask")
    if mask is not None:
        start = sequences.shape[1] - new_tokens - mask.shape[1]  # 1 where the library put a start token before it
        forcing["decoder_attention_mask"] = nn.functional.pad(mask, (start, new_tokens - 1), value=1)
    return forcing


def _in_rows(forced: ForcedTokens, sequences: torch.Tensor, is_token: torch.Tensor) -> OracleExits:
    """Tokens back at their places of the batch, `is_token [batch, T]`."""
    is_token = is_token.cpu()

    def place(values: torch.Tensor) -> torch.Tensor:
        placed = values.new_zeros(*is_token.shape, *values.shape[1:])
        placed[is_token] = values
        return placed

    ends = forced.agrees, forced.layers, forced.num_layers
    return OracleExits(
        sequences,
        forced.layers,
        forced.num_layers,
        place(first_agreeing(*ends)),
        place(stable_from(*ends)),
        place(forced.agrees),
        place(forced.tied),
        place(forced.rewritten),
    )
