"""The structure of a T5 decoder besides its weights, and checks that it is the library's.

A prepared copy replaces the modules of the decoder, the LM head and the exit norms. Modules that are still called (the
embedding, activations, other exit heads) may be of any class when the copy is made, but must not be replaced
afterwards.

Even without a copy, the decoder walk calls blocks and key/value projections directly, so changes to the modules around
them would have no effect. `passed_by` lists such changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5LayerCrossAttention,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5Stack,
)

from hf_earlyexit.exits.heads import ExitNorm, NormHead
from hf_earlyexit.generation.plain import described, has_dense_weight, has_hooks, has_hooks_before, is_moved


# Packages whose modules are known to compute what their class defines.
PLAIN_PACKAGES = ("torch", "transformers")
NORMS = (T5LayerNorm, ExitNorm)  # the library may take the first from another package
OWN = (*NORMS, NormHead)
# Classes without numbers that affect the result; most modules have one of these.
WITHOUT_NUMBERS = (nn.Linear, nn.ModuleList, nn.ModuleDict)
# Values of the configuration that a prepared copy or a compiled segment depends on.
TAKEN_OVER = ("scale_decoder_outputs", "is_gated_act", "layer_norm_epsilon", "num_heads")


# The library's modules of a block that the walk bypasses for keys and values of the source and of skipped layers.
AROUND_MAPS = (
    ("layer.0", T5LayerSelfAttention),
    ("layer.0.SelfAttention", T5Attention),
    ("layer.1", T5LayerCrossAttention),
    ("layer.1.EncDecAttention", T5Attention),
)


class Part(NamedTuple):
    """The state of a module: itself, its `forward`, and the numbers that it holds (an epsilon, a number of heads)."""

    module: nn.Module
    kind: type
    class_forward: Any
    own_forward: Any
    numbers: tuple


def structure_of(model: nn.Module) -> tuple:
    """Everything besides weights and hooks that determines what the decoder computes; compared for equality.

    It holds the modules, so that their addresses are not reused.
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
    """The roots and all modules in them, in a fraction of the time that `Module.modules` takes."""
    found = list(roots)
    for module in found:
        found.extend(module.children())
    return found


def refuse_other_forwards(model: nn.Module) -> None:
    """Check that the modules that a copy replaces run the library's `forward`, in eval mode.

    Raises:
        ValueError: A module does not; the message names it.
    """
    for name, module in replaced_modules(model):
        if "forward" in vars(module):
            raise ValueError(f"`prepare_for_generation` would bypass the replaced `forward` of `{name}`: remove it.")
        kind = type(module)
        if kind.__module__.partition(".")[0] not in PLAIN_PACKAGES and kind not in OWN:
            raise ValueError(
                f"`prepare_for_generation` would not call `{name}`, a `{kind.__name__}`: use the library's."
            )
        if module.training:
            raise ValueError(f"`prepare_for_generation` needs eval mode, `{name}` is not: call `model.eval()`.")


def refuse_other_norms(model: nn.Module) -> None:
    """Check that the norms that a copy replaces are root-mean-square norms with a scale.

    Raises:
        ValueError: A norm is not; the message names it.
    """
    for name, module in replaced_norms(model):
        if type(module) not in NORMS or not has_dense_weight(module):
            raise ValueError(
                f"`prepare_for_generation` would not call `{name}`, {described(module)}: use the library's "
                "root-mean-square norm."
            )


def replaced_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norms that a copy replaces, by name."""
    for number, block in enumerate(model.decoder.block):
        for kind, part in enumerate(block.layer):
            yield f"decoder.block.{number}.layer.{kind}.layer_norm", part.layer_norm
    yield "decoder.final_layer_norm", model.decoder.final_layer_norm
    for layer, head in model.exit_heads.heads.items():
        if type(head) is NormHead:
            yield f"exit_heads.heads.{layer}.norm", head.norm


def replaced_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a copy replaces, by name."""
    yield "lm_head", model.lm_head
    for name, module in model.decoder.block.named_modules(prefix="decoder.block"):
        if not name.endswith(".act"):
            yield name, module
    yield "decoder.final_layer_norm", model.decoder.final_layer_norm
    for name, head in model.exit_heads.named_modules(prefix="exit_heads"):
        if type(head) is NormHead:
            yield name, head
            yield f"{name}.norm", head.norm


# --- what the walk would bypass -------------------------------------------------------------------------------------


def passed_by(model: nn.Module) -> list[str]:
    """Changes to a model that the decoder walk would bypass, each with a remedy; empty for a stock model.

    Linear maps, norms, the embedding, the LM head and exit heads are called as modules and may be of any class.
    """
    decoder = model.decoder
    if not _runs_as(decoder, T5Stack) or not isinstance(decoder.block, nn.ModuleList):
        return [f"`decoder`, {described(decoder)} in place of the library's: put that back"]
    problems = [
        f"hooks of {name}, which is not called as a whole: remove them"
        for name, module in (("the model", model), ("`decoder`", decoder))
        if has_hooks(module)
    ]
    for number, block in enumerate(decoder.block):
        problems += _passed_by_in_block(f"decoder.block.{number}", block)
    return problems or _without_weights(model)


def _passed_by_in_block(name: str, block: nn.Module) -> list[str]:
    whole = getattr(block, "_orig_mod", block)  # the block inside a `torch.compile` wrapper
    if not isinstance(whole, T5Block) or type(whole).forward is not T5Block.forward:
        return [f"`{name}`, {described(block)} in place of the library's: put that back"]
    for inner, kind in AROUND_MAPS:
        module = whole
        for part in inner.split("."):
            module = module._modules[part]
        if not _runs_as(module, kind):
            return [f"`{name}.{inner}`, {described(module)} with a `forward` of its own: put the library's back"]
        if has_hooks_before(module):
            return [f"hooks before `{name}.{inner}`, which is not called as a whole: remove them"]
    return []


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is a `kind` and runs the library's `forward`."""
    own = "forward" in vars(module) and not is_moved(module)
    return isinstance(module, kind) and type(module).forward is kind.forward and not own


def _without_weights(model: nn.Module) -> list[str]:
    """Modules that the walk calls directly and whose weights are loaded only by a call of an enclosing module."""
    lacking = [name for name, module in _called_alone(model) if _lacks_weights(module)]
    return [
        f"`{name}`, whose weights are on the meta device until a module around it is called: offload each module by "
        "itself (no `preload_module_classes`)"
        for name in lacking[:1]
    ]


def _lacks_weights(root: nn.Module) -> bool:
    parts = modules_of(root) if root._modules else (root,)  # most are a single linear map
    held = ((module, one) for module in parts for one in module._parameters.values())
    return any(one is not None and one.is_meta and not is_moved(module) for module, one in held)


def _called_alone(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules besides blocks that the walk calls directly, by name."""
    for name in ("embed_tokens", "final_layer_norm"):
        yield f"decoder.{name}", getattr(model.decoder, name)
    for number, block in enumerate(model.decoder.block):
        own, cross = block.layer[0], block.layer[1].EncDecAttention
        keys = f"decoder.block.{number}.layer"
        yield f"{keys}.0.layer_norm", own.layer_norm
        for name in ("k", "v"):
            yield f"{keys}.0.SelfAttention.{name}", getattr(own.SelfAttention, name)
            yield f"{keys}.1.EncDecAttention.{name}", getattr(cross, name)
    yield (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        (model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias),
    )
    yield "lm_head", model.lm_head
    yield "exit_heads", model.exit_heads
