"""Batches without their padding, and back, against index_select and index_copy."""

import pytest
import torch

from fastattn.backends.triton import rows as kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("height", "columns", "share"), [(70, 300, 0.5), (33, 7, 0.1), (16, 64, 1.0), (5, 8, 0.0)]
)
def test_there_and_back(dtype, height, columns, share, poisoned):
    rows = torch.nonzero(torch.rand(height) < share).squeeze(1)
    matrix = torch.randn(columns, height).to(dtype).T  # not contiguous
    packed = kernels.unpad(matrix, rows)
    assert torch.equal(packed, matrix.index_select(0, rows))
    padded = kernels.pad(packed, rows, height)
    assert torch.equal(padded, torch.zeros(height, columns, dtype=dtype).index_copy(0, rows, packed))


def test_no_rows_at_all_pad_to_zeros(poisoned):
    assert not kernels.pad(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), 40).any()
