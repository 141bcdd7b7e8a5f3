"""Fused convolution, batch normalisation, residual and activation, for inference and for training."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptkernels import _backend
from ptkernels._autograd import in_transform
from ptkernels._distributed import is_distributed
from ptkernels._registry import Explanation
from ptkernels.ops.conv_bn_relu import checks, reference, register, routing
from ptkernels.ops.conv_bn_relu.library import conv_op
from ptkernels.ops.conv_bn_relu.variant import OP, PLAIN, Variant, num_groups_of

__all__ = ["conv_bn_relu"]


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
    norm: str = "batch",
    num_groups: int | None = None,
    pre_activation: str = "none",
) -> Tensor:
    r"""Fused ``activation(batch_norm(conv(input, weight, bias)) + residual)`` in one, two or three dimensions.

    What :func:`torch.nn.functional.conv2d`, :func:`torch.nn.functional.batch_norm`, an addition and an activation
    compute, without writing the intermediate results of inference and with one saved tensor in training. Or with group
    or instance normalisation, and with an activation of the input before all that. Transposed convolutions are
    :func:`ptkernels.conv_transpose_bn_relu`.

    Args:
        input: ``[N, C, *space]`` with 1 to 3 dimensions of space; float64, float32, bfloat16 or float16. A dense
            channels-last input gives a channels-last result; any other layout gives a contiguous one.
        weight: ``[O, C / groups, *kernel]``, dtype and device of ``input``.
        bias: ``[O]``, of the convolution. With ``training`` its gradient is exactly 0: the statistics remove it.
        bn_weight: ``[O]``, factor after normalisation (gamma). This and the other vectors of the normalisation have the
            dtype of ``input``, or float32 where that is narrower. Default: 1.
        bn_bias: ``[O]``, added after normalisation (beta). Default: 0.
        running_mean: ``[O]``. Normalises when not training; updated in place when training. Not differentiable.
        running_var: ``[O]``, given together with ``running_mean``. Without both and without ``training`` there is no
            normalisation, and ``bn_weight`` and ``bn_bias`` must be None.
        residual: shape and dtype of the result, added before the activation.
        training: normalise with the mean and biased variance of the batch, and move the running statistics towards the
            mean and the *unbiased* variance, as :class:`torch.nn.BatchNorm2d` does.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        stride: of the convolution, one int or one per dimension of space, at least 1.
        padding: zeros on both sides of every dimension: one int or one per dimension, or ``"valid"`` for none, or
            ``"same"`` (stride 1 only) for a result of the size of ``input``.
        dilation: distance of the taps, at least 1.
        groups: divisor of C and O.
        activation: ``"none"``, ``"relu"``, ``"leaky_relu"``, ``"relu6"``, ``"elu"``, ``"silu"``, ``"gelu"``,
            ``"mish"``, ``"hardswish"``, ``"sigmoid"`` or ``"tanh"``; elu with alpha 1, gelu by the error function.
        negative_slope: of ``"leaky_relu"``.
        recompute: keep only ``input`` for the backward, which computes the convolution again.
        norm: ``"batch"`` normalises channels as above. ``"group"`` normalises with the mean and biased variance of each
            of ``num_groups`` groups of channels of every image, training or not, as :class:`torch.nn.GroupNorm` does;
            ``"instance"`` the same with a group for every channel, as :class:`torch.nn.InstanceNorm2d`. Neither has
            running statistics.
        num_groups: of ``norm="group"``, a divisor of O.
        pre_activation: of the input, before the convolution (and before its padding with zeros): one of those above, as
            in the ReLU-Conv-BN of architecture search. The backward keeps the input as it was given.

    Returns:
        ``[N, O, *space]`` in the dtype of ``input``.

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype or Python type the operator does not take.
        ValueError: shapes, devices or numbers do not fit, or statistics would be taken of one value.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.
        ptkernels.errors.BackendError: the backend asked for cannot run the call.

    Note:
        Sums are float32 (float64 for float64). Statistics are taken of blocks, centred before they are squared, and
        merged in a fixed order (Chan, Golub and LeVeque, 1983): a mean of 10,000 standard deviations costs no
        more than the rounding of the mean itself to float32. Results do not depend on the number of
        threads. Time is that of the convolution; inference keeps nothing beyond the result, training the convolution's
        result, or nothing with ``recompute``. Statistics of images cost one more pass over the convolution's result,
        an activation before a channels-last convolution one over the input.

        Inside a backward pass, where activation checkpointing runs a forward again, running statistics are left alone:
        a training step updates them once. Under vmap a mapped dimension becomes groups.

        Double backward and forward-mode differentiation run on :func:`ptkernels.reference.conv_bn_relu`, with a
        warning. ``ptkernels.explain(ptkernels.conv_bn_relu, ...)`` tells what a call will run on.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x, weight = torch.randn(2, 3, 32, 32), torch.randn(8, 3, 3, 3)
        >>> mean, var = torch.zeros(8), torch.ones(8)
        >>> ptk.conv_bn_relu(x, weight, running_mean=mean, running_var=var, training=True, padding="same").shape
        torch.Size([2, 8, 32, 32])
    """
    if is_distributed(input):
        from ptkernels.integrations import dtensor

        operands = {"input": input, "weight": weight, "bias": bias, "bn_weight": bn_weight, "bn_bias": bn_bias}
        operands |= {"running_mean": running_mean, "running_var": running_var, "residual": residual}
        given: dict[str, Any] = {
            "training": training,
            "momentum": momentum,
            "eps": eps,
            "stride": stride,
            "padding": padding,
        }
        given |= {"dilation": dilation, "groups": groups, "activation": activation, "negative_slope": negative_slope}
        given |= {"norm": norm, "num_groups": num_groups, "pre_activation": pre_activation}
        return dtensor.conv_bn_relu(operands, {**given, "recompute": recompute})
    tensors = (input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual)
    options = (training, momentum, eps, stride, padding, dilation, groups, activation, negative_slope)
    if norm == "batch" and num_groups is None and pre_activation == "none":
        return evaluate(tensors, options, PLAIN, recompute)
    variant = PLAIN._replace(num_groups=num_groups_of(OP, norm, num_groups), pre_activation=pre_activation)
    return evaluate(tensors, options, variant, recompute)


def evaluate(tensors: tuple[Any, ...], options: tuple[Any, ...], variant: Variant, recompute: bool) -> Tensor:
    """The result for arguments that nobody has looked at, as :func:`checked_arguments` takes them."""
    training, momentum, eps, stride, padding, dilation, groups, activation, negative_slope = options
    # The first attempt checks nothing that the operator checks itself. Whatever goes wrong in it is left to the second,
    # which handles every case and words every error.
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None = None
    space = tensors[0].dim() - 2 if isinstance(tensors[0], Tensor) else 0
    lists = [_plain_list(value, space) for value in (stride, padding, dilation)]
    if None not in lists and _is_plain(training, momentum, eps, groups, negative_slope):
        args = (
            *tensors, training, eps, *lists, groups, activation, negative_slope,
        )  # fmt: skip
        with contextlib.suppress(AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            if _records(args):
                saves = not recompute and register.needs_conv(args, variant)
                results = register.record(args, saves, _plain_variant(variant, space))
            else:
                # Nothing to record: the autograd kernel, which is Python, would double the latency.
                with torch._C._AutoDispatchBelowAutograd():
                    rest = () if variant is PLAIN else _plain_variant(variant, space)
                    results = conv_op(*args, False, *rest)
    if results is None:
        results = _convolve(checked_arguments(tensors, options, variant), recompute)
    out, _, mean, var = results
    running_mean, running_var = tensors[5:7]
    if training and running_mean is not None and mean is not None and var is not None and not replays_forward():
        count = out.size(0) * math.prod(out.shape[2:])
        reference.update_statistics(running_mean, running_var, mean, var, count, momentum)
    return out


def _plain_variant(variant: Variant, space: int) -> Variant:
    """As the operator takes it; an output_padding of None, where that is no such list, is refused there."""
    more = variant.output_padding
    return variant if more is None else variant._replace(output_padding=_plain_list(more, space))


def _plain_list(value: Any, space: int) -> list[int] | None:
    """One int, or one per dimension of space, as the operator takes them; None for anything else."""
    if type(value) is int:
        return [value] * space
    if type(value) is tuple and list(map(type, value)) == [int] * space:
        return list(value)
    return None


def _is_plain(training: Any, momentum: Any, eps: Any, groups: Any, slope: Any) -> bool:
    """Whether the operator can be called with these arguments as they are, as far as it would not notice itself."""
    return (
        type(training) is bool
        and type(momentum) is type(eps) is type(slope) is float
        and 0.0 <= momentum < math.inf
        and type(groups) is int
        and _backend.state.backend is None
        and not torch.compiler.is_compiling()
        and not in_transform()
    )


def _records(args: tuple[Any, ...]) -> bool:
    """Whether autograd has to know of the call; torch.jit.trace writes down operators, and does not differentiate."""
    return (
        torch.is_grad_enabled()
        and any(args[index] is not None and args[index].requires_grad for index in (0, 1, 2, 3, 4, 7))
        and torch._C._get_tracing_state() is None
    )


def _convolve(args: tuple[Any, ...], recompute: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Result, convolution, mean and variance, of checked arguments."""
    if routing.runs_on_reference(Variant(*args[16:]), *args[:5], args[7]):
        # Autocast has been applied; inside the composition it would round everything else as well.
        with torch.autocast(args[0].device.type, enabled=False):
            return reference.forward(*args)
    saves = not recompute and _records(args) and register.needs_conv(args, Variant(*args[16:]))
    return conv_op(*args[:16], saves, *args[16:])  # type: ignore[no-any-return]


