"""Several processes share the calibration samples, agree on the plan, and are killed together."""

import json
import textwrap

import pytest
import torch
from safetensors.torch import load_file

import camera
from camera.calibration.hessians import HessianObserver
from camera.calibration.observers import ObserverSpec
from camera.calibration.scores.energy import EnergyStatistics
from camera.calibration.statistics import LayerStatistics, Statistics
from camera.method import Pass, PassKind
from camera.moe.capture import run_ffn
from camera.moe.families import family_of
from camera.moe.feed_forward import FeedForward
from camera.pipeline.compression import refuse_unshared
from camera.runtime import distributed
from camera.runtime.errors import CameraError
from tests.helpers.machine.processes import torchrun
from tests.helpers.models import build_model
from tests.helpers.quantization.damage import damage

LAYERS = 4
JOBS = {
    "layer by layer": dict(method="camera_p", sparsity=0.4),
    "all layers at once": dict(method="camera_p", sparsity=0.4, rank_scope="global"),
    "cuts tried": dict(method="camera_p", sparsity=0.4, rank_scope="measured"),
    "dense": dict(method="camera_p", sparsity=0.4, propagate="dense"),
    "compensated": dict(
        method="camera_p", sparsity=0.4, compensate="layer", target="dense", ridges=[10.0]
    ),
    "hessians": dict(method="camera_q", bits=3.0),
    "outputs": dict(method="naee", sparsity=0.25),
    "begun": dict(method="camera_p", sparsity=0.4),
}
REFUSED, BEGUN = "outputs", "begun"
# What each process does: all jobs in turn. In its first life one is killed in the middle of the
# first job, and torchrun starts both anew; both stop in the middle of the last one.
JOB = textwrap.dedent("""
    import json, os, signal, sys
    from pathlib import Path
    import camera
    from camera.pipeline import resume
    from camera.runtime.distributed import barrier, process_group, rank
    from camera.runtime.errors import CameraError
    from camera.streaming.streamer import LayerStreamer

    source, folder, data, jobs = sys.argv[1:]
    folder, jobs, original, written = Path(folder), json.loads(jobs), resume.write_json, []

    def killed(*args):
        original(*args)
        written.append(1)
        if len(written) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        resume.write_json = killed

    class Stopped(BaseException):
        pass

    commit = resume.PassProgress.commit

    def stopped(self, done, *rest):
        commit(self, done, *rest)
        if done == 2:
            barrier()
            raise Stopped

    loaded, load = [], LayerStreamer.load_layer
    LayerStreamer.load_layer = lambda self, i: loaded.append(i) or load(self, i)
    with process_group():
        for name, options in jobs.items():
            if name == "begun":
                resume.PassProgress.commit = stopped
            try:
                result = camera.compress(
                    source, out=folder / name, data=data, device="cpu", progress=False,
                    calibration=camera.Calibration(samples=5, length=16), **options,
                )
                said = result.widths
            except CameraError as error:
                said = str(error)
            except Stopped:
                said = "stopped"
            line = json.dumps({"job": name, "said": said, "loaded": loaded})
            loaded.clear()
            with (folder / f"rank-{rank()}").open("a") as file:
                file.write(line + "\\n")
""")


