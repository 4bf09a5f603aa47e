"""Camera-Q-dagger, the ablation: the bits of an expert's three matrices don't match.

Shapes: H hidden.
"""

import re

import pytest
import torch

from camera.quantization.camera_q import CameraQ
from camera.quantization.camera_q_dagger import CameraQDagger
from camera.runtime.errors import CameraError
from camera.streaming.skeleton import MetaModel
from tests.helpers.quantization.quantizing import layer_of, plan_of, seen_by


def test_dagger_has_the_shares_of_camera_q_along_its_own_inputs():
    ffn, x_TH = layer_of("qwen2_moe")
    seen = seen_by(ffn, x_TH)
    method = CameraQDagger(bits=None, ratios=[0.25, 0.5, 0.25], group_size=16)
    plan = plan_of(method, ffn, seen).experts
    mixed = torch.cat([e.down for e in plan])
    assert torch.bincount(mixed).tolist()[1:] == [58, 116, 58]
    for e in plan:
        for bits in (e.gate, e.up):
            assert torch.bincount(bits).tolist() == [0, 8, 16, 8]
    e = plan[3]
    energy_H = seen.channel_energy(0.9)[3] * ffn.module.experts.gate_up_proj[2, :24].square().sum(0)
    assert e.gate[energy_H.argmax()] == 3 and e.gate[energy_H.argmin()] == 1
    assert any(not torch.equal(e.gate, e.up) for e in plan)


def test_shuffle_keeps_counts_and_breaks_the_match():
    ffn, x_TH = layer_of("qwen3_moe")
    seen = seen_by(ffn, x_TH)
    matched = plan_of(CameraQ(bits=3.3, group_size=16), ffn, seen).experts
    method = CameraQDagger(bits=3.3 + 32 / 96, group_size=16, split="shuffle")
    plan = plan_of(method, ffn, seen).experts
    again = plan_of(method, ffn, seen).experts
    for a, b, c in zip(matched, plan, again, strict=True):
        for bits in (b.gate, b.up, b.down):
            assert sorted(bits.tolist()) == sorted(a.down.tolist())
        assert torch.equal(b.gate, c.gate)
    assert any(not torch.equal(b.gate, b.down) for b in plan)


@pytest.mark.parametrize("split", ["channels", "shuffle"])
def test_one_width_for_all_stores_no_orders(split, checkpoints):
    """The range that is stated is that of the plans that exist."""
    budget = MetaModel(checkpoints("qwen3_moe")).budget
    asked = dict(group_size=7, group_bits=[4, 3, 2])
    least, most = CameraQDagger(bits=3.0, split=split, **asked).reachable(budget)
    assert (least, most) == CameraQ(bits=3.0, **asked).reachable(budget)
    CameraQDagger(bits=least, split=split, **asked).check(budget)
    with pytest.raises(CameraError, match="can't be met"):
        CameraQDagger(bits=least - 0.01, split=split, **asked).check(budget)


@pytest.mark.parametrize(("split", "missed"), [("channels", True), ("shuffle", False)])
def test_a_target_that_is_missed_is_said_with_the_next_plan(split, missed, caplog):
    """A second width in gate and up takes orders at once, which dear tiny matrices can't pay."""
    ffn, x_TH = layer_of("qwen3_moe")
    seen = seen_by(ffn, x_TH)
    plan_of(CameraQDagger(bits=3.0, group_size=24, split=split), ffn, seen)
    said = [record.message for record in caplog.records]
    assert bool(said) is missed
    if missed:
        found = re.fullmatch(
            r"bits=3.0: layer \d+ stores ([\d.]+) bits per weight, and the next plan that these "
            r"settings allow ([\d.]+)",
            said[0],
        )
        assert float(found[1]) < 0.99 * 3 < 3 < float(found[2])
