"""Codes packed without a gap: nothing is lost, nothing is wasted."""

import pytest
import torch

from camera.checkpoint.formats.packed.codes import pack, packed_bytes, unpack

BITS = range(1, 9)


def codes_of(bits: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + count)
    return torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=generator)


def as_one_integer(codes: torch.Tensor, bits: int) -> bytes:
    """The layout said otherwise: one number whose digits in base 2^bits are the codes."""
    number = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    return number.to_bytes(packed_bytes(len(codes), bits), "little")


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back_for_every_length(bits):
    for count in (*range(35), 1000, 1001):
        codes = codes_of(bits, count)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(count, bits),)
        assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_bits_stand_where_the_format_says(bits):
    for count in (1, 7, 8, 29):
        codes = codes_of(bits, count)
        assert bytes(pack(codes, bits).tolist()) == as_one_integer(codes, bits)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_less_than_a_byte(bits):
    for count in range(40):
        assert 0 <= 8 * packed_bytes(count, bits) - bits * count < 8


@pytest.mark.parametrize("bits", BITS)
def test_a_run_may_start_at_any_byte(bits):
    codes = codes_of(bits, 57)
    run = pack(codes, bits)
    for start in range(1, 9):
        table = torch.full((start + len(run) + 3,), 255, dtype=torch.uint8)
        table[start : start + len(run)] = run
        assert torch.equal(unpack(table[start : start + len(run)], bits, 57), codes)


@pytest.mark.parametrize("bits", BITS)
def test_largest_codes_stay_inside_their_fields(bits):
    codes = torch.full((23,), 2**bits - 1, dtype=torch.int64)
    codes[::2] = 0
    assert unpack(pack(codes, bits), bits, 23).tolist() == codes.tolist()


def test_shapes_are_flattened_by_rows():
    codes = codes_of(3, 24).view(2, 3, 4)
    assert torch.equal(pack(codes, 3), pack(codes.flatten(), 3))


@pytest.mark.parametrize("code", [-1, 8])
def test_codes_that_do_not_fit_are_refused(code):
    with pytest.raises(ValueError, match=r"0\.\.7"):
        pack(torch.tensor([0, code]), 3)
