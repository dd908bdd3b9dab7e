"""Answers for what else than weights a prepared copy of a T5 decoder was made of, and whether that is plain.

A copy stands in for the modules of the decoder, the LM head and the exit norms. Modules that are still called (the
embedding, activations, other exit heads) may be anything when the copy is made, but not be replaced afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_earlyexit.heads import ExitNorm, NormHead


# Packages whose modules do what their class says.
PLAIN_PACKAGES = ("torch", "transformers")
OWN = (T5LayerNorm, NormHead, ExitNorm)  # the first of which may come from another package that the library found
# Without numbers that matter, and most of all modules.
WITHOUT_NUMBERS = (nn.Linear, nn.ModuleList, nn.ModuleDict)
# Values of the configuration that a copy or a compiled region has taken over.
TAKEN_OVER = ("scale_decoder_outputs", "is_gated_act", "layer_norm_epsilon", "num_heads")


class Part(NamedTuple):
    """A module as it was: itself, what it runs, and the numbers that it holds (an epsilon, a number of heads)."""

    module: nn.Module
    kind: type
    class_forward: Any
    own_forward: Any
    numbers: tuple


def structure_of(model: nn.Module) -> tuple:
    """All that decides what the decoder computes, but for weights and hooks: the same structure, the same function.

    It holds the modules, so that no others come to lie where they do.
    """
    modules = modules_of(model.lm_head, model.decoder, model.exit_heads)
    return (*map(_part, modules), *(getattr(model.config, name) for name in TAKEN_OVER))


def _part(module: nn.Module) -> Part:
    held, kind = vars(module), type(module)
    numbers = (module.training,)
    if kind not in WITHOUT_NUMBERS:
        numbers += tuple(value for value in held.values() if type(value) in (int, float, bool))
    return Part(module, kind, kind.forward, held.get("forward"), numbers)


def modules_of(*roots: nn.Module) -> list[nn.Module]:
    """These and all modules in them, in a fraction of the time that `modules` takes."""
    found = list(roots)
    for module in found:
        found.extend(module.children())
    return found


def refuse_other_forwards(model: nn.Module) -> None:
    """See that the modules that a copy stands in for run what the library's run, in eval mode.

    Raises:
        ValueError: One does not; the message names it.
    """
    for name, module in replaced_modules(model):
        if "forward" in vars(module):
            raise ValueError(f"`prepare_for_generation` would not call the own `forward` of `{name}`: remove it.")
        kind = type(module)
        if kind.__module__.partition(".")[0] not in PLAIN_PACKAGES and kind not in OWN:
            raise ValueError(
                f"`prepare_for_generation` would not call `{name}`, a `{kind.__name__}`: use the library's."
            )
        if module.training:
            raise ValueError(f"`prepare_for_generation` needs eval mode, `{name}` is not: call `model.eval()`.")


def replaced_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are not called once there is a copy, by name."""
    yield "lm_head", model.lm_head
    for name, module in model.decoder.block.named_modules(prefix="decoder.block"):
        if not name.endswith(".act"):
            yield name, module
    yield "decoder.final_layer_norm", model.decoder.final_layer_norm
    for name, head in model.exit_heads.named_modules(prefix="exit_heads"):
        if type(head) is NormHead:
            yield name, head
            yield f"{name}.norm", head.norm
