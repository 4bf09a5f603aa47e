"""The GPTQ solver gives the reference's numbers.

Shapes: E experts, R rows, C columns, N tokens.
"""

import pytest
import torch

from camera.quantization.gptq import GPTQ, QUIRKS, Hessian
from camera.quantization.grids import CLIPS
from tests.helpers.golden import golden_case


def close(got: torch.Tensor, want: torch.Tensor, compare: dict) -> None:
    """By the tolerance that the golden index states."""
    got, want = got.double(), want.double()
    if compare["kind"] == "rel_fro":
        assert (got - want).norm() <= compare["tol"] * want.norm()
    else:
        torch.testing.assert_close(got, want, rtol=compare["rtol"], atol=compare["atol"])


@pytest.mark.parametrize("name", ["gptq", "gptq_dead", "gptq_variants"])
def test_golden(golden, name):
    case, tensors = golden_case(golden, name)
    x_SNC = tensors["X"]
    hessian = Hessian(1, x_SNC.shape[2])
    for x_NC in x_SNC:
        hessian.add(0, x_NC)
    H_ECC = hessian.H_ECC * (2 / len(x_SNC))  # the reference's scale, which the loss has too
    torch.testing.assert_close(H_ECC[0], tensors["H"], rtol=1e-4, atol=1e-4)
    assert hessian.tokens_E.tolist() == [x_SNC.shape[0] * x_SNC.shape[1]]
    for combo, own in case["hyper"]["combos"].items():
        hyper = {**case["hyper"], **own}
        solver = GPTQ(
            group_size=None if hyper["groupsize"] == -1 else hyper["groupsize"],
            sym=hyper["sym"],
            act_order=hyper["actorder"],
            static_groups=hyper["static_groups"],
            block_size=hyper["blocksize"],
            damping=hyper["percdamp"],
            quirks=tuple(QUIRKS),
        )
        factor = solver.factor(tensors["H"][None])
        result = solver.solve(tensors["weight"][None], factor, bits=hyper["bits"])
        expected = case["expected"]
        close(result.weight[0], tensors[f"q_{combo}"], expected[f"q_{combo}"]["compare"])
        close(result.loss_ER.sum(), tensors[f"loss_{combo}"], expected[f"loss_{combo}"]["compare"])


def test_golden_clip_search(golden):
    case, tensors = golden_case(golden, "gptq_mse")
    for combo, hyper in case["hyper"]["combos"].items():
        options = dict(sym=hyper["sym"], clip=CLIPS["gptq"], quirks=("one_sided_sym",))
        solver = GPTQ(group_size=None, **options)
        result = solver.solve(tensors["weight"][None], bits=hyper["bits"])
        found = {"scale": result.scale_ERG[0], "zero": result.zero_ERG[0], "q": result.weight[0]}
        for kind, got in found.items():
            name = f"{kind}_{combo}"
            close(got, tensors[name], case["expected"][name]["compare"])


def test_golden_round_to_nearest_of_mc(golden):
    case, tensors = golden_case(golden, "mc_quant_loss")
    solver = GPTQ(group_size=case["hyper"]["groupsize"])
    for bits in case["hyper"]["bits"]:
        for matrix in ("gate_up", "down"):
            result = solver.solve(tensors[f"{matrix}_proj"], bits=bits)
            for expert in range(2):
                name = f"q{bits}_{matrix}_e{expert}"
                close(result.weight[expert], tensors[name], case["expected"][name]["compare"])
        special = solver.solve(tensors["w_special"][None], bits=bits).weight[0]
        name = f"q{bits}_w_special"
        close(special, tensors[name], case["expected"][name]["compare"])
