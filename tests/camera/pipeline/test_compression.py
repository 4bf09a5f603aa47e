"""compress(): the whole way, against the plain path; reuse of energies; refusals."""

import json
import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import camera
from camera.calibration.scores.energy import EnergyScore, EnergySpec
from camera.calibration.statistics import Statistics
from camera.calibration.tokens import calibration_tokens
from camera.checkpoint.loading import load_model
from camera.pruning.camera_p import CameraP
from camera.runtime.errors import CameraError
from camera.streaming.settings import MemoryChoices
from tests.helpers import oracles
from tests.helpers.checkpoints import tensors_of
from tests.helpers.models import FAMILIES


@pytest.fixture
def run(data_folder, calibration, tmp_path):
    """run(model, method, name, **options): compress into tmp_path/name with small defaults."""

    def go(model, method="camera_p", name="out", **options):
        settings = dict(
            calibration=calibration, data=str(data_folder), device="cpu", progress=False
        )
        if method in ("camera_p", "random"):
            settings["sparsity"] = 0.3
        return camera.compress(model, method, tmp_path / name, **{**settings, **options})

    return go


@pytest.mark.parametrize(
    ("family", "phi"),
    [
        *((family, phi) for phi in ("keep", "recompute") for family in FAMILIES),
        ("qwen2_moe", "routed"),
        ("deepseek", "routed"),
        ("llama", "routed"),
    ],
)
def test_camera_p_equals_the_plain_path(
    family, phi, run, checkpoints, data_folder, calibration, tmp_path
):
    source = checkpoints(family)
    run(source, alpha=0.9, memory=MemoryChoices(phi=phi))
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids_NL = calibration_tokens(
        tokenizer, calibration, data=str(data_folder), seed=1234, max_length=128
    ).ids_NL
    expected = oracles.camera_p(AutoModelForCausalLM.from_pretrained(source), ids_NL, 0.3, 0.9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids_NL[:2]).logits, expected(ids_NL[:2]).logits, rtol=1e-4, atol=1e-5
        )


def test_camera_p_is_closer_to_the_model_than_random(run, checkpoints, tmp_path):
    source = checkpoints("qwen2_moe")
    run(source, name="energy", sparsity=0.4)
    run(source, "random", name="random", sparsity=0.4)
    ids = torch.randint(3, 250, (4, 32))
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        error = {
            name: (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits - full).norm()
            for name in ("energy", "random")
        }
    assert error["energy"] < 0.7 * error["random"]


