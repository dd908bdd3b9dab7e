"""The shipped model, prepared, on single inputs padded to static shapes."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_earlyexit.common.partition import Partition
from hf_earlyexit.families.shipped import default_examples, load_default


PADDINGS = {
    "to a multiple of 64": {"padding": True, "pad_to_multiple_of": 64},
    "to 128": {"padding": "max_length", "max_length": 128},
}


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDINGS)
def test_prepared_writes_what_plain_writes(padding):
    """Texts and exits are equal. Without the mask a quarter of the texts differed."""
    model, tokenizer = load_default()
    prepared = copy.copy(model).prepare_for_generation()
    exits = {"exit_criterion": "classifier", "exit_threshold": 0.9, "return_dict_in_generate": True}
    for example in Partition().in_order(default_examples(), 40):
        inputs = tokenizer([example.source], return_tensors="pt", **PADDINGS[padding])
        assert not inputs["attention_mask"].all()
        plain, other = (one.generate(**inputs, **exits, output_logits=True) for one in (model, prepared))
        assert torch.equal(plain.sequences, other.sequences) and torch.equal(plain.layers_run, other.layers_run)
        torch.testing.assert_close(plain.logits[0], other.logits[0], atol=1e-4, rtol=1e-4)
