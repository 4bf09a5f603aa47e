"""Experts with constants: every implementation adds the constants with the routing weights."""

import pytest
import torch

from camera.checkpoint.formats.approximate import ApproximateExperts
from tests.helpers.constants import outputs_of

E, H, W = 6, 16, 8


@pytest.fixture
def native():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=W, num_experts=E)
    experts = Qwen3MoeExperts(config).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for table in experts.parameters():
        table.copy_(torch.randn(table.shape, generator=draw) / 4)
    return experts


@pytest.fixture
def constants():
    return torch.randn(2, H, generator=torch.Generator().manual_seed(1))


def approximate(native, keep, constants):
    from camera.moe.experts.group import RoutedExperts

    return ApproximateExperts.of(RoutedExperts("experts", native), keep, constants)


@pytest.mark.parametrize("tokens", [0, 1, 2, 40])
@pytest.mark.parametrize("keep", [[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]])
def test_a_replaced_expert_puts_out_its_constant(tokens, keep, native, constants):
    draw = torch.Generator().manual_seed(2)
    x_TH = torch.randn(tokens, H, generator=draw)
    index_TK = torch.rand(tokens, E, generator=draw).argsort(1)[:, :3]
    weight_TK = torch.rand(tokens, 3, generator=draw)
    out_TEH = outputs_of(native, x_TH).float() if tokens else torch.zeros(0, E, H)
    out_TEH[:, [not stays for stays in keep]] = constants
    chosen_TKH = out_TEH.gather(1, index_TK[..., None].expand(-1, -1, H))
    module = approximate(native, keep, constants)
    want_TH = (chosen_TKH * weight_TK[..., None]).sum(1)
    found_TH = module(x_TH, index_TK, weight_TK)
    torch.testing.assert_close(found_TH, want_TH, rtol=1e-4, atol=1e-5)
    for way in ("all_at_once", "by_expert", "by_width", "gathered") if tokens else ():
        rest_TH = getattr(module, way)(x_TH, index_TK, weight_TK)
        added_TH = module.add_constants(rest_TH, index_TK, weight_TK)
        torch.testing.assert_close(added_TH, want_TH, rtol=1e-4, atol=1e-5)


def test_the_spec_alone_builds_the_module(native, constants):
    module = approximate(native, [1, 0, 1, 1, 0, 1], constants)
    assert module.spec() == {"form": "approximate", "widths": [W, 0, W, W, 0, W]}
    empty = ApproximateExperts.from_spec(native, module.spec())
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


def test_what_would_lose_the_constants_is_not_offered(native, constants):
    module = approximate(native, [1, 0, 1, 1, 0, 1], constants)
    assert module.dequantize() is module
    with pytest.raises(NotImplementedError):
        module.select([torch.arange(width) for width in module.widths])
    with pytest.raises(NotImplementedError):
        module.to_native(W)
