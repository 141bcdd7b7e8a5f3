"""What was replaced, what was left and why, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replaced:
    """One module that runs on an operator of the package."""

    path: str
    """Where it is in the model, as in ``named_modules``; ``""`` is the model itself."""
    module: str
    """Its type before."""
    op: str
    effect: str
    """What is to be expected of it."""


@dataclass(frozen=True)
class Kept:
    """One module that an operator might have run, left as it was."""

    path: str
    module: str
    op: str
    reason: str


@dataclass(frozen=True)
class Verified:
    """One output or gradient of the example, compared with the model in float64."""

    name: str
    error: float
    error_before: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound


@dataclass
class Report:
    """Result of :func:`ptkernels.replace`; prints as a table."""

    dry_run: bool
    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    verified: list[Verified] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restore the model exactly as it was; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        verb = "would run on" if self.dry_run else "runs on"
        rows = [(item.path or "(model)", item.module, f"{verb} {item.op}", item.effect) for item in self.replaced]
        rows += [(item.path or "(model)", item.module, "left as it is", item.reason) for item in self.kept]
        if not rows:
            return "ptkernels.replace: nothing in this model that an operator could run"
        header = ("module", "type", "what", "effect, or why not")
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(4)]
        lines = ["  ".join(map(str.ljust, row, widths)) for row in [header, *rows]]
        if self.verified:
            worst = max(self.verified, key=lambda item: item.error / item.bound if item.bound else 0.0)
            lines.append(
                f"verified against float64: {len(self.verified)} outputs and gradients; closest to its bound: "
                f"{worst.name}, error {worst.error:.2e} (before: {worst.error_before:.2e}, bound {worst.bound:.2e})"
            )
        return "\n".join(line.rstrip() for line in lines)
