"""The GPTQ solver gives the reference's numbers.

Shapes: E experts, R rows, C columns, N tokens.
"""

import pytest
import torch
from safetensors.torch import load_file

from baselines.quantization.gptq import Gptq
from camera.quantization.quantizers.gptq import GPTQ, QUIRKS
from camera.quantization.quantizers.grids import CLIPS
from camera.quantization.quantizers.hessian import Hessian
from tests.helpers.golden import golden_cases
from tests.helpers.runs.documents import reference_settings

REFERENCE = Gptq(bits=4, **reference_settings("gptq"))


def seen(x_SNC: torch.Tensor) -> Hessian:
    """The Hessian of one matrix's inputs."""
    hessian = Hessian(1, x_SNC.shape[2])
    for x_NC in x_SNC:
        hessian.add(0, x_NC)
    return hessian


@pytest.mark.golden("gptq", r"loss_(.+)")
def test_weights_and_losses(expected):
    (combo,), tensors, case = expected.parts, expected.tensors, expected.hyper
    hyper = {**case, **case["combos"][combo]}
    solver = GPTQ(
        group_size=None if hyper["groupsize"] == -1 else hyper["groupsize"],
        sym=hyper["sym"],
        act_order=hyper["actorder"],
        static_groups=hyper["static_groups"],
        block_size=hyper["blocksize"],
        damping=hyper["percdamp"],
        clip=CLIPS[REFERENCE.clip],
        quirks=tuple(QUIRKS),
    )
    factor = solver.factor(tensors["H"][None])
    result = solver.solve(tensors["weight"][None], factor, bits=hyper["bits"])
    expected.compare(result.loss_ER.sum())
    expected.compare(result.weight[0], f"q_{combo}")


def test_hessians(golden):
    cases = [load_file(golden / case["file"]) for case in golden_cases(golden, "gptq")]
    cases = [tensors for tensors in cases if {"X", "H"} <= tensors.keys()]
    if not cases:
        pytest.skip(f"{golden} has no golden case with a Hessian: pass --golden DIR")
    for tensors in cases:
        x_SNC, hessian = tensors["X"], seen(tensors["X"])
        H_ECC = hessian.H_ECC * (2 / len(x_SNC))  # the reference's scale, which the loss has too
        torch.testing.assert_close(H_ECC[0], tensors["H"], rtol=1e-4, atol=1e-4)
        assert hessian.tokens_E.tolist() == [x_SNC.shape[0] * x_SNC.shape[1]]


@pytest.mark.golden("gptq", r"(scale|zero|q)_(.+_mse\w+)")
def test_clip_search(expected):
    (kind, combo), hyper = expected.parts, expected.hyper
    own = hyper["combos"][combo]
    solver = GPTQ(group_size=None, sym=own["sym"], clip=CLIPS["gptq"], quirks=("one_sided_sym",))
    result = solver.solve(expected.tensors["weight"][None], bits=own["bits"])
    found = {"scale": result.scale_ERG[0], "zero": result.zero_ERG[0], "q": result.weight[0]}
    expected.compare(found[kind])


@pytest.mark.golden("mc", r"q(\d+)_(gate_up|down)_e(\d+)")
def test_round_to_nearest_of_mc(expected):
    bits, matrix, expert = expected.parts
    solver = GPTQ(group_size=expected.hyper["groupsize"])
    weight_RC = expected.tensors[f"{matrix}_proj"][int(expert)]
    expected.compare(solver.solve(weight_RC[None], bits=int(bits)).weight[0])


@pytest.mark.golden("mc", r"q(\d+)_w_special")
def test_round_to_nearest_of_mc_where_rows_are_special(expected):
    solver = GPTQ(group_size=expected.hyper["groupsize"])
    weight_RC = expected.tensors["w_special"]
    expected.compare(solver.solve(weight_RC[None], bits=int(expected.parts[0])).weight[0])