def succeed(*arguments, **options):
    done = torchrun(*arguments, **options)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints("qwen2_moe", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def two(source, data_folder, tmp_path_factory):
    """The folder of what two processes did, and what each of them said of each job."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "job.py"
    script.write_text(JOB)
    asked = (source, folder, data_folder, json.dumps(JOBS))
    succeed(script, *asked, restarts=1)
    said = [
        {fact["job"]: fact for fact in map(json.loads, (folder / f"rank-{r}").open())}
        for r in range(2)
    ]
    return folder, said


@pytest.fixture(scope="module")
def one(source, data_folder, tmp_path_factory):
    """one(name): what one process makes of a job."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def go(name):
        if name not in made:
            made[name] = camera.compress(
                source,
                out=folder / name,
                data=str(data_folder),
                device="cpu",
                progress=False,
                calibration=camera.Calibration(samples=5, length=16),
                **JOBS[name],
            )
        return folder / name, made[name]

    return go


def weights(folder):
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("job", ["layer by layer", "all layers at once", "dense"])
def test_two_processes_keep_what_one_keeps(job, two, one):
    folder, said = two
    alone, result = one(job)
    assert [rank[job]["said"] for rank in said] == [result.widths] * 2
    mine, theirs = weights(folder / job), weights(alone)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_killed_processes_go_on_at_the_right_layer(two):
    """One was killed once its second layer was there; both went on, and ended in what one process
    makes of it (the test above)."""
    folder, said = two
    loaded = [rank["layer by layer"]["loaded"] for rank in said]
    assert loaded == [[2, 3], [2, 3]] or loaded == [[1, 2, 3], [1, 2, 3]]
    assert [rank["dense"]["loaded"] for rank in said] == [[*range(LAYERS)] * 2] * 2
    assert not list(folder.glob(".layer*"))


def test_cuts_are_tried_on_both_processes_tokens(two, one):
    _, said = two
    _, result = one("cuts tried")
    widths = [rank["cuts tried"]["said"] for rank in said]
    assert widths[0] == widths[1]
    # costs are summed in another order, so that a layer may end a step of the curves further on
    assert sum(map(sum, widths[0].values())) == sum(map(sum, result.widths.values()))
    differing = sum(abs(sum(widths[0][path]) - sum(result.widths[path])) for path in result.widths)
    assert differing <= 0.02 * sum(map(sum, result.widths.values()))


def test_what_both_processes_quantise_is_as_good_as_what_one_does(two, one, source):
    folder, said = two
    alone, result = one("hessians")
    assert [rank["hessians"]["said"] for rank in said] == [result.widths] * 2
    mine, theirs = weights(folder / "hessians"), weights(alone)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].shape == theirs[name].shape for name in mine)
    lost, expected = damage(folder / "hessians", source), damage(alone, source)
    assert lost == pytest.approx(expected, rel=0.1)  # codes may differ: see damage.py
    # the inputs of this layer are the same, so that its codes hang on its own sums alone; with the
    # Hessians of other tokens two thirds of its bytes are others
    first = [name for name in mine if name.startswith("model.layers.0.") and "expert" in name]
    same = sum((mine[name] == theirs[name]).sum().item() for name in first)
    assert same > 0.9 * sum(mine[name].numel() for name in first)


def test_both_processes_tokens_are_fitted_to(two, one):
    folder, said = two
    alone, result = one("compensated")
    # what is held out differs, so layers after the first are cut by energies that differ a little
    widths = [rank["compensated"]["said"] for rank in said]
    assert widths[0] == widths[1]
    for path, own in result.widths.items():
        if ".layers.0." in path:
            assert widths[0][path] == own
        else:
            assert sum(widths[0][path]) == pytest.approx(sum(own), abs=4)
    report = json.loads((folder / "compensated" / "camera.json").read_text())["layers"]["0"]
    assert report["ridges"] == result.layers["0"]["ridges"] == [10.0]
    mine, theirs, before = map(weights, (folder / "compensated", alone, one("layer by layer")[0]))
    first = [name for name in theirs if ".0." in name and "down_proj" in name]
    assert first
    for name in first:
        change = (theirs[name] - before[name]).norm()
        assert (mine[name] - theirs[name]).norm() < 0.1 * change


def test_what_can_not_be_added_up_is_refused_by_both(two):
    folder, said = two
    for rank in said:
        assert "expert_outputs) can't be added up over processes" in rank[REFUSED]["said"]
    assert not (folder / REFUSED).exists()


