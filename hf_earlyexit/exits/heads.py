"""Exit heads and classifiers: from an intermediate hidden state to the LM head's input or an exit probability.

All heads end in the model's LM head, so rows that exit at different layers can share one vocabulary projection.
Independent of the decoder; the final norm is passed in.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from hf_earlyexit.exits.config import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.exits.criteria import at_least_float32


class ZeroLinear(nn.Linear):
    """A linear map that is initialised to zero, so that a residual branch with it starts without effect."""


class InnerLinear(nn.Linear):
    """The first linear map of a perceptron; a separate class, so that the model's default initialisation skips it."""


class StateLinear(nn.Linear):
    """A linear map of raw states in their own dtype, even under autocast, since they can be too large for fp16."""

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
    """A linear map that is initialised to the identity."""


class ClassifierLinear(StateLinear):
    """A linear map of an exit classifier."""


class ExitNorm(nn.Module):
    """Root-mean-square norm with its own scale, initialised to a copy of the final norm's."""

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
    """Kind `"linear"`: its own final norm, plus a linear map of the normed state."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__(hidden_size, epsilon)
        self.map = ZeroLinear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        return normed + self.map(normed)


class MlpHead(NormHead):
    """Kind `"mlp"`: its own final norm, plus a two-layer perceptron of the normed state (EE-LLM, arXiv 2312.04916)."""

    def __init__(self, hidden_size: int, epsilon: float):
        super().__init__(hidden_size, epsilon)
        self.up = InnerLinear(hidden_size, hidden_size)
        self.down = ZeroLinear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        return normed + self.down(torch.relu(self.up(normed)))


class ShortcutHead(NormHead):
    """Kind `"shortcut"`: its own final norm, applied to a linear map of the raw state (arXiv 2303.09435).

    The map predicts the last layer's output. `hf_earlyexit.training.shortcuts.fit_shortcuts` fits it in closed form.
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
    """An exit classifier on the raw hidden state (without a norm, as in CALM's released code)."""

    def __init__(self, config: ClassifierConfig, hidden_size: int):
        super().__init__()
        width = config.width or hidden_size
        self.inner = ClassifierLinear(hidden_size, width) if config.kind == "mlp" else None
        self.output = ClassifierLinear(width if config.kind == "mlp" else hidden_size, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[...]` of `hidden [..., hidden]`, in at least fp32, since raw states can be too large for fp16."""
        hidden = at_least_float32(hidden)
        if self.inner is not None:
            hidden = torch.relu(self.inner(hidden))
        return self.output(hidden).squeeze(-1)


class ExitHeads(nn.Module):
    """The heads and classifiers of all exit points.

    Args:
        config: Resolved for a decoder (`EarlyExitConfig.for_layers`).
        hidden_size: Hidden size of the decoder.
        epsilon: Epsilon of the norms.
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
        """The module from the state after `layer` to the LM head's input; `final_norm` if the layer has no head."""
        name = str(layer)
        return self.heads[name] if name in self.heads else final_norm  # noqa: SIM401 (a ModuleDict has no `get`)

    def exit_logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The classifier's logits `[rows]` for `hidden [rows, hidden]`, before the sigmoid."""
        name = "shared" if "shared" in self.classifiers else str(layer)
        return self.classifiers[name](hidden)

    def exit_probability(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The classifier's probabilities `[rows]` for `hidden [rows, hidden]`."""
        return torch.sigmoid(self.exit_logits(layer, hidden))

    @torch.no_grad()
    def start_as_logit_lens(self, final_norm: nn.Module, missing: set[str] | None = None) -> None:
        """Copy the final norm's scale into the heads' norms: into all, or only into the parameters in `missing`."""
        for layer, head in self.heads.items():
            if missing is None or f"heads.{layer}.norm.weight" in missing:
                head.norm.weight.copy_(final_norm.weight)


def initialize(module: nn.Module) -> bool:
    """Initialise `module` if it is a leaf module of this file; returns whether it was.

    Uses the library's `init`, which skips parameters that were loaded from a checkpoint.
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
