"""Gradients streamed layer by layer equal ordinary autograd through the whole model."""

import gc

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import camera
from camera.calibration.observers import LayerObserver, ObserverSpec
from camera.calibration.scores.gradient import GradientObserver, GradientSpec
from camera.calibration.statistics import LayerStatistics
from camera.pipeline.passes import backward
from camera.pipeline.passes.backward import BackwardWay
from camera.pipeline.resume import PassProgress
from camera.runtime.errors import CameraError
from camera.streaming import lm_head
from camera.streaming.skeleton import MetaModel
from camera.streaming.streamer import LayerStreamer, Placement
from tests.helpers.models import FAMILIES, MOE_FAMILIES
from tests.helpers.oracles import ffn_of, shared_of

LAYERS = 3


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Layers are freed with a collection each: let it look at what the tests make only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def plain_batches(samples=4, length=20):
    ids = torch.randint(3, 250, (samples, length), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": part} for part in ids.split(2)]


def padded_batches():
    batches = plain_batches()
    for batch, pads in zip(batches, ((0, 5), (3, 0)), strict=True):
        mask = torch.ones_like(batch["input_ids"])
        for row, count in enumerate(pads):
            mask[row, :count] = 0
        batch["attention_mask"] = mask
    return batches


def assert_equal(got, want):
    """Equal to 1e-4, or to 1e-5 of the largest entry where terms cancel."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def whole(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return model.eval()


def sample_losses(model, batch):
    """The model's own loss of each sample: the mean cross entropy of its next tokens."""
    for row, ids in enumerate(batch["input_ids"]):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[row]
        labels = ids.masked_fill(mask == 0, -100)
        first = int(mask.argmax())
        labels[first] = -100  # nothing real comes before it
        yield model(ids[None], attention_mask=mask[None], labels=labels[None]).loss


class Squares(LayerStatistics):
    """Squared weight gradients by expert and matrix."""

    kind = "squares"


class Recorder(LayerObserver):
    """Weight gradients per sample, as an observer of gradients sees them."""

    def __init__(self):
        self.squares = {}

    def __call__(self, seen):
        for gradients in seen.weights():
            for name, gradient in zip(("gate", "up", "down"), gradients, strict=True):
                key = (seen.group.routed, seen.expert, name)
                self.squares[key] = self.squares.get(key, 0) + gradient.square()

    def result(self):
        found = Squares({})
        found.squares = self.squares
        return found


class RecorderSpec(ObserverSpec):
    statistics = Squares
    reads = "gradients"

    def build(self, index, ffn):
        return Recorder()


def streamer_of(folder, dtype="auto", **placement):
    return LayerStreamer(MetaModel(folder, dtype=dtype), Placement(**placement))


def there_and_back(streamer, batches, folder, spec=None):
    """Gradients at every layer's output (last: the embedding) and what observers saw."""
    run, seen = BackwardWay(streamer, batches, folder), {}
    run.start()
    for index in range(LAYERS):
        run.forward(index)
    run.head()
    gradients = [run.gradients]
    for index in reversed(range(LAYERS)):
        run.gradients = list(run.gradients)
        seen[index] = run.back(index, spec)
        gradients.append(run.gradients)
    return gradients[::-1], seen


@pytest.mark.parametrize("make", [plain_batches, padded_batches])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_whole_model(family, make, checkpoints, tmp_path):
    """Of every layer's input, and of every sample's loss for every expert's weights."""
    folder, batches = checkpoints(family), make()
    streamer = streamer_of(folder)
    hidden, seen = there_and_back(streamer, batches, tmp_path, RecorderSpec())
    model, inputs, squares = whole(folder), {}, {}
    for index, layer in enumerate(model.model.layers):

        def keep(_, args, kwargs, index=index):
            found = args[0] if args else kwargs["hidden_states"]
            found.retain_grad()
            inputs.setdefault(index, []).append(found)

        layer.register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        for loss in sample_losses(model, batch):
            model.zero_grad()
            loss.backward()
            for index in streamer.model.budget.layers:
                found = squares.setdefault(index, {})
                for key, gradient in expert_gradients(ffn_of(model.model.layers[index])):
                    found[key] = found.get(key, 0) + gradient.square()
    for index in range(LAYERS):
        want = torch.cat([found.grad for found in inputs[index]])
        assert want.abs().max() > 1e-6
        assert_equal(torch.cat(hidden[index]), want)
    for index, want in squares.items():
        for key, square in want.items():
            if key in seen[index].squares:
                assert_equal(seen[index].squares[key].sqrt(), square.sqrt())
            else:
                assert not square.any(), "an expert that no observer saw has gradients"


def expert_gradients(ffn):
    """((routed, expert, matrix), gradient) of every expert of a layer's pool."""
    mlp = shared_of(ffn) if hasattr(ffn, "experts") else ffn
    if mlp is not None:
        for name in ("gate", "up", "down"):
            yield (False, 0, name), getattr(mlp, f"{name}_proj").weight.grad
    if hasattr(ffn, "experts"):
        gate_up, down = ffn.experts.gate_up_proj.grad, ffn.experts.down_proj.grad
        for e in range(len(down)):
            gate, up = gate_up[e].chunk(2)
            yield from (((True, e, n), g) for n, g in (("gate", gate), ("up", up)))
            yield (True, e, "down"), down[e]


def forwards(title, start):
    return range(start, LAYERS)


def sensitivities(streamer, ids, work, size=10**6, spec=None):
    """Statistics of gradients of all layers, `size` samples together."""
    progress = PassProgress(work / "progress", {})
    progress.restore()
    inputs = [{"input_ids": part} for part in ids.split(size)]
    return BackwardWay(streamer, inputs, work / "inputs").run(
        spec or GradientSpec(), forwards, progress
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek", "granitemoe", "llama"])
def test_sensitivities_equal_those_of_output_gradients(family, checkpoints, tmp_path):
    """dloss/dh_i is w_i^down . dloss/d(expert output), taken from whole-model autograd."""
    folder, batches = checkpoints(family), plain_batches()
    ids = torch.cat([batch["input_ids"] for batch in batches])
    found = sensitivities(streamer_of(folder), ids, tmp_path)
    model = whole(folder)
    want = {index: {} for index in found}
    hooks = []
    for index in found:
        hooks += watch_outputs(ffn_of(model.model.layers[index]), want[index])
    for batch in batches:
        for loss in sample_losses(model, batch):
            loss.backward()
    for index, layer in found.items():
        parts = [want[index][key] for key in sorted(want[index])]
        for name in ("h2_N", "dh2_N", "joint_N"):
            expected = torch.cat([sums[name] for sums in parts])
            assert_equal(getattr(layer, name), expected)


def watch_outputs(ffn, sums):
    """Sums of h^2, (w . g)^2 and their product over tokens, g by a hook on the expert's output."""
    hooks = []

    def add(key, h, down, g):
        g, h = (g @ down).double(), h.double()
        found = sums.setdefault(key, dict.fromkeys(("h2_N", "dh2_N", "joint_N"), 0))
        for name, term in (("h2_N", h), ("dh2_N", g), ("joint_N", g * h)):
            found[name] = found[name] + term.square().sum(0)

    mlp = shared_of(ffn) if hasattr(ffn, "experts") else ffn
    if mlp is not None:

        def on_mlp(_, args, out):
            x, down = args[0].detach(), mlp.down_proj.weight.detach()
            h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            h = h.detach().flatten(0, -2)
            out.register_hook(lambda g: add((0, 0), h, down, g.flatten(0, -2)))

        hooks.append(mlp.register_forward_hook(on_mlp))
    if hasattr(ffn, "experts"):

        def on_experts(module, args, out):
            x, index_TK, weight_TK = (a.detach() for a in args)

            def hook(g_TH):
                for e in range(len(module.down_proj)):
                    down = module.down_proj[e].detach()
                    tokens, slots = (index_TK == e).nonzero(as_tuple=True)
                    gate, up = F.linear(x[tokens], module.gate_up_proj[e].detach()).chunk(2, -1)
                    a = weight_TK[tokens, slots][:, None]
                    add((1, e), F.silu(gate) * up, down, a * g_TH[tokens])

            out.register_hook(hook)

        hooks.append(ffn.experts.register_forward_hook(on_experts))
    return hooks


def test_batching_and_order_of_samples_do_not_matter(checkpoints, tmp_path):
    folder = checkpoints("qwen2_moe")
    ids = torch.cat([batch["input_ids"] for batch in plain_batches(6)])
    one = sensitivities(streamer_of(folder), ids, tmp_path / "a", size=1)
    many = sensitivities(streamer_of(folder), ids.flip(0), tmp_path / "b", size=4)
    for index, layer in one.items():
        assert torch.equal(layer.tokens_E, many[index].tokens_E)
        for name in ("h2_N", "dh2_N", "joint_N", "sum2_N", "max2_N"):
            assert_equal(getattr(layer, name), getattr(many[index], name))


@pytest.mark.parametrize(("tokens", "sizes"), [(1, [1] * 6), (100, [2] * 3), (10**6, [6])])
def test_as_many_samples_go_back_together_as_the_tokens_allow(
    tokens, sizes, checkpoints, calibration, data_folder, tmp_path, monkeypatch
):
    found, run = [], BackwardWay.run

    def counted(self, *args):
        found.extend(len(batch["input_ids"]) for batch in self.inputs)
        return run(self, *args)

    monkeypatch.setattr(BackwardWay, "run", counted)
    monkeypatch.setattr(backward, "BACKWARD_TOKENS", tokens)
    options = dict(calibration=calibration, data=str(data_folder), progress=False, device="cpu")
    camera.compress(checkpoints("llama"), "heapr", tmp_path / "out", sparsity=0.3, **options)
    assert found == sizes


def test_the_head_is_computed_in_chunks_of_tokens(checkpoints, tmp_path, monkeypatch):
    folder, batches = checkpoints("granitemoe"), plain_batches()
    whole_head, _ = there_and_back(streamer_of(folder), batches, tmp_path / "a")
    seen = []
    original = F.cross_entropy
    monkeypatch.setattr(
        backward.F, "cross_entropy", lambda x, *a, **k: seen.append(len(x)) or original(x, *a, **k)
    )
    monkeypatch.setattr(lm_head, "HEAD_LOGITS", 6 * 7 * 256)  # six tables of them
    chunked, _ = there_and_back(streamer_of(folder), batches, tmp_path / "b")
    assert max(seen) == 7
    for a, b in zip(whole_head, chunked, strict=True):
        assert_equal(torch.cat(a), torch.cat(b))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_no_two_layers_are_in_memory_and_no_weight_gets_a_gradient(
    family, checkpoints, tmp_path, monkeypatch
):
    streamer, counts = streamer_of(checkpoints(family)), []
    model = streamer.model

    def real(layer):
        return any(not p.is_meta for p in layer.parameters())

    original = LayerStreamer.load_layer

    def counted(self, index):
        layer = original(self, index)
        counts.append(sum(real(layer) for layer in self.model.layers))
        return layer

    class Observer(GradientObserver):
        def __call__(self, call):
            super().__call__(call)
            assert sum(real(layer) for layer in model.layers) == 1
            assert all(p.grad is None for p in model.model.parameters())

    class Spec(GradientSpec):
        def build(self, index, ffn):
            return Observer(ffn)

    monkeypatch.setattr(LayerStreamer, "load_layer", counted)
    ids = torch.cat([batch["input_ids"] for batch in plain_batches()])
    found = sensitivities(streamer, ids, tmp_path, spec=Spec())
    assert sorted(found) == sorted(model.budget.layers)
    assert counts == [1] * (2 * LAYERS - min(model.budget.layers))
    assert all(p.is_meta for p in model.model.parameters())
    assert not list((tmp_path / "inputs").iterdir()), "inputs that nobody needs are left"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 2 * LAYERS + 1))
