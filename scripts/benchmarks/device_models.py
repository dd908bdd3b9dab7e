"""Models of the device benchmark, made on the device itself, and the contenders: the ways to decode with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.grid import NEVER, GridBench, recorded
from benchmarks.models import early_exit_config


# Layers of encoder and decoder each, hidden size, heads, head size, feed-forward size, vocabulary.
DEVICE_SHAPES = {
    "base": (12, 768, 12, 64, 2048, 32128),
    "large": (24, 1024, 16, 64, 2816, 32128),
    "xl": (24, 2048, 32, 64, 5120, 32128),
    "tiny": (4, 32, 2, 16, 64, 100),
}
END = 1
STATIC = {"cache_implementation": "static"}
EAGER_GRAPHS = STATIC | {"disable_compile": True}
FULL_DEPTH = ("plain", "prepared", "graphs", "graphs + compile")


@dataclass(frozen=True)
class Contender:
    """A way to decode: `call(new_tokens)` returns token ids, `depth(new_tokens)` the mean layers per token."""

    name: str
    call: Callable[[int], torch.Tensor]
    depth: Callable[[int], float] | None = None


class DeviceBench(GridBench):
    """Models of one shape on one set of random weights, on one device.

    The end token's embedding is zero, so its logit is zero and never the largest. Texts run to their full length, and
    no contender needs a logits processor that suppresses the end token.
    """

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype):
        sizes = DEVICE_SHAPES[shape]
        quarters = [sizes[0] // 4, sizes[0] // 2, 3 * sizes[0] // 4]
        self.shape, self.device, self.dtype, self.depths = shape, device, dtype, quarters
        with torch.device(device):
            super().__init__(early_exit_config(*sizes, exit_layers=quarters), 0)
        self.ours.to(dtype)
        with torch.no_grad():
            self.ours.shared.weight[END] = 0

    def random_states(self, rows: int, source: int) -> torch.Tensor:
        """Random encoder states `[rows, source, hidden]` of unit variance, as after a final norm."""
        width = self.ours.config.d_model
        return torch.randn(rows, source, width, device=self.device, dtype=self.dtype)

    def decode(self, model: Any, states: torch.Tensor, new_tokens: int, **settings) -> Any:
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=self.device)
        length = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": END, "pad_token_id": 0}
        # A new wrapper for each call, since `generate` may change its arguments.
        return model.generate(encoder_outputs=BaseModelOutput(states), attention_mask=mask, **length, **settings)

    def contender(self, name: str, model: Any, states: torch.Tensor, **settings) -> Contender:
        def depth(new_tokens: int) -> float:
            output = self.decode(model, states, new_tokens, **settings, return_dict_in_generate=True)
            if not hasattr(output, "layers_run"):
                raise RuntimeError("the library decoded, not ours")
            return output.layers_run.double().mean().item()

        ours = type(model) is type(self.ours)
        return Contender(name, lambda new: self.decode(model, states, new, **settings), depth if ours else None)

    # --- what is compared ------------------------------------------------------------------------------------------

    def kinds(self) -> dict[str, tuple[Callable[[], Any], dict[str, Any]]]:
        """Kinds of ours by name: a function returning the model, made on first use, and the settings of its calls."""
        compiled = dict(STATIC)
        if self.device.type == "cpu":  # runs the walk on segments, without a compiler
            compiled["compile_config"] = CompileConfig(backend="eager")
        return {
            "plain": (lambda: self.ours, {}),
            "prepared": (lambda: self.prepared, {}),
            "graphs": (lambda: self.prepared, EAGER_GRAPHS),
            "graphs + compile": (lambda: self.prepared, compiled),
        }

    def stock_eager(self, states: torch.Tensor) -> Contender:
        return self.contender("stock eager", self.stock_at(self.layers), states)

    def stock_compiled(self, states: torch.Tensor) -> Contender:
        """Transformers' own path: a static cache, with `forward` compiled if the device is an accelerator."""
        model = copy.copy(self.stock_at(self.layers))  # Transformers stores the compiled function on the model
        return self.contender("stock static + compile", model, states, **STATIC)

    def stock_half(self, states: torch.Tensor) -> Contender:
        return self.contender("stock cut to 1/2", self.stock_at(self.layers // 2), states)

    def full_depth(self, kind: str, states: torch.Tensor, name: str | None = None) -> Contender:
        model, settings = self.kinds()[kind]
        return self.contender(name or kind, model(), states, **NEVER, **settings)

    def exits(self, kind: str, states: torch.Tensor) -> list[Contender]:
        """Contenders of one kind of ours: forced exits, replayed exits, and exits that never accept a token."""
        make, settings = self.kinds()[kind]
        model, found = make(), []

        def add(name: str, **exits) -> None:
            found.append(self.contender(name, model, states, **exits, **settings))

        for name, depth in zip(("1/4", "1/2", "3/4"), self.depths, strict=True):
            add(f"exit {name}", exit_criterion="fixed", exit_layer=depth)
        for criterion in ("classifier", "softmax"):
            vain = {"exit_criterion": criterion, "exit_threshold": 1.0, "exit_layers": self.depths}
            add(f"{criterion} in vain", **vain)
        replay = {"exit_criterion": recorded(self.layers), "exit_threshold": 0.5, "exit_layers": self.depths}
        add("replay, rule row", **replay)
        if len(states) > 1:
            add("replay, rule batch", **replay, batch_exit="batch")
        return found

    # --- the floor -------------------------------------------------------------------------------------------------

    def bytes_per_step(self, rows: int, source: int, positions: float) -> dict[str, float]:
        """Bytes that a step at full depth must read: weights once, keys and values of every row.

        Args:
            rows: Rows of the batch.
            source: Source tokens of a row.
            positions: Mean number of self-attention keys of a row.
        """
        shared = ("EncDecAttention.k.", "EncDecAttention.v.", "relative_attention_bias")
        size = self.ours.lm_head.weight.element_size()
        blocks = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in self.ours.decoder.named_parameters()
            if name.startswith("block.") and not any(part in name for part in shared)
        )
        config = self.ours.config
        position = 2 * self.layers * config.num_heads * config.d_kv * size
        return {
            "decoder_blocks": blocks,
            "lm_head": self.ours.lm_head.weight.numel() * size,
            "keys_values": rows * (source + positions) * position,
        }
