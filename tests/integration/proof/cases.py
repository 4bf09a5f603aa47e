"""What is compressed, and how: all that knows how settings are named."""

from typing import Any

from tests.helpers.models import FAMILIES

Case = tuple[str, dict[str, Any], dict[str, Any]]

PRUNE = dict(sparsity=0.4)
RENAMED = {"relative": "hidden_share"}  # cases keep the names they had
DROP = dict(sparsity=0.5, sparsity_of="routed")
PLUS = dict(**PRUNE, ridges=[3.0, 0.3], sweeps=3)
FIT = dict(**PLUS, compensate="layer")
Q = dict(bits=2.9, group_size=16)
DAGGER = dict(bits=4.2, group_size=16)
SHARES = dict(**Q, low_share=0.4)
GPTQ = dict(bits=3.15)
RTN = dict(bits=3.15)
MC = dict(bits=3.2, group_size=32)

# name -> (method, its settings, options). An option is an argument of camera.compress, or
#   after: the case whose checkpoint is compressed, instead of the original model;
#   export: the checkpoint is exported, and that is recorded;
#   killed: the run is killed at so many files, and started again;
#   keep: a folder of statistics is filled by the case of this name, then used;
#   processes: how many share the work.
CASES: dict[str, Case] = {
    # for all families
    "camera_p": ("camera_p", PRUNE, {}),
    "camera_plus": ("camera_plus", PLUS, {}),
    "heapr": ("heapr", PRUNE, {}),
    "camera_q": ("camera_q", Q, {}),
    "gptq": ("gptq", dict(bits=5.15), {}),
    "d2_moe": ("d2_moe", PRUNE, {}),
    "naee": ("naee", DROP, {}),
    "reap": ("reap", DROP, {}),
    # where budgets come from, what the next layer is fed, what is kept in memory
    "camera_p/alpha": ("camera_p", dict(**PRUNE, alpha=0.0), {}),
    "camera_p/global": ("camera_p", dict(**PRUNE, rank_scope="global"), {}),
    "camera_p/measured": ("camera_p", dict(**PRUNE, rank_scope="measured"), {}),
    "camera_p/dense": ("camera_p", PRUNE, dict(propagate="dense")),
    "camera_p/dense kept": (
        "camera_p",
        dict(sparsity=0.2, alpha=0.5),
        dict(propagate="dense", keep="camera_p/dense"),
    ),
    "camera_p/model": ("camera_p", dict(sparsity=0.3, sparsity_of="model"), {}),
    "camera_p/routed": ("camera_p", dict(sparsity=0.3, sparsity_of="routed"), {}),
    "camera_p/routed global": (
        "camera_p",
        dict(sparsity=0.3, sparsity_of="routed", rank_scope="global"),
        {},
    ),
    "camera_p/multiple": ("camera_p", dict(**PRUNE, width_multiple=8), {}),
    "camera_p/multiple global": (
        "camera_p",
        dict(**PRUNE, width_multiple=8, rank_scope="global"),
        {},
    ),
    "camera_p/multiple measured": (
        "camera_p",
        dict(**PRUNE, width_multiple=8, rank_scope="measured"),
        {},
    ),
    "camera_p/min width": ("camera_p", dict(**PRUNE, min_width=10), {}),
    "camera_p/min width global": ("camera_p", dict(**PRUNE, min_width=10, rank_scope="global"), {}),
    "camera_p/floor": ("camera_p", dict(**PRUNE, layer_floor=0.55, rank_scope="global"), {}),
    "camera_p/floor measured": (
        "camera_p",
        dict(**PRUNE, layer_floor=0.55, rank_scope="measured"),
        {},
    ),
    "camera_p/phi keep": ("camera_p", PRUNE, dict(memory=dict(phi="keep"))),
    "camera_p/phi recompute": ("camera_p", PRUNE, dict(memory=dict(phi="recompute"))),
    "camera_p/experts layer": ("camera_p", PRUNE, dict(memory=dict(experts="ram"))),
    "camera_p/experts visit": ("camera_p", PRUNE, dict(memory=dict(experts="disk"))),
    "camera_p/hidden disk": ("camera_p", PRUNE, dict(memory=dict(hidden="disk"))),
    "camera_p/c4": ("camera_p", PRUNE, dict(calibration=dict(source="c4"), seed=7)),
    "camera_p/few tokens": ("camera_p", PRUNE, dict(calibration=dict(samples=1, length=4))),
    "camera_p/bfloat16": ("camera_p", PRUNE, dict(dtype="bfloat16")),
    "camera_p/measures": ("camera_p", PRUNE, dict(measures=dict(corpora=["wikitext2"], blocks=2))),
    # output weights refitted
    "camera_p/fit layer": ("camera_p", dict(**FIT, target="layer"), {}),
    "camera_p/fit dense": ("camera_p", dict(**FIT, target="dense"), {}),
    "camera_p/fit expert": ("camera_p", dict(**PLUS, compensate="expert", target="layer"), {}),
    "camera_p/fit expert dense": (
        "camera_p",
        dict(**PLUS, compensate="expert", target="dense"),
        {},
    ),
    "camera_p/fit absolute": ("camera_p", dict(**FIT, target="layer", token_weights="uniform"), {}),
    "camera_p/fit dense absolute": (
        "camera_p",
        dict(**FIT, target="dense", token_weights="uniform"),
        {},
    ),
    "camera_p/fit held out": ("camera_p", dict(**FIT, held_out=0.5), {}),
    "camera_p/fit of dense energies": ("camera_p", FIT, dict(propagate="dense")),
    "camera_p/fit recompute": ("camera_p", FIT, dict(memory=dict(phi="recompute"))),
    # other scores
    **{
        f"camera_plus/{score} {scope}": (
            "camera_plus",
            dict(**PLUS, score=RENAMED.get(score, score), **more),
            {},
        )
        for score in ("fisher", "product", "energy", "relative", "residual")
        for scope, more in (
            ("layer", dict(rank_scope="layer")),
            ("global", dict(rank_scope="global")),
            ("measured", dict(rank_scope="measured")),
        )
    },
    "camera_plus/relative alpha": (
        "camera_plus",
        dict(**PLUS, score="hidden_share", alpha=0.5),
        {},
    ),
    "camera_plus/all": ("camera_plus", dict(**PLUS, normalize="all"), {}),
    "camera_plus/product all": ("camera_plus", dict(**PLUS, score="product", normalize="all"), {}),
    "camera_plus/none": ("camera_plus", dict(**PRUNE, compensate="none"), {}),
    "camera_plus/expert": ("camera_plus", dict(**PLUS, compensate="expert", target="layer"), {}),
    "camera_plus/layer": ("camera_plus", dict(**PLUS, target="layer"), {}),
    "camera_plus/absolute": ("camera_plus", dict(**PLUS, token_weights="uniform"), {}),
    "camera_plus/floor": ("camera_plus", dict(**PLUS, layer_floor=0.3, width_multiple=8), {}),
    "camera_plus/hidden disk": ("camera_plus", PLUS, dict(memory=dict(hidden="disk"))),
    "camera_plus/bfloat16": ("camera_plus", PLUS, dict(dtype="bfloat16")),
    "camera_plus/visit": (
        "camera_plus",
        dict(**PRUNE, compensate="none", rank_scope="global"),
        dict(memory=dict(experts="disk")),
    ),
    "heapr/layer": ("heapr", dict(**PRUNE, rank_scope="layer"), {}),
    "heapr/measured": ("heapr", dict(**PRUNE, rank_scope="measured"), {}),
    "heapr/joint": ("heapr", dict(**PRUNE, score="fisher"), {}),
    "heapr/all": ("heapr", dict(**PRUNE, normalize="all"), {}),
    "heapr/joint all": ("heapr", dict(**PRUNE, score="fisher", normalize="all"), {}),
    "heapr/routed": ("heapr", dict(**PRUNE, sparsity_of="routed"), {}),
    "heapr/multiple": ("heapr", dict(**PRUNE, width_multiple=8, min_width=8), {}),
    "heapr/fit": ("heapr", FIT, {}),
    "magnitude": ("magnitude", PRUNE, {}),
    "magnitude/sum": ("magnitude", dict(**PRUNE, score="weight_sum"), {}),
    "magnitude/global": ("magnitude", dict(**PRUNE, rank_scope="global"), {}),
    "magnitude/sum global": (
        "magnitude",
        dict(**PRUNE, score="weight_sum", rank_scope="global"),
        {},
    ),
    "magnitude/measured": ("magnitude", dict(**PRUNE, rank_scope="measured"), {}),
    "magnitude/fit": ("magnitude", FIT, {}),
    "magnitude/visit": ("magnitude", PRUNE, dict(memory=dict(experts="disk"))),
    "random": ("random", PRUNE, {}),
    "random/seed": ("random", dict(**PRUNE, seed=5), {}),
    "random/global": ("random", dict(**PRUNE, rank_scope="global"), {}),
    "random/multiple": ("random", dict(**PRUNE, width_multiple=8), {}),
    "random/fit": ("random", FIT, {}),
    # whole experts, and merged ones
    "reap/dense": ("reap", DROP, dict(propagate="dense")),
    "reap/softmax": ("reap", dict(**DROP, routing_weights="softmax"), {}),
    **{
        f"reap/{score}": ("reap", dict(**DROP, score=score), {})
        for score in ("weighted_ean_sum", "ean_sum", "ean_mean", "weighted_frequency")
    },
    "reap/model": ("reap", dict(sparsity=0.3, sparsity_of="model"), {}),
    "frequency": ("frequency", DROP, {}),
    "frequency/dense": ("frequency", DROP, dict(propagate="dense")),
    **{
        f"naee/{search}": ("naee", dict(**DROP, search=search, max_subsets=2000), {})
        for search in ("enumerate", "greedy", "random", "independent")
    },
    "naee/dense": ("naee", DROP, dict(propagate="dense")),
    "naee/sample": ("naee", dict(**DROP, sample_tokens=100, seed=5), {}),
    "naee/norms": ("naee", dict(**DROP, sample_tokens=0, norm_tokens=64), {}),
    **{
        f"d2_moe/{merge}": ("d2_moe", dict(**PRUNE, merge=merge), {})
        for merge in ("fisher", "freq", "mean")
    },
    "d2_moe/pruned base": ("d2_moe", dict(**PRUNE, pp_ratio=0.25), {}),
    "d2_moe/damping": ("d2_moe", dict(**PRUNE, damping=0.01), {}),
    "d2_moe/model": ("d2_moe", dict(sparsity=0.3, sparsity_of="model"), {}),
    # bits
    "gptq/three": ("gptq", GPTQ, {}),
    "gptq/group": ("gptq", dict(bits=4.25, group_size=16), {}),
    "gptq/whole row": ("gptq", dict(bits=3.12, group_size=-1), {}),
    "gptq/sym": ("gptq", dict(bits=3.0, sym=True), {}),
    "gptq/clip": ("gptq", dict(**GPTQ, clip="gptq"), {}),
    "gptq/clip mc": ("gptq", dict(**GPTQ, clip="mc"), {}),
    "gptq/act order": ("gptq", dict(bits=4.5, act_order=True), {}),
    "gptq/static groups": ("gptq", dict(bits=4.2, act_order=True, static_groups=True), {}),
    "gptq/percdamp": ("gptq", dict(**GPTQ, damping=0.1), {}),
    "gptq/mean hessian": (
        "gptq",
        dict(**GPTQ, fallback="mean_hessian", min_tokens=60),
        {},
    ),
    "gptq/min tokens": ("gptq", dict(**GPTQ, min_tokens=100), {}),
    "gptq/weighted": ("gptq", dict(**GPTQ, weighted_hessian=True), {}),
    "gptq/sequential": ("gptq", dict(**GPTQ, true_sequential=True), {}),
    "gptq/sequential few": (
        "gptq",
        dict(**GPTQ, true_sequential=True, sequential_tokens=40),
        {},
    ),
    "gptq/compensated": (
        "gptq",
        dict(**GPTQ, true_sequential=True, compensate="expert"),
        {},
    ),
    "gptq/attention": ("gptq", dict(**GPTQ, attn_bits=8), {}),
    "gptq/router": ("gptq", dict(**GPTQ, router_bits=4), {}),
    "gptq/dense": ("gptq", GPTQ, dict(propagate="dense")),
    "gptq/visit": ("gptq", GPTQ, dict(memory=dict(experts="disk"))),
    "gptq/bfloat16": ("gptq", GPTQ, dict(dtype="bfloat16")),
    "rtn": ("rtn", RTN, {}),
    "rtn/group": ("rtn", dict(bits=4.25, group_size=16), {}),
    "rtn/sym": ("rtn", dict(bits=3.0, sym=True), {}),
    "rtn/clip": ("rtn", dict(**RTN, clip="gptq"), {}),
    "rtn/attention": ("rtn", dict(**RTN, attn_bits=8, router_bits=4), {}),
    "mc": ("mc", MC, {}),
    "mc/batches": ("mc", dict(**MC, loss_norm="batches"), {}),
    "mc/paper": ("mc", dict(**MC, loss_exponent=2.0, expert_alpha=0.5, expert_beta=1.0), {}),
    "mc/shared bits": ("mc", dict(**MC, shared_bits=3), {}),
    "mc/at least one": ("mc", dict(**MC, at_least_one=[2]), {}),
    "mc/no feedback": ("mc", dict(**MC, inblock_feedback=False, clip="mc"), {}),
    "mc/dense": ("mc", MC, dict(propagate="dense")),
    "camera_q/alpha": ("camera_q", dict(**Q, alpha=0.0), {}),
    "camera_q/low share": ("camera_q", SHARES, {}),
    "camera_q/ratios": ("camera_q", dict(bits=3.75, ratios=[0.25, 0.5, 0.25]), {}),
    "camera_q/ratios only": (
        "camera_q",
        dict(bits=None, ratios=[0.3, 0.4, 0.3], group_bits=[3, 2, 0], group_size=16),
        {},
    ),
    "camera_q/five levels": ("camera_q", dict(**Q, group_bits=[4, 3, 2, 1, 0]), {}),
    "camera_q/two levels": ("camera_q", dict(**Q, group_bits=[3, 0]), {}),
    "camera_q/expert": ("camera_q", dict(**Q, rank_scope="expert"), {}),
    "camera_q/model": ("camera_q", dict(**SHARES, rank_scope="global"), {}),
    "camera_q/relative": ("camera_q", dict(**Q, score="hidden_share"), {}),
    "camera_q/fisher": ("camera_q", dict(**Q, score="fisher"), {}),
    "camera_q/fisher all": ("camera_q", dict(**Q, score="fisher", normalize="all"), {}),
    "camera_q/product": ("camera_q", dict(**Q, score="product"), {}),
    "camera_q/residual": ("camera_q", dict(**Q, score="residual"), {}),
    "camera_q/align": ("camera_q", dict(**Q, align=4), {}),
    "camera_q/static groups": ("camera_q", dict(**Q, act_order=True, static_groups=True), {}),
    "camera_q/clip": ("camera_q", dict(**Q, clip="gptq", sym=True), {}),
    "camera_q/compensated": (
        "camera_q",
        dict(**Q, true_sequential=True, compensate="expert"),
        {},
    ),
    "camera_q/mean hessian": ("camera_q", dict(**Q, fallback="mean_hessian", min_tokens=60), {}),
    "camera_q/attention": ("camera_q", dict(**Q, attn_bits=8, router_bits=8), {}),
    "camera_q/dense": ("camera_q", Q, dict(propagate="dense")),
    "camera_q/visit": ("camera_q", Q, dict(memory=dict(experts="disk"))),
    "camera_q/bfloat16": ("camera_q", Q, dict(dtype="bfloat16")),
    "camera_q_dagger": ("camera_q_dagger", DAGGER, {}),
    "camera_q_dagger/shuffle": ("camera_q_dagger", dict(**DAGGER, split="shuffle"), {}),
    "camera_q_dagger/seed": ("camera_q_dagger", dict(**DAGGER, split="shuffle", seed=5), {}),
    "camera_q_dagger/low share": ("camera_q_dagger", dict(**DAGGER, low_share=0.3), {}),
    "camera_q_dagger/expert": ("camera_q_dagger", dict(**DAGGER, rank_scope="expert"), {}),
    # from checkpoint to checkpoint
    "killed/camera_p": ("camera_p", PRUNE, dict(killed=5)),
    "killed/dense": ("camera_p", PRUNE, dict(killed=3, propagate="dense")),
    "killed/fit": ("camera_p", FIT, dict(killed=5)),
    "killed/camera_q": ("camera_q", Q, dict(killed=5)),
    "again/camera_p": ("camera_p", PRUNE, dict(after="camera_p")),
    "again/camera_plus": ("camera_plus", PLUS, dict(after="camera_p")),
    "again/camera_q": ("camera_q", dict(bits=3.4, group_size=16), dict(after="camera_p")),
    "again/gptq": ("gptq", dict(bits=4.5), dict(after="camera_p")),
    "again/packed": ("camera_p", PRUNE, dict(after="gptq")),
    "again/d2_moe": ("camera_p", PRUNE, dict(after="d2_moe")),
    "again/reap": ("camera_p", PRUNE, dict(after="reap")),
    "export/ragged": ("camera_p", PRUNE, dict(export=True)),
    "export/packed": ("camera_q", Q, dict(export=True)),
    "export/attention": ("gptq", dict(**GPTQ, attn_bits=8, router_bits=4), dict(export=True)),
    "export/delta": ("d2_moe", PRUNE, dict(export=True)),
    "two/layer": ("camera_p", PRUNE, dict(processes=2)),
    "two/global": ("camera_p", dict(**PRUNE, rank_scope="global"), dict(processes=2)),
    "two/measured": ("camera_p", dict(**PRUNE, rank_scope="measured"), dict(processes=2)),
    "two/fit": ("camera_p", dict(**FIT, target="dense"), dict(processes=2)),
    "two/fisher": ("camera_plus", dict(**PRUNE, compensate="none"), dict(processes=2)),
    "two/camera_q": ("camera_q", Q, dict(processes=2)),
    "two/naee": ("naee", DROP, dict(processes=2)),
}
EVERYWHERE = ("camera_p", "camera_plus", "heapr", "camera_q", "gptq", "d2_moe", "naee", "reap")
THOROUGH = ("qwen2_moe", "deepseek_v3")  # a shared expert; routers that choose groups first
OF_SEVERAL = ("qwen2_moe",)  # cases of several processes
# Of two experts a group none can be dropped.
OVERRIDES = {"deepseek_v3": dict(n_routed_experts=16)}
CALIBRATION = dict(source="wikitext2", samples=6, length=48)


def cases() -> list[tuple[str, str]]:
    """(family, case) of all that is compressed."""
    found = []
    for family in FAMILIES:
        for name, (_, _, options) in CASES.items():
            asked = family in (OF_SEVERAL if "processes" in options else THOROUGH)
            if name in EVERYWHERE or asked:
                found.append((family, name))
    return found
