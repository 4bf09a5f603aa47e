"""Every benchmark runs at a tiny scale, and both of its sides compute the same."""

import argparse
import json
import pkgutil

import pytest
import torch

import experiments.bench as bench
from camera.runtime.errors import CameraError
from experiments.bench import (
    __main__,
    energy,
    gptq,
    layer,
    naee,
    packed,
    roofline,
    serve,
    speed,
    stream,
)
from experiments.bench.support import timing
from experiments.bench.support.layers import SHAPES

BENCHMARKS = (energy, gptq, layer, naee, packed, roofline, serve, speed, stream)


@pytest.fixture(autouse=True)
def _threads():
    """Benchmarks set the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def ran(benchmark, *words: str) -> dict:
    """What a benchmark measures with these options; it is one line of JSON."""
    parser = argparse.ArgumentParser()
    benchmark.arguments(parser)
    found = benchmark.run(parser.parse_args(words))
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_of_routed_tokens_are_those_of_all_tokens(shape):
    found = ran(energy, "--shapes", shape, "--scale", "32", "--tokens", "64")
    assert found["shapes"][shape]["same"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_pruned_in_one_pass_leaves_what_the_reference_leaves(shape):
    words = ("--scale", "32", "--samples", "2", "--length", "32", "--repeats", "1")
    assert ran(layer, "--shape", shape, *words)["same"]


def test_what_is_served_is_weighed_and_decoded_beside_the_dense_model(checkpoints, tmp_path):
    for package in ("gguf", "xllamacpp"):
        pytest.importorskip(package, reason=f"needs {package}")
    words = (str(checkpoints("qwen3_moe")), "--rows", "dense", "magnitude", "--blocks", "0")
    words += ("--sparsity", "0.5", "--tokens", "2", "--repeats", "1", "--out", str(tmp_path))
    words += ("--table", str(tmp_path / "table.md"))
    dense, small = ran(serve, *words)["rows"]
    assert small["sparsity"] == 0.5 and small["widths"] == {"routed": [12, 12]}
    for form in ("checkpoint", "gguf"):
        assert small["megabytes"][form] < dense["megabytes"][form]
    assert small["megabytes"]["native"] == small["megabytes"]["checkpoint"]
    assert all(found["ratio"] > 0 for found in small["decode"].values())
    assert ran(serve, *words)["rows"] == [dense, small]  # kept, not measured again
    *_, last = (tmp_path / "table.md").read_text().splitlines()
    assert last.startswith("| qwen3_moe") and "| Magnitude | uniform | 12 | – | 50.0% |" in last


def test_as_much_of_all_experts_goes_where_the_shared_one_stays_whole(checkpoints):
    folder, asked = (
        str(checkpoints("qwen2_moe")),
        argparse.Namespace(sparsity=0.4, width_multiple=1),
    )
    settings = serve.settings_of("plus_routed", folder, asked)
    shared, *routed = 40, *8 * [24]  # widths of a layer of the model
    assert settings["sparsity"] * sum(routed) == pytest.approx(0.4 * (shared + sum(routed)))
    assert settings["sparsity_of"] == "routed" and settings["expert_widths"] == "uniform"
    with pytest.raises(CameraError, match="leave out plus_routed"):
        serve.settings_of("plus_routed", str(checkpoints("qwen3_moe")), asked)


def test_codes_of_a_batch_are_those_of_expert_by_expert():
    found = ran(gptq, "--experts", "3", "--scale", "32", "--repeats", "1")
    assert found["same_codes"]


def test_errors_from_cached_outputs_are_those_of_running_the_experts():
    words = ("--tokens", "64", "--drop", "2", "5", "--candidates", "2", "--repeats", "1")
    found = ran(naee, "--scale", "32", *words)
    assert found["largest_difference"] < 1e-4
    assert [(one["drop"], one["evaluations"]) for one in found["search"]] == [
        (drop, sum(range(64 - drop + 1, 64 + 1))) for drop in (2, 5)
    ]


def test_packed_experts_run_in_every_dtype_and_take_less_memory():
    words = ("--experts", "4", "--scale", "16", "--tokens", "1", "8", "--repeats", "1")
    found = ran(packed, *words, "--group-size", "32")
    results = {(one["dtype"], one["tokens"]): one for one in found["results"]}
    assert results.keys() == {(d, n) for d in ("float32", "bfloat16") for n in (1, 8)}
    memory = found["average_bits"] / 32
    assert results["float32", 1]["memory"] == pytest.approx(memory, abs=1e-4)
    assert results["bfloat16", 1]["memory"] == pytest.approx(2 * memory, abs=1e-4)


@pytest.mark.parametrize("model", ["tiny", "wide"])
def test_speeds_are_measured_by_sparsity_and_batch_size(model, monkeypatch):
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_experts": 8}
    for key, value in small.items():
        monkeypatch.setitem(speed.WIDE, key, value)
    words = ("--prompt-length", "4", "--new-tokens", "1", "--repeats", "1")
    sizes = ("--batch-sizes", "1", "2", "--sparsity", "0.4")
    found = ran(speed, "--model", model, *words, *sizes)
    measured = found["sparsity"]["0.4"]
    assert measured["goal"] == 1.25 and {"1", "2"} <= measured.keys()
    assert measured["2"]["decode"]["ratio"] > 0
    assert found["ceiling"].keys() == {"1", "2"}


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_a_checkpoint_of_real_shapes_is_streamed(place, tmp_path):
    words = ("--model", "olmoe_1b_7b", "--scale", "16", "--layers", "2", "--length", "32")
    places = ("--experts", place, "--hidden", place, "--folder", str(tmp_path))
    found = ran(stream, *words, *places)
    assert (found["layers"], found["tokens"]) == (2, 8 * 32)
    assert found["written_gb"] < found["read_gb"]
    assert 0 <= found["overlapped"] <= 1
    assert not list(tmp_path.iterdir())


def test_a_scale_that_leaves_no_whole_width_is_refused(tmp_path):
    with pytest.raises(CameraError, match="--scale 3 doesn't divide hidden_size=2048"):
        ran(stream, "--model", "olmoe_1b_7b", "--scale", "3", "--folder", str(tmp_path))


def test_every_benchmark_is_a_name_of_the_command_and_one_line_of_json(capsys):
    names = {m.name for m in pkgutil.iter_modules(bench.__path__) if not m.ispkg} - {"__main__"}
    assert names == {module.__name__.rpartition(".")[2] for module in BENCHMARKS}
    __main__.main(["roofline", "--model", "tiny_moe", "--device", "h100"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["benchmark"] == "roofline"


def test_the_help_of_a_benchmark_says_what_is_measured(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["layer", "--help"])
    assert "`reference` is the paper's released code" in " ".join(capsys.readouterr().out.split())


def test_sides_take_turns_and_the_first_turn_warms_up():
    turns = []
    sides = {name: lambda name=name: turns.append(name) for name in "ab"}
    assert timing.take_turns(sides, 2).keys() == {"a", "b"}
    assert turns == ["a", "b"] * 3
