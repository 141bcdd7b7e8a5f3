"""Convolutions read nothing behind the end of a tensor: operands end where a page begins that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptkernels as ptk

# (batch, channels in and out, groups, kernel, stride, padding, height, width)
CASES = [
    (2, 17, 5, 1, 1, 1, 0, 7, 9),
    (1, 96, 70, 1, 1, 1, 0, 14, 7),
    (3, 64, 32, 1, 1, 2, 0, 9, 31),
    (2, 5, 5, 5, 3, 1, 1, 20, 33),
    (2, 19, 19, 19, 5, 1, 2, 14, 14),
    (1, 5, 5, 5, 7, 2, 3, 31, 16),
    (2, 12, 8, 4, 3, 1, 1, 7, 14),
    (1, 3, 31, 1, 7, 2, 3, 31, 33),
    (2, 33, 64, 1, 3, 1, 1, 9, 14),
    (1, 20, 8, 1, 5, 3, 5, 20, 16),
]


def at_end_of_page(values: Tensor) -> Tensor:
    """A copy whose last byte is the last of a page, with one behind it that cannot be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size, page = values.numel() * values.element_size(), mmap.PAGESIZE
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(start + pages, page, 0) == 0
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=pages - size)
    return copy.view(values.shape).copy_(values)


def steps() -> None:
    for batch, ins, outs, groups, kernel, stride, padding, *space in CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = at_end_of_page(torch.randn(batch, ins, *space).to(dtype)).requires_grad_()
            weight = at_end_of_page(torch.randn(outs, ins // groups, kernel, kernel).to(dtype)).requires_grad_()
            options = {"stride": stride, "padding": padding, "groups": groups}
            with torch.no_grad():
                out = ptk.conv_bn_relu(x, weight, **options)
            residual, grad = (at_end_of_page(torch.randn(out.shape).to(dtype)) for _ in range(2))
            with torch.no_grad():
                ptk.conv_bn_relu(x, weight, residual=residual, **options)
            ptk.conv_bn_relu(x, weight, residual=residual, training=True, **options).backward(grad)


def overstep() -> None:
    tensor = at_end_of_page(torch.zeros(3))
    ctypes.string_at(tensor.data_ptr() + 12, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages as Linux does")
@pytest.mark.parametrize(("job", "status"), [("steps", 0), ("overstep", -signal.SIGSEGV)])
def test_nothing_is_read_behind_a_tensor(job: str, status: int) -> None:
    here = {**os.environ, "PYTHONPATH": str(Path(ptk.__file__).parents[1])}
    command = [sys.executable, __file__, job]
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


if __name__ == "__main__":
    {"steps": steps, "overstep": overstep}[sys.argv[1]]()
