"""What the makers of GPUs publish about them."""

from dataclasses import dataclass

from lmdeploy_vico.host_memory import GIB
from lmdeploy_vico.planning import PlanningError


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        name: as ``--gpu`` takes it.
        flops: dense bfloat16 FLOP/s of the tensor cores, at most.
        bandwidth: bytes/s of its memory, at most.
        memory: bytes of its memory.
        nvlink: bytes/s that it can send to other GPUs while it receives as much, at most.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    nvlink: float


# NVIDIA's data sheets of the SXM modules, without sparsity: A100 (2021: 312 TFLOP/s, 2,039 GB/s, 80 GB, NVLink 600 GB/s
# both ways), H100 (989 TFLOP/s, 3.35 TB/s, 80 GB, 900 GB/s), H200 (the same, 4.8 TB/s, 141 GB) and HGX B200 (36 PFLOP/s
# with sparsity by 8 GPUs, 8 TB/s and 180 GB each, 1.8 TB/s). Memory is what PyTorch reports of these sizes: "80 GB" are
# 79.1 GiB, "141 GB" 139.8 GiB; for a B200 it is the 180 GB as published, since we have no report of one.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu('A100-80G', 312e12, 2.039e12, int(79.1 * GIB), 300e9),
        Gpu('H100', 989e12, 3.35e12, int(79.1 * GIB), 450e9),
        Gpu('H200', 989e12, 4.8e12, int(139.8 * GIB), 450e9),
        Gpu('B200', 2250e12, 8e12, int(180e9), 900e9),
    )
}


def gpu_of(name: str) -> Gpu:
    """Return a GPU by its name, in capitals or not; raises PlanningError."""
    if name.upper() not in GPUS:
        raise PlanningError(f'--gpu {name} is not known: it takes {", ".join(GPUS)}.')
    return GPUS[name.upper()]
