"""Which engines a checkpoint is said to fit, held against what the exports do."""

import pytest
import torch

import camera
from camera.engines.fit import engines
from camera.runtime.errors import CameraError
from tests.helpers.models import build_model, build_tokenizer

FORMATS = {
    "as it is": None,
    "after `import camera`": None,
    "after `camera export FROM TO` (unpacked)": "native",
    "after `camera export FROM TO` (every expert as wide as the widest)": "native",
    "after `camera export FROM TO --format compressed-tensors`": "compressed-tensors",
    "after `camera export FROM TO.gguf`": "gguf",
}
CASES = {
    "uniform": ("qwen3_moe", "magnitude", dict(sparsity=0.5, expert_widths="uniform")),
    "ragged": ("qwen2_moe", "random", dict(sparsity=0.4)),
    "one_scheme": ("qwen3_moe", "rtn", dict(bits=5, sym=True, group_size=8)),
    "experts_in_one_tensor": ("granitemoe", "rtn", dict(bits=5, sym=True, group_size=8)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_to_be_needed_can_be_made(case, tmp_path):
    family, method, settings = CASES[case]
    for package in ("gguf", "compressed_tensors"):
        pytest.importorskip(package, reason=f"needs {package}")
    changed = {"norm_topk_prob": True} if case == "ragged" else {}  # which llama.cpp hasn't
    build_model(family, **changed).save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    cut = tmp_path / "cut"
    done = camera.compress(
        tmp_path / "source", method, cut, device="cpu", progress=False, **settings
    )
    said = camera.describe(cut)
    assert said.engines == done.engines and said.native == (case == "uniform")
    card = (cut / "README.md").read_text()
    for engine, how in said.engines.items():
        assert f"| {engine} | {how} |" in card
        if how.startswith("no: "):
            with pytest.raises(CameraError) as refusal:
                camera.export(cut, tmp_path / f"{engine}.gguf")
            assert str(refusal.value).rstrip(".") == how.removeprefix("no: ")
        elif (form := FORMATS[how]) is not None:
            camera.export(cut, tmp_path / engine, format=form)
    assert said.engines["transformers"].startswith("as" if case == "uniform" else "after")
    assert said.engines["llama.cpp"].startswith("no: ") == (case == "ragged")
    assert ("compressed-tensors" in said.engines["vLLM"]) == (case == "one_scheme")


@pytest.mark.parametrize(
    "width, told",
    [(12, "as it is"), (13, 'with `experts_implementation="eager"` (experts are 13 wide)')],
)
def test_a_width_that_transformers_refuses_by_default_is_told(width, told):
    model = build_model("qwen3_moe", moe_intermediate_size=width)
    config = model.config
    config.dtype = torch.float32
    assert engines(config)["transformers"] == told
    ids = torch.arange(20)[None]
    if width == 13:
        with pytest.raises(RuntimeError, match="16 bytes"):
            model(ids)
        model.set_experts_implementation("eager")
    assert model(ids).logits.isfinite().all()
