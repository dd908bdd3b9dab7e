"""Answers for the tokenizer of a model: that there is one, and that it belongs to the model.

The library makes a tokenizer that knows no word where a folder has none.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_earlyexit.failures import reading
from hf_earlyexit.library import file_if_there


# A vocabulary is padded to a multiple of some power of two, so that a model may have a few more tokens than its
# tokenizer: T5's has 32,100, its models 32,128.
MOST_PADDING = 1024
REMEDY = "save the tokenizer that the model was trained with beside it"


def load_tokenizer(path: str | Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        path: Where the model is: a folder or a Hub id.
        config: Of the model.

    Raises:
        OSError: There is no such folder, or the Hub cannot be reached.
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
        where: The model's name for messages.

    Raises:
        ValueError: Its tokens are more than the model's, or far fewer, or the padding or end token is another one.
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
