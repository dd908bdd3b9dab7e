"""An evaluation whose calls are timed on three tokens: to time a grid takes four fifths of an evaluation."""

from __future__ import annotations

import pytest

from hf_earlyexit import evaluation


def time_shortly(patch: pytest.MonkeyPatch) -> None:
    """Everything is timed as it is, beside stock, on the same batches; texts and their quality are whole."""
    whole = evaluation.time_beside_stock

    def shorter(ours, stock, batches):
        return whole(ours, stock, [{**batch, "max_new_tokens": 3} for batch in batches])

    patch.setattr(evaluation, "time_beside_stock", shorter)
