"""The certificate of a model in memory: saving and loading it with the model, and checking calls against it.

`generation/certificate.py` defines what a certificate covers; `calibration/model_calibration.py` produces one.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from hf_earlyexit.common.library import file_if_there
from hf_earlyexit.common.seen_inputs import SeenInputs
from hf_earlyexit.decoding.settings import CERTIFICATE, ExitSettings
from hf_earlyexit.generation.certificate import FILE, Certificate, CertificateWarning, call_conditions, changes_texts
from hf_earlyexit.generation.fingerprint import parameter_versions, weights_fingerprint
from hf_earlyexit.generation.implementations import implementation_of


# Arguments of `generate` that change texts and are not part of a generation config.
IN_NO_CONFIG = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "decoder_input_ids")
INPUTS = ("inputs", "input_ids", "inputs_embeds")
NOT_SAVED = (
    "The weights are not those that the certificate is about, so it is not saved with them: calibrate again "
    "(`hf-earlyexit calibrate`)."
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def uncertified(model: CertifiedMixin) -> Any:
    """A copy of the model that shares all weights, without certificate and stored exit settings."""
    bare = copy.copy(model)
    bare.generation_config = copy.deepcopy(model.generation_config)
    bare._forget_certificate()
    return bare


class CertifiedMixin:
    """A certificate for a class with `generation_config`, `early_exit` and `decoder_adapter`.

    Attributes:
        exit_certificate: The certificate; None if there is none.
        seen_inputs: Inputs that the model and its criteria were fitted on, as far as recorded; saved with the model.
    """

    exit_certificate: Certificate | None = None
    seen_inputs: SeenInputs = SeenInputs()
    # Parameter versions, whether the weights are the certified ones, and whether they were read to determine that.
    _known_weights: tuple[Any, bool, bool] | None = None

    def certify(self, certificate: Certificate) -> None:
        """Attach a certificate and store its decoding and exit settings in `generation_config`.

        They replace all stored ones, except `strict_certificate`. The weights must be the certified ones; `generate`
        and `save_pretrained` check that.
        """
        strict = getattr(self.generation_config, "strict_certificate", None)
        self._forget_certificate()
        self.generation_config = certified_config(self.generation_config, certificate)
        if strict is not None:
            self.generation_config.strict_certificate = strict
        self.exit_certificate = certificate

    def record_seen(self, by: str, sources: Iterable[str]) -> None:
        """Record inputs that something was fitted on, so that no certificate is tested on them.

        Args:
            by: `"training"` or `"criteria"`.
            sources: The inputs as the model reads them, prefix included.
        """
        self.seen_inputs = self.seen_inputs.plus(by, sources)

    def _forget_certificate(self) -> None:
        for name in (*ExitSettings.names(), CERTIFICATE):
            self.generation_config.__dict__.pop(name, None)
        self.exit_certificate = self._known_weights = None

    # --- calls ------------------------------------------------------------------------------------------------------

    def _hold_to_certificate(self, settings: ExitSettings, call: dict[str, Any]) -> None:
        """Warn about, or with `strict_certificate` refuse, a `generate` call that the certificate does not cover."""
        if not settings.early_exit or (self.exit_certificate is None and not settings.strict_certificate):
            return
        problems = self._not_certified(settings, call)
        if problems and settings.strict_certificate:
            raise ValueError(
                f"`strict_certificate=True`, and this call is not covered: {'; '.join(problems)}. Call `generate` as "
                "certified, calibrate for what you need (`hf-earlyexit calibrate`), or pass `early_exit=False`."
            )
        if problems:
            message = f"The certificate of this model does not cover this call: {'; '.join(problems)}."
            warnings.warn(message, CertificateWarning, stacklevel=3)

    def _not_certified(self, settings: ExitSettings, call: dict[str, Any]) -> list[str]:
        certificate = self.exit_certificate
        if certificate is None:
            return ["the model has no certificate"]
        if not certificate.certified:
            return ["the certificate says that no setting but full depth keeps the target"]
        config, cut = self._config_of(call), certificate.data["max_source_tokens"]
        problems = certificate.differences(self.conditions_of(settings, call, config))
        problems += certificate.uncovered(implementation_of(self, config), _source_tokens(call, cut))
        if not self._has_certified_weights(read=settings.strict_certificate):
            problems.append("the weights are not the certified ones")
        return problems

    def _config_of(self, call: dict[str, Any]) -> GenerationConfig:
        """The generation config of a call, as the library prepares it."""
        return super()._prepare_generation_config(call.get("generation_config"), **call.get("kwargs", {}))[0]

    def conditions_of(
        self, settings: ExitSettings, call: dict[str, Any], config: GenerationConfig | None = None
    ) -> dict[str, Any]:
        """Everything in a call that determines its texts, as `call_conditions`.

        Args:
            settings: The exit settings of the call.
            call: Arguments of `generate` by name, with the keywords both under `kwargs` and by their own names.
            config: The generation config of the call, if already prepared.
        """
        config = self._config_of(call) if config is None else config
        points = settings.exit_points(self.early_exit, self.decoder_adapter.shape(self).num_layers)
        own = {name: _described(call[name]) for name in IN_NO_CONFIG if _is_given(call.get(name))}
        inputs = _inputs_of(call)
        device = (self.device if inputs is None else inputs.device).type  # "meta" for an offloaded model
        if torch.is_autocast_enabled(device):
            own["autocast"] = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        return call_conditions(settings, points, config, self, _rows_of(call)) | own

    def _has_certified_weights(self, read: bool) -> bool:
        """Whether the weights are the certified ones.

        Reads the weights if they may have changed since the last check: written to, moved, trained, or after a step of
        any optimizer of the process. With `read`, reads them at least once.
        """
        marks = parameter_versions(self)
        known, same, was_read = self._known_weights or (None, False, False)
        if marks != known or (read and not was_read):
            same = self._has_weights_of(self.exit_certificate)
            self._known_weights = (marks, same, True)
        return same

    def _has_weights_of(self, certificate: Certificate, state_dict: Mapping[str, torch.Tensor] | None = None) -> bool:
        """Read all weights and compare fingerprints; False if they cannot be read (offloaded or quantised)."""
        try:
            return weights_fingerprint(self, state_dict) == certificate.weights
        except ValueError:
            return False

    def train(self, mode: bool = True):
        if mode:
            self._known_weights = None  # training may change weights in ways that are not detected
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_known_weights"}

    # --- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """As the library's; also saves the certificate if the saved weights are the certified ones.

        Reads the weights to check that, since not every write to weights can be detected.
        """
        self.seen_inputs.name_in(self.config)
        certificate, saved = self.exit_certificate, self
        if certificate is not None and not self._has_weights_of(certificate, kwargs.get("state_dict")):
            warnings.warn(NOT_SAVED, CertificateWarning, stacklevel=3)
            saved = self._without_certificate()
        super(CertifiedMixin, saved).save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            saved._save_beside(save_directory)

    def _without_certificate(self) -> Any:
        """A copy without certificate that shares all weights and keeps the settings.

        A copy, so that other threads keep using the model unchanged.
        """
        other = copy.copy(self)
        other.generation_config = copy.deepcopy(self.generation_config)
        other.generation_config.__dict__.pop(CERTIFICATE, None)
        other.exit_certificate = None
        return other

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        """Write the files before the upload: `save_pretrained(push_to_hub=True)` uploads before it returns."""
        self._save_beside(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _save_beside(self, folder: str | os.PathLike) -> None:
        if self.exit_certificate is not None:
            self.exit_certificate.save(folder)
        if self.seen_inputs:
            self.seen_inputs.save(folder)

    def _load_seen_inputs(self, path: str | os.PathLike, hub: dict[str, Any]) -> None:
        """Read the recorded inputs from the model's folder or repository."""
        options = {key: hub[key] for key in HUB_ARGUMENTS if key in hub}
        self.seen_inputs = SeenInputs.of_model(path, self.config, **options)

    def _load_certificate(self, path: str | os.PathLike, as_stored: bool, hub: dict[str, Any]) -> None:
        """Read the certificate that `generation_config` names from the model's folder or repository.

        Args:
            path: A folder or a Hub id.
            as_stored: Whether the weights are those of the checkpoint; then they are assumed to be the certified ones.
            hub: Keywords of `from_pretrained`.
        """
        name = getattr(self.generation_config, CERTIFICATE, None)
        if name is None:
            return
        options = {key: hub[key] for key in HUB_ARGUMENTS if key in hub}
        file = file_if_there(path, name, **options)
        if file is None:
            message = f"The generation_config of {str(path)!r} names a certificate, {name}, which is not there."
            warnings.warn(message, CertificateWarning, stacklevel=4)
            return
        self.exit_certificate = Certificate.load(file)
        self._known_weights = (parameter_versions(self), True, False) if as_stored else None


