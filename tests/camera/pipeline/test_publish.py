"""The written folder: it is read back before it appears, and what belongs to the model travels."""

import json
from fnmatch import fnmatch

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import baselines.experts.reap
import baselines.micro_experts.random  # noqa: F401
import camera
from camera.checkpoint.loading import load_model
from camera.checkpoint.shards import ShardWriter
from camera.checkpoint.source import resolve_model
from camera.moe.families import family_of
from camera.runtime.errors import CameraError
from tests.helpers.checkpoints import changed, config_of, tensors_of
from tests.helpers.models import MOE_FAMILIES


@pytest.fixture
def compress(tmp_path, data_folder, calibration):
    """compress(source, method, **options): folder of the compressed model."""

    def go(source, method="random", name="out", **options):
        settings = dict(sparsity=0.25, device="cpu", progress=False) | options
        settings |= dict(calibration=calibration, data=str(data_folder))
        camera.compress(source, method, tmp_path / name, **settings)
        return tmp_path / name

    return go


def lost(tensors):
    return {k: t for k, t in tensors.items() if "layers.1.self_attn.o_proj" not in k}


def cast(tensors):
    return {k: t.half() if "layers.1.self_attn.o_proj" in k else t for k, t in tensors.items()}


def cut(tensors):
    return {k: t[:5] if "layers.1.self_attn.o_proj" in k else t for k, t in tensors.items()}


def added(tensors):
    return tensors | ({"more": torch.ones(3)} if any("layers.1." in key for key in tensors) else {})


@pytest.mark.parametrize(
    "harm, told",
    [
        (lost, r"lacks tensor 'model\.layers\.1\.self_attn\.o_proj\.weight'"),
        (cast, r"o_proj\.weight' was written as float16 instead of float32"),
        (cut, r"o_proj\.weight' has the shape \[5, 32\] where config\.json asks for \[32, 32\]"),
        (added, "'more', which has no use"),
    ],
)
@pytest.mark.parametrize("method", ["random", "reap"])
def test_what_does_not_read_back_is_not_published(
    method, harm, told, compress, checkpoints, tmp_path, monkeypatch
):
    add = ShardWriter.add
    monkeypatch.setattr(
        ShardWriter, "add", lambda self, i, ts, counted=None: add(self, i, harm(ts), counted)
    )
    with pytest.raises(CameraError, match=told):
        compress(checkpoints("qwen3_moe"), method)
    assert not (tmp_path / "out").exists()


def test_a_tensor_is_written_once(tmp_path):
    writer = ShardWriter(tmp_path, 2)
    writer.add(0, {"w": torch.zeros(2)})
    writer.add(0, {"w": torch.zeros(2)})  # a resumed run writes its shard again
    with pytest.raises(RuntimeError, match="'w' is written twice"):
        writer.add(1, {"w": torch.zeros(2)})


TRAVEL = [
    *("qwen.tiktoken", "tekken.json", "bpe.codes", "dict.txt", "source.spm", "emoji.json"),
    *("normalizer.json", "preprocessor_config.json", "processor_config.json", "NOTICE"),
    *("tokenization_foo.py", "Notice.txt", "USE_POLICY.md", "vocab.json", "merges.txt"),
    *("added_tokens.json", "tokenizer.model", "chat_template.jinja", "LICENSE"),
    "additional_chat_templates/rag.jinja",
]
STAY = [
    *("pytorch_model.bin", "optimizer.pt", "model.gguf", "consolidated.safetensors", "README.md"),
    *("pytorch_model.bin.index.json", ".gitattributes", "camera.json", "evaluation.json"),
    "plan.safetensors",
]


