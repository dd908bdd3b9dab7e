"""The checkpoint that ships with the package: its files, loading it, and inputs to try and evaluate it.

Nothing is downloaded. `assets/t5-e2e/README.md` describes the model, the source of its data and the licence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_earlyexit.common.data import Example, read_examples, read_file
from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration


ASSETS = Path(__file__).parent.parent / "assets"
CHECKPOINT = ASSETS / "t5-e2e"
VALIDATION = ASSETS / "e2e-validation.csv.gz"
PREFIX = "describe: "


def load_default(
    early_exit: EarlyExitConfig | None = None,
) -> tuple[EarlyExitT5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """The shipped model, in eval mode and fp32 on the CPU, and its tokenizer.

    Inputs are `describe: ` and the attributes of a restaurant, as in `default_inputs()`.

    Args:
        early_exit: The exit points; all layers but the last if None.
    """
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(CHECKPOINT, early_exit=early_exit, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(CHECKPOINT)


def default_exits() -> dict[str, Any]:
    """Measured results of the shipped model's exits on inputs that nothing was chosen on.

    Returns:
        `setting`, keywords of `generate`, chosen on other inputs to lose at most 2 points of ROUGE-L; `rougeL` of full
        depth and of the setting; `distribution`, the share of tokens that ran 1, 2, ... layers; `layers_run`, the
        number of layers that every token ran, by text.
    """
    return json.loads((CHECKPOINT / "exits.json").read_text(encoding="utf-8"))


def default_examples() -> list[Example]:
    """The validation set of E2E NLG with all references; the shipped model has not been trained on it.

    Its 4,672 rows are 547 distinct inputs. The prefix is included.
    """
    return read_examples(read_file(str(VALIDATION)), "mr", "ref", prefix=PREFIX, group_by="mr")


def default_inputs() -> list[str]:
    """Some inputs of E2E NLG's validation set, prefix included; the shipped model has not been trained on them."""
    return (ASSETS / "inputs.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
