"""Early-exit text generation for Hugging Face Transformers: easy tokens exit the decoder early."""

from hf_earlyexit.common.version import __version__
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.exits.config import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.exits.criteria import ExitPoint
from hf_earlyexit.families.t5.configuration import EarlyExitT5Config
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.mixin import EarlyExitGenerateBeamOutput, EarlyExitGenerateOutput


__all__ = [
    "ClassifierConfig",
    "EarlyExitCache",
    "EarlyExitConfig",
    "EarlyExitGenerateBeamOutput",
    "EarlyExitGenerateOutput",
    "EarlyExitT5Config",
    "EarlyExitT5ForConditionalGeneration",
    "ExitPoint",
    "__version__",
]
