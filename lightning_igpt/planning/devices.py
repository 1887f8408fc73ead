"""What devices can do, by the vendor's data sheets: memory, bandwidth, and products of dense matrices per second.

Lightning has such a table too; for H200, H100 NVL and A40 it holds figures for sparse matrices, twice as high, and it
takes an L40S for an L4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lightning_igpt.planning.memory import widths_of
from lightning_igpt.spelling import there_is_no

GIB = 2**30
USABLE = (74, 80)  # of a device's memory; the rest is the driver's, and gaps that the allocator leaves


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: What people call it.
        memory: Bytes.
        tflops_16: Products in bfloat16, or in float16 where the device has no bfloat16, in 10^12 operations per second.
        tflops_tf32: The same in TF32; None where the device has none.
        tflops_32: The same in float32.
        bandwidth: Bytes of memory read or written per second.
        source: Where the figures are from.
        torch_name: Regular expression for what torch calls it.
        bfloat16: Whether it multiplies bfloat16.
        measured_16: What large products in 16 bits reach, in 10^12 operations per second; None where nobody measured.
        measured_bandwidth: What large copies reach, in bytes per second.
    """

    name: str
    memory: int
    tflops_16: float
    tflops_tf32: float | None
    tflops_32: float
    bandwidth: float
    source: str
    torch_name: str
    bfloat16: bool = True
    measured_16: float | None = None
    measured_bandwidth: float | None = None

    @property
    def usable(self) -> int:
        """Bytes that training may take."""
        return usable_bytes(self.memory)

    def peak(self, precision: str, *, tf32: bool = True) -> float:
        """Operations per second by the data sheet, which MFU refers to.

        Args:
            precision: As ``training_bytes`` takes it.
            tf32: Whether products of float32 may be TF32, as ``fit`` has them where the device can.
        """
        if widths_of(precision).product == 2:
            return self.tflops_16 * 1e12
        return (self.tflops_tf32 if tf32 and self.tflops_tf32 else self.tflops_32) * 1e12

    def reached(self, precision: str) -> float:
        """Operations per second of a large product: measured, or the data sheet's."""
        if widths_of(precision).product == 2 and self.measured_16:
            return self.measured_16 * 1e12
        return self.peak(precision)

    @property
    def reached_bandwidth(self) -> float:
        """Bytes per second of a large copy: measured, or the data sheet's."""
        return self.measured_bandwidth or self.bandwidth


HOPPER, AMPERE = "NVIDIA H100 Tensor Core GPU data sheet", "NVIDIA A100 Tensor Core GPU data sheet"

# Comments mark what was not found in a second source. Of several names that fit, the first counts.
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        # Editions of the sheet differ: 180 or 192 GB, TF32 1,100 or 1,125, FP32 75 or 80.
        "b200": Device("B200", 180 * GIB, 2250, 1100, 75, 8e12, "NVIDIA HGX B200 data sheet", "B200"),
        "h200": Device("H200", 141 * GIB, 989.4, 494.7, 66.9, 4.8e12, "NVIDIA H200 data sheet", "H200"),
        # The edition of 96 GB; that of 144 GB has more memory and bandwidth, and multiplies as fast.
        "gh200": Device("GH200", 96 * GIB, 989.4, 494.7, 66.9, 4e12, "NVIDIA GH200 data sheet", "GH200"),
        # Not found: TF32 and float32.
        "h100-nvl": Device("H100 NVL", 94 * GIB, 835, 417, 60, 3.9e12, HOPPER, "H100 NVL"),
        "h100-pcie": Device("H100 PCIe", 80 * GIB, 756, 378, 51.2, 2e12, HOPPER, "H100 PCIe"),
        "h100": Device(
            "H100 SXM", 80 * GIB, 989.4, 494.7, 66.9, 3.35e12, HOPPER, "H100", measured_16=800, measured_bandwidth=3e12
        ),
        "a100-80": Device("A100 80 GB", 80 * GIB, 312, 156, 19.5, 2.039e12, AMPERE, "A100.*80GB"),
        "a100-40": Device("A100 40 GB", 40 * GIB, 312, 156, 19.5, 1.555e12, AMPERE, "A100"),
        "l40s": Device("L40S", 48 * GIB, 362, 183, 91.6, 864e9, "NVIDIA L40S data sheet", "L40S"),
        "l4": Device("L4", 24 * GIB, 121, 60, 30.3, 300e9, "NVIDIA L4 data sheet", "L4"),
        "a10": Device("A10", 24 * GIB, 125, 62.5, 31.2, 600e9, "NVIDIA A10 data sheet", "A10"),
        "v100-16": Device(
            "V100 16 GB",
            16 * GIB,
            125,
            None,
            15.7,
            900e9,
            "NVIDIA V100 data sheet (SXM2)",
            "V100.*16GB",
            bfloat16=False,
        ),
        "v100": Device(
            "V100", 32 * GIB, 125, None, 15.7, 900e9, "NVIDIA V100 data sheet (SXM2)", "V100", bfloat16=False
        ),
        "t4": Device("T4", 16 * GIB, 65, None, 8.1, 320e9, "NVIDIA T4 data sheet", "T4", bfloat16=False),
        # Consumer cards multiply 16 bits at half speed where sums are float32, as torch has them. Not found: 209.5 of
        # the 5090 and 71 of the 3090.
        "rtx5090": Device(
            "RTX 5090", 32 * GIB, 209.5, 104.8, 104.8, 1.792e12, "NVIDIA RTX Blackwell whitepaper", "RTX 5090(?! D| L)"
        ),
        "rtx4090": Device(
            "RTX 4090", 24 * GIB, 165.2, 82.6, 82.6, 1.008e12, "NVIDIA Ada whitepaper", "RTX 4090(?! D| L)"
        ),
        "rtx3090": Device(
            "RTX 3090", 24 * GIB, 71, 35.6, 35.6, 936e9, "NVIDIA Ampere GA102 whitepaper", "RTX 3090(?! Ti)"
        ),
    }
)


def find_device(kind: str) -> Device:
    """A device of the table.

    Args:
        kind: Its key, with or without spaces and dashes (``a100`` is the one of 80 GB, ``v100`` that of 32), or
            torch's name of it; in any case.

    Raises:
        ValueError: There is none of that name; the message lists all, and offers the closest.
    """
    known = {_plain(key): key for key in DEVICES} | {"a100": "a100-80", "h100sxm": "h100", "v10032": "v100"}
    key = known.get(_plain(kind))
    found = device_called(kind) if key is None else DEVICES[key]
    if found is not None:
        return found
    rest = f"Devices: {', '.join(DEVICES)}, and cpu, which is measured"
    raise ValueError(there_is_no("device", kind, [*DEVICES, "cpu"], rest))


def device_called(name: str) -> Device | None:
    """The device that torch calls ``name``, such as "NVIDIA H100 80GB HBM3", in any case.

    Returns:
        None where it is not known, as for a part of a device (MIG).
    """
    if re.search(r"\bMIG\b", name, re.IGNORECASE):
        return None
    found = (one for one in DEVICES.values() if re.search(rf"\b(?:{one.torch_name})\b", name, re.IGNORECASE))
    return next(found, None)


def usable_bytes(memory: int) -> int:
    """What training may take of a device's memory, both in bytes."""
    return memory * USABLE[0] // USABLE[1]


def _plain(kind: str) -> str:
    return re.sub(r"[^a-z0-9]", "", kind.lower()).removesuffix("gb")