@pytest.mark.parametrize("method", ["camera_p", "random"])
def test_the_same_call_writes_the_same_bytes(method, run, checkpoints, tmp_path):
    for name in ("a", "b"):
        run(checkpoints("qwen2_moe"), method, name)
    for path in sorted((tmp_path / "a").glob("model-*")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("phi", ["keep", "recompute"])
def test_bf16_models_are_cut_to_the_same_widths_every_time(phi, run, checkpoints, tmp_path):
    source = checkpoints("qwen2_moe", dtype=torch.bfloat16)
    results = [
        run(source, name=name, memory=MemoryChoices(phi=phi), sparsity=0.5, dtype="bfloat16").widths
        for name in ("a", "b")
    ]
    assert results[0] == results[1]


def test_code_of_a_checkpoint_is_never_run_unasked(run, checkpoints, tmp_path, monkeypatch):
    import io

    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: ...")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    fails("trust_remote_code", run, source)
    assert not (tmp_path / "ran").exists()


def test_an_auto_map_of_a_native_type_is_dropped(run, checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("deepseek"), source)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    run(source)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_model(tmp_path / "out", device="cpu")


def test_a_model_that_lacks_a_tensor_is_not_measured(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("qwen2_moe"), source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = source / index["weight_map"].pop("model.layers.1.self_attn.q_proj.weight")
    tensors = load_file(shard)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CameraError, match=r"lacks tensor 'model\.layers\.1\.self_attn\.q_proj"):
        load_model(source, device="cpu")


def test_peak_memory_of_an_accelerator_is_reported_while_it_runs(monkeypatch):
    from camera.runtime.device.peak_memory import PeakMemory

    asked = []
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(
            f"torch.accelerator.{name}", lambda device: asked.append(str(device)) or 123
        )
    with PeakMemory(torch.device("cuda:1")) as memory:
        assert memory.bytes == memory.now() == 123
    assert set(asked) == {"cuda:1"}


def test_dense_energies_are_measured_once_for_all_alphas_and_sparsities(
    run, checkpoints, tmp_path, monkeypatch
):
    measured, build = [], EnergySpec.build
    monkeypatch.setattr(
        EnergySpec,
        "build",
        lambda self, index, ffn: measured.append(index) or build(self, index, ffn),
    )
    source, kept = checkpoints("qwen2_moe"), tmp_path / "statistics"
    for alpha in (0.0, 0.9):
        for sparsity in (0.2, 0.4):
            run(
                source,
                name=f"{alpha}-{sparsity}",
                propagate="dense",
                statistics=kept,
                alpha=alpha,
                sparsity=sparsity,
            )
    assert measured == [0, 1, 2]
    alone = run(source, name="alone", propagate="dense", alpha=0.9, sparsity=0.4)
    assert measured == [0, 1, 2] * 2 and alone.statistics
    shared, own = tensors_of(tmp_path / "0.9-0.4"), tensors_of(tmp_path / "alone")
    assert all(torch.equal(shared[name], tensor) for name, tensor in own.items())


def test_other_weights_or_tokens_do_not_share_energies(run, checkpoints, calibration, tmp_path):
    kept = tmp_path / "statistics"
    options = dict(propagate="dense", statistics=kept)
    run(checkpoints("qwen2_moe"), name="a", **options)
    run(checkpoints("qwen2_moe", seed=1), name="b", **options)
    run(checkpoints("qwen2_moe"), name="c", seed=5, **options)
    assert len(list(kept.glob("*.safetensors"))) == 3


class OwnSpec(EnergySpec):
    """A spec of another package than camera."""


class OwnScore(EnergyScore):
    def observer(self):
        return OwnSpec()


class Own(CameraP):
    def ranked_by(self):
        return OwnScore(self.alpha)


class Heir(Own):
    pass


def test_a_method_with_a_spec_of_its_own_shares_with_none_but_its_heirs(run, checkpoints, tmp_path):
    kept = tmp_path / "statistics"
    for method, files in ((CameraP, 1), (Own, 2), (Heir, 2)):
        name, options = method.__name__, dict(propagate="dense", statistics=kept)
        run(checkpoints("qwen2_moe"), method(sparsity=0.3), name, **options)
        assert len(list(kept.glob("*.safetensors"))) == files


def _compress_in_a_process(source, out, data, kept, queue):
    build = EnergySpec.build

    def counted(self, index, ffn):
        queue.put(index)
        return build(self, index, ffn)

    EnergySpec.build = counted
    calibration = camera.Calibration(samples=4, length=32)
    camera.compress(
        source,
        "camera_p",
        out,
        sparsity=0.3,
        calibration=calibration,
        data=data,
        propagate="dense",
        statistics=kept,
        device="cpu",
        progress=False,
    )


def test_parallel_jobs_measure_once(checkpoints, data_folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    source = checkpoints("mixtral")
    jobs = [
        context.Process(
            target=_compress_in_a_process,
            args=(source, tmp_path / f"o{i}", str(data_folder), tmp_path / "kept", queue),
        )
        for i in range(2)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert [queue.get(timeout=5) for _ in range(3)] == [0, 1, 2] and queue.empty()


@pytest.mark.parametrize("of", ["moe", "model", "routed"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_sparsity_is_of_what_it_says_and_never_over(of, family, run, checkpoints):
    result = run(checkpoints(family), sparsity=0.3, sparsity_of=of)
    assert result.sparsity["asked"] == 0.3 and result.sparsity["of"] == of
    assert 0.28 < result.sparsity[of] <= 0.3


def test_routed_leaves_the_shared_expert_alone(run, checkpoints):
    result = run(checkpoints("qwen2_moe"), sparsity=0.5, sparsity_of="routed")
    assert all(w == [40] for path, w in result.widths.items() if path.endswith("shared_expert"))


@pytest.mark.parametrize("multiple", [8, 16])
def test_width_multiple_reaches_the_checkpoint(multiple, run, checkpoints, tmp_path):
    run(checkpoints("qwen3_moe"), width_multiple=multiple, min_width=2)
    stored = load_model(tmp_path / "out", device="cpu").config.quantization_config
    widths = [w for spec in stored.modules.values() for w in spec["widths"]]
    assert all(w % multiple == 0 or w == 24 for w in widths) and min(widths) >= 2
    assert sum(widths) >= 0.7 * 24 * len(widths)


def test_a_compressed_checkpoint_can_be_compressed_again(run, checkpoints, tmp_path):
    run(checkpoints("qwen2_moe"), name="once", sparsity=0.2)
    result = run(tmp_path / "once", name="twice", sparsity=0.25)
    assert 0.23 < result.sparsity["moe"] <= 0.25
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    with torch.no_grad():
        assert torch.isfinite(model(torch.randint(3, 250, (1, 9))).logits).all()


def test_the_report_says_what_was_done(run, checkpoints, tmp_path):
    result = run(checkpoints("deepseek"))
    stored = json.loads((tmp_path / "out" / "camera.json").read_text())
    assert stored == json.loads(json.dumps(result.to_dict()))
    assert stored["coverage"]["experts"] == 18
    assert stored["calibration"]["hash"] and stored["calibration"]["samples"] == 6
    assert stored["seconds"]["calibrate"] > 0 and stored["peak_memory_bytes"] > 1e6
    energies = Statistics.load(tmp_path / "out" / "statistics.safetensors")
    assert sorted(energies.layers) == [1, 2]


def test_unreached_experts_are_reported_with_their_layer(run, checkpoints, tmp_path, caplog):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("qwen3_moe"), source)
    with caplog.at_level("WARNING", "camera"):
        result = run(source, calibration=camera.Calibration(samples=1, length=2))
    assert result.coverage["unreached"]
    layer, path, expert = result.coverage["unreached"][0]
    assert f"layer {layer}: no calibration token reached expert {expert}" in caplog.text
    energy = Statistics.load(tmp_path / "out" / "statistics.safetensors").layers[layer]
    assert path == f"model.layers.{layer}.mlp.experts"
    assert energy.energy(0.9).split(energy.widths)[expert].eq(0).all()


def test_describe_counts_the_original(checkpoints):
    result = camera.describe(checkpoints("mixtral"))
    assert result.method == "dense" and result.sparsity["model"] == 0
    assert result.bytes["dense"] == result.bytes["compressed"] > 0
    assert result.bits["model"] == 32


def fails(match, run, *args, **options):
    with pytest.raises(CameraError, match=match) as caught:
        run(*args, **options)
    assert "\n" not in str(caught.value)


def test_refusals_name_the_key_and_the_mend(run, checkpoints, tmp_path, monkeypatch):
    source = checkpoints("qwen2_moe")
    fails("alpha=1.5", run, source, alpha=1.5)
    fails("sparsity=0 ", run, source, sparsity=0)
    fails(
        r"sparsity=0\.99 of 'model'.*largest possible",
        run,
        source,
        sparsity=0.99,
        sparsity_of="model",
    )
    fails("sparsity_of=all is none of moe, model, routed", run, source, sparsity_of="all")
    fails("method=magic is none of .*camera_p.*, dense.*, random", run, source, "magic")
    fails("method camera_p: .*betta", run, source, betta=1)
    fails("propagate=sideways is none of compressed, dense", run, source, propagate="sideways")
    fails("leaves the model as it is", run, source, "dense")
    with pytest.raises(CameraError, match=r"memory\.phi=maybe is none of auto, keep, routed"):
        MemoryChoices(phi="maybe")
    fails("dtype=int4 is none of auto, float32", run, source, dtype="int4")
    fails("device=gpu is no device", run, source, device="gpu")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    fails("device=cuda:1 is not available", run, source, device="cuda:1")
    fails("neither a folder nor a hub id", run, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    fails("folder without config.json", run, tmp_path / "empty")
    (tmp_path / "taken").mkdir()
    fails("exists already", run, source, name="taken")
    assert not (tmp_path / "out").exists()


def test_hub_models_are_refused_while_offline(run):
    fails(r"owner/name-of-nothing can't be fetched", run, "owner/name-of-nothing")


def test_nothing_is_read_before_an_impossible_sparsity_is_refused(run, checkpoints, monkeypatch):
    monkeypatch.setattr("camera.checkpoint.shards.ShardReader.read", None)
    fails("largest possible", run, checkpoints("mixtral"), sparsity=0.99, sparsity_of="model")


def test_too_little_disk_is_refused_beforehand(run, checkpoints, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    fails("free space or set output", run, checkpoints("mixtral"))


def test_a_disk_that_fills_up_leaves_nothing_that_looks_finished(
    run, checkpoints, tmp_path, monkeypatch
):
    import camera.checkpoint.shards

    written = []

    def full(tensors, path):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        original(tensors, path)

    original = camera.checkpoint.shards.write_tensors
    monkeypatch.setattr("camera.checkpoint.shards.write_tensors", full)
    fails("No space left on device", run, checkpoints("mixtral"))
    assert not (tmp_path / "out").exists()
