"""What a benchmark run produces, and how it is stored."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROW_KEYS = (
    "op",
    "case",
    "shape",
    "dtype",
    "direction",
    "backend",
    "kernel",
    "seconds",
    "work_flops",
    "work_bytes",
    "peers",
    "best_peer",
    "ratio",
    "limit_fraction",
    "error",
    "error_bound",
)


@dataclass
class Row:
    """One case: ``seconds`` are medians; ``seconds`` and what follows from it are None when the case failed its check.

    ``ratio`` is the best peer's time over ours (above 1: ours is faster); ``limit_fraction`` is the roofline time over
    ours; ``error`` and ``error_bound`` belong to the output closest to its bound.
    """

    op: str
    case: str
    shape: dict[str, Any]
    dtype: str
    direction: str
    backend: str
    kernel: str
    seconds: float | None = None
    work_flops: float = 0.0
    work_bytes: float = 0.0
    peers: dict[str, float] = field(default_factory=dict)
    best_peer: str | None = None
    ratio: float | None = None
    limit_fraction: float | None = None
    error: float | None = None
    error_bound: float | None = None

    def settle(self) -> None:
        """Derive ``best_peer`` and ``ratio`` from the times."""
        self.best_peer = min(self.peers, key=self.peers.__getitem__) if self.peers else None
        if self.best_peer is not None and self.seconds:
            self.ratio = self.peers[self.best_peer] / self.seconds


@dataclass(frozen=True)
class ModelRun:
    """A real model on real input, with plain torch attention and with ours in place.

    ``seconds`` are medians for all sentences per attention implementation; ``error`` is our embeddings' largest
    distance from the float64 model's and ``plain_error`` that of plain torch; ``neighbours_changed`` counts sentences
    whose nearest other sentence is not the one the plain torch model finds.
    """

    name: str
    source: str
    dtype: str
    kernel: str
    sentences: int
    tokens: int
    seconds: dict[str, float]
    error: float
    plain_error: float
    error_bound: float
    neighbours_changed: int


@dataclass(frozen=True)
class Note:
    """Why something in the run is missing, partial or failed; ``contender`` is None when it concerns the whole case."""

    case: str
    text: str
    contender: str | None = None
    failure: bool = False


@dataclass
class Results:
    """A run. ``status`` is ``running``, ``complete`` or ``interrupted``."""

    machine: dict[str, Any]
    commit: str
    rows: list[Row] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    model: ModelRun | None = None
    status: str = "running"

    def failures(self) -> list[Note]:
        return [note for note in self.notes if note.failure]

    def to_json(self) -> str:
        content = {
            "machine": self.machine,
            "commit": self.commit,
            "rows": [asdict(row) for row in self.rows],
            "model": None if self.model is None else asdict(self.model),
            "notes": [asdict(note) for note in self.notes],
            "status": self.status,
        }
        return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: str | Path) -> Results:
    """Read a file written by :meth:`Results.to_json`.

    Raises:
        ValueError: the file is not a benchmark result.
        OSError: it cannot be read.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        rows = [Row(**{key: row[key] for key in ROW_KEYS}) for row in content["rows"]]
        notes = [Note(**note) for note in content.get("notes", [])]
        model = ModelRun(**content["model"]) if content.get("model") else None
        return Results(content["machine"], content["commit"], rows, notes, model, content.get("status", "complete"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a ptkernels benchmark result: {error!r}") from error


def _finite(value: Any) -> Any:
    # JSON has no NaN or infinity: such an error value reads as null, and the note of the failed case says why.
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def commit_id() -> str:
    """The commit of the source tree that runs, with ``-dirty`` when tracked files differ; ``""`` outside a clone."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=20)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if head.returncode != 0:
        return ""
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
