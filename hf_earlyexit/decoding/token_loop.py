"""The token loop: greedy search and sampling with minimal work per token.

The library's loop prepares inputs, wraps outputs and builds masks for every token; this one calls `decode_step`
directly. Tokens, scores and the random stream are those of the library, and its processors, stopping
criteria and streamers are used. Independent of the model.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateEncoderDecoderOutput

from hf_earlyexit.common.library import CACHE, pad_token
from hf_earlyexit.common.transfer import to_host
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import Decoder, decode_step
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.kernels.graphs import RECORDING


def generate_tokens(
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    decoder: Decoder,
    cache: EarlyExitCache,
    run: ExitRun,
    streamer: Any = None,
) -> torch.Tensor | GenerateEncoderDecoderOutput:
    """Generate tokens until every row has finished.

    Args:
        input_ids: `[batch, prompt]`, the decoder prompt.
        generation_config: As prepared by the library; used for `do_sample`, the outputs to return and the pad token.

    Returns:
        `[batch, prompt + new]`, or with `return_dict_in_generate` the library's output object.
    """
    wanted = generation_config.return_dict_in_generate
    scores = () if wanted and generation_config.output_scores else None
    logits = () if wanted and generation_config.output_logits else None
    rests_ended = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    padding = pad_token(generation_config, input_ids.device) if rests_ended else None
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    new_ids = ids = input_ids
    while True:
        token_logits = decode_step(decoder, new_ids, cache, run)[:, -1].to(torch.float32, copy=True)
        token_scores = logits_processor(ids, token_logits)
        if scores is not None:
            scores += (token_scores,)
        if logits is not None:
            logits += (token_logits,)
        tokens = choose(token_scores, generation_config.do_sample)
        if padding is not None:
            tokens = tokens.where(ended.logical_not(), padding)
        new_ids = tokens[:, None]
        ids = torch.cat([ids, new_ids], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        ended = ended | stopping_criteria(ids, scores)
        decoder.look_ahead(tokens, run.live, cache)
        has_ended = to_host(ended)  # the only device read of a step at full depth
        if all(has_ended):
            break
        if rests_ended:
            run.record_finished(has_ended)
    if streamer is not None:
        streamer.end()
    if not wanted:
        return ids
    return GenerateEncoderDecoderOutput(sequences=ids, scores=scores, logits=logits, **{CACHE: cache})


def choose(scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """A token for every row of `scores [batch, vocabulary]`: `[batch]`.

    With sampling, finished rows draw, too, as in the library.
    """
    if do_sample:
        with RECORDING if scores.is_cuda else nullcontext():
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)
