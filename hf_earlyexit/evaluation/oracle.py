"""The oracle: for each token of the full-depth text, the first exit whose top choice is the last layer's.

CALM's oracle measure (arXiv 2207.07061, section 3.4). It uses hindsight, since the exit is only known after running
all layers. It bounds criteria and is not a saving: all layers run, no token exits, no keys or values are written, and
the layers counted here are not executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.forced import AskExits, ForcedTokens
from hf_earlyexit.exits.config import check_exit_layers
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.certified import uncertified
from hf_earlyexit.generation.refusals import refuse_training_mode
from hf_earlyexit.generation.teacher_forced import IGNORED


NEEDED, PROMPT = ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")
NOT_GREEDY = ("do_sample", "num_beams", "num_return_sequences")


@dataclass(frozen=True)
class OracleExits:
    """The exits that agree with full depth, for each token of the full-depth texts.

    Shapes: at most `T` new tokens, E exit points.

    A bound, not a saving. It holds along the full-depth text with full depth's keys and values. A text with exits has
    different keys and values above the skipped layers, and diverges after its first different token. So no criterion
    that decides by these states can exit earlier *here* without losing agreement *here*. To know the result of a text
    with exits, generate it.

    Attributes:
        sequences: `[batch, prompt + T]`, as full depth wrote them.
        exit_layers: The exit points, as counts of layers run, ascending.
        num_layers: Layers of the decoder.
        first: `[batch, T]`, the first exit layer whose choice is full depth's; `num_layers` if none is, 0 where the
            row had ended. Later exits may disagree again.
        stable: `[batch, T]`, the first exit layer from which on all agree; at least `first`.
        agrees: `[batch, T, E]`, whether the exit's choice is full depth's; False where the row had ended.
        tied: `[batch, T]`, whether full depth's two best logits were equal. Choices at every layer are by `argmax`,
            the lowest id of equal logits. Half precisions have such ties, and an exit with the same two tokens on top
            may count as disagreeing.
        rewritten: `[batch, T]`, whether full depth's choice in this single pass differs from the token it wrote step
            by step: a tie within rounding, or the effect of a logits processor. Exits are compared to the choice in
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
        """Mean of `first` over all tokens: the bound, not layers that were executed."""
        return float(self.first[self.is_token].double().mean())

    @property
    def stable_layers_per_token(self) -> float:
        """Mean of `stable` over all tokens."""
        return float(self.stable[self.is_token].double().mean())

    @property
    def shares(self) -> dict[int, float]:
        """For every exit layer and the last one, the share of tokens that have it as `first`; they add up to 1."""
        return shares(self.first[self.is_token], self.exit_layers, self.num_layers)

    @property
    def stable_shares(self) -> dict[int, float]:
        """The same for `stable`."""
        return shares(self.stable[self.is_token], self.exit_layers, self.num_layers)

    @property
    def agreement(self) -> dict[int, float]:
        """For every exit layer, the share of all tokens that agree there."""
        means = self.agrees[self.is_token].double().mean(dim=0)
        return dict(zip(self.exit_layers, means.tolist(), strict=True))


def first_agreeing(agrees: torch.Tensor, layers: Sequence[int], num_layers: int) -> torch.Tensor:
    """`[N]`, the first of `layers` that agrees, from `agrees [N, E]`; `num_layers` if none does."""
    ends = torch.tensor([*layers, num_layers])
    return ends[_with_full_depth(agrees).int().argmax(dim=-1)]


def stable_from(agrees: torch.Tensor, layers: Sequence[int], num_layers: int) -> torch.Tensor:
    """`[N]`, the first of `layers` from which on all agree, from `agrees [N, E]`; `num_layers` if none does."""
    ends = torch.tensor([*layers, num_layers])
    agreeing_to_the_end = _with_full_depth(agrees).flip(-1).int().cumprod(dim=-1).sum(dim=-1)
    return ends[len(ends) - agreeing_to_the_end]


def _with_full_depth(agrees: torch.Tensor) -> torch.Tensor:
    """`[N, E + 1]`: appends a column for the last layer, which agrees with itself."""
    return torch.cat([agrees, agrees.new_ones(len(agrees), 1)], dim=1)


def shares(chosen: torch.Tensor, layers: Sequence[int], num_layers: int) -> dict[int, float]:
    """For every layer and the last one, its share in `chosen [N]`."""
    return {layer: float((chosen == layer).double().mean()) for layer in (*layers, num_layers)}


@torch.no_grad()
def oracle_exits(
    model: EarlyExitT5ForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    *,
    exit_layers: Sequence[int] | None = None,
    **generation: Any,
) -> OracleExits:
    """Generate greedily at full depth, then evaluate the choice of every exit at each position of that text.

    Args:
        model: In eval mode; not changed.
        inputs: `input_ids` and `attention_mask`, `[batch, source]`. With a decoder prompt also `decoder_input_ids` and
            `decoder_attention_mask`, `[batch, prompt]`.
        exit_layers: The subset of the model's exit points to consider; all if None.
        generation: Further keywords of `generate`, such as `max_new_tokens`.

    Returns:
        A bound on the choices of criteria, not a saving of any (see `OracleExits`).

    Raises:
        ValueError: The model is in training mode, an input is missing or unknown, a layer is not an exit point, or a
            keyword requests exits, sampling or beams. Raised before anything is generated.
    """
    layers = _checked(model, inputs, exit_layers, generation)
    bare = uncertified(model)  # without stored exit settings, which would interfere
    greedy = {"early_exit": False, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    output = bare.generate(**inputs, **generation, **greedy, return_dict_in_generate=True)
    if output.get("layers_run") is None:
        raise ValueError(
            "The model's generation_config has settings that early exit does not support: remove them there."
        )
    labels = _labels_of(output.sequences, output.layers_run)
    forcing = _forcing(inputs, output.sequences, output.layers_run.shape[1])
    forced = bare(**forcing, labels=labels, exit_objective=AskExits({})).loss
    return _in_rows(forced.asked_at(layers), output.sequences, output.layers_run > 0)


def _checked(model, inputs: Mapping[str, Any], exit_layers: Sequence[int] | None, generation: Mapping[str, Any]):
    """Check the arguments, and return the exit layers to consider."""
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
    """`[batch, prompt + T - 1]`, the next token after each id; no label inside the prompt and after the end."""
    new_tokens = layers_run.shape[1]
    labels = sequences[:, -new_tokens:].masked_fill(layers_run.to(sequences.device) == 0, IGNORED)
    return nn.functional.pad(labels, (sequences.shape[1] - new_tokens - 1, 0), value=IGNORED)


def _forcing(inputs: Mapping[str, torch.Tensor], sequences: torch.Tensor, new_tokens: int) -> dict[str, torch.Tensor]:
    """Arguments of `forward` for teacher forcing `sequences [batch, prompt + new_tokens]`."""
    forcing = {name: inputs[name] for name in NEEDED} | {"decoder_input_ids": sequences[:, :-1]}
    mask = inputs.get("decoder_attention_mask")
    if mask is not None:
        start = sequences.shape[1] - new_tokens - mask.shape[1]  # 1 if the library prepended a start token
        forcing["decoder_attention_mask"] = nn.functional.pad(mask, (start, new_tokens - 1), value=1)
    return forcing


def _in_rows(forced: ForcedTokens, sequences: torch.Tensor, is_token: torch.Tensor) -> OracleExits:
    """Put tokens back at their places in the batch, `is_token [batch, T]`."""
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