def test_what_two_processes_began_one_does_anew(two, one, source, data_folder, caplog):
    folder, said = two
    assert [rank[BEGUN]["said"] for rank in said] == ["stopped"] * 2
    assert (folder / f".{BEGUN}.partial" / "progress" / "state-1.json").exists()
    camera.compress(
        source,
        out=folder / BEGUN,
        data=str(data_folder),
        device="cpu",
        progress=False,
        calibration=camera.Calibration(samples=5, length=16),
        **JOBS[BEGUN],
    )
    assert "starting anew (processes: 2 there, 1 here)" in caplog.text
    alone, _ = one("layer by layer")
    mine, theirs = weights(folder / BEGUN), weights(alone)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    seen, whole = (
        Statistics.load(made / "statistics.safetensors").layers for made in (folder / BEGUN, alone)
    )
    for index, layer in whole.items():
        assert torch.equal(seen[index].tokens_E, layer.tokens_E)


class Summed:
    """What torch.distributed does for two processes of which this is one."""

    def __init__(self, monkeypatch, other):
        self.other = iter(other)
        monkeypatch.setattr(distributed, "world", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", self)

    def __call__(self, tensor, how):
        other = next(self.other)
        summed = how == torch.distributed.ReduceOp.SUM
        tensor.copy_(tensor + other if summed else tensor.max(other))


def energy(seed):
    draw = torch.Generator().manual_seed(seed)
    shares = [torch.rand(6, generator=draw) for _ in range(3)]
    return EnergyStatistics({"experts": [2, 4]}, *shares, torch.randint(9, (2,), generator=draw))


def test_each_field_is_combined_by_its_rule(monkeypatch):
    mine, other, basis = energy(0), energy(1), energy(0).basis_N
    fields = sorted(EnergyStatistics.reduced)  # the same order in every process
    Summed(monkeypatch, [getattr(other, field) for field in fields])
    both = mine.all_reduced()
    assert torch.equal(both.sum2_N, energy(0).sum2_N + energy(1).sum2_N)
    assert torch.equal(both.max2_N, energy(0).max2_N.max(energy(1).max2_N))
    assert torch.equal(both.tokens_E, energy(0).tokens_E + energy(1).tokens_E)
    assert torch.equal(both.basis_N, basis)  # of the weights, which all have


def test_hessians_of_shares_add_up_to_those_of_all_tokens(monkeypatch):
    layer = build_model("qwen2_moe").model.layers[1]
    ffn = FeedForward(layer, family_of("qwen2_moe"), "model.layers.1")
    x_BLH = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def seen(part_BLH):
        observer = HessianObserver(ffn)
        run_ffn(ffn, part_BLH, observer)
        return observer.result()

    mine, other, whole = seen(x_BLH[:1]), seen(x_BLH[1:]), seen(x_BLH)
    Summed(monkeypatch, [getattr(other, field) for field in sorted(mine.reduced)])
    both = mine.all_reduced()
    assert torch.equal(both.tokens_E, whole.tokens_E)
    for name in ("input_EHH", "hidden_F", "input_max2_EH"):  # fp32 sums, in another order
        got, want = getattr(both, name), getattr(whole, name)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_statistics_without_a_rule_are_refused(monkeypatch):
    class Odd(LayerStatistics):
        kind = "odd"

    class OddSpec(ObserverSpec):
        statistics = Odd

        def build(self, index, ffn):
            raise AssertionError("a layer is observed before the refusal")

    passes, method = [Pass(PassKind.COMPRESSED, OddSpec())], camera.CameraP(sparsity=0.3)
    refuse_unshared(passes, method)  # one process adds nothing up
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(CameraError, match=r"\(odd\) can't be added up.*without torchrun"):
        refuse_unshared(passes, method)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_are_all_samples_once_and_even(ranks, monkeypatch):
    ids_NL = torch.arange(20).view(5, 4)
    monkeypatch.setattr(distributed, "world", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.shard_samples(ids_NL))
    assert torch.equal(torch.cat(shares), ids_NL)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
