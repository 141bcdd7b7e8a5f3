"""Which of a kernel's few candidate tiles a device is fastest with: looked up, never measured, during a call.

A table maps ``kernel|key`` to the place of the best candidate. Keys hold what a tile depends on (head dims, channels,
dtype) and neither batch nor tokens, so a new length compiles nothing. Two tables are read once per process: the one
shipped for the device, and the one that ``bench/gpu_tune.py`` writes on a machine; the latter goes first. Without an
entry the first candidate, the best guess, runs. So the first call of a kernel costs its compilation (seconds, kept on
disk by Triton) and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ptkernels import _env

Candidate = TypeVar("Candidate")

SHIPPED = Path(__file__).with_name("tables")

# While tuning: the entry that is being measured, and how many candidates there were of each that was asked for.
_forced: dict[str, int] = {}
_asked: dict[str, int] = {}


def device_name(device: torch.device) -> str:
    """Of the table's file: the GPU's name in letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def table_paths(device: torch.device) -> tuple[Path, Path]:
    """The shipped table of a device, and the machine's own."""
    name = f"{device_name(device)}.json"
    return SHIPPED / name, _env.cache_folder() / "tiles" / name


@functools.cache
def _table(device: torch.device) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in table_paths(device):
        if path.exists():
            found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def pick(kernel: str, key: Sequence[object], candidates: Sequence[Candidate], device: torch.device) -> Candidate:
    """The candidate to launch ``kernel`` with; ``key`` is everything the choice depends on, the device aside."""
    entry = "|".join(map(str, (kernel, *key)))
    index = 0
    if _forced or _asked:
        _asked[entry] = len(candidates)
        index = _forced.get(entry, 0)
    elif device.type == "cuda" and torch.cuda.is_available():
        index = _table(device).get(entry, 0)
    return candidates[index if index < len(candidates) else 0]


@contextlib.contextmanager
def recording(forced: dict[str, int] | None = None) -> Iterator[dict[str, int]]:
    """Count the candidates of every choice inside, some of them ``forced``; for measuring them."""
    _forced.update(forced or {})
    _asked.setdefault("", 0)
    try:
        yield _asked
    finally:
        _forced.clear()
        _asked.clear()


def store(device: torch.device, entries: dict[str, int]) -> Path:
    """Add measured entries to the machine's own table."""
    path = table_paths(device)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _table.cache_clear()
    return path
