"""Low-rank adapters on the blocks of an early-exit model: added, and merged into its weights again.

For objectives that train the whole model when its gradients and optimiser states would not fit into memory. The model
keeps its class, so that `EarlyExitTrainer` trains it. Independent of objectives. LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_earlyexit.common.extras import require
from hf_earlyexit.common.values import is_integer, is_number
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.plain import described, has_dense_weight


FLAGS = "_requires_grad_before_lora"
BLOCKS = ("encoder.block.", "decoder.block.")


def add_lora(
    model: EarlyExitT5ForConditionalGeneration,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> EarlyExitT5ForConditionalGeneration:
    """Add an adapter to linear maps of the encoder's and the decoder's blocks: W x + alpha / rank x B A x.

    B starts at zero, so the outputs do not change at first. From now on the adapters are trained, and exit heads and
    classifiers as before; all other parameters are frozen until `merge_lora`. Checkpoints saved in between store
    adapters separately. They serve to resume training, after adapters are added again, and cannot be loaded as a
    model. Save after `merge_lora`.

    Args:
        model: Changed in place.
        rank: Rows of A, columns of B.
        alpha: Scale of the adapters; 2 x rank if None, as FREE trains T5-3B (rank 64, alpha 128; arXiv 2310.05424).
        dropout: Of an adapter's input, in [0, 1), during training.
        targets: Names of the maps, such as `("q", "v")`; all maps of the blocks if None.

    Returns:
        The model.

    Raises:
        ValueError: An argument is not legal, the model has adapters already, or a map is not a plain one (quantised).
            The model is unchanged.
        ImportError: peft is missing, which the extra `lora` installs.
    """
    _check_numbers(rank, alpha, dropout)
    peft = require("peft", "lora")
    if _adapted(model):
        raise ValueError("`model` has adapters already: call `merge_lora(model)` first.")
    names = _maps_of(model, targets)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.unprepare()
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout, target_modules=names
    )
    peft.inject_adapter_in_model(config, model)
    for layer in _adapted(model).values():  # peft creates them in training mode
        layer.train(layer.get_base_layer().training)
    for name, parameter in model.exit_heads.named_parameters(prefix="exit_heads"):
        parameter.requires_grad_(flags[name])
    setattr(model, FLAGS, flags)
    return model


@torch.no_grad()
def merge_lora(model: EarlyExitT5ForConditionalGeneration) -> EarlyExitT5ForConditionalGeneration:
    """Merge the adapters into the weights.

    The model has its plain maps again, under their names. Parameters that were frozen before `add_lora` are frozen, no
    others. `save_pretrained` writes an ordinary checkpoint.

    Args:
        model: With adapters added by `add_lora`; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: It has no such adapters, or their weights are not finite. The model is unchanged.
    """
    if not hasattr(model, FLAGS):
        raise ValueError("`model` has no adapters to merge: `add_lora(model, rank)` puts them in.")
    adapted = _adapted(model)
    deltas = {name: layer.get_delta_weight(layer.active_adapters[0]) for name, layer in adapted.items()}
    if broken := [name for name, delta in deltas.items() if not delta.isfinite().all()]:
        raise ValueError(f"The adapter of `{broken[0]}` is not finite: the training went wrong, load the model again.")
    model.unprepare()
    for name, layer in adapted.items():
        plain = layer.get_base_layer()
        plain.weight.add_(deltas[name])  # in place, not through `.data`, so that the parameter version increases
        model.set_submodule(name, plain)
    flags = model.__dict__.pop(FLAGS)
    model.__dict__.pop("peft_config", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    return model


def _check_numbers(rank: int, alpha: float | None, dropout: float) -> None:
    if not is_integer(rank) or rank < 1:
        raise ValueError(f"`rank` must be a whole number from 1 on, got {rank!r}.")
    if alpha is not None and not (is_number(alpha) and 0 < alpha < float("inf")):
        raise ValueError(f"`alpha` must be a number above 0, or None for 2 x rank, got {alpha!r}.")
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"`dropout` must be a number in [0, 1), got {dropout!r}.")


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The maps with adapters, by name."""
    layer_class = require("peft.tuners.tuners_utils", "lora").BaseTunerLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, layer_class)}


def _maps_of(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """The full names of the blocks' maps selected by `targets`."""
    maps = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(BLOCKS) and isinstance(module, nn.Linear)
    }
    known = sorted({name.rpartition(".")[2] for name in maps})
    if isinstance(targets, str) or (targets is not None and (not targets or set(targets) - set(known))):
        raise ValueError(f"`targets` must be a list of the maps that blocks have, {known}, or None, got {targets!r}.")
    chosen = [name for name in maps if targets is None or name.rpartition(".")[2] in targets]
    for name in chosen:
        if type(maps[name]) is not nn.Linear or not has_dense_weight(maps[name]):
            raise ValueError(
                f"`{name}` is {described(maps[name])}, into which an adapter cannot be merged: load the model "
                "unquantised and into memory."
            )
    return chosen
