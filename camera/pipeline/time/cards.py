"""What accelerators do at most, by their data sheets, and what asking them costs."""

from dataclasses import dataclass

LAUNCH_SECONDS = 8e-6  # of the host, for one operator of PyTorch
WAIT_SECONDS = 30e-6  # of an empty queue, until the host has asked for more
BANDWIDTH_SHARE = 0.8  # of the memory's bandwidth, which elementwise kernels reach
PCIE4, PCIE5 = 24e9, 48e9  # bytes/s each way, from pinned memory


@dataclass(frozen=True)
class Card:
    """FLOP/s of dense products in bf16 and in fp32 without TF32, bytes/s of its memory and to the
    host, each way, bytes of its memory, and whether grouped products are one kernel."""

    flops: float
    fp32: float
    bandwidth: float
    link: float
    bytes: int
    grouped: bool = False


CARDS = {
    "a100_40gb": Card(312e12, 19.5e12, 1555e9, PCIE4, 40 * 10**9),
    "a100_80gb": Card(312e12, 19.5e12, 2039e9, PCIE4, 80 * 10**9),
    "h100": Card(989e12, 67e12, 3350e9, PCIE5, 80 * 10**9, grouped=True),
    "h200": Card(989e12, 67e12, 4800e9, PCIE5, 141 * 10**9, grouped=True),
    "l40s": Card(362e12, 91.6e12, 864e9, PCIE4, 48 * 10**9),
    "rtx_4090": Card(165e12, 82.6e12, 1008e9, PCIE4, 24 * 10**9),
}
CARD = "a100_40gb"  # that is computed for where none is named
