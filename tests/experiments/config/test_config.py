"""Every shipped config composes and every model runs; what is wrong is refused, choices named."""

import functools
import itertools
import json
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf

from camera.moe.families import FAMILIES
from camera.runtime.errors import CameraError
from camera.runtime.values import KEYS, renaming
from experiments.config.constructor import build, choice, typed_settings
from experiments.config.schema import CONF
from experiments.config.settings import Settings, check
from experiments.runs.run import run
from tests.helpers.runs.composing import choices, command, config_of, settings_of, tiny

GROUPS = ("model", "method", "calibration", "evaluation", "tracker", "experiment")
EVERY_CHOICE = [(group, name) for group in GROUPS for name in choices(group)]

FAMILY_OF = {  # which tiny random model stands in for a choice of conf/model
    "deepseek_moe_16b": "deepseek",
    "deepseek_v2_lite": "deepseek_v2",
    "deepseek_v3_1": "deepseek_v3",
    "ernie_4_5_21b_a3b": "ernie4_5_moe",
    "glm_4_5_air": "glm4_moe",
    "glm_4_6": "glm4_moe",
    "glm_4_7_flash": "glm4_moe_lite",
    "gpt_oss_120b": "gpt_oss",
    "gpt_oss_20b": "gpt_oss",
    "granite_3_1b_a400m": "granitemoe",
    "granite_4_h_tiny": "granitemoehybrid",
    "hunyuan_a13b": "hunyuan_v1_moe",
    "kimi_linear_48b_a3b": "kimi_linear",
    "lfm2_8b_a1b": "lfm2_moe",
    "llama_4_scout": "llama4",
    "minimax_m2": "minimax_m2",
    "mistral_small_4": "mistral3",
    "mixtral_8x7b": "mixtral",
    "olmoe_1b_7b": "olmoe",
    "phi35_moe": "phimoe",
    "qwen2_57b_a14b": "qwen2_moe",
    "qwen3_30b_a3b": "qwen3_moe",
    "qwen3_5_35b_a3b": "qwen3_5_moe",
    "qwen3_next_80b_a3b": "qwen3_next",
    "qwen3_vl_30b_a3b": "qwen3_vl_moe",
    "smollm2_135m": "llama",
    "tiny_moe": "qwen2_moe",
}


@functools.cache
def composed(group, name):
    """The config of a choice; composing takes a quarter of a second."""
    return config_of(f"{group}={name}")


@pytest.mark.parametrize(("group", "name"), EVERY_CHOICE)
def test_every_choice_composes_and_resolves(group, name):
    settings = Settings.of(composed(group, name))
    assert settings.model["name"] and settings.data
    for part in (settings.method, settings.calibration, settings.tracker):
        build(part)


