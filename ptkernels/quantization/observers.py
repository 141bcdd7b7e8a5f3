"""Observers: what scale an 8-bit grid should have for data that comes in batches, and calibration of models with them.

All of them are symmetric: the scale is a threshold / 127, and what lies beyond the threshold is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BINS = 2048


class MinMaxObserver:
    """The threshold is the largest magnitude seen.

    Example:
        >>> import torch, ptkernels as ptk
        >>> observer = ptk.quantization.MinMaxObserver()
        >>> observer.observe(torch.tensor([1.0, -254.0]))
        >>> observer.scale().item()
        2.0
    """

    def __init__(self) -> None:
        self.top = 0.0

    def observe(self, x: Tensor) -> None:
        """Take a batch into account.

        Raises:
            ValueError: it holds NaN or infinities.
        """
        if x.numel() == 0:
            return
        top = float(x.detach().abs().amax())
        if not top < float("inf"):
            raise ValueError(f"{type(self).__name__}: x: got NaN or infinities, expected finite numbers")
        self._widen(top)
        self._count(x.detach().float().abs().flatten())

    def scale(self) -> Tensor:
        """Float32 ``[1]``; 1 where only zeros were seen."""
        threshold = self.threshold()
        return torch.tensor([threshold / 127 if threshold > 0.0 else 1.0])

    def threshold(self) -> float:
        return self.top

    def _widen(self, top: float) -> None:
        self.top = max(self.top, top)

    def _count(self, magnitudes: Tensor) -> None:
        pass


class _HistogramObserver(MinMaxObserver):
    """Counts of magnitudes in equal bins from 0 to a power of two times the first batch's largest: widening merges
    whole bins, so that no count is ever divided."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.width = 0.0

    def _widen(self, top: float) -> None:
        super()._widen(top)
        if self.width == 0.0:
            self.width = top / _BINS
        while self.width > 0.0 and top > self.width * _BINS:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.width *= 2

    def _count(self, magnitudes: Tensor) -> None:
        if self.width > 0.0:
            bins = (magnitudes / self.width).long().clamp_(max=_BINS - 1)
            self.counts += torch.bincount(bins.cpu(), minlength=_BINS)


class PercentileObserver(_HistogramObserver):
    """The threshold is the magnitude below which a share of all values lies.

    Args:
        percentile: that share, above 0, at most 100.

    Raises:
        ValueError: the percentile is out of range.

    Example:
        >>> import torch, ptkernels as ptk
        >>> observer = ptk.quantization.PercentileObserver(50)
        >>> observer.observe(torch.arange(1.0, 128.0))
        >>> abs(observer.threshold() - 64) < 1
        True
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 0.0 < percentile <= 100.0:
            raise ValueError(f"PercentileObserver: percentile: got {percentile}, expected above 0, at most 100")
        self.percentile = percentile

    def threshold(self) -> float:
        total = self.counts.cumsum(0)
        if total[-1] == 0:
            return self.top
        index = int(torch.searchsorted(total, total[-1] * (self.percentile / 100)))
        return min(self.top, (min(index, _BINS - 1) + 1) * self.width)


class MSEObserver(_HistogramObserver):
    """The threshold of least mean squared error: what clipping adds against what a finer grid saves.

    Example:
        >>> import torch, ptkernels as ptk
        >>> observer = ptk.quantization.MSEObserver()
        >>> observer.observe(torch.cat([torch.linspace(-1, 1, 99_999), torch.tensor([9.0])]))
        >>> observer.threshold() < 6
        True
    """

    def threshold(self) -> float:
        if self.width == 0.0:
            return self.top
        middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * self.width
        thresholds = self.top * torch.arange(1, 101, dtype=torch.float64) / 100
        beyond = (middles - thresholds[:, None]).clamp(min=0.0)
        within = (thresholds / 127)[:, None].square() / 12 * (beyond == 0.0)
        errors = ((beyond.square() + within) * self.counts).sum(1)
        return float(thresholds[int(errors.argmin())])


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    observer: Callable[[], MinMaxObserver] = MinMaxObserver,
    filter: Callable[[str, nn.Linear], bool] | None = None,
) -> dict[str, Tensor]:
    """Scales of the inputs of linear layers, from running a model on sample batches.

    Args:
        model: called with every batch (a tuple as its arguments), without gradients.
        batches: a few hundred samples of what the model will see.
        observer: makes an observer for each layer.
        filter: called with a layer's name and the layer; only those it returns True for are observed. Default: all.

    Returns:
        A float32 ``[1]`` scale by layer name: what :func:`ptkernels.nn.quantize_` takes as ``input_scales``.

    Raises:
        ValueError: a layer saw NaN or infinities.

    Example:
        >>> import torch, ptkernels as ptk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> scales = ptk.quantization.calibrate(model, [torch.randn(8, 16) for _ in range(4)])
        >>> ptk.nn.quantize_(model, "int8_static", input_scales=scales)
        ['0', '2']
    """
    observers = {
        name: observer()
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and (filter is None or filter(name, layer))
    }
    with linear_inputs(model, observers, lambda name, x: observers[name].observe(x)), torch.no_grad():
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    return {name: found.scale() for name, found in observers.items()}


@contextmanager
def linear_inputs(model: nn.Module, names: Iterable[str], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Context in which ``take(name, input)`` is called before every call of the named layers."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: take(name, args[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()
