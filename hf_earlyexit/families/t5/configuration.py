"""The configuration of an early-exit T5, and its construction from a plain T5's."""

from __future__ import annotations

import copy
import os

from transformers import PreTrainedConfig, T5Config

from hf_earlyexit.exits.config import EarlyExitConfig


class EarlyExitT5Config(T5Config):
    """A `T5Config` with `early_exit`, the plain values of an `EarlyExitConfig`."""

    model_type = "early_exit_t5"

    early_exit: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.early_exit, EarlyExitConfig):
            self.early_exit = self.early_exit.to_dict()

    def to_dict(self) -> dict:
        if isinstance(self.early_exit, EarlyExitConfig):  # set after construction, as the Auto classes do
            self.early_exit = self.early_exit.to_dict()
        return super().to_dict()


def early_exit_config(
    path: str | os.PathLike, config: PreTrainedConfig | str | os.PathLike | None, kwargs: dict
) -> tuple[EarlyExitT5Config, dict]:
    """The early-exit configuration of a checkpoint, and the remaining keyword arguments for the model.

    All values of a plain T5's configuration are copied, so that none is lost, in particular `scale_decoder_outputs`.
    """
    config_class = EarlyExitT5Config
    if not isinstance(config, PreTrainedConfig):
        path = path if config is None else config
        for_model = {
            name: kwargs.pop(name) for name in ("dtype", "torch_dtype", "attn_implementation") if name in kwargs
        }
        values, _ = config_class.get_config_dict(path, **kwargs)
        if not values:
            raise OSError(f"{str(path)!r} has no config.json.")
        model_type = values.get("model_type")
        family = {config_class.model_type: config_class, "t5": T5Config}.get(model_type)
        if family is None:
            raise ValueError(
                f"{str(path)!r} is a model of type {model_type!r}; early exit supports 't5' and "
                f"{config_class.model_type!r}. UMT5, which has a relative bias in every block, and mT5 are not "
                "supported yet."
            )
        config, kwargs = family.from_dict(values, return_unused_kwargs=True, **kwargs)
        kwargs |= for_model
    config = copy.deepcopy(config)
    if isinstance(config, config_class):
        return config, kwargs
    if config.model_type != "t5":
        raise ValueError(
            f"`config` must be a `T5Config` or a `{config_class.__name__}`, got `{type(config).__name__}`."
        )
    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    return config_class(**values), kwargs
