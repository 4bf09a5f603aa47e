"""Every family has a tiny model and an entry in the docs; its facts are those of its models."""

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from camera.moe.families import (
    FAMILIES,
    family_of,
    is_routed,
    register_family,
)
from camera.moe.families.family import ExpertNames, RouterGroups
from camera.moe.feed_forward import FeedForward
from camera.moe.routing import router_constraints, router_of
from tests.helpers import models
from tests.helpers.models import MOE_FAMILIES, build_model
from tests.helpers.newer_families import NESTED, NEWER

ROOT = Path(__file__).parents[3]


def layer(name: str, **overrides) -> FeedForward:
    """The last layer's FFN of a tiny model, which is an MoE one in every MoE family."""
    model = build_model(name, **overrides)
    return FeedForward(model.model.layers[-1], family_of(name), "model.layers.2")


def test_every_family_has_a_tiny_model_and_an_entry_in_the_docs():
    assert set(FAMILIES) == {*models.FAMILIES, *NEWER, *NESTED}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    missing = [name for name in FAMILIES if not re.search(rf"`{name}`", text)]
    assert not missing


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_config_keys_name_the_sizes_of_the_model(name):
    ffn, keys = layer(name), family_of(name).keys
    config = ffn.layer.self_attn.config
    routed = next(group for group in ffn.groups if group.routed)
    assert getattr(config, keys.experts) == len(routed.widths)
    assert getattr(config, keys.width) == routed.widths[0]
    assert family_of(name).top_k(config) == router_of(ffn).top_k == getattr(config, keys.top_k)
    shared = next((group for group in ffn.groups if not group.routed), None)
    if shared is not None:
        count = getattr(config, keys.shared_count) if keys.shared_count else 1
        assert shared.widths == [count * getattr(config, keys.shared_width)]
        assert ffn.family.is_shared(shared.path) and not is_routed(shared.path)
    assert ffn.family.is_routed(routed.path) and is_routed(routed.path)


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_checkpoint_names_hold_exactly_the_routed_experts(name, checkpoints):
    from camera.checkpoint.shards import ShardReader

    names, folder = family_of(name).checkpoint_names, checkpoints(name)
    held = {key: place for key, place in ShardReader(folder).places.items() if names.holds(key)}
    ffn, config = layer(name), AutoConfig.from_pretrained(folder)
    routed = next(group for group in ffn.groups if group.routed)
    layers = {re.search(r"layers\.(\d+)\.", key).group(1) for key in held}
    numbers = sum(place.bytes // place.dtype.itemsize for place in held.values())
    assert numbers == len(layers) * routed.module_size
    assert len(layers) == config.num_hidden_layers - getattr(config, "first_k_dense_replace", 0)


def test_names_of_one_expert_are_numbered_anew():
    names, key = ExpertNames(), "model.layers.11.mlp.experts.7.up_proj.weight"
    assert names.number(key) == 7
    assert names.as_first(key) == "model.layers.11.mlp.experts.0.up_proj.weight"
    assert names.number("model.layers.11.mlp.experts.down_proj") is None


def test_groups_of_routers():
    limited = dict(n_group=4, topk_group=2)
    groups = family_of("deepseek_v3").groups
    assert groups(router_of(layer("deepseek_v3", **limited))) == RouterGroups(4, 2, 2)
    v2 = layer("deepseek_v2", **limited, topk_method="group_limited_greedy")
    assert groups(router_of(v2)) == RouterGroups(4, 2, 1)
    assert groups(router_of(layer("deepseek_v2", **limited))) == RouterGroups()  # greedy
    assert router_constraints(layer("qwen3_moe")).groups == 1


def test_attention_widths_are_those_of_the_projections():
    for name in ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"):
        attention = build_model(name).model.layers[0].self_attn
        config, width = attention.config, attention.o_proj.in_features
        values = width // config.num_attention_heads
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim if "deepseek" in name else values
        assert family_of(name).attention_width(config) == keys + values


def test_a_family_from_outside_is_known(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", None)  # removed again afterwards
    register_family("mine", family_of("olmoe"))
    assert family_of("mine") is family_of("olmoe")
