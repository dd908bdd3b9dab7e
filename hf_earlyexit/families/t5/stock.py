"""The stock model inside an early-exit one: its weights in stock classes, complete or truncated to some layers.

The static truncated decoder is the baseline for early exit: it evaluates no exits, and all tokens run the same number
of layers.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

from hf_earlyexit.common.library import CACHE, attention_of, set_attention_of
from hf_earlyexit.decoding.settings import CERTIFICATE, ExitSettings


if TYPE_CHECKING:
    from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration


def stock_of(model: EarlyExitT5ForConditionalGeneration, layers: int | None = None) -> T5ForConditionalGeneration:
    """A stock T5 that shares this model's weights, in eval mode, without exits and exit settings.

    Args:
        model: Not modified, even if the stock model is moved. Weights that are replaced in it later are not replaced
            in the stock model.
        layers: Number of decoder layers, counted from the first; all if None. A truncated decoder uses the head of the
            exit point after its last layer, which must be trained for useful output.

    Raises:
        ValueError: The model has no exit point after that many layers, or its weights are not those of a T5 in memory
            (adapters, wrappers, offloading).
    """
    depth = model.config.num_decoder_layers
    layers = depth if layers is None else layers
    if layers not in (*model.early_exit.exit_layers, depth):
        raise ValueError(f"`layers={layers}` is no exit point: {[*model.early_exit.exit_layers, depth]} are.")
    with torch.device("meta"):
        stock = T5ForConditionalGeneration(stock_config(model, layers))
    weights = _weights_of(model, layers)
    _refuse_other_weights(weights, stock)
    stock.load_state_dict(weights, assign=True)
    if layers < depth:
        head = model.exit_heads.head_of(layers, stock.decoder.final_layer_norm)
        same_weights = {id(weight): nn.Parameter(weight.detach()) for weight in head.parameters()}
        stock.decoder.final_layer_norm = copy.deepcopy(head, same_weights)
    stock.generation_config = copy.deepcopy(model.generation_config)
    for name in (*ExitSettings.names(), CERTIFICATE):
        stock.generation_config.__dict__.pop(name, None)
    return stock.eval()


def stock_generate(stock: T5ForConditionalGeneration, **kwargs):
    """`generate` that also works for a decoder deeper than the encoder, by which the library sizes the cache."""
    if stock.config.num_decoder_layers > stock.config.num_layers:
        kwargs[CACHE] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return stock.generate(**kwargs)


def stock_config(model: EarlyExitT5ForConditionalGeneration, layers: int) -> T5Config:
    """The model's config as plain `t5`, with this number of decoder layers."""
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "early_exit"):
        values.pop(name, None)
    config = T5Config(**{**values, "num_decoder_layers": layers})
    config.scale_decoder_outputs = model.config.scale_decoder_outputs
    set_attention_of(config, attention_of(model.encoder.config))
    return config


def _weights_of(model: EarlyExitT5ForConditionalGeneration, layers: int) -> dict[str, torch.Tensor]:
    """The weights of the stock model, by name."""
    deeper = tuple(f"decoder.block.{layer}." for layer in range(layers, model.config.num_decoder_layers))
    return {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("exit_heads.", *deeper))
    }


def _refuse_other_weights(weights: dict[str, torch.Tensor], stock: nn.Module) -> None:
    """Check that a stock model can be made of these weights.

    Raises:
        ValueError: It cannot; the message names a weight that is missing, unexpected or not in memory.
    """
    needed = set(stock.state_dict())
    if others := sorted(needed ^ set(weights)):
        raise ValueError(
            f"A stock T5 has {'' if others[0] in needed else 'no '}weights `{others[0]}`, unlike this model: merge "
            "its adapters (`merge_and_unload`), or put the library's modules back."
        )
    if offloaded := [name for name, weight in weights.items() if weight.is_meta]:
        raise ValueError(
            f"The weights of `{offloaded[0]}` are offloaded, so no stock T5 can share them: load the model "
            "into memory."
        )
