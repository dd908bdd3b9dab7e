"""Tiny random T5 models with varied outputs, and inputs for them."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_earlyexit import EarlyExitConfig, EarlyExitT5Config, EarlyExitT5ForConditionalGeneration


VOCABULARY = 97
NUM_LAYERS = 6
# End tokens that a random model generates occasionally, so that rows finish at different steps.
ENDS = [3, 17, 29, 41, 53, 67]

FAMILIES = {
    "tied": {"feed_forward_proj": "relu"},
    "untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "deeper decoder": {"feed_forward_proj": "gated-gelu", "num_layers": 2},
    "narrow heads": {"feed_forward_proj": "relu", "d_kv": 5},
}


def tiny_config(family: str = "tied", **changes) -> T5Config:
    values = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": NUM_LAYERS,
        "num_decoder_layers": NUM_LAYERS,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "decoder_start_token_id": 0,
    }
    return T5Config(**(values | FAMILIES[family] | changes))


def copied_models(models):
    """Like `copy.deepcopy` in a sixth of the time; most of its time goes to dictionaries of hooks."""
    roots = models if isinstance(models, tuple) else (models,)
    memo = {}
    for module in (module for root in roots for module in root.modules()):
        memo[id(module)] = object.__new__(type(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            copy.deepcopy(tensor, memo)
    for module in (module for root in roots for module in root.modules()):
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                value = {key: memo.get(id(part)) for key, part in value.items()}
            elif isinstance(value, (dict, set)) and not value:
                value = type(value)()
            elif not isinstance(value, (bool, int, float, str)):
                value = copy.deepcopy(value, memo)
            vars(memo[id(module)])[name] = value
    copies = tuple(memo[id(root)] for root in roots)
    return copies if isinstance(models, tuple) else copies[0]


def made_once(make):
    """Decorator: models are made once per arguments, and every call gets its own copy, which it may change.

    Making a pair takes as long as generating with it. `shared` returns the same models to all callers, for tests that
    do not change them. The random number generator is left in the state after making.
    """

    @functools.lru_cache(maxsize=128)
    def keep(args, kwargs):
        return make(*args, **dict(kwargs)), torch.get_rng_state()

    @functools.wraps(make)
    def copied(*args, **kwargs):
        models, state = keep(args, tuple(sorted(kwargs.items())))
        torch.set_rng_state(state)
        copies = copied_models(models)
        for one in copies if isinstance(copies, tuple) else (copies,):
            one.to(one.dtype)  # as at the end of making; sets the state that a copy lacks (no prepared weights)
        return copies

    copied.shared = lambda *args, **kwargs: keep(args, tuple(sorted(kwargs.items())))[0]
    return copied


@made_once
@torch.no_grad()
def tiny_stock(family: str = "tied", seed: int = 0, dtype=torch.float64, **changes) -> T5ForConditionalGeneration:
    """A stock T5 whose output depends on source, position and depth."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = T5ForConditionalGeneration(config).eval()
    if family == "untied":
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * config.d_model**-0.5)
    for name, parameter in model.named_parameters():
        if "EncDecAttention" in name or "wo.weight" in name or ".o.weight" in name:
            parameter.mul_(2)
        if "relative_attention_bias" in name:
            parameter.mul_(4)
        if "layer_norm" in name:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def with_exits(stock: T5ForConditionalGeneration, early_exit: EarlyExitConfig | None = None):
    """The early-exit model with the same weights as a stock one."""
    values = stock.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    config = EarlyExitT5Config(**values, early_exit=(early_exit or EarlyExitConfig()).to_dict())
    model = EarlyExitT5ForConditionalGeneration(config)
    if stock.lm_head.weight is not stock.shared.weight:
        model.lm_head.weight = nn.Parameter(stock.lm_head.weight.detach().clone())
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("exit_heads") for name in missing)
    model.exit_heads.start_as_logit_lens(model.decoder.final_layer_norm)
    return model.to(stock.device, stock.dtype).eval()


@made_once
def tiny_pair(family: str = "tied", seed: int = 0, dtype=torch.float64, early_exit=None, device="cpu", **changes):
    stock = tiny_stock(family, seed, dtype, **changes).to(device)
    return stock, with_exits(stock, early_exit)


def tiny_inputs(batch_size: int, seed: int = 0, longest: int = 11, device="cpu") -> dict[str, torch.Tensor]:
    """A padded batch of sources of different lengths."""
    generator = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(4, VOCABULARY, (batch_size, longest), generator=generator)
    lengths = [longest - (3 * row) % (longest - 2) for row in range(batch_size)]
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def one_row(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a padded batch as its own batch, without padding."""
    length = int(inputs["attention_mask"][row].sum())
    return {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}


@functools.lru_cache
def noise_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)


class Unrest(LogitsProcessor):
    """Adds noise that depends only on the last token and the length.

    A random model then does not repeat itself, and a row still has the same output in any batch.
    """

    def __init__(self, seed: int = 0, strength: float = 4.0):
        self.noise = strength * noise_of(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.noise = self.noise.to(scores.device)
        return scores + self.noise[input_ids.shape[1] % 16, input_ids[:, -1]].to(scores)


def unrest(seed: int = 0) -> LogitsProcessorList:
    return LogitsProcessorList([Unrest(seed)])


def stock_cache() -> EncoderDecoderCache:
    """A stock cache that grows with the layers, as a stock T5 with a deeper decoder needs."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def cut_to(stock: T5ForConditionalGeneration, layers: int) -> T5ForConditionalGeneration:
    """The stock model with only its first `layers` decoder layers, sharing the weights."""
    config = T5Config(**{**stock.config.to_dict(), "num_decoder_layers": layers})
    config.scale_decoder_outputs = stock.config.scale_decoder_outputs
    with torch.device("meta"):  # all modules with weights are replaced
        cut = T5ForConditionalGeneration(config)
    for name in ("shared", "encoder", "lm_head"):
        setattr(cut, name, getattr(stock, name))
    cut.decoder.embed_tokens = stock.decoder.embed_tokens
    cut.decoder.block = nn.ModuleList(list(stock.decoder.block)[:layers])
    cut.decoder.final_layer_norm = stock.decoder.final_layer_norm
    return cut.eval()
