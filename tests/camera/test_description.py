"""A model described by its config alone: its parts, and what methods leave of it."""

import pytest

from camera.api import description
from camera.runtime.errors import CameraError
from tests.helpers.models import build_model

FAMILIES = ("qwen2_moe", "gpt_oss", "granitemoe", "minimax_m2", "llama4", "llama")


@pytest.fixture
def folder(tmp_path):
    """A folder with a config and nothing else."""

    def made(family, **overrides):
        model = build_model(family, **overrides)
        model.config.save_pretrained(tmp_path)
        return tmp_path, model

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_those_of_the_model(family, folder):
    path, model = folder(family)
    found = description(path, sparsity=0.3)
    named = dict(model.named_parameters())

    def held(*pieces):
        return sum(p.numel() for name, p in named.items() if any(part in name for part in pieces))

    extra = sum(b.numel() for n, b in model.state_dict().items() if n not in named)
    tied = model.config.get_text_config().tie_word_embeddings
    extra -= held("embed_tokens") * (extra > 0 and tied)
    assert found.parameters == sum(p.numel() for p in named.values()) + extra
    assert found.parts["routed experts"] == held(".experts.")
    assert found.parts["shared experts"] == held("shared_expert.")
    assert found.parts["embeddings"] == held("embed_tokens")
    assert found.parts["head"] == (0 if tied else held("lm_head"))
    assert found.parts["other towers"] == held("vision_model", "multi_modal_projector")
    assert "micro-expert pruning" in str(found) and found.to_dict()["parts"] == found.parts


def test_what_is_left_is_what_methods_leave(folder):
    path, model = folder("mixtral")
    found = {row.method: row for row in description(path, sparsity=0.5).left}
    pool = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert found["micro-expert pruning"].parameters == model.num_parameters() - pool // 2
    gone = pool // 2 + 3 * 2 * 32  # and two rows of each layer's router
    assert found["whole-expert pruning"].parameters == model.num_parameters() - gone
    assert found["quantisation"].bytes == 4 * (model.num_parameters() - pool) + pool * 2.5 / 8


def test_a_sparsity_out_of_reach_is_refused(folder):
    path, _ = folder("mixtral")
    with pytest.raises(CameraError, match="sparsity=1"):
        description(path, sparsity=1.0)
