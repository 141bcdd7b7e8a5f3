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
class Predicted:
    """What the example says of one changed module: bytes of a forward pass with gradients, before and after.

    They are counted while the example runs, and depend on shapes alone: no clock is read.
    """

    path: str | None
    """As in :class:`Replaced`; None is everything outside of the changed modules."""
    kernels: tuple[str, ...]
    """Those that ran within it, as :func:`ptkernels.explain` names them."""
    moved_before: int
    """Bytes that operators are given and give back; what happens within an operator is not seen."""
    moved_after: int
    kept_before: int
    """Bytes kept for the backward pass, parameters left out."""
    kept_after: int


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
    predicted: list[Predicted] = field(default_factory=list)
    """With ``example_inputs``: what is to be expected of every changed module."""
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
        lines = _table([("module", "type", "what", "effect, or why not"), *rows])
        if self.predicted:
            lines += ["", "predicted from the example, for one forward pass with gradients:", *self._predictions()]
        if self.verified:
            worst = max(self.verified, key=lambda item: item.error / item.bound if item.bound else 0.0)
            lines.append(
                f"verified against float64: {len(self.verified)} outputs and gradients; closest to its bound: "
                f"{worst.name}, error {worst.error:.2e} (before: {worst.error_before:.2e}, bound {worst.bound:.2e})"
            )
        return "\n".join(line.rstrip() for line in lines)

    def _predictions(self) -> list[str]:
        def row(name: str, kernels: str, items: list[Predicted]) -> tuple[str, ...]:
            moved = _change(sum(item.moved_before for item in items), sum(item.moved_after for item in items))
            kept = _change(sum(item.kept_before for item in items), sum(item.kept_after for item in items))
            return name, kernels, moved, kept

        names = {None: "(elsewhere)", "": "(model)"}
        rows = [row(names.get(item.path, str(item.path)), ", ".join(item.kernels), [item]) for item in self.predicted]
        header = ("module", "kernels", "bytes moved by operators", "bytes kept for backward")
        return _table([header, *rows, row("total", "", self.predicted)])


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)) for row in rows]


def _change(before: int, after: int) -> str:
    unit, name = (2**20, "MiB") if max(before, after) >= 2**20 else (2**10, "KiB")
    return f"{before / unit:.1f} -> {after / unit:.1f} {name}"
