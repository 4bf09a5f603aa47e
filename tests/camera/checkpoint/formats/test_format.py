"""What every format answers for itself: widths, bytes, native tensors, selection."""

import pytest
import torch

from camera.checkpoint.formats.delta import DeltaExperts
from camera.checkpoint.formats.format import FORMATS, Format
from camera.checkpoint.formats.packed.codes import MAX_BITS
from camera.checkpoint.formats.packed.footprint import StoredBits
from camera.checkpoint.formats.packed.segments import BitSegments
from camera.checkpoint.formats.packed.spec import (
    experts_spec,
    linear_spec,
    mlp_spec,
    router_spec,
    spec_bytes,
)
from camera.checkpoint.formats.ragged import RaggedExperts, ragged_of
from camera.moe.families import family_of

NAMES = [
    "ragged",
    "approximate",
    "narrow",
    "delta",
    "packed",
    "packed_mlp",
    "packed_linear",
    "packed_router",
]
ROWS = BitSegments.of("rows", [[3] * 8])
BOTH = ROWS, BitSegments.of("columns", [[3] * 8])


def ragged(widths=(3, 5)) -> RaggedExperts:
    torch.manual_seed(0)
    experts = RaggedExperts(4, list(widths), torch.nn.SiLU()).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_()
    return experts


def test_the_names_of_formats_are_those_in_published_checkpoints():
    assert sorted(FORMATS) == sorted(NAMES)
    assert [FORMATS[name].name for name in NAMES] == NAMES


def test_width_keys_and_widths():
    family = family_of("qwen2_moe")
    routed, shared = "model.layers.1.mlp.experts", "model.layers.1.mlp.shared_expert"
    keys = {
        ("ragged", routed): "moe_intermediate_size",
        ("delta", routed): "moe_intermediate_size",
        ("packed", routed): "moe_intermediate_size",
        ("narrow", shared): "shared_expert_intermediate_size",
        ("packed_mlp", shared): "shared_expert_intermediate_size",
        ("narrow", "model.layers.0.mlp"): "intermediate_size",
    }
    assert {(n, path): FORMATS[n].width_key(family, path) for n, path in keys} == keys
    assert RaggedExperts.widest({"form": "ragged", "widths": [3, 9, 0]}) == 9
    assert FORMATS["narrow"].widest({"form": "narrow", "width": 7}) == 7
    assert FORMATS["packed_mlp"].widest(mlp_spec(16, 8, *BOTH, 8, False)) == 8
    with pytest.raises(NotImplementedError):
        FORMATS["packed_linear"].width_key(family, routed)


@pytest.mark.parametrize(
    "spec",
    [
        experts_spec(16, [8], *BOTH, 8, False),
        mlp_spec(16, 8, *BOTH, 8, True),
        linear_spec(8, 16, ROWS, None, False),
        router_spec(8, 16, ROWS, 4, False),
    ],
    ids=lambda spec: spec["form"],
)
def test_packed_sizes_follow_from_the_spec(spec):
    format = FORMATS[spec["form"]]
    weights = 8 * 16 * (3 if "widths" in spec else 1)
    assert format.weights(spec) == weights
    assert format.code_bits(spec) == 3 * weights
    assert format.nbytes(spec) == spec_bytes(spec) > 3 * weights / 8
    assert format.nbytes(spec) == sum(layout.bytes for layout in format.layouts(spec).values())


def test_plain_formats_count_their_tensors():
    spec = ragged().spec()
    assert (RaggedExperts.nbytes(spec), RaggedExperts.weights(spec)) == (None, None)
    assert RaggedExperts.code_bits(spec) is None
    assert isinstance(ragged(), Format)


def test_selection_and_native_tensors():
    experts = ragged()
    assert experts.dequantize() is experts
    rows = [torch.tensor([2, 0]), torch.tensor([4])]
    few = experts.select(rows)
    assert few.widths == [2, 1]
    for e, kept in enumerate(rows):
        assert torch.equal(few.down(e), experts.down(e)[:, kept])
        halves = zip(few.gate_up(e).chunk(2), experts.gate_up(e).chunk(2), strict=True)
        assert all(torch.equal(part, whole[kept]) for part, whole in halves)
    native = experts.to_native(6)
    assert native["gate_up_proj"].shape == (2, 12, 4) and native["down_proj"].shape == (2, 4, 6)
    gate, up = native["gate_up_proj"][0].chunk(2)
    assert torch.equal(torch.cat((gate[:3], up[:3])), experts.gate_up(0))
    assert not gate[3:].any() and not up[3:].any() and not native["down_proj"][0, :, 3:].any()


def test_factored_experts_become_plain_ones():
    torch.manual_seed(0)
    delta = DeltaExperts(4, 6, 2, 3, 2, torch.nn.SiLU()).requires_grad_(False)
    for parameter in delta.parameters():
        parameter.normal_()
    plain = delta.dequantize()
    assert isinstance(plain, RaggedExperts) and plain.widths == [6, 6]
    assert torch.equal(plain.gate_up(1), delta.gate_up(1))
    few = delta.select([torch.tensor([1]), torch.tensor([0, 5])])
    assert torch.equal(few.down(1), plain.down(1)[:, [0, 5]])
    again = ragged_of(plain, [torch.arange(6)] * 2)
    assert torch.equal(again.down_proj, plain.down_proj)


@pytest.mark.parametrize("seed", range(40))
def test_the_footprint_of_any_plan_is_the_size_of_its_module(seed):
    draw = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    hidden = pick(1, 7, 32, 200)
    widths = torch.randint(0, 40, (pick(1, 2, 5),), generator=draw).tolist()
    group_size, sym, scattered = pick(None, 1, 5, 16, 128), pick(True, False), pick(True, False)
    bits_N = torch.randint(0, MAX_BITS + 1, (sum(widths),), generator=draw)
    if scattered:  # their columns may only be of one width
        bits_N = bits_N.clamp(min=1)
    kept = [part[part > 0] for part in bits_N.split(widths)]
    order = ("columns",) if scattered else ()
    gate_up, down = BitSegments.of("rows", kept, order), BitSegments.of("columns", kept, order)
    spec = experts_spec(hidden, [len(k) for k in kept], gate_up, down, group_size, sym)
    pool = StoredBits(hidden, tuple(widths), group_size, sym, scattered)
    assert pool.total(bits_N) == 8 * spec_bytes(spec)
