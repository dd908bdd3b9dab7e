"""Early-exit text generation for Hugging Face Transformers: easy tokens leave the decoder early."""

from hf_earlyexit.cache import EarlyExitCache
from hf_earlyexit.config import ClassifierConfig, EarlyExitConfig, EarlyExitT5Config
from hf_earlyexit.generation import EarlyExitGenerateBeamOutput, EarlyExitGenerateOutput
from hf_earlyexit.models import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.policies import ExitPoint


__version__ = "0.1.0"

__all__ = [
    "ClassifierConfig",
    "EarlyExitCache",
    "EarlyExitConfig",
    "EarlyExitGenerateBeamOutput",
    "EarlyExitGenerateOutput",
    "EarlyExitT5Config",
    "EarlyExitT5ForConditionalGeneration",
    "ExitPoint",
]
