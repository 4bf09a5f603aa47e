"""rank_scope=global: all layers' micro-experts ranked together, by scores of the dense model."""

import pytest
import torch

import camera
from camera.calibration.statistics import Statistics
from camera.streaming.skeleton import MetaModel


@pytest.fixture
def compress(data_folder, calibration, tmp_path):
    def run(source, method, **options):
        settings = dict(data=str(data_folder), calibration=calibration, device="cpu")
        return camera.compress(
            source, method, tmp_path / "out", progress=False, **{**settings, **options}
        )

    return run


@pytest.mark.parametrize("sparsity_of", ["moe", "routed"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_the_lowest_energies_of_the_whole_model_go(
    family, sparsity_of, compress, checkpoints, tmp_path
):
    source = checkpoints(family)
    result = compress(
        source, "camera_p", sparsity=0.4, sparsity_of=sparsity_of, rank_scope="global"
    )
    statistics = Statistics.load(tmp_path / "out" / "statistics.safetensors")
    pools = MetaModel(source).budget.layers
    energies, kept = [], []
    for i, layer in statistics:
        energy_N = layer.energy(0.9)
        own = [width for path in layer.groups for width in result.widths[path]]
        parts = energy_N.split(layer.widths)
        for expert, (part, routed) in enumerate(zip(parts, pools[i].routed, strict=True)):
            if sparsity_of == "moe" or routed:
                energies.append(part)
                kept.append(own[expert])
            else:
                assert own[expert] == len(part)
    everything = torch.cat(energies)
    gone = int(len(everything) * 0.4 + 1e-9)
    limit = everything.sort().values[gone]
    assert kept == [int((part >= limit).sum()) for part in energies]


@pytest.mark.parametrize("method", ["magnitude", "random", "camera_p"])
def test_layers_keep_unequal_shares_of_an_equal_total(method, compress, checkpoints):
    result = compress(
        checkpoints("qwen3_moe", num_hidden_layers=4), method, sparsity=0.5, rank_scope="global"
    )
    sums = [sum(widths) for widths in result.widths.values()]
    full = sum(result.full_widths[path] * len(w) for path, w in result.widths.items())
    assert sum(sums) == full - full // 2
    assert len(set(sums)) > 1
