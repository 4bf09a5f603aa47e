"""Every form of experts computes on an accelerator what it computes on the CPU."""

import pytest
import torch
from torch.nn import functional as F

import camera
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.checkpoint.loading import load_model

pytestmark = pytest.mark.gpu  # on a real card too
FORMS = {
    "ragged": ("camera_p", {}),
    "uniform": ("camera_p", dict(expert_widths="uniform", sparsity=0.4138)),
    "fewer experts": ("reap", {}),
    "constants": ("mone", {}),
    "packed": ("camera_q", {}),
    "packed columns": ("camera_q_dagger", {}),
    "packed alike": ("gptq", {}),
    "factors": ("d2_moe", {}),
}


@torch.no_grad()
def logits(model, tokens: int) -> torch.Tensor:
    ids_BL = torch.arange(3, 3 + tokens).view(1, tokens)
    return model(ids_BL.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_logits_of_the_cpu(form, compressed, device):
    case, settings = FORMS[form]
    folder = compressed(case, "cpu", settings=settings)
    there, here = load_model(folder, device, "float32"), load_model(folder, "cpu")
    assert str(there.device) == device
    for tokens in (1, 2, 60):  # few tokens are gathered, many are sorted
        torch.testing.assert_close(
            logits(there, tokens), logits(here, tokens), rtol=1e-4, atol=1e-4
        )
    plain = camera.dequantize(there)
    torch.testing.assert_close(logits(plain, 60), logits(here, 60), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["camera_p", "camera_q"])
def test_a_form_decodes_in_half_precision(case, compressed, device):
    folder = compressed(case, "cpu")
    there, here = (load_model(folder, where, "bfloat16") for where in (device, "cpu"))
    torch.testing.assert_close(logits(there, 1), logits(here, 1), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("way", ["gathered", "by_width", "by_expert"])
def test_every_way_of_ragged_experts_is_that_of_the_cpu(way, device):
    torch.manual_seed(0)
    experts = RaggedExperts(16, [8, 0, 8, 16, 4], F.silu, "cpu", torch.float32)
    for table in experts.parameters():
        torch.nn.init.normal_(table)
    call = torch.randn(12, 16), torch.randint(5, (12, 2)), torch.rand(12, 2)
    with torch.no_grad():
        expected = experts.by_expert(*call)
        experts.to(device)
        found = getattr(experts, way)(*(part.to(device) for part in call))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