def test_what_is_not_weights_travels(compress, checkpoints, tmp_path):
    source = changed(checkpoints("qwen3_moe"), tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    for name in TRAVEL + STAY:
        if not (source / name).exists():
            (source / name).write_text('{"of": "the source"}')
    out = compress(source)
    exported = camera.export(out, tmp_path / "plain")
    for folder in (out, exported):
        for name in TRAVEL:
            assert (folder / name).read_text() == (source / name).read_text(), name
        for name in STAY:
            path = folder / name
            assert not path.exists() or path.read_bytes() != b'{"of": "the source"}', name


def test_the_hub_is_asked_for_what_travels(tmp_path, monkeypatch):
    asked = {}

    def download(model, *, revision, ignore_patterns=(), allow_patterns=()):
        asked["ignored"] = ignore_patterns
        return tmp_path / "snapshots" / "commit"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    def fetched(name):
        return not any(fnmatch(name, pattern) for pattern in asked["ignored"])

    resolve_model("owner/name")
    assert all(fetched(name) for name in [*TRAVEL, "config.json", "model-00001.safetensors"])
    left = ["pytorch_model.bin", "model.gguf", "consolidated.00.safetensors", "a/b.safetensors"]
    assert not any(fetched(name) for name in left)
    resolve_model("owner/name", weights=False)
    assert fetched("tokenizer.json") and not fetched("model-00001.safetensors")


CONFIGURATION = """from transformers import Qwen3MoeConfig
class FooConfig(Qwen3MoeConfig):
    model_type = "qwen3_moe"
"""
MODELING = """from transformers import Qwen3MoeForCausalLM
from .configuration_foo import FooConfig
class FooForCausalLM(Qwen3MoeForCausalLM):
    config_class = FooConfig
"""
TOKENIZATION = """from transformers import PreTrainedTokenizerFast
class FooTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("method", ["random", "reap"])
def test_a_model_of_remote_code_travels_with_its_code(method, compress, checkpoints, tmp_path):
    parts = {
        "AutoConfig": "configuration_foo.FooConfig",
        "AutoModelForCausalLM": "modeling_foo.FooForCausalLM",
    }
    source = changed(checkpoints("qwen3_moe"), tmp_path / f"source_{method}", auto_map=parts)
    (source / "configuration_foo.py").write_text(CONFIGURATION)
    (source / "modeling_foo.py").write_text(MODELING)
    (source / "tokenization_foo.py").write_text(TOKENIZATION)
    path = source / "tokenizer_config.json"
    told = json.loads(path.read_text())
    told |= {"auto_map": {"AutoTokenizer": [None, "tokenization_foo.FooTokenizer"]}}
    path.write_text(json.dumps(told | {"tokenizer_class": "FooTokenizer"}))
    out = compress(source, method, trust_remote_code=True)
    assert type(load_model(out, device="cpu", trust_remote_code=True)).__name__ == "FooForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("a cat") == AutoTokenizer.from_pretrained(checkpoints("qwen3_moe"))("a cat")


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_native_checkpoints_say_the_expert_count_as_published_ones_do(
    family, compress, checkpoints
):
    groups = dict(n_group=1, topk_group=1) if family == "deepseek_v3" else {}
    out = compress(checkpoints(family, **groups), "reap", sparsity_of="routed")
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    told = {key: value for key, value in config_of(out).items() if key in names}
    assert family_of(family).keys.experts in told
    assert set(told.values()) == {3 if family in ("mixtral", "phimoe") else 6}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 4.0}])
def test_older_readers_find_the_names_they_know(scaling, compress, checkpoints, tmp_path):
    rope = {"rope_theta": 5e5, "rope_type": "default"} | (scaling or {})
    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", rope_parameters=rope)
    out = compress(source, "reap")
    told = config_of(out)
    assert told["rope_theta"] == 5e5 and told["torch_dtype"] == told["dtype"] == "float32"
    assert told.get("rope_scaling", {}).get("factor") == (scaling or {}).get("factor")
    config = AutoConfig.from_pretrained(out)
    assert config.rope_parameters == AutoConfig.from_pretrained(source).rope_parameters
    assert config.dtype == torch.float32
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.float32}


def test_two_expert_counts_are_refused(compress, checkpoints, tmp_path):
    source = changed(checkpoints("qwen3_moe"), tmp_path / "source", num_experts=4)
    with pytest.raises(CameraError, match=r"num_local_experts=8 and num_experts=4.*remove"):
        compress(source)