# each method once, each evaluation several times: no key of one group is in the other
@pytest.mark.parametrize(
    ("method", "evaluation"),
    list(zip(choices("method"), itertools.cycle(choices("evaluation")), strict=False)),
)
def test_groups_combine(method, evaluation):
    settings = settings_of(f"method={method}", f"evaluation={evaluation}", "model=mixtral_8x7b")
    assert settings.method_name == method
    assert settings.data == "hub"


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.stem)
def test_a_comment_is_one_short_line(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [found[1] for line in lines if (found := re.search(r"(?:^|\s)# ?(.*)$", line))]
    assert [comment for comment in comments if len(comment) > 80] == []


def test_every_choice_says_what_it_is():
    silent = [
        (group, name)
        for group, name in EVERY_CHOICE
        if group != "model" and not (CONF / group / f"{name}.yaml").read_text().startswith("# ")
    ]
    assert silent == []


def test_every_model_of_the_table_of_contents_is_a_hub_id_or_the_embedded_one():
    for name in choices("model"):
        model = Settings.of(composed("model", name)).model
        assert model["name"] == name
        assert model["path"] == "embedded" or model["path"].count("/") == 1


def test_every_model_is_of_a_type_that_is_tested():
    assert set(FAMILY_OF) == set(choices("model")) and set(FAMILY_OF.values()) <= set(FAMILIES)


@pytest.mark.parametrize("name", ["gpt_oss_20b", "llama_4_scout", "mixtral_8x7b", "smollm2_135m"])
def test_a_named_model_runs(name, checkpoints, data_folder, tmp_path):
    overrides = tiny(checkpoints(FAMILY_OF[name]), data_folder, tmp_path)
    folder = run(settings_of(f"model={name}", *overrides, "method=camera_p", "evaluation=none"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["model"] in (name, checkpoints(FAMILY_OF[name]).name)
    assert metrics["sparsity"]["moe"] == pytest.approx(0.2, abs=0.02)


def test_launchers_and_presets_compose_with_hydras_own_config():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["experiment=main"], return_hydra_config=True)
        assert config.hydra.mode.name == "MULTIRUN"
        assert config.hydra.sweeper.grids.main[1].sparsity == [0.2, 0.4, 0.6]
        for launcher in ("slurm", "ray"):  # extras: they compose where they aren't installed
            config = compose("config", [f"hydra/launcher={launcher}"], return_hydra_config=True)
            assert "hydra_plugins" in config.hydra.launcher._target_
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        config = compose("config", ["hydra/launcher=parallel"], return_hydra_config=True)
        assert config.hydra.launcher.n_jobs == 2


@pytest.mark.parametrize(
    ("launcher", "plugin", "types"),
    [
        ("slurm", "hydra_plugins.hydra_submitit_launcher.config", "SlurmQueueConf"),
        ("ray", "hydra_plugins.hydra_ray_launcher._config", "RayLauncherConf"),
    ],
)
def test_launchers_say_only_what_their_plugin_knows(launcher, plugin, types):
    known = getattr(pytest.importorskip(plugin), types)
    said = OmegaConf.load(CONF / "hydra" / "launcher" / f"{launcher}.yaml")
    OmegaConf.merge(OmegaConf.structured(known), said)


def test_another_model_is_named_after_its_path_and_reads_the_hub():
    for path, name in (("allenai/OLMoE-1B", "OLMoE-1B"), ("/models/my-moe/", "my-moe")):
        settings = settings_of(f"model.path={path}")
        assert (settings.model["name"], settings.data) == (name, "hub")
    assert settings_of("model=olmoe_1b_7b", "model.path=/copy").model["name"] == "olmoe_1b_7b"
    assert settings_of("model.path=/m", "data=/texts").data == "/texts"
    assert settings_of().data == "embedded"


def test_scalars_reach_the_method():
    settings = settings_of("sparsity=0.4", "sparsity_of=routed", "alpha=0.5")
    assert settings.method["sparsity"] == 0.4
    assert settings.method["sparsity_of"] == "routed"
    assert settings.method["alpha"] == 0.5


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sparsty=0.2", "sparsty"),
        ("method.aplha=0.2", "aplha"),
        ("evaluation.limt=3", "limt"),
        ("sparsity=much", "Float"),
        ("seed=0.5", "Integer"),
        ("force=maybe", "bool"),
        ("method.width_multiple=wide", "Integer"),
        ("calibration.samples=many", "Integer"),
        ("sparsity_of=all", "moe, model, routed"),
        ("retry=all", "none, failed"),
        ("propagate=both", "compressed, dense"),
        ("dtype=int8", "auto, float32, bfloat16, float16"),
        ("tracker.mode=loud", "offline, online"),
        ("evaluation.perplexity=[ptb]", "wikitext2, c4"),
        ("method=prune_all", "camera_p"),
        ("model=gpt", "tiny_moe"),
    ],
)
def test_wrong_keys_types_and_values_are_refused_while_composing(override, told):
    with pytest.raises((HydraException, MissingConfigException)) as refusal:
        config_of(override)
    assert told in f"{refusal.value} {refusal.value.__cause__}"


