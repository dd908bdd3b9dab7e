"""Load a model's tokenizer and check that it belongs to the model.

The check is needed because Transformers builds a tokenizer with an empty vocabulary for a folder that has none.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_earlyexit.common.failures import reading
from hf_earlyexit.common.library import file_if_there


# Vocabularies are padded to a multiple of a power of two, so a model may have a few more tokens than its tokenizer:
# T5's tokenizer has 32,100, its models 32,128.
MOST_PADDING = 1024
REMEDY = "save the tokenizer that the model was trained with beside it"


def load_tokenizer(path: str | Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: Folder or Hub id of the model.
        config: Config of the model.

    Raises:
        OSError: The folder does not exist, or the Hub cannot be reached.
        ValueError: There is no tokenizer, it cannot be read, or it belongs to another model.
    """
    with reading(path, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path)
    files = tokenizer.vocab_files_names.values()
    if files and not any(file_if_there(path, name) for name in files):
        raise ValueError(f"{path} has no tokenizer, none of {sorted(files)}: {REMEDY}")
    check_tokenizer(tokenizer, config, str(path))
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, where: str) -> None:
    """Refuse a tokenizer of another model, as far as sizes and special tokens show it.

    Args:
        where: Name of the model, for messages.

    Raises:
        ValueError: The tokenizer has more tokens than the model or far fewer, or a different padding or end token.
    """
    known, largest = len(tokenizer), max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size or config.vocab_size - known >= MOST_PADDING:
        raise ValueError(
            f"{where}: the tokenizer has {known} tokens, the model {config.vocab_size}: another model's, {REMEDY}"
        )
    for kind in ("pad_token_id", "eos_token_id"):
        found, expected = getattr(tokenizer, kind), getattr(config, kind, None)
        if expected is not None and found not in (expected if isinstance(expected, Collection) else [expected]):
            raise ValueError(
                f"{where}: `{kind}` of the tokenizer is {found}, of the model {expected}: another model's, {REMEDY}"
            )