@pytest.mark.parametrize("after", [False, True], ids=["before writing", "after writing"])
def test_a_killed_pass_goes_on_and_ends_in_the_same_numbers(
    at, after, checkpoints, tmp_path, monkeypatch
):
    folder = checkpoints("deepseek")
    ids = torch.cat([batch["input_ids"] for batch in plain_batches()])
    want = sensitivities(streamer_of(folder), ids, tmp_path / "whole", size=2)
    original, count, loads = PassProgress.commit, [0], []

    def commit(self, *args):
        count[0] += 1
        if count[0] == at and not after:
            raise Killed
        original(self, *args)
        if count[0] == at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PassProgress, "commit", commit)
        sensitivities(streamer_of(folder), ids, tmp_path / "killed", size=2)
    load = LayerStreamer.load_layer
    monkeypatch.setattr(LayerStreamer, "load_layer", lambda s, i: loads.append(i) or load(s, i))
    got = sensitivities(streamer_of(folder), ids, tmp_path / "killed", size=2)
    steps = [*range(LAYERS), *reversed(range(1, LAYERS))]  # layer 0 is dense: nothing is asked
    assert loads == steps[at if after else at - 1 :]
    assert list(got) == list(want)
    for index, layer in want.items():
        for name, tensor in layer.tensors().items():
            assert torch.equal(getattr(got[index], name), tensor), name