def test_an_added_key_is_refused_with_the_nearest_one():
    with pytest.raises(CameraError, match=r"sparsty .* did you mean sparsity"):
        Settings.of(config_of("+sparsty=0.2"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sparsity=0", "sparsity=0 must"),
        ("sparsity=1.5", "sparsity=1.5"),
        ("alpha=-0.1", "alpha=-0.1"),
        ("seed=-1", "seed=-1"),
        ("evaluation.batch_size=0", "evaluation.batch_size=0"),
        ("evaluation.perplexity_batch_size=0", "evaluation.perplexity_batch_size=0"),
        ("evaluation.blocks=0", "evaluation.blocks=0"),
        ("calibration.samples=0", "calibration.samples=0"),
        ("calibration.source=news", "wikitext2"),
        ("evaluation.tasks=[boolq]", "tasks/boolq.jsonl.gz"),
        ("device=tpu", "device=tpu"),
        ("data=/nowhere", "data=/nowhere"),
        ("model.path=/nowhere", "the model /nowhere"),
    ],
)
def test_values_that_cannot_work_are_refused_before_any_weight(
    override, told, checkpoints, data_folder, tmp_path
):
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    with pytest.raises(CameraError, match=r"^[^\n]*$") as refusal:
        check(settings_of(*overrides, override))
    assert told in str(refusal.value)


def test_without_such_a_value_nothing_is_refused(checkpoints, data_folder, tmp_path):
    overrides = tiny(checkpoints("qwen2_moe"), data_folder, tmp_path)
    check(settings_of(*overrides))
    # dense has no sparsity to be wrong
    check(settings_of(*overrides, "method=dense", "sparsity=1.5"))


class Example:
    def __init__(self, mode: str, width: int = 8, names: list[str] | None = None, scale: float = 1):
        self.mode = mode


def test_a_constructor_is_a_schema():
    types = typed_settings(f"{__name__}.Example").__annotations__
    assert types["width"] is int
    assert types["names"] == list[str] | None
    assert typed_settings("camera.missing.Method") == {}
    assert choice("a", "b") is choice("a", "b")


def test_the_command_names_the_valid_keys(capsys):
    assert "did you mean method.alpha" in command("method.aplha=1")
    told = command("method=magnitude", "method.alpha=1")  # another's
    assert told.startswith("method.alpha is no setting; did you mean method.")
    assert "Traceback" not in "".join(capsys.readouterr())


def test_a_choice_without_settings_says_so():
    told = command("method=dense", "method.alpha=0.3")
    assert told == "method=dense has no settings of its own: leave method.alpha out."


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("method=heapr method.term=joint", "method.term is now method.score."),
        ("method=gptq method.percdamp=0.1", "method.percdamp is now method.damping."),
        ("evaluation.unpack=false", "evaluation.unpack is now evaluation.dequantize."),
        ("memory.experts=visit", "memory.experts=visit is now memory.experts=disk."),
        (
            "method=camera_q method.rank_scope=model",
            "method.rank_scope=model is now method.rank_scope=global.",
        ),
    ],
)
def test_an_old_setting_is_refused_with_its_new_name(arguments, told, capsys):
    code = command(*arguments.split())  # of a value before Hydra reads it, which is then told
    assert code == told or (code == 1 and told in "".join(capsys.readouterr()).splitlines())


def test_every_new_name_is_one():
    assert set(KEYS["method"].values()) <= _keys("method")
    assert not set(KEYS["method"]) & _keys("method")
    config = config_of()
    for group, renamed in KEYS.items():
        if group != "method":
            assert set(renamed.values()) <= set(config[group])
    assert renaming("method", "norm", "product").endswith("now method.score=weight_product.")
    assert renaming("method", "score", "product") is None


def _keys(group):
    return {key for name in choices(group) for key in composed(group, name)[group]}


def test_ambiguous_sweeps_are_refused_by_hydra():
    with pytest.raises(ConfigCompositionException):
        config_of("sparsity=0.2,0.4")
