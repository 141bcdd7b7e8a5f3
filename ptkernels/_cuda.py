"""Which CUDA C++ kernels may run: those that have passed the tests on a GPU, or those that the environment asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from ptkernels import _env

NOT_YET_RUN = "not yet run on a GPU"

VERIFIED_ON: dict[str, str | None] = {"cuda_cores": None, "sm_80": None, "sm_90a": None}
"""GPU and commit on which ``bench/gpu_check.sh`` passed with each architecture's kernels; None where it never ran."""


def newest() -> str | None:
    """The newest architecture whose kernels may be chosen, or None where there is none.

    ``PTKERNELS_CUDA_ARCH`` says so. Without it, it is the newest in :data:`VERIFIED_ON` that has passed.
    """
    if _env.settings.cuda_arch is not None:
        return _env.settings.cuda_arch
    passed = [name for name in _env.CUDA_ARCHITECTURES if VERIFIED_ON[name] is not None]
    return passed[-1] if passed else None


def unavailable() -> str | None:
    """Why no CUDA C++ kernel may be chosen, or None where some may."""
    if newest() is not None:
        return None
    return f"its CUDA kernels are {NOT_YET_RUN}; PTKERNELS_CUDA_ARCH=sm_80 runs them all the same"


def note(architecture: str) -> str:
    """What a user should know before trusting the kernels."""
    verified = VERIFIED_ON[architecture]
    return NOT_YET_RUN if verified is None else f"passed on {verified}"


def _suits_copy_engine(tensor: Tensor) -> bool:
    """Whether TMA can read the rows: 16-byte strides, nothing expanded."""
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in outer)
    )


def kernel(query: Tensor, key: Tensor, value: Tensor, capability: tuple[int, int]) -> str:
    """The architecture of the kernel that attention's forward takes on a GPU of that compute capability.

    Mirrors ``choose_architecture`` of ``csrc/ops/attention/attention_cuda.h``. Packed sequences have three dimensions.
    """
    limit = newest()
    if limit is None:
        return "none"
    narrow = query.dtype in (torch.bfloat16, torch.float16)
    if limit == "cuda_cores" or capability < (8, 0) or not narrow or max(query.size(-1), value.size(-1)) > 256:
        return "cuda_cores"
    operands = (query, key, value)
    suits = query.dim() == 4 and key.size(2) > 0 and all(_suits_copy_engine(tensor) for tensor in operands)
    return "sm_90a" if limit == "sm_90a" and capability == (9, 0) and suits else "sm_80"


def query_heads_per_tile(heads_q: int, heads_kv: int, len_q: int) -> int:
    """How many query heads of one key head share a tile of 128 rows in attention's forward for sm_90a.

    Mirrors ``choose_query_tile`` of ``csrc/ops/attention/attention_schedule.h``: as many as make the fewest tiles.
    """
    group = heads_q // heads_kv
    counts = [heads for heads in (1, 2, 4, 8) if group % heads == 0]
    return min(counts, key=lambda heads: -(-len_q // (128 // heads)) * (group // heads))
