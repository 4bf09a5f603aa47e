"""Every method in each of its ways, with settings that a tiny model takes."""

from typing import Any

from camera.method import METHODS, Method

PRUNE = dict(sparsity=0.4)
DROP = dict(sparsity=0.5, sparsity_of="routed")
FIT = dict(**PRUNE, ridges=[3.0, 0.3], sweeps=2)
Q = dict(bits=2.9, group_size=16)
# name -> (method, its settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "camera_p": ("camera_p", PRUNE),
    "camera_p global": ("camera_p", dict(**PRUNE, rank_scope="global")),
    "camera_p measured": ("camera_p", dict(**PRUNE, rank_scope="measured")),
    "camera_p fit": ("camera_p", dict(**FIT, compensate="layer", target="between")),
    "camera_plus": ("camera_plus", dict(**FIT, rank_scope="measured", target="dense")),
    "camera_plus hidden_share": (
        "camera_plus",
        dict(**PRUNE, score="hidden_share", rank_scope="layer", compensate="none"),
    ),
    "camera_plus residual": (
        "camera_plus",
        dict(**PRUNE, score="residual", rank_scope="layer", compensate="none"),
    ),
    "camera_plus projection": (
        "camera_plus",
        dict(**PRUNE, score="projection", rank_scope="layer", compensate="none"),
    ),
    "heapr": ("heapr", PRUNE),
    "magnitude": ("magnitude", PRUNE),
    "magnitude global": ("magnitude", dict(**PRUNE, rank_scope="global")),
    "random": ("random", PRUNE),
    "frequency": ("frequency", DROP),
    "reap": ("reap", DROP),
    "reap softmax": ("reap", dict(**DROP, routing_weights="softmax", replaced_by="fitted")),
    "aimer": ("aimer", DROP),
    "naee": ("naee", DROP),
    "mone": ("mone", dict(**DROP, rank_scope="global", replaced_by="fitted")),
    "d2_moe": ("d2_moe", PRUNE),
    "d2_moe freq": ("d2_moe", dict(**PRUNE, merge="freq")),
    "camera_q": ("camera_q", Q),
    "camera_q fisher": ("camera_q", dict(**Q, score="fisher")),
    "camera_q hidden_share": ("camera_q", dict(**Q, score="hidden_share")),
    "camera_q residual": ("camera_q", dict(**Q, score="residual")),
    "camera_q global": ("camera_q", dict(**Q, rank_scope="global", low_share=0.4)),
    "camera_q levels": ("camera_q", dict(bits=3.25)),
    "camera_q sequential": (
        "camera_q",
        dict(**Q, true_sequential=True, compensate="expert", sequential_tokens=20),
    ),
    "camera_q_dagger": ("camera_q_dagger", dict(bits=4.2, group_size=16)),
    "camera_q_dagger shuffle": (
        "camera_q_dagger",
        dict(bits=4.2, group_size=16, split="shuffle"),
    ),
    "gptq": ("gptq", dict(bits=5.15)),
    "gptq sequential": ("gptq", dict(bits=5.15, true_sequential=True)),
    "rtn": ("rtn", dict(bits=5.15)),
    "mc": ("mc", dict(bits=3.2, group_size=32)),
    "layerwise_bits": ("layerwise_bits", dict(bits=4.5)),
}


def method_of(case: str) -> Method:
    name, settings = CASES[case]
    return METHODS[name](**settings)
