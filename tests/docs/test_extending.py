"""The examples of docs/extending.md, installed as the package that the page makes of them."""

import re
import sys
import tomllib
from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

import camera
from camera.calibration.scores.base import SCORES
from camera.calibration.statistics import KINDS
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.formats.format import FORMATS
from camera.checkpoint.formats.ragged import RaggedExperts
from camera.method import METHODS, Applied, Method, Pass, PassKind
from camera.moe import families
from camera.moe.families import FAMILIES
from camera.pruning.plan import KeptExperts
from camera.quantization.quantizers.quantizer import QUANTIZERS
from experiments.config.constructor import typed_settings
from experiments.records.files import read_json
from tests.helpers.models import COMMON, build_tokenizer
from tests.helpers.runs.composing import command, tiny
from tests.helpers.runs.documents import ROOT, blocks, page

REGISTRIES = (METHODS, SCORES, FORMATS, QUANTIZERS, KINDS)
NAMED = re.compile(r"^`(my_camera/\w+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(NAMED.findall(page("extending.md")))
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder on sys.path with the package, what it announces, and its file of settings."""
    site = tmp_path_factory.mktemp("site")
    for path, code in {"my_camera/__init__.py": "", **EXAMPLES}.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(code, encoding="utf-8")
    (settings,) = blocks(page("extending.md"), "yaml")
    (site / "method").mkdir()
    (site / "method" / "equal_widths.yaml").write_text(settings, encoding="utf-8")
    project = tomllib.loads(blocks(page("extending.md"), "toml")[0])["project"]
    about = site / f"my_camera-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        for registry in REGISTRIES:
            list(registry)  # what ships, before the page's can be found: it stays
        patch.syspath_prepend(site)
        for registry in REGISTRIES:
            patch.setattr(registry, "_classes", dict(registry._classes))
            patch.setattr(registry, "_announced", dict(registry._announced))
            patch.setattr(registry, "_complete", False)
        yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_camera"]:
        del sys.modules[name]


@pytest.fixture
def options(data_folder, calibration):
    """What every compression of a tiny model is given."""
    return dict(calibration=calibration, data=data_folder, device="cpu", progress=False)


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def test_five_examples_are_short():
    assert len(EXAMPLES) == len(blocks(page("extending.md"), "python")) == 5
    sizes = {name: sum(map(bool, code.splitlines())) for name, code in EXAMPLES.items()}
    assert max(sizes.values()) < 40, sizes


def test_the_page_announces_what_registries_read(installed):
    project = tomllib.loads(blocks(page("extending.md"), "toml")[0])["project"]
    groups = {registry._group: registry for registry in REGISTRIES if registry._group}
    announced = project["entry-points"]
    assert announced.pop(families.ENTRY_POINTS) == {"glm4_moe": "my_camera.glm4"}
    assert announced.keys() == groups.keys()
    for group, entries in announced.items():
        for name, place in entries.items():
            assert name in groups[group]
            cls = groups[group][name]
            assert cls.name == name and place == f"{cls.__module__}:{cls.__name__}"


def test_the_score_ranks_by_its_formula(installed, checkpoints, tmp_path, options):
    """Against a plain loop over tokens, with the hidden states that the model itself hands on."""
    source = checkpoints("llama")
    settings = dict(sparsity=0.5, score="mean_output", rank_scope="layer", compensate="none")
    result = camera.compress(
        source, "camera_plus", tmp_path / "o", propagate="dense", **settings, **options
    )
    model = AutoModelForCausalLM.from_pretrained(source)
    ffn, inputs = model.model.layers[0].mlp, []
    ffn.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    tokens = calibration_tokens(
        build_tokenizer(),
        options["calibration"],
        data=options["data"],
        seed=1234,
        max_length=128,
    )
    with torch.no_grad():
        model(tokens.ids_NL)
        phi = ffn.act_fn(ffn.gate_proj(inputs[0])) * ffn.up_proj(inputs[0])
        score = phi.abs().sum((0, 1)) * ffn.down_proj.weight.norm(dim=0)
    kept = score.argsort(descending=True)[: result.widths["model.layers.0.mlp"][0]].sort().values
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "o").model.layers[0].mlp
    assert torch.equal(pruned.up_proj.weight, ffn.up_proj.weight[kept])


def test_the_score_serves_camera_q(installed, checkpoints, tmp_path, options):
    settings = dict(score="mean_output", bits=2.9, group_size=16)
    camera.compress(checkpoints("qwen2_moe"), "camera_q", tmp_path / "o", **settings, **options)
    assert logits(tmp_path / "o").isfinite().all()


@pytest.fixture
def eight_bits(installed, monkeypatch):
    """A method that puts the format in the place of all routed experts, as the page says."""
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    experts = FORMATS["int8"]

    @dataclass(frozen=True)
    class EightBits(Method):
        name = "eight_bits"
        reads_text = False

        def check(self, budget):
            pass

        def passes(self, budget, propagate):
            return (Pass(PassKind.COMPRESSED, tokens=False),)

        def plan_layer(self, index, ffn, seen, budget, plan):
            return KeptExperts(torch.ones(len(ffn.routed.widths), dtype=torch.bool))

        def apply(self, index, ffn, plan, seen):
            path, module = ffn.routed.path, experts.of(ffn.routed)
            ffn.replace(ffn.routed, module)
            return Applied({path: module.spec()})

    return EightBits()


def test_the_format_is_saved_and_loaded(eight_bits, checkpoints, tmp_path, options):
    source = checkpoints("qwen2_moe")
    result = camera.compress(source, eight_bits, tmp_path / "o", **options)
    assert result.sparsity["model"] == 0 and result.bytes["compressed"] < result.bytes["dense"]
    specs = read_json(tmp_path / "o" / "config.json")["quantization_config"]["modules"]
    assert {spec["form"] for spec in specs.values()} == {"int8"} and len(specs) == 3
    loaded, before = logits(tmp_path / "o"), logits(source)
    assert 0 < (loaded - before).norm() < 0.01 * before.norm()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    experts = model.model.layers[0].mlp.experts
    assert type(experts) is FORMATS["int8"] and experts.down_proj.dtype == torch.int8
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), loaded)


def test_the_format_becomes_plain_and_native(eight_bits, checkpoints, tmp_path, options):
    camera.compress(checkpoints("qwen2_moe"), eight_bits, tmp_path / "o", **options)
    packed, plain = logits(tmp_path / "o"), AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    camera.dequantize(plain)
    assert type(plain.model.layers[0].mlp.experts) is RaggedExperts
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, packed)
    camera.export(tmp_path / "o", tmp_path / "native")
    torch.testing.assert_close(logits(tmp_path / "native"), packed)


def test_the_family_is_compressed(installed, tmp_path, options, monkeypatch):
    monkeypatch.delitem(FAMILIES, "glm4_moe")  # as if it weren't in the tree
    small = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    small |= {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
    known = set(FAMILIES)
    try:
        families.family_of("glm4_moe")  # found by its entry point
        (kind,) = set(FAMILIES) - known
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**COMMON, **small, "initializer_range": 0.1})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
        build_tokenizer().save_pretrained(tmp_path / "m")
        result = camera.compress(
            tmp_path / "m", "camera_p", tmp_path / "o", sparsity=0.4, **options
        )
        assert result.sparsity["moe"] == pytest.approx(0.4, abs=0.02)
        assert any(path.endswith(".shared_experts") for path in result.widths)
        camera.export(tmp_path / "o", tmp_path / "plain")
    finally:
        for name in set(FAMILIES) - known:
            del FAMILIES[name]
    torch.testing.assert_close(logits(tmp_path / "o"), logits(tmp_path / "plain"))


def test_the_quantiser_beats_rounding(installed, checkpoints, tmp_path, options):
    errors = {}
    for name in ("clipped", "rtn"):
        settings = dict(bits=3.1, group_size=-1, quantizer=name)
        source = checkpoints("qwen2_moe")
        result = camera.compress(source, "gptq", tmp_path / name, **settings, **options)
        assert result.bits["raw"] == 2
        found = result.layers["0"]["experts"]["model.layers.0.mlp.experts"]
        errors[name] = found["gate_up"]["error_all"]
        assert logits(tmp_path / name).isfinite().all()
        assert found["down"]["fallback"] == ({} if name == "clipped" else {"rtn": 8})
    assert errors["clipped"] < 0.9 * errors["rtn"]


def test_the_method_keeps_equal_widths(installed, checkpoints, tmp_path, options):
    source, settings = checkpoints("qwen2_moe"), dict(sparsity=0.4, alpha=0.0)
    result = camera.compress(source, "equal_widths", tmp_path / "o", **settings, **options)
    assert result.method == "equal_widths" and result.settings["alpha"] == 0
    assert set(result.widths["model.layers.1.mlp.experts"]) == {14}
    camera.apply(source, tmp_path / "o", tmp_path / "again", device="cpu", progress=False)
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "o"))
    with pytest.raises(camera.CameraError, match="sparsity=2 must lie"):
        camera.compress(source, "equal_widths", tmp_path / "no", sparsity=2, **options)


def test_the_method_runs_from_the_command_line(installed, checkpoints, data_folder, tmp_path):
    arguments = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    place = f"hydra.searchpath=[file://{installed}]"
    methods = "method=equal_widths,camera_p"
    assert command("-m", *arguments, methods, "sparsity=0.4", "propagate=dense", place) == 0
    (folder,) = (tmp_path / "runs").glob("*-equal_widths-*")
    metrics = read_json(folder / "metrics.json")
    assert metrics["method"] == "equal_widths"
    assert metrics["sparsity"]["moe"] == pytest.approx(0.4, abs=0.02)
    assert " equal_widths " in (tmp_path / "table.md").read_text()


def test_hydra_can_check_the_method_s_settings(installed):
    (settings,) = blocks(page("extending.md"), "yaml")
    types = typed_settings(OmegaConf.create(settings)["_target_"])
    known = OmegaConf.structured(types)
    assert OmegaConf.merge(known, {"sparsity": 0.3, "alpha": 0}).sparsity_of == "moe"
    with pytest.raises(ValidationError):
        OmegaConf.merge(known, {"sparsity": "much"})


def test_names_of_the_architecture_are_in_the_files_they_lead_to():
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w./]+)\)", page("architecture.md"))
    links += re.findall(r"\[`([\w.]+)`\]\(\.\./([\w./]+)\)", page("extending.md"))
    assert len(links) > 40
    for name, file in links:
        for part in name.split("."):
            code = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"\b(class|def) {part}\b", code), (name, file)