def certified_config(config: GenerationConfig, certificate: Certificate) -> GenerationConfig:
    """A copy of `config` with the decoding and exit settings of a certificate."""
    certified = copy.deepcopy(config)
    for name in [name for name in certified.to_dict() if changes_texts(name) and hasattr(GenerationConfig(), name)]:
        setattr(certified, name, None)
    for name, value in {**certificate.decoding, **certificate.setting, CERTIFICATE: FILE}.items():
        setattr(certified, name, value)
    return certified


def _is_given(value: Any) -> bool:
    """Whether an argument is given; an empty list counts as not given."""
    return value is not None and not (isinstance(value, list) and not value)


def _described(value: Any) -> str:
    """The `repr` of a value; of a tensor only the shape."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _inputs_of(call: dict[str, Any]) -> torch.Tensor | None:
    """The inputs of a `generate` call, `[rows, source, ...]`."""
    given = [call[name] for name in INPUTS if call.get(name) is not None]
    states = call.get("encoder_outputs")
    return given[0] if given else None if states is None else states[0]


def _rows_of(call: dict[str, Any]) -> int | None:
    """The number of inputs of a `generate` call; None if unknown."""
    inputs = _inputs_of(call)
    return None if inputs is None else len(inputs)


def _source_tokens(call: dict[str, Any], cut: int | None) -> int | None:
    """Tokens of the longest input of a call; padding included if the padded length is at most `cut`.

    Excluding padding waits for the device, so it is done only where the result matters.
    """
    inputs, mask = _inputs_of(call), call.get("attention_mask")
    if inputs is None or cut is None or inputs.shape[1] <= cut or mask is None:
        return None if inputs is None else inputs.shape[1]
    return int(mask.bool().sum(dim=-1).max())
