"""The GPTQ solver where rows or columns have bits of their own.

Shapes: E experts, R rows, C columns, N tokens.
"""

import pytest
import torch

from camera.quantization.quantizers.gptq import GPTQ
from tests.helpers.quantization.gptq_problem import KINDS, C, E, R, as_good, same


@pytest.mark.parametrize("kind", KINDS)
def test_row_bits_are_the_uniform_runs_rows(W_ERC, H_ECC, kind):
    solver = GPTQ(**KINDS[kind])
    factor = solver.factor(H_ECC)
    uniform = {bits: solver.solve(W_ERC, factor, bits=bits) for bits in (1, 2, 3)}
    row_bits = torch.randint(1, 4, (E, R))
    mixed = solver.solve(W_ERC, factor, row_bits=row_bits)
    assert torch.equal(mixed.bits_ERG[:, :, 0], row_bits)
    for bits, run in uniform.items():
        rows = row_bits == bits
        assert torch.equal(mixed.codes_ERC[rows], run.codes_ERC[rows])
        assert torch.equal(mixed.weight[rows], run.weight[rows])
    vector = solver.solve(W_ERC, factor, row_bits=row_bits[0])
    assert torch.equal(vector.codes_ERC[0], mixed.codes_ERC[0])


def segments(*cuts: tuple[int, int]) -> torch.Tensor:
    """Bits per column of contiguous (width, bits)."""
    return torch.tensor([bits for width, bits in cuts for _ in range(width)])


RAGGED = torch.stack(
    [
        segments((10, 3), (60, 2), (10, 1)),
        segments((13, 3), (50, 2), (17, 1)),
        segments((0, 3), (80, 2)),
        segments((79, 3), (1, 1)),
        segments((10, 3), (60, 2), (10, 1)),
    ]
)


@pytest.mark.parametrize("kind", ["plain", "uneven_groups", "act_order_static", "clip"])
def test_column_segments(W_ERC, H_ECC, kind):
    solver = GPTQ(**KINDS[kind])
    result = solver.solve(W_ERC, solver.factor(H_ECC), column_bits=RAGGED)
    size = KINDS[kind]["group_size"]
    bits_EC = result.bits_ERG[:, 0].gather(1, result.group_EC)
    assert torch.equal(bits_EC, RAGGED)
    assert (result.codes_ERC < 2 ** RAGGED[:, None]).all()
    for e in range(E):
        widths = [int((RAGGED[e] == b).sum()) for b in (3, 2, 1)]
        assert result.groups_E[e] == sum(-(-width // size) for width in widths)
        assert result.group_EC[e].bincount().max() <= size
        one = slice(e, e + 1)
        alone = solver.solve(W_ERC[one], solver.factor(H_ECC[one]), column_bits=RAGGED[e])
        as_good(alone.weight, result.weight[one], W_ERC[one], H_ECC[one])
    assert result.weight.isfinite().all()


def test_equal_segments_are_uniform(W_ERC, H_ECC):
    solver = GPTQ(group_size=32)
    factor = solver.factor(H_ECC)
    uniform = solver.solve(W_ERC, factor, bits=2)
    same(solver.solve(W_ERC, factor, column_bits=torch.full((E, C), 2)), uniform)
    same(solver.solve(W_ERC, factor, row_bits=torch.full((R,), 2)), uniform)
