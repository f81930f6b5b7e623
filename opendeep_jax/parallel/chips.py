"""The chips that we know: peaks, memory and links, from the vendors' data sheets. Standard library only.

Prices are assumptions, to be replaced by `--price`: they stand for on-demand list prices of a chip-hour in US dollars;
an H800-hour costs what the DeepSeek-V3 report counts it at, 2 dollars.
"""

import dataclasses
from dataclasses import dataclass

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of chip. Rates are per second and chip."""

    name: str
    platform: str
    """`tpu` or `gpu`."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    fp8_flops: float
    """Dense FP8 FLOP/s; as bfloat16 where the chip has no FP8."""
    memory_bytes: float
    """Memory that a program may fill. TPU: what the compiler says is available. GPU: 95 % of the device's memory."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s in one direction: of one link of the torus (TPU), or into the switch of the node (GPU's NVLink)."""
    dcn: float
    """Bytes/s in one direction of this chip's share of the network between slices or nodes."""
    price: float
    """Dollars for a chip-hour: an assumption."""
    compiler_name: str = ""
    """Name that its compiler uses."""
    cores: int = 1
    """Devices of JAX in one chip; each has its share of everything above."""
    torus_dimensions: int = 0
    """Dimensions of a TPU slice; 0 where a switch joins all chips of a node."""

    def per_device(self) -> "Chip":
        """The figures of one device of JAX: all of the chip, or its share where a chip is several devices."""
        rates = ("flops", "fp8_flops", "memory_bytes", "bandwidth", "link", "dcn")
        return dataclasses.replace(self, cores=1, **{rate: getattr(self, rate) / self.cores for rate in rates})


_H100_FLOPS = 989.4e12

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, 197e12, 15.75 * GIB, 819 * GB, 45 * GB, 3.1 * GB, 1.20, "v5e", 1, 2),
        Chip("v5p", "tpu", 459e12, 459e12, 95.74 * GIB, 2765 * GB, 90 * GB, 6.25 * GB, 4.20, "v5p", 1, 3),
        Chip("v6e", "tpu", 918e12, 918e12, 31.25 * GIB, 1640 * GB, 90 * GB, 12.5 * GB, 2.70, "v6e", 1, 2),
        Chip("v7x", "tpu", 2307e12, 4614e12, 189.5 * GIB, 7380 * GB, 100 * GB, 12.5 * GB, 12.0, "tpu7x", 2, 3),
        Chip("a100", "gpu", 312e12, 312e12, 80.7e9, 2039 * GB, 300 * GB, 25 * GB, 1.50, "a100"),
        Chip("h100", "gpu", _H100_FLOPS, 2 * _H100_FLOPS, 80.7e9, 3352 * GB, 450 * GB, 50 * GB, 2.00, "h100"),
        Chip("h800", "gpu", _H100_FLOPS, 2 * _H100_FLOPS, 80.7e9, 3352 * GB, 200 * GB, 50 * GB, 2.00, "h100"),
        Chip("h200", "gpu", _H100_FLOPS, 2 * _H100_FLOPS, 143.2e9, 4800 * GB, 450 * GB, 50 * GB, 2.50, "h200"),
        Chip("b200", "gpu", 2250e12, 4500e12, 171.0e9, 8000 * GB, 900 * GB, 50 * GB, 4.00, "b200"),
        Chip("gb200", "gpu", 2500e12, 5000e12, 176.7e9, 8000 * GB, 900 * GB, 50 * GB, 4.50, "gb200"),
    )
}
"""TPU links as usually reached; v7x's figures are of the chip, which is two devices. H800: an H100 with less NVLink.
A100: the one with 80 GB."""
