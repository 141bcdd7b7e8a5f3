"""Fused transposed convolution, normalisation, residual and activation: conv_bn_relu's operator, asked otherwise.

Checks, shapes, derivatives and kernels are those of :mod:`ptkernels.ops.conv_bn_relu`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptkernels._distributed import is_distributed
from ptkernels._registry import Explanation
from ptkernels.ops.conv_bn_relu import account_of, evaluate
from ptkernels.ops.conv_bn_relu.variant import TRANSPOSED_OP, Variant, num_groups_of

__all__ = ["conv_transpose_bn_relu"]


def conv_transpose_bn_relu(
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
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
    norm: str = "batch",
    num_groups: int | None = None,
    pre_activation: str = "none",
) -> Tensor:
    r"""Fused ``activation(batch_norm(conv_transpose(input, weight, bias)) + residual)`` in one to three dimensions.

    What :func:`torch.nn.functional.conv_transpose2d`, :func:`torch.nn.functional.batch_norm`, an addition and an
    activation compute, without writing the intermediate results of inference and with one saved tensor in training.

    Args:
        input: ``[N, C, *space]`` with 1 to 3 dimensions of space; float64, float32, bfloat16 or float16. A dense
            channels-last input gives a channels-last result; any other layout gives a contiguous one.
        weight: ``[C, O / groups, *kernel]``, dtype and device of ``input``.
        bias: ``[O]``, of the convolution.
        bn_weight: ``[O]``, factor after normalisation, as the other vectors of the normalisation in the dtype of
            ``input`` or float32 where that is narrower. Default: 1.
        bn_bias: ``[O]``, added after normalisation. Default: 0.
        running_mean: ``[O]``. Normalises when not training; updated in place when training. Not differentiable.
        running_var: ``[O]``, given together with ``running_mean``. Without both and without ``training`` there is no
            normalisation over the batch, and ``bn_weight`` and ``bn_bias`` must be None.
        residual: shape and dtype of the result, added before the activation.
        training: normalise with the mean and biased variance of the batch, and move the running statistics.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        stride: of the convolution, at least 1; as what follows one int, or one per dimension of space.
        padding: what is cut off both sides of every dimension of the result.
        output_padding: what is added to one side of it, less than ``stride`` or ``dilation``.
        groups: divisor of C and O.
        dilation: distance of the taps, at least 1.
        activation, negative_slope, recompute, norm, num_groups, pre_activation: see :func:`ptkernels.conv_bn_relu`.

    Returns:
        ``[N, O, *space]`` in the dtype of ``input``; a size of ``n`` becomes
        ``(n - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1``.

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype or Python type the operator does not take.
        ValueError: shapes, devices or numbers do not fit, or statistics would be taken of one value.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.
        ptkernels.errors.BackendError: the backend asked for cannot run the call.

    Note:
        The time is that of the products that there are: one convolution for each residue of the result's coordinates
        modulo the stride, none of which multiplies a zero between two inputs. Everything else (sums, statistics,
        threads, transforms, double backward) is as of :func:`ptkernels.conv_bn_relu`, whose operator this is.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x, weight = torch.randn(2, 8, 4, 4), torch.randn(8, 3, 4, 4)
        >>> ptk.conv_transpose_bn_relu(x, weight, training=True, stride=2, padding=1).shape
        torch.Size([2, 3, 8, 8])
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
        given |= {"output_padding": output_padding, "groups": groups, "dilation": dilation, "activation": activation}
        given |= {"negative_slope": negative_slope, "recompute": recompute, "norm": norm, "num_groups": num_groups}
        return dtensor.conv_bn_relu(operands, {**given, "pre_activation": pre_activation}, transposed=True)
    return evaluate(
        (input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual),
        (training, momentum, eps, stride, padding, dilation, groups, activation, negative_slope),
        Variant(True, output_padding, num_groups_of(TRANSPOSED_OP, norm, num_groups), pre_activation),  # type: ignore[arg-type]
        recompute,
    )


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Account of the call :func:`ptkernels.conv_transpose_bn_relu` would make with these arguments, without making it.

    Raises what the call would raise for bad arguments.
    """
    import inspect

    bound = inspect.signature(conv_transpose_bn_relu).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    num_groups = num_groups_of(TRANSPOSED_OP, given["norm"], given["num_groups"])
    return account_of(given, Variant(True, given["output_padding"], num_groups, given["pre_activation"]))
