"""Full-width layers of Qwen3-30B-A3B: streamed within the stated memory, then run in every form."""

import pytest

from tests.gpu.layers import FORMS, compressed, speeds, write_layers

pytestmark = pytest.mark.gpu
LAYERS, SAMPLES, LENGTH = 2, 16, 2048
SIZES, PROMPT, NEW = (1, 4, 16), 512, 32
SLOWEST = 0.7  # of the dense model's decoding; what is packed pays for unpacking


@pytest.fixture(scope="module")
def source(card, tmp_path_factory):
    return write_layers(tmp_path_factory.mktemp("layers"), LAYERS, 1, LENGTH)


@pytest.fixture(scope="module")
def made(source, card, tmp_path_factory):
    """made(form): (checkpoint, result of making it)."""
    found = {}

    def go(form: str):
        if form not in found:
            out = tmp_path_factory.mktemp(form) / "out"
            found[form] = out, compressed(source, form, out, card, SAMPLES, LENGTH)
        return found[form]

    return go


@pytest.mark.parametrize("form", FORMS)
def test_full_layers_are_streamed_within_the_stated_memory(form, made, measured):
    result = made(form)[1]
    took, said = result.peak_memory_bytes / 1e9, result.expected_memory_bytes / 1e9
    title = f"Qwen3-30B-A3B, {LAYERS} layers, {SAMPLES * LENGTH} tokens"
    measured(title, f"{form}: memory", took, "GB", f"{said:.4g} said")
    seconds = (result.seconds["calibrate"] + result.seconds["compress"]) / LAYERS
    measured(title, f"{form}: a layer", seconds, "s")
    assert took <= 1.2 * said


@pytest.mark.parametrize("form", FORMS)
def test_forms_decode_and_prefill_beside_the_dense_model(form, made, source, card, measured):
    found = speeds(
        source, made(form)[0], card, batch_sizes=SIZES, prompt_length=PROMPT, new_tokens=NEW
    )
    for size, phases in found.items():
        for phase, row in phases.items():
            title = f"{phase}, times as fast as dense ({PROMPT} tokens, then {NEW})"
            measured(title, f"{form}, {size} at once", row["ratio"], "×")
    if form != "packed":
        assert min(phases["decode"]["ratio"] for phases in found.values()) >= SLOWEST
