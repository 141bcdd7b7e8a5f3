"""Which CUDA C++ kernels may run: those that have passed the tests on a GPU, or those that the environment asks for."""

from __future__ import annotations

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


def kernel(dtype: str, head_dim: int, capability: tuple[int, int]) -> str:
    """The architecture of the kernel that attention takes on a GPU of that compute capability.

    Mirrors ``choose_architecture`` of ``csrc/ops/attention/attention_cuda.h``.
    """
    limit = newest() or "cuda_cores"
    on_tensor_cores = dtype in ("bfloat16", "float16") and head_dim <= 256 and capability >= (8, 0)
    return "sm_80" if on_tensor_cores and limit != "cuda_cores" else "cuda_cores"
