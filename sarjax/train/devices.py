"""What accelerators can do, as their makers publish it: for plans, not measured here."""

from typing import NamedTuple


class DeviceKind(NamedTuple):
    """One accelerator, which jax calls a device.

    memory: bytes. usable: the share of it that a program gets. bfloat16, float32: the most multiplications and
    additions a second, without sparsity, float32 as jax computes it by default. bandwidth: of its memory, bytes/s.
    link: bytes/s that a device sends to others of its domain of `domain` devices, half of the printed sum of both
    directions; network: to devices beyond. sources: where these are printed; notes: what was derived, and how.
    """

    name: str
    memory: float
    usable: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float
    domain: int
    network: float
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()


_HOPPER = (
    "printed with sparsity, twice what is dense: bfloat16 1,979 and TF32 989 TFLOPS",
    "float32 by TF32, jax's default precision there",
    "memory: jax takes three quarters at its start (XLA_PYTHON_CLIENT_MEM_FRACTION)",
    "network: an eighth of the eight 400 Gb/s adapters of a DGX",
)
_JAX_GPU = "https://docs.jax.dev/en/latest/gpu_memory_allocation.html"
_TPU = (
    "float32 in one bfloat16 pass, jax's default precision there",
    "memory: a tenth is left to the runtime, an assumption",
)

KINDS: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind(
            "h100",
            memory=80e9,
            usable=0.75,
            bfloat16=989.5e12,
            float32=494.5e12,
            bandwidth=3.35e12,
            link=450e9,
            domain=8,
            network=50e9,
            sources=(
                "https://www.nvidia.com/en-us/data-center/h100/ (SXM)",
                "https://docs.nvidia.com/dgx/dgxh100-user-guide/",
                _JAX_GPU,
            ),
            notes=_HOPPER,
        ),
        DeviceKind(
            "h200",
            memory=141e9,
            usable=0.75,
            bfloat16=989.5e12,
            float32=494.5e12,
            bandwidth=4.8e12,
            link=450e9,
            domain=8,
            network=50e9,
            sources=(
                "https://www.nvidia.com/en-us/data-center/h200/ (SXM)",
                "https://docs.nvidia.com/dgx/dgxh100-user-guide/",
                _JAX_GPU,
            ),
            notes=_HOPPER,
        ),
        DeviceKind(
            "v5e",
            memory=16e9,
            usable=0.9,
            bfloat16=197e12,
            float32=197e12,
            bandwidth=819e9,
            link=200e9,
            domain=256,
            network=6.4e12 / 8 / 256,
            sources=("https://docs.cloud.google.com/tpu/docs/v5e",),
            notes=(*_TPU, "network: 6.4 Tbps a pod of 256 chips"),
        ),
        DeviceKind(
            "v5p",
            memory=95e9,
            usable=0.9,
            bfloat16=459e12,
            float32=459e12,
            bandwidth=2765e9,
            link=600e9,
            domain=6144,
            network=50e9 / 8,
            sources=("https://docs.cloud.google.com/tpu/docs/v5p-training",),
            notes=(
                *_TPU,
                "the largest job has 6,144 chips of a pod's 8,960",
                "network: 50 Gb/s a chip, an assumption",
            ),
        ),
    )
}
