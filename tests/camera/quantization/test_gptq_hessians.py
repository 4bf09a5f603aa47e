"""The GPTQ solver where a Hessian doesn't serve as it is.

Shapes: E experts, R rows, C columns, N tokens.
"""

import pytest
import torch

from camera.quantization.quantizers.gptq import GPTQ
from tests.helpers.quantization.gptq_problem import C, inputs


def test_dead_columns(W_ERC, H_ECC):
    dead = [0, 17, C - 1]
    H_ECC[0, dead, :] = 0
    H_ECC[0, :, dead] = 0
    for solver in (GPTQ(group_size=16), GPTQ(group_size=16, act_order=True, static_groups=True)):
        factor = solver.factor(H_ECC)
        result = solver.solve(W_ERC, factor, bits=2)
        assert torch.nonzero(factor.dead_EC[0]).flatten().tolist() == dead
        assert (result.weight[0][:, dead] == 0).all()
        assert (result.weight[1][:, dead] != 0).any()
        assert not factor.dead_EC[1:].any() and result.weight.isfinite().all()


@pytest.mark.parametrize("act_order", [False, True])
def test_fallback_round_to_nearest(W_ERC, H_ECC, act_order):
    H_ECC[2] = 0
    H_ECC[3] *= 0.01
    tokens_E = torch.tensor([300, 300, 0, 3, 300])
    solver = GPTQ(group_size=16, min_tokens=8, act_order=act_order)
    result = solver.solve(W_ERC, solver.factor(H_ECC, tokens_E), bits=2)
    nearest = solver.solve(W_ERC, bits=2)
    assert result.fallback == ["", "", "rtn", "rtn", ""]
    assert [result.damping_E[e] for e in (0, 1, 4)] == [0.01] * 3
    assert torch.equal(result.weight[2:4], nearest.weight[2:4])
    assert not torch.equal(result.weight[0], nearest.weight[0])
    unseen = solver.factor(H_ECC)  # without counts, an empty Hessian tells
    assert unseen.fallback == ["", "", "rtn", "", ""]


def test_fallback_mean_hessian(W_ERC, H_ECC):
    H_ECC[2] = 0
    tokens_E = torch.tensor([300, 300, 0, 3, 300])
    solver = GPTQ(group_size=16, min_tokens=8, fallback="mean_hessian")
    result = solver.solve(W_ERC, solver.factor(H_ECC, tokens_E), bits=2)
    mean_CC = H_ECC[[0, 1, 4]].mean(0, keepdim=True)
    want = solver.solve(W_ERC[2:4], solver.factor(mean_CC), bits=2)
    assert torch.equal(result.codes_ERC[2:4], want.codes_ERC)
    assert result.fallback == ["", "", "mean_hessian", "mean_hessian", ""]
    assert H_ECC[2].abs().max() == 0  # the caller's tensor stays as it was
    nobody = solver.factor(torch.zeros(2, C, C))
    assert nobody.fallback == ["rtn", "rtn"]


def test_damping_ladder(W_ERC, H_ECC):
    """Singular, indefinite, hopeless and broken Hessians: each gets the rung it needs."""
    x_NC = inputs()[0, :4]
    H_ECC[1] = x_NC.T @ x_NC  # rank 4 of 80
    mean = H_ECC[2].diagonal().mean()
    lowest = torch.linalg.eigvalsh(H_ECC[2]).min()
    H_ECC[2] -= (lowest + 0.05 * mean) * torch.eye(C)  # the lowest eigenvalue is -0.05 mean
    H_ECC[3] = -H_ECC[3]
    H_ECC[4, 1, 1] = torch.nan
    solver = GPTQ(group_size=16, damping=1e-9)
    factor = solver.factor(H_ECC)
    assert factor.damping_E[0] == 1e-9
    assert 1e-9 < factor.damping_E[1] < 1e-3
    assert factor.damping_E[2] == pytest.approx(0.1)
    assert factor.fallback == ["", "", "", "rtn_damping", "rtn_damping"]
    result = solver.solve(W_ERC, factor, bits=2)
    assert result.weight.isfinite().all()
    assert torch.equal(result.weight[3:], solver.solve(W_ERC, bits=2).weight[3:])
    assert result.fallback == factor.fallback and len(set(result.damping_E[:3])) == 3
    assert GPTQ(damping=0).factor(-H_ECC[:1]).fallback == ["rtn_damping"]
