"""The refit, at once and by descent: the joint solution, and careful where nothing is to be won.

Shapes: T tokens, H hidden, N tokens of one expert, W its width.
"""

import pytest
import torch

from camera.compensation import expert_regression, least_squares, normal_equations
from camera.compensation.expert_regression import ExpertRegression
from camera.compensation.least_squares import refit
from camera.compensation.settings import CompensationSettings
from camera.runtime.errors import CameraError

T, H = 400, 24


@pytest.fixture(autouse=True, params=[4096, 0], ids=["at once", "descent"])
def micro_experts_solved_at_once(request, monkeypatch):
    monkeypatch.setattr(least_squares, "AT_ONCE", request.param)


def experts(widths=(10, 7, 12), seed=0):
    """Experts of which the first sees all tokens, and phi of all on all tokens (0 where not)."""
    generator = torch.Generator().manual_seed(seed)
    blocks, columns = [], []
    for e, width in enumerate(widths):
        tokens_N = None if e == 0 else torch.randperm(T, generator=generator)[:150].sort().values
        count = T if tokens_N is None else len(tokens_N)
        scale_W = 10 ** torch.randn(width, generator=generator)
        phi_NW = torch.randn(count, width, generator=generator) * scale_W
        blocks.append(
            ExpertRegression(tokens_N, phi_NW, torch.randn(width, H, generator=generator))
        )
        phi_TW = torch.zeros(T, width)
        phi_TW[slice(None) if tokens_N is None else tokens_N] = phi_NW
        columns.append(phi_TW)
    return blocks, torch.cat(columns, 1).double()


def changes(blocks):
    return torch.cat([block.weight_WH - block.old_WH for block in blocks]).double()


def removed(phi_TN, noise=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(phi_TN.shape[1], H, generator=generator, dtype=torch.float64)
    return (phi_TN @ weight + noise * torch.randn(T, H, generator=generator)).float()


@pytest.mark.parametrize(
    ("ridge", "piece", "widths"),
    [(0.3, 1000, (10, 7, 12)), (0.03, 1000, (10, 7, 12)), (0.3, 60, (10, 7, 12)), (0.3, 60, (10,))],
)
def test_it_ends_at_the_joint_solution(ridge, piece, widths, monkeypatch):
    monkeypatch.setattr(least_squares, "ENOUGH", 1e-9)
    monkeypatch.setattr(expert_regression, "PIECE", piece)  # of 400 tokens
    monkeypatch.setattr(normal_equations, "PIECE", piece)
    blocks, phi_TN = experts(widths)
    target_TH = removed(phi_TN)
    residual_TH = target_TH.clone()
    found = refit(blocks, residual_TH, 350, CompensationSettings(ridges=[ridge], sweeps=500))
    gram_NN = phi_TN.T @ phi_TN
    norm2_N = torch.cat([block.old_WH for block in blocks]).double().square().sum(1)
    energy = (gram_NN.diagonal() * norm2_N).mean()
    weighted_NN = gram_NN + ridge * energy * torch.diag(1 / norm2_N)
    want = torch.linalg.solve(weighted_NN, phi_TN.T @ target_TH.double())
    fitted, best = phi_TN @ changes(blocks), phi_TN @ want
    assert (fitted - best).norm() < 1e-3 * best.norm()
    torch.testing.assert_close(residual_TH.double(), target_TH - fitted, rtol=1e-3, atol=1e-2)
    assert found.residual == pytest.approx(residual_TH.double().square().sum().item(), rel=1e-4)


def test_ways_agree_on_the_ridge_and_on_what_is_missing(monkeypatch):
    found = []
    monkeypatch.setattr(least_squares, "ENOUGH", 1e-6)
    for most in (4096, 0):
        monkeypatch.setattr(least_squares, "AT_ONCE", most)
        blocks, phi_TN = experts(widths=(60, 60))
        residual_TH = removed(phi_TN, noise=100.0)
        found.append(refit(blocks, residual_TH, 350, CompensationSettings(sweeps=500)))
    one, other = found
    assert one.ridge == other.ridge > 0
    for name in ("removed", "residual", "removed_out", "residual_out"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3), name


def test_the_scale_of_a_micro_expert_does_not_matter():
    results = []
    for scale in (1.0, 1000.0):
        blocks, phi_TN = experts(widths=(10, 7))
        residual_TH = removed(phi_TN)
        scaled = [
            ExpertRegression(block.tokens_N, block.phi_NW * scale, block.old_WH / scale)
            for block in blocks
        ]
        refit(scaled, residual_TH, 350, CompensationSettings(ridges=[0.1, 0.01]))
        results.append(residual_TH)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-2)


def test_where_no_ridge_helps_held_out_tokens_nothing_changes():
    blocks, _ = experts(widths=(200, 100))
    noise_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(2))
    residual_TH = noise_TH.clone()
    found = refit(blocks, residual_TH, 350, CompensationSettings())
    assert found.ridge == 0 and found.residual == found.removed
    assert not changes(blocks).any()
    torch.testing.assert_close(residual_TH, noise_TH, rtol=0, atol=1e-2)


def test_held_out_tokens_choose_a_smaller_ridge_where_there_is_less_noise():
    chosen = []
    for noise in (300.0, 0.01):
        blocks, phi_TN = experts(widths=(60, 60))
        found = refit(
            blocks,
            removed(phi_TN, noise),
            350,
            CompensationSettings(ridges=[1.0, 0.1, 0.01, 0.001]),
        )
        chosen.append(found.ridge)
    assert chosen[0] > chosen[1] > 0


def test_the_residual_never_grows():
    blocks, phi_TN = experts()
    residual_TH = removed(phi_TN, noise=10)
    last = residual_TH.norm()
    for block in blocks:
        block.fit_to(T)
        block.factorise(1.0)
    for _ in range(5):
        for block in blocks:
            block.step(residual_TH)
            assert residual_TH.norm() <= last * (1 + 1e-6)
            last = residual_TH.norm()


def test_what_the_text_hardly_uses_hardly_changes():
    """An expert whose energy here is a millionth of the others', as far as it is known."""
    blocks, phi_TN = experts()
    rare = ExpertRegression(None, 1e-3 * torch.randn(T, 10), torch.randn(10, H))
    refit([*blocks, rare], removed(phi_TN), 350, CompensationSettings(ridges=[0.1]))
    relative = (rare.weight_WH - rare.old_WH).norm() / rare.old_WH.norm()
    others = torch.cat([b.weight_WH - b.old_WH for b in blocks]).norm()
    assert relative < 1e-3 < others / torch.cat([b.old_WH for b in blocks]).norm()


def test_experts_without_tokens_or_micro_experts_are_left_alone():
    empty = ExpertRegression(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5), torch.ones(5, H))
    gone = ExpertRegression(None, torch.zeros(T, 0), torch.zeros(0, H))
    blocks, phi_TN = experts()
    refit([empty, *blocks, gone], removed(phi_TN), 350, CompensationSettings())
    assert torch.equal(empty.weight_WH, torch.ones(5, H))
    assert all(torch.isfinite(block.weight_WH).all() for block in blocks)


@pytest.mark.parametrize(
    "options",
    [
        dict(scope="model"),
        dict(target="none"),
        dict(token_weights="none"),
        dict(scope="expert", target="dense"),
        dict(scope="expert", target="between"),
        dict(ridges=[]),
        dict(ridges=[0.1, 0.0]),
        dict(sweeps=0),
        dict(held_out=1.0),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(CameraError, match=r"must|none of|needs"):
        CompensationSettings(**options)
