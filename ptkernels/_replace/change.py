"""The one way in which a module is changed: its class and a few of its attributes, nothing that others hold.

Parameters, buffers, hooks, children and the module object itself stay, so optimizers, tied weights, state_dict and
references from elsewhere stay valid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Protocol

from torch import nn

from ptkernels._replace.report import Kept, Replaced

_MISSING = object()


class Forward:
    """Stands in for a module's forward. A class, so that the module pickles and copies."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: torch.export names inputs after it."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """The original's: torch.export tells where the model is written."""
        code: CodeType = type(self.module).forward.__code__
        return code


@dataclass
class Change:
    """A module about to be changed, and the lines of the report that say so."""

    path: str
    entries: list[Replaced]
    module: nn.Module
    new_class: type[nn.Module] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    custom: Callable[[], Callable[[], None]] | None = None
    """Applies a change of another kind, and returns what takes it back."""

    def apply(self) -> Callable[[], None]:
        """Change the module; returns what takes the change back."""
        if self.custom is not None:
            return self.custom()
        module, old_class = self.module, type(self.module)
        old = {name: module.__dict__.get(name, _MISSING) for name in self.attributes}
        if self.new_class is not None:
            module.__class__ = self.new_class
        module.__dict__.update(self.attributes)

        def undo() -> None:
            module.__class__ = old_class
            for name, value in old.items():
                if value is _MISSING:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value

        return undo


SUBCLASS = "a subclass, whose own forward a replacement would lose"


def swap(
    path: str,
    module: nn.Module,
    op: str,
    classes: Mapping[type[nn.Module], type[nn.Module]],
    effects: Mapping[type[nn.Module], str],
) -> Change | Kept | None:
    """The change of a module whose class has a counterpart; a subclass of such a class stays, and is told."""
    kind = type(module)
    if kind in classes:
        return Change(path, [Replaced(path, kind.__name__, op, effects[kind])], module, classes[kind])
    if isinstance(module, tuple(classes)) and kind not in classes.values():
        return Kept(path, kind.__name__, op, SUBCLASS)
    return None


class Rule(Protocol):
    """Finds the modules of a model that one operator can run."""

    op: str

    def plan(self, model: nn.Module) -> Iterator[Change | Kept]:
        """What to change and what to leave, without changing anything."""
        ...