def replays_forward() -> bool:
    """Whether a backward pass surrounds the call, as when checkpointing runs a forward a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checked_arguments(tensors: tuple[Any, ...], options: tuple[Any, ...], variant: Variant) -> tuple[Any, ...]:
    """Checked arguments of the operator, but for ``save_conv``.

    ``tensors`` are the public function's first eight, ``options`` training, momentum, eps, stride, padding, dilation,
    groups, activation and negative_slope.
    """
    training, momentum, eps, stride, padding, dilation, groups, activation, negative_slope = options
    tensors = register.autocast_if_enabled(tensors)
    input, weight = tensors[:2]
    if isinstance(padding, str) and not variant.transposed and all(isinstance(t, Tensor) for t in (input, weight)):
        input, padding = _resolve_padding(input, weight, stride, padding, dilation)
        tensors = (input, *tensors[1:])
    given = (training, eps, stride, padding, dilation, groups, activation, negative_slope)
    checks.check_op_inputs(*(*tensors, *given, variant, momentum))
    space = input.dim() - 2
    lists = [
        checks.spatial(variant.op, name, value, space, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    ]
    if variant.transposed:
        more = checks.spatial(variant.op, "output_padding", variant.output_padding, space, 0)
        variant = variant._replace(output_padding=more)
    return (*tensors, training, float(eps), *lists, groups, activation, float(negative_slope), *variant)


def _resolve_padding(
    input: Tensor, weight: Tensor, stride: Any, padding: str, dilation: Any
) -> tuple[Tensor, int | list[int]]:
    """The padding that a word stands for; an odd zero of "same" goes behind the input, as in torch."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise ValueError(f"{OP}: padding: got {padding!r}, expected ints, 'same' or 'valid'")
    space = input.dim() - 2
    if any(number != 1 for number in checks.spatial(OP, "stride", stride, space, 1)):
        raise ValueError(f"{OP}: padding: got 'same' with stride {stride}, expected stride 1")
    spans = [
        step * (size - 1)
        for step, size in zip(checks.spatial(OP, "dilation", dilation, space, 1), weight.shape[2:], strict=False)
    ]
    if any(span % 2 for span in spans):
        behind = [number for span in reversed(spans) for number in (0, span % 2)]
        is_channels_last = register._is_channels_last(input)
        input = F.pad(input, behind)
        if is_channels_last:
            input = input.contiguous(memory_format=register._FORMATS[input.dim()])
    return input, [span // 2 for span in spans]


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Account of the call :func:`ptkernels.conv_bn_relu` would make with these arguments, without making it.

    Raises what the call would raise for bad arguments.
    """
    import inspect

    bound = inspect.signature(conv_bn_relu).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    num_groups = num_groups_of(OP, given["norm"], given["num_groups"])
    variant = PLAIN._replace(num_groups=num_groups, pre_activation=given["pre_activation"])
    return account_of(given, variant)


def account_of(given: dict[str, Any], variant: Variant) -> Explanation:
    """Account of a call with these arguments by name."""
    tensors = (
        given[name]
        for name in ("input", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var", "residual")
    )
    names = ("training", "momentum", "eps", "stride", "padding", "dilation", "groups", "activation", "negative_slope")
    return routing.account(checked_arguments(tuple(tensors), tuple(given[name] for name in names), variant))
