"""Dropped experts leave the very layer that the smaller config builds, in every family.

Shapes: T tokens, C candidates, E experts.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from baselines.experts.rerouting import Rerouter
from camera.checkpoint.formats.native import native_state
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.moe.routing import gates, router_constraints
from camera.pruning.whole_experts import remove_experts, smaller_config
from camera.runtime.errors import CameraError
from tests.helpers.dropping import ALL, build, some, tokens, views
from tests.helpers.models import build_model
from tests.helpers.oracles import capture


def cut(model, seed=0):
    """Drop experts of every layer, others in each."""
    left = 0
    for i, ffn in views(model).items():
        keep = some(router_constraints(ffn), seed + i)
        remove_experts(ffn, keep)
        left = len(keep)
    return left


def write(model, experts, folder):
    """As a job does: each layer's tensors on their own, under the names of the disk."""
    folder.mkdir(parents=True)
    state, shards = model.state_dict(), {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in state.items():
        if name not in tied:
            layer = name.split(".")[2] if ".layers." in name else "rest"
            shards.setdefault(layer, {})[name] = tensor
    where = {}
    for layer, tensors in shards.items():
        on_disk = native_state(model, tensors)
        save_file({k: v.contiguous() for k, v in on_disk.items()}, folder / f"{layer}.safetensors")
        where |= dict.fromkeys(on_disk, f"{layer}.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)
    for key, value in smaller_config(model.config, experts).items():
        setattr(model.config, key, value)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


@pytest.mark.parametrize("case", ALL)
def test_what_is_left_is_what_the_smaller_config_builds(case):
    model = build(case)
    experts = cut(model)
    config = copy.deepcopy(model.config)
    for key, value in smaller_config(config, experts).items():
        setattr(config, key, value)
    small = type(model)(config).eval()
    assert experts < router_constraints(next(iter(views(build(case)).values()))).experts
    layers, ours = small.model.layers, model.model.layers
    for (name, new), (_, old) in zip(layers.named_modules(), ours.named_modules(), strict=True):
        facts = {k: v for k, v in vars(new).items() if type(v) in (int, float, bool, str)}
        assert facts == {k: vars(old)[k] for k in facts}, name
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    small.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(small(tokens()).logits, model(tokens()).logits)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
ids, found = torch.tensor({ids}), {{}}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    found[folder] = model.eval()(ids).logits.detach().clone()
assert "camera" not in sys.modules
save_file(found, sys.argv[1])
"""


def test_layers_written_one_by_one_load_in_plain_transformers(tmp_path):
    expected = {}
    for case in ALL:
        model, folder = build(case), tmp_path / case.replace(" ", "_")
        experts = cut(model)
        with torch.no_grad():
            expected[str(folder)] = model(tokens()).logits
        write(model, experts, folder)
    plain = [folder for folder in expected if not folder.endswith("/deepseek")]  # needs camera
    script = LOAD.format(ids=tokens().tolist())
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "logits"), *plain], check=True, cwd="/"
    )
    got = load_file(tmp_path / "logits")
    ours = str(tmp_path / "deepseek")
    with torch.no_grad():
        got[ours] = AutoModelForCausalLM.from_pretrained(ours).eval()(tokens()).logits
    for folder, logits in expected.items():
        torch.testing.assert_close(got[folder], logits, rtol=1e-5, atol=1e-5, msg=folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ALL)
def test_masked_routing_is_that_of_the_smaller_router(case, dtype):
    model = build(case, dtype=dtype)
    i, ffn = next(iter(views(model).items()))
    x_TH, _ = capture(model, i, tokens())
    routing = router_constraints(ffn)
    kept = [some(routing, seed) for seed in range(4)]
    keep_CE = torch.zeros(len(kept), routing.experts, dtype=torch.bool)
    for row, keep in zip(keep_CE, kept, strict=True):
        row[keep] = True
    with torch.no_grad():
        got_TCE = Rerouter(ffn, x_TH)(keep_CE)
    assert not got_TCE[:, ~keep_CE].any()
    for c, keep in enumerate(kept):
        cut_ffn = views(build(case, dtype=dtype))[i]
        remove_experts(cut_ffn, keep)
        with torch.no_grad():
            _, weight_TK, index_TK = getattr(cut_ffn.module, ffn.family.router)(x_TH)
        want_TE = gates(weight_TK, index_TK, len(keep))
        torch.testing.assert_close(got_TCE[:, c, keep], want_TE, rtol=1e-5, atol=1e-6)
        if case in ("deepseek", "olmoe", "mixtral"):  # fewer experts: others are chosen, or weigh
            with torch.no_grad():
                full_TE = Rerouter(ffn, x_TH)(torch.ones_like(keep_CE[:1]))[:, 0]
            assert not torch.allclose(got_TCE[:, c], full_TE)


def test_a_router_that_looks_beyond_its_logits_is_refused():
    model = build("qwen3_moe")
    ffn = views(model)[1]
    gate, forward = ffn.module.gate, type(ffn.module.gate).forward

    class Noisy(type(gate)):
        def forward(self, x):
            logits, weights, index = forward(self, x)
            return logits, weights * x.norm(dim=-1, keepdim=True), index

    gate.__class__ = Noisy
    with pytest.raises(CameraError, match="doesn't decide by its logits alone"):
        Rerouter(ffn, torch.randn(7, 32))


def test_the_router_says_how_many_may_go():
    most = {case: router_constraints(next(iter(views(build(case)).values()))).most for case in ALL}
    assert most["qwen2_moe"] == 5 and most["mixtral"] == 2
    assert most["deepseek_v3"] == 16 - 4 * 2  # two of each group make its score
    assert most["deepseek_v2 in groups"] == 8 - 2 * 3  # one group is open: it needs all of top-3
    assert router_constraints(views(build_model("deepseek_v3"))[1]).most == 0


def test_a_router_row_counts_the_parameters_that_go_with_an_expert():
    assert router_constraints(views(build("phimoe"))[0]).row == 32
    assert router_constraints(views(build("deepseek_v3"))[1]).row == 32 + 1


def refused(match, case, keep):
    with pytest.raises(CameraError, match=match):
        remove_experts(next(iter(views(build(case)).values())), keep)


def test_what_a_router_cannot_do_with_is_refused():
    refused("fewer than its router needs.*at least 3", "qwen2_moe", [0, 5])
    refused("there are 0 to 7", "olmoe", [1, 2, 3, 8])
    refused(r"equally many.*\[2, 3, 3, 3\]", "deepseek_v3", [0, 1, 4, 5, 6, 8, 9, 10, 12, 13, 14])
    refused("fewer than its router needs.*at least 6", "deepseek_v2 in groups", [0, 1, 4, 5])


def test_compressed_experts_and_dense_layers_have_none_to_drop():
    model = build("olmoe")
    ffn = views(model)[0]
    ffn.module.experts = RaggedExperts(32, [3] * 8, torch.nn.SiLU())
    ragged = views(model)[0]
    assert router_constraints(ragged) is None
    with pytest.raises(CameraError, match="already compressed"):
        remove_experts(ragged, range(6))
    dense = build_model("llama")
    ffn = FeedForward(dense.model.layers[0], family_of("llama"), "model.layers.0")
    assert router_constraints(ffn) is None
    with pytest.raises(CameraError, match="no routed experts"):
        remove_experts(ffn, [0])