def test_inputs_that_are_gone_are_named(checkpoints, tmp_path):
    run = BackwardWay(streamer_of(checkpoints("qwen3_moe")), plain_batches(), tmp_path)
    with pytest.raises(CameraError, match=r"input-00002\.safetensors can.t be read"):
        run.start(2)


def test_float16_is_refused(checkpoints, calibration, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(BackwardWay, "run", None)  # can't be called
    options = dict(calibration=calibration, data=str(data_folder), progress=False, device="cpu")
    with pytest.raises(CameraError, match="dtype=bfloat16"):
        camera.compress(
            checkpoints("qwen3_moe"),
            "heapr",
            tmp_path / "out",
            sparsity=0.3,
            dtype="float16",
            **options,
        )


def test_gradients_that_are_not_finite_are_refused(checkpoints, tmp_path, monkeypatch):
    batches = plain_batches()
    streamer = streamer_of(checkpoints("qwen3_moe"))
    original = MetaModel.load_rest

    def broken(self, only=""):
        original(self, only)
        if only == "lm_head":
            self.model.lm_head.weight.data[3] = torch.inf

    monkeypatch.setattr(MetaModel, "load_rest", broken)
    with pytest.raises(CameraError, match="gradients at the head hold NaN or inf"):
        there_and_back(streamer, batches, tmp_path)


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_experts_that_stay_on_disk_have_the_same_gradients(family, checkpoints, tmp_path):
    folder, batches = checkpoints(family), plain_batches()
    loaded, _ = there_and_back(streamer_of(folder), batches, tmp_path / "a", GradientSpec())
    streamer = streamer_of(folder, experts_on_disk=True)
    on_disk, _ = there_and_back(streamer, batches, tmp_path / "b", GradientSpec())
    for a, b in zip(loaded, on_disk, strict=True):
        assert_equal(torch.cat(a), torch.cat(b))


def test_bfloat16_follows_float32(checkpoints, tmp_path):
    folder, batches = checkpoints("qwen2_moe"), plain_batches()
    want, _ = there_and_back(streamer_of(folder), batches, tmp_path / "a")
    got, _ = there_and_back(streamer_of(folder, dtype="bfloat16"), batches, tmp_path / "b")
    for a, b in zip(want, got, strict=True):
        a, b = torch.cat(a).flatten(), torch.cat(b).float().flatten()
        assert b.dtype == torch.float32 and F.cosine_similarity(a, b, dim=0) > 0.98
