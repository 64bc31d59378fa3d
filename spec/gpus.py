"""GPUs one may serve on: memory as the driver reports it, bandwidth and compute capability as NVIDIA's data sheets say.

Sources: the data sheets "H100", "H200", "A100 80GB", "L4", "L40S", "A10", "T4", "HGX B200",
"GeForce RTX 3090", "GeForce RTX 4090", "GeForce RTX 5090";
MiB as `nvidia-smi` shows them with ECC on where the card has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from corral.spec.errors import InputError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of device, or a host of `count` of them."""

    name: str
    title: str
    memory_bytes: int  # of one device
    bandwidth: float  # bytes a second, of one device
    capability: str
    count: int = 0  # of a host, which cannot have more; 0: any number

    @property
    def l2_bytes(self) -> int:
        """Of one device's level-2 cache."""
        return L2_MIB[self.name] * MIB


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h100", title="H100 80 GB", memory_bytes=81559 * MIB, bandwidth=3.35e12, capability="9.0"),
        Gpu(name="h200", title="H200 141 GB", memory_bytes=143771 * MIB, bandwidth=4.8e12, capability="9.0"),
        Gpu(name="b200", title="B200 180 GB", memory_bytes=183359 * MIB, bandwidth=7.7e12, capability="10.0"),
        Gpu(name="a100", title="A100 80 GB", memory_bytes=81920 * MIB, bandwidth=2.039e12, capability="8.0"),
        Gpu(name="a100-40", title="A100 40 GB", memory_bytes=40960 * MIB, bandwidth=1.555e12, capability="8.0"),
        Gpu(name="a10", title="A10 24 GB", memory_bytes=23028 * MIB, bandwidth=0.6e12, capability="8.6"),
        Gpu(name="t4", title="T4 16 GB", memory_bytes=15360 * MIB, bandwidth=0.32e12, capability="7.5"),
        Gpu(name="l40s", title="L40S 48 GB", memory_bytes=46068 * MIB, bandwidth=0.864e12, capability="8.9"),
        Gpu(name="l4", title="L4 24 GB", memory_bytes=23034 * MIB, bandwidth=0.3e12, capability="8.9"),
        Gpu(name="rtx3090", title="RTX 3090 24 GB", memory_bytes=24576 * MIB, bandwidth=0.936e12, capability="8.6"),
        Gpu(name="rtx4090", title="RTX 4090 24 GB", memory_bytes=24564 * MIB, bandwidth=1.008e12, capability="8.9"),
        Gpu(name="rtx5090", title="RTX 5090 32 GB", memory_bytes=32607 * MIB, bandwidth=1.792e12, capability="12.0"),
        Gpu(
            name="dgx-h100",
            title="DGX H100 host (8 GPUs)",
            memory_bytes=81559 * MIB,
            bandwidth=3.35e12,
            capability="9.0",
            count=8,
        ),
    )
}

# What the CUDA runtime reports (`l2CacheSize`), which is NVIDIA's figure of the whole cache even where a multiprocessor is
# near one half of it only (A100, H100, H200, B200).
# Architecture white papers: A100, H100 (H200 is the same chip), RTX 3090 and A10 (GA102), RTX 4090, RTX 5090.
# CUDA's tuning guide for Ada and the white paper: 98304 KB of the whole AD102, which L40S has, and 49152 KB of L4's AD104.
# deviceQuery as published by owners: T4. B200: several that measured it agree (Chips and Cheese, for one).
L2_MIB = {
    "h100": 50, "h200": 50, "b200": 126, "a100": 40, "a100-40": 40, "a10": 6, "t4": 4, "l40s": 96, "l4": 48,
    "rtx3090": 6, "rtx4090": 72, "rtx5090": 96, "dgx-h100": 50,
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Look a GPU up. Raises InputError naming those there are."""
    if name.lower() not in GPUS:
        raise InputError(f'GPU "{name[:80]}" is not known; expected one of {", ".join(GPUS)}.')
    return GPUS[name.lower()]


def gpus_meant(gpu: str) -> list[Gpu]:
    """The GPUs that a name or a compute capability may mean; none where the capability is not in the table."""
    return [known for known in GPUS.values() if gpu.lower() in (known.name, known.capability)]


def capability_of(gpu: str) -> str:
    """The compute capability that `gpu` names, by a GPU's name or itself ("rtx4090", "8.9"). Raises InputError."""
    if re.fullmatch(r"\d{1,2}\.\d", gpu):
        return gpu
    if gpu.lower() not in GPUS:
        raise InputError(
            f'gpu "{gpu[:80]}" is not known; expected a compute capability such as 8.9, or one of {", ".join(GPUS)}.'
        )
    return GPUS[gpu.lower()].capability
