"""A model described by its config alone: its parts, and what methods leave of it."""

import importlib.util

import pytest

import camera
from camera.inspection import description
from camera.runtime.errors import CameraError
from camera.runtime.progress import format_bytes
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


def test_the_time_is_that_of_the_card_that_is_named(folder):
    """A faster card takes less; as much is read and written."""
    path, _ = folder("mixtral")
    found = {card: description(path, card=card) for card in ("a100_40gb", "h100")}
    slow, fast = (found[card].time for card in found)
    assert 0 < fast["on h100"] < slow["on a100_40gb"]
    assert fast["disk, beside it"] == slow["disk, beside it"]
    assert "on h100" in found["h100"].memory and "on h100" in str(found["h100"])
    with pytest.raises(CameraError, match="card=abacus is none of a100_40gb, "):
        description(path, card="abacus")


def test_a_sparsity_out_of_reach_is_refused(folder):
    path, _ = folder("mixtral")
    with pytest.raises(CameraError, match="sparsity=1"):
        description(path, sparsity=1.0)


def test_a_compressed_checkpoint_is_told_with_its_own_size_beside_its_original(
    checkpoints, tmp_path
):
    source = checkpoints("qwen2_moe")
    result = camera.compress(source, "magnitude", tmp_path / "out", sparsity=0.4)
    found = description(result.checkpoint)
    assert found.compressed == (
        f"compressed by magnitude, {100 * result.sparsity['moe']:.1f} % of the experts removed: "
        f"{format_bytes(result.bytes['compressed'])} instead of "
        f"{format_bytes(result.bytes['dense'])}, in Camera's format"
    )
    assert found.engines == result.engines and found.published_as is None
    assert found.parameters == description(source).parameters
    assert "its original: qwen2_moe" in str(found)


def test_a_native_checkpoint_is_counted_itself(checkpoints, tmp_path):
    source, settings = checkpoints("qwen2_moe"), dict(sparsity=0.4138, expert_widths="uniform")
    result = camera.compress(source, "magnitude", tmp_path / "out", **settings)
    found = description(result.checkpoint)
    assert found.compressed.endswith("native") and not found.of_original
    assert found.parameters < description(source).parameters


def test_no_module_hides_a_public_name():
    """A module of a function's name takes its place on the package once it is imported."""
    for name in camera.__all__:
        assert importlib.util.find_spec(f"camera.{name}") is None, name
