"""Jobs that several gloo processes do together: one start under torchrun for each number of processes, for all tests.

A job is a function of no arguments in one of :data:`MODULES`; it finds its rank in ``torch.distributed`` and returns
tensors, in any structure. Starting processes is what takes time, so the first test to ask for the result of a job has
all of them done.
"""

from __future__ import annotations

import datetime
import fcntl
import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor  # whose tensors are among the results that are loaded

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("jobs_context_parallel", "jobs_data_parallel", "jobs_dtensor", "jobs_synchronized")


def jobs() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for module in MODULES:
        found |= importlib.import_module(module).JOBS
    return found


def torchrun(world: int, *command: str) -> None:
    """Run a script in so many processes; its errors are ours."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "integrations")))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@cache
def results(folder: Path, world: int) -> list[dict[str, Any]]:
    """Of every job by name, in each process; those of test processes that share ``folder`` are made once."""
    own = folder / f"{world} processes"
    own.mkdir(exist_ok=True)
    with (own / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (own / "done").exists():
            torchrun(world, __file__, str(own))
            (own / "done").touch()
    return [torch.load(own / f"{rank}.pt") for rank in range(world)]


def main(folder: str) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, job in jobs().items():
        torch.manual_seed(0)
        try:
            found[name] = job()
        except Exception:
            # The others may be waiting for this process, and what comes after would not fit together.
            found[name] = traceback.format_exc()
            break
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
    os._exit(0)  # threads of groups that a mesh still holds can abort an interpreter that ends as it should


if __name__ == "__main__":
    main(sys.argv[1])
