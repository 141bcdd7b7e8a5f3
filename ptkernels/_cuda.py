"""Which CUDA C++ kernels may run: those that have passed the tests on a GPU, or those that the environment asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from ptkernels import _env

NOT_YET_RUN = "not yet run on a GPU"

VERIFIED_ON: dict[str, str | None] = {"cuda_cores": None, "sm_80": None, "sm_90a": None}
"""GPU and commit on which ``bench/gpu_check.sh`` passed with each architecture's kernels; None where it never ran."""


_built = list(_env.CUDA_ARCHITECTURES)


def note_built(newest_built: str) -> None:
    """Remember the newest kernels that the library has of those that :func:`newest` asks for."""
    if newest_built != newest():
        _built[:] = _env.CUDA_ARCHITECTURES[: _env.CUDA_ARCHITECTURES.index(newest_built) + 1]


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


def _refused_by_copy_engine(tensor: Tensor) -> str | None:
    """Why TMA cannot read the rows, or None where it can."""
    if tensor.data_ptr() % 16 != 0:
        return "an address that is no multiple of 16 bytes"
    if tensor.stride(-1) != 1:
        return f"stride {tensor.stride(-1)} along a row"
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size != 1 and not (stride > 0 and stride % 8 == 0 and stride < 2**38):
            return f"stride {stride}, which is 0 or no multiple of 16 bytes"
    return None


def _refusal(architecture: str, query: Tensor, key: Tensor, value: Tensor, capability: tuple[int, int]) -> str | None:
    """Why the kernels of an architecture do not take a forward of attention, or None where they do."""
    if architecture == "cuda_cores":
        return None
    if architecture not in _built:
        return "libptkernels_cuda.so was built without it"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(query.dtype).removeprefix('torch.')} is not multiplied on the tensor cores"
    if (dim := max(query.size(-1), value.size(-1))) > 256:
        return f"head dim {dim} is above 256"
    found = "{}.{}".format(*capability)
    if architecture == "sm_80":
        return None if capability >= (8, 0) else f"the GPU has compute capability {found}"
    if capability != (9, 0):
        return f"it is code for compute capability 9.0 alone, and the GPU has {found}"
    if query.dim() != 4:
        return "sequences are packed"
    if key.size(2) == 0:
        return "there are no keys"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if (why := _refused_by_copy_engine(tensor)) is not None:
            return f"TMA does not read {name}: {why}"
    return None


def choose(query: Tensor, key: Tensor, value: Tensor, capability: tuple[int, int]) -> tuple[str, str]:
    """The architecture of the kernel that attention's forward takes on a GPU of that compute capability, and why it is
    no newer one of those that may be chosen: an empty string where it is the newest.

    Mirrors ``choose_architecture`` of ``csrc/ops/attention/attention_cuda.h``. Packed sequences have three dimensions.
    """
    limit = newest()
    if limit is None:
        return "none", NOT_YET_RUN
    refusals = []
    for architecture in reversed(_env.CUDA_ARCHITECTURES[: _env.CUDA_ARCHITECTURES.index(limit) + 1]):
        if (why := _refusal(architecture, query, key, value, capability)) is None:
            break
        refusals.append(f"not {architecture}: {why}")
    return architecture, "; ".join(refusals)


def query_heads_per_tile(heads_q: int, heads_kv: int, len_q: int) -> int:
    """How many query heads of one key head share a tile of 128 rows in attention's forward for sm_90a.

    Mirrors ``choose_query_tile`` of ``csrc/ops/attention/attention_schedule.h``: as many as make the fewest tiles.
    """
    group = heads_q // heads_kv
    counts = [heads for heads in (1, 2, 4, 8) if group % heads == 0]
    return min(counts, key=lambda heads: -(-len_q // (128 // heads)) * (group // heads))
