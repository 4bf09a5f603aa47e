"""Gradients that don't depend on the order in which a card adds: atomics add in any."""

import pytest
import torch

from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.gradients import _RoutedStub, _sum_of_slots
from tests import fake_device
from tests.helpers.models import build_model

ADDING = ("index_add", "scatter_add", "scatter_reduce", "index_put", "embedding_dense_backward")
TOKENS, TOP_K = 12, 3


def test_rows_of_a_token_are_added_in_one_order(fake, device):
    model = build_model("olmoe").to(device)
    layer = model.model.layers[0]
    group = FeedForward(layer, family_of("olmoe"), "layer").routed
    torch.manual_seed(0)
    scores_TE = torch.randn(TOKENS, len(group.widths))
    index_TK = scores_TE.topk(TOP_K).indices.to(device)
    x_TH = torch.randn(TOKENS, 32, device=device).requires_grad_()
    weight_TK = torch.rand(TOKENS, TOP_K, device=device).requires_grad_()
    with fake_device.counting() as counts:
        out_TH = _RoutedStub(group)(x_TH, index_TK, weight_TK)
        out_TH.square().sum().backward()
    operators = {row.operator for row in counts.rows if row.kind == "launch"}
    assert any("index_select" in name for name in operators)
    assert not [name for name in operators if any(word in name for word in ADDING)]

    plain_TH, share_TK = (t.detach().clone().requires_grad_() for t in (x_TH, weight_TK))
    expected = torch.zeros_like(plain_TH)
    for k in range(TOP_K):
        rows = [
            group.project(e, group.activations(e, plain_TH[t : t + 1]) * share_TK[t, k])
            for t, e in enumerate(index_TK[:, k].tolist())
        ]
        expected = expected + torch.cat(rows)
    expected.square().sum().backward()
    for mine, theirs in (
        (out_TH, expected),
        (x_TH.grad, plain_TH.grad),
        (weight_TK.grad, share_TK.grad),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_slots_is_that_of_the_rows(dtype, device):
    y_SH = torch.randn(6, 4, dtype=dtype, device=device)
    row_TK = torch.tensor([[4, 0], [1, 5], [2, 3]], device=device)
    found = _sum_of_slots(y_SH, row_TK)
    expected = torch.stack([y_SH[list(rows)].float().sum(0) for rows in row_TK.tolist()])
    torch.testing.assert_close(found.float(), expected.to(dtype).float())
