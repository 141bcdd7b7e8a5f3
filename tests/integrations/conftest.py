"""Results of jobs that several processes do together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """One for all of the test processes of a run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(scope="session")
def outcome(shared_folder: Path) -> Callable[[str, int], list[Any]]:
    """``outcome(job, processes)``: what every process returned."""
    from several_processes import results

    def of(job: str, world: int) -> list[Any]:
        found = [ranks.get(job, "not reached: an earlier job failed") for ranks in results(shared_folder, world)]
        for rank, result in enumerate(found):
            assert not isinstance(result, str), f"process {rank}: {result}"
        return found

    return of
