"""A slow reference for generation with exits: every layer runs, and exited rows keep their hidden state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LogitsProcessorList

from hf_earlyexit.common.library import CACHE
from tests.tiny import stock_cache


@torch.no_grad()
def frozen_row_generate(
    stock,
    inputs: dict[str, torch.Tensor],
    script: Callable[[int, int], int],
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
    ends: tuple[int, ...] = (),
    norm_of: Callable[[int], nn.Module] | None = None,
    states: list[torch.Tensor] | None = None,
    prompt_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens `[batch, prompt + steps]` and the logits `[batch, steps, vocabulary]` they come from.

    An exited row keeps its hidden state through the deeper layers, which project their keys and values from it. This
    is the definition of projecting the exit state. Uses stock blocks and a stock cache, and nothing of the package.

    `norm_of` returns the norm before the LM head for rows that exited after a layer; default: the final norm. For each
    step, the outputs `[layers, batch, hidden]` of all layers are appended to `states`. `prompt_ids [batch, prompt]`
    replace the start token; all of their positions except the last run all layers, one at a time.
    """
    norm_of = norm_of or (lambda layer: stock.decoder.final_layer_norm)
    encoder_states = stock.encoder(**inputs).last_hidden_state
    mask = (1 - inputs["attention_mask"][:, None, None].to(stock.dtype)) * torch.finfo(stock.dtype).min
    batch_size = len(encoder_states)
    prompt_ids = torch.zeros(batch_size, 1, dtype=torch.long) if prompt_ids is None else prompt_ids
    first, ids, cache, all_logits = prompt_ids.shape[1] - 1, prompt_ids[:, :1], stock_cache(), []
    ended = torch.zeros(batch_size, dtype=torch.bool)
    for position in range(first + max_new_tokens):
        hidden, bias, cross_bias = stock.decoder.embed_tokens(ids[:, -1:]), None, None
        depth = len(stock.decoder.block)
        exits = torch.tensor([script(row, position) if position >= first else depth for row in range(batch_size)])
        outputs = []
        for layer, block in enumerate(stock.decoder.block, start=1):
            output, bias, cross_bias = block(hidden, None, bias, encoder_states, mask, cross_bias, **{CACHE: cache})
            hidden = torch.where((exits < layer)[:, None, None], hidden, output)
            outputs.append(hidden[:, 0])
        if position < first:
            ids = prompt_ids[:, : position + 2]
            continue
        if states is not None:
            states.append(torch.stack(outputs))
        scale = stock.model_dim**-0.5 if stock.config.scale_decoder_outputs else 1.0
        normed = torch.stack([norm_of(int(layer))(row) for layer, row in zip(exits, hidden[:, 0])])
        logits = stock.lm_head(normed * scale)
        all_logits.append(logits)
        scores = processors(ids, logits.float()) if processors else logits
        token = scores.argmax(-1).masked_fill(ended, 0)
        ids = torch.cat([ids, token[:, None]], dim=1)
        ended = ended | torch.isin(token, torch.tensor(list(ends), dtype=torch.long))
        if ended.all():
            break
    return ids, torch.stack(all_logits, dim=1)
