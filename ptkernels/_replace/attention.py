"""Which modules attention can run: torch.nn's own, transformers' models, and callers of torch's SDPA."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

import ptkernels.nn as ptk_nn
from ptkernels._replace.change import Change, Forward, swap
from ptkernels._replace.report import Kept, Replaced
from ptkernels._sdpa import patch_sdpa

_SDPA = "scaled_dot_product_attention"
_TORCHS = F.scaled_dot_product_attention
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: ptk_nn.MultiheadAttention,
    nn.TransformerEncoderLayer: ptk_nn.TransformerEncoderLayer,
}
_EFFECTS: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "fused forward and backward, memory linear in the length; masked-out rows give 0, not NaN",
    nn.TransformerEncoderLayer: "its attention is fused in evaluation too, where torch's fast path bypassed the module",
}


class _Patched(Forward):
    """With torch's SDPA replaced while it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with patch_sdpa():
            return type(self.module).forward(self.module, *args, **kwargs)


@functools.cache
def _reached(kind: Any) -> tuple[FunctionType, ...]:
    """A class's forward, and the methods and functions that it names, a few calls deep."""
    found: dict[FunctionType, None] = {}
    named: list[Any] = [kind.forward]
    for _ in range(3):
        functions = [function for function in named if isinstance(function, FunctionType)]
        found.update(dict.fromkeys(functions))
        own = [function for function in functions if not function.__module__.startswith("torch.")]
        named = [getattr(kind, name, f.__globals__.get(name)) for f in own for name in f.__code__.co_names]
    return tuple(found)


@functools.cache
def _calls_sdpa(kind: Any) -> bool:
    return any(_SDPA in function.__code__.co_names for function in _reached(kind))


@functools.cache
def _imports_sdpa(kind: Any) -> bool:
    """Whether one of them has the function as a name of its own, where a patch of torch's does not reach."""
    own = (function for function in _reached(kind) if function.__globals__ is not vars(F))
    loads = ((f, i.argval) for f in own for i in dis.get_instructions(f) if i.opname == "LOAD_GLOBAL")
    return any(function.__globals__.get(name) is _TORCHS for function, name in loads)


class AttentionRule:
    """See the module."""

    op = "attention"

    def plan(self, model: nn.Module) -> Iterator[Change | Kept]:
        """See :class:`ptkernels._replace.change.Rule`."""
        switched: list[str] = []  # transformers' models, whose layers take part through them
        for path, module in model.named_modules():
            kind: Any = type(module)
            if kind not in _CLASSES and any(path.startswith(prefix) for prefix in switched):
                continue
            name = kind.__name__
            if (swapped := swap(path, module, self.op, _CLASSES, _EFFECTS)) is not None:
                yield swapped
            elif kind is nn.TransformerEncoder and module.use_nested_tensor:
                effect = "padding stays a mask: its conversion to nested tensors would bypass the layers"
                yield Change(
                    path, [Replaced(path, name, self.op, effect)], module, attributes={"use_nested_tensor": False}
                )
            elif _is_transformers(module):
                switched.append(f"{path}." if path else "")
                yield from self._transformers(path, name, module)
            elif kind.__module__.startswith("ptkernels.") or isinstance(module.__dict__.get("forward"), _Patched):
                continue
            elif _imports_sdpa(kind):
                yield Kept(path, name, self.op, f"has imported {_SDPA} by name: call it as F.{_SDPA}")
            elif _calls_sdpa(kind):
                if "forward" in module.__dict__:
                    yield Kept(path, name, self.op, "its forward has been exchanged already")
                    continue
                effect = f"F.{_SDPA} within its forward is ptkernels.attention"
                yield Change(
                    path, [Replaced(path, name, self.op, effect)], module, attributes={"forward": _Patched(module)}
                )

    def _transformers(self, path: str, name: str, module: Any) -> Iterator[Change | Kept]:
        from ptkernels.integrations import transformers as integration

        before = module.config._attn_implementation
        if before == integration.NAME:
            return
        if not getattr(module, "_supports_attention_backend", False) and not getattr(module, "_supports_sdpa", False):
            yield Kept(path, name, self.op, "this model of transformers does not take another attention")
            return

        def switch() -> Callable[[], None]:
            integration.register()
            module.set_attn_implementation(integration.NAME)
            return lambda: module.set_attn_implementation(before)

        effect = f"every layer's attention, {before!r} before; weights are not returned (output_attentions)"
        yield Change(path, [Replaced(path, name, self.op, effect)], module, custom=switch)


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(module, "set_attn_implementation") and hasattr(module, "config")
