"""linear equals F.linear in all its cases: few rows, many rows, and inputs of any number of dimensions."""

import pytest
import torch
import torch.nn.functional as F

from runtime.linear import linear

SHAPES = [(1,), (3,), (1, 1), (2, 1), (8, 1), (9, 1), (2, 3), (2, 3, 1), (2, 3, 2), (3, 4, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [7, 58, 256])  # one block for a prime number, two of 29, two of 128
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_that_of_torch(shape, width, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 12, dtype=torch.float64), torch.randn(width, 12, dtype=torch.float64)
    bias = torch.randn(width, dtype=torch.float64) if bias else None
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-12, rtol=0)
