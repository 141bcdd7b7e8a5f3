"""What tells whether packed weights are still those of a call: the fingerprint of their contents, and the store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptkernels import _env

ROOT = Path(__file__).resolve().parents[1]


def fingerprint(tensor: Tensor) -> tuple[int, ...]:
    return tuple(torch.ops.ptkernels._fingerprint(tensor))


@pytest.mark.parametrize("size", [1, 3, 63, 64, 65, 4096, 4097, 70_000, 2_100_001])
def test_every_single_byte_counts(size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    before = fingerprint(data)
    assert fingerprint(data.clone()) == before
    for index in {0, size - 1, size // 2, size // 3, min(size - 1, 64), min(size - 1, 4095)}:
        for bit in (1, 128):
            data[index] ^= bit
            assert fingerprint(data) != before
            data[index] ^= bit
    assert fingerprint(data) == before


def test_order_and_place_count() -> None:
    """Contents that sums alone would take for equal."""
    data = torch.arange(400_000, dtype=torch.int64)
    found = {fingerprint(data)}
    for first, second in ((0, 8), (0, 1), (3, 515), (10, 8202), (17, 350_000)):
        swapped = data.clone()
        swapped[first], swapped[second] = data[second], data[first]
        found.add(fingerprint(swapped))
    for block in (8, 512, 8192):
        blocks = data[: 4 * block].clone().reshape(4, block)[[1, 0, 2, 3]].flatten()
        found.add(fingerprint(torch.cat([blocks, data[4 * block :]])))
    assert len(found) == 9


def test_threads_do_not_matter() -> None:
    data = torch.randn(3_000_017)
    torch.set_num_threads(1)
    alone = fingerprint(data)
    torch.set_num_threads(3)
    assert fingerprint(data) == alone


def test_variable() -> None:
    assert _env.read({"PTKERNELS_PACKED_MB": "64"}).packed_mb == 64
    with pytest.raises(ValueError, match="PTKERNELS_PACKED_MB: got '-1', expected a number of 0 or more"):
        _env.read({"PTKERNELS_PACKED_MB": "-1"})
    code = "import torch, ptkernels; print(torch.ops.ptkernels._packed_weights_info()[1])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PTKERNELS_PACKED_MB": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) == 3 << 20
