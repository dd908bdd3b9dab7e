"""Answers for what turns a middle hidden state into the input of the LM head, or into an exit probability.

Knows nothing of the decoder it sits on: it is handed the final norm. All heads end in the model's LM head, so rows
that leave at different layers can share one vocabulary projection.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from hf_earlyexit.config import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.policies import at_least_float32


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero, so that what it is added to starts unchanged."""


class InnerLinear(nn.Linear):
    """The first linear map of a perceptron; its own class, so that the model's default initialisation does not reach
    it."""


class StateLinear(nn.Linear):
    """A linear map of raw states, computed in their dtype, also under autocast: they can be too large for fp16."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._in_dtype_of(hidden)
        return self._in_dtype_of(hidden)

    def _in_dtype_of(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)


class IdentityLinear(StateLinear):
    """It starts as the identity."""


class ClassifierLinear(StateLinear):
    """A classifier's."""


class ExitNorm(nn.Module):
    """Root-mean-square norm with its own scale, which starts as a copy of the final norm's."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.epsilon)).to(self.weight.dtype)


class NormHead(nn.Module):
    """Kind `"norm"`: its own final norm."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__()
        self.norm = ExitNorm(hidden_size, epsilon)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden)


class LinearHead(NormHead):
    """Kind `"linear"`: its own final norm, plus a linear map of what that gives."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__(hidden_size, epsilon)
        self.map = ZeroLinear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        return normed + self.map(normed)


class MlpHead(NormHead):
    """Kind `"mlp"`: its own final norm, plus a two-layer perceptron of what that gives (EE-LLM, arXiv 2312.04916)."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__(hidden_size, epsilon)
        self.up = InnerLinear(hidden_size, hidden_size)
        self.down = ZeroLinear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        return normed + self.down(torch.relu(self.up(normed)))


class ShortcutHead(NormHead):
    """Kind `"shortcut"`: its own final norm of a linear map of the raw state (arXiv 2303.09435).

    `hf_earlyexit.shortcuts.fit_shortcuts` makes the map, a guess at the last layer's output, in closed form.
    """

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__(hidden_size, epsilon)
        self.map = IdentityLinear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.map(hidden))


HEADS: dict[str, type[NormHead]] = {
    "norm": NormHead,
    "linear": LinearHead,
    "mlp": MlpHead,
    "shortcut": ShortcutHead,
}


class Classifier(nn.Module):
    """Probability that a token may leave, from the raw hidden state (CALM's released code takes it without norm)."""

    def __init__(self, config: ClassifierConfig, hidden_size: int):
        super().__init__()
        width = config.width or hidden_size
        self.inner = ClassifierLinear(hidden_size, width) if config.kind == "mlp" else None
        self.output = ClassifierLinear(width if config.kind == "mlp" else hidden_size, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[...]` of `hidden [..., hidden]`, in fp32 at least: raw states can be too large for fp16."""
        hidden = at_least_float32(hidden)
        if self.inner is not None:
            hidden = torch.relu(self.inner(hidden))
        return self.output(hidden).squeeze(-1)


class ExitHeads(nn.Module):
    """The heads and classifiers of all exit points.

    Args:
        config: Spelled out for a decoder (`EarlyExitConfig.for_layers`).
        hidden_size: Of the decoder.
        epsilon: Of the norms.
    """

    def __init__(self, config: EarlyExitConfig, hidden_size: int, epsilon: float):
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                str(layer): HEADS[kind](hidden_size, epsilon)
                for layer, kind in zip(config.exit_layers, config.heads, strict=True)
                if kind != "shared"
            }
        )
        self.classifiers = nn.ModuleDict()
        if config.classifier is not None:
            names = ["shared"] if config.classifier.shared else [str(layer) for layer in config.exit_layers]
            self.classifiers.update({name: Classifier(config.classifier, hidden_size) for name in names})

    def head_of(self, layer: int, final_norm: nn.Module) -> nn.Module:
        """What makes the LM head's input of the state after `layer`: `final_norm` where the layer has no own head."""
        name = str(layer)
        return self.heads[name] if name in self.heads else final_norm  # noqa: SIM401 (a ModuleDict has no `get`)

    def exit_logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows]` of `hidden [rows, hidden]`, before the sigmoid."""
        name = "shared" if "shared" in self.classifiers else str(layer)
        return self.classifiers[name](hidden)

    def exit_probability(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows]` of `hidden [rows, hidden]`."""
        return torch.sigmoid(self.exit_logits(layer, hidden))

    @torch.no_grad()
    def start_as_logit_lens(self, final_norm: nn.Module, missing: set[str] | None = None) -> None:
        """Copy the final norm's scale into the heads' norms: of those parameters in `missing`, or of all."""
        for layer, head in self.heads.items():
            if missing is None or f"heads.{layer}.norm.weight" in missing:
                head.norm.weight.copy_(final_norm.weight)


def initialize(module: nn.Module) -> bool:
    """Initialise one of this file's leaves; says whether it was one.

    Through the library's `init`, which leaves alone what a checkpoint has filled.
    """
    if isinstance(module, ZeroLinear):
        init.zeros_(module.weight)
    elif isinstance(module, IdentityLinear):
        init.eye_(module.weight)
    elif isinstance(module, (ClassifierLinear, InnerLinear)):
        init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        init.zeros_(module.bias)
    elif isinstance(module, ExitNorm):
        init.ones_(module.weight)
    else:
        return False
    return True
