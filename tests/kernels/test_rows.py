"""`Rows`: runs, places, and reading and writing rows of batch tensors."""

from __future__ import annotations

import pytest
import torch

from hf_earlyexit.kernels.rows import LARGE_ROW, Rows


@pytest.mark.parametrize("indices", ([0, 1, 2, 3, 4], [2], [1, 2], [0, 2, 3], [0, 2, 4]))
@pytest.mark.parametrize("width", (3, LARGE_ROW))
def test_select_and_place(indices, width):
    rows, tensor = Rows(indices, 5), torch.randn(5, width)
    assert torch.equal(rows.select(tensor), tensor[indices])
    values, expected = torch.randn(len(indices), width), tensor.clone()
    expected[indices] = values
    rows.place(tensor, values)
    assert torch.equal(tensor, expected)
    assert [row for run in rows.runs for row in range(run.start, run.stop)] == indices
    assert [torch.equal(tensor[run], values[here]) for run, here in zip(rows.runs, rows.places)] == [True] * len(
        rows.runs
    )


def test_neighbours_are_read_as_views():
    tensor = torch.randn(5, 3)
    assert Rows([1, 2], 5).select(tensor).data_ptr() == tensor[1].data_ptr()
    assert Rows.everyone(5).select(tensor) is tensor
    assert Rows([0, 2], 5).choose([1]).indices == [2]
