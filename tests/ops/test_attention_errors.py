"""Every bad call of attention names the operator and the argument, before any data is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import ptkernels as ptk
from ptkernels.errors import BackendError, FallbackError

B, H, LQ, LK, D = 2, 4, 3, 5, 8


def good() -> dict[str, Any]:
    """A valid call, to be spoiled in one place."""
    return {"query": torch.randn(B, H, LQ, D), "key": torch.randn(B, H, LK, D), "value": torch.randn(B, H, LK, D)}


@dataclass(frozen=True)
class Bad:
    name: str
    changes: Callable[[], dict[str, Any]]
    error: type[Exception]
    message: str
    op_takes: bool = False
    """Whether the call says something else, and is valid, for the operator underneath."""


def t(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


def quantized(*shape: int) -> Tensor:
    return torch.quantize_per_tensor(t(*shape), 0.1, 0, torch.qint8)


def nested() -> Tensor:
    return torch.nested.nested_tensor([t(H, LQ, D), t(H, LQ + 1, D)], layout=torch.jagged)


BAD = [
    # what the tensors are
    Bad("query None", lambda: {"query": None}, TypeError, "query: got .*NoneType, expected torch.Tensor"),
    Bad("query list", lambda: {"query": [[1.0]]}, TypeError, "query: got .*list, expected torch.Tensor"),
    Bad(
        "key numpy",
        lambda: {"key": np.zeros((B, H, LK, D))},
        TypeError,
        "key: got numpy.ndarray, expected torch.Tensor",
    ),
    Bad("value number", lambda: {"value": 1.0}, TypeError, "value: got .*float, expected torch.Tensor"),
    Bad("mask string", lambda: {"attn_mask": "causal"}, TypeError, "attn_mask: got .*str, expected torch.Tensor"),
    Bad("mask list", lambda: {"attn_mask": [True]}, TypeError, "attn_mask: got .*list, expected torch.Tensor"),
    Bad("mask bool", lambda: {"attn_mask": True}, TypeError, "attn_mask: got .*bool, expected torch.Tensor"),
    Bad("query quantized", lambda: {"query": quantized(B, H, LQ, D)}, TypeError, "query: got a quantized tensor"),
    Bad("value quantized", lambda: {"value": quantized(B, H, LK, D)}, TypeError, "value: got a quantized tensor"),
    Bad("key sparse", lambda: {"key": t(B, H, LK, D).to_sparse()}, TypeError, "key: got layout torch.sparse_coo"),
    Bad("query csr", lambda: {"query": t(LQ, D).to_sparse_csr()}, TypeError, "query: got layout torch.sparse_csr"),
    Bad(
        "mask sparse",
        lambda: {"attn_mask": torch.ones(LQ, LK).to_sparse()},
        TypeError,
        "attn_mask: got layout torch.sparse_coo",
    ),
    Bad("key mkldnn", lambda: {"key": t(B, H, LK, D).to_mkldnn()}, TypeError, "key: got layout torch._mkldnn"),
    Bad("query nested", lambda: {"query": nested()}, TypeError, "key: expected a nested tensor .* beside nested ones"),
    Bad("key nested", lambda: {"key": nested()}, TypeError, "key: got a nested tensor, expected all operands to be"),
    # dtypes
    *(
        Bad(
            f"all {str(dtype)[6:]}",
            lambda dtype=dtype: {name: tensor.to(dtype) for name, tensor in good().items()},  # type: ignore[misc]
            TypeError,
            f"query: got dtype {str(dtype)[6:]}, expected one of float64, float32, bfloat16, float16",
        )
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    Bad("key float64", lambda: {"key": t(B, H, LK, D).double()}, TypeError, "key: got dtype float64, expected float32"),
    Bad("key half", lambda: {"key": t(B, H, LK, D).half()}, TypeError, "key: got dtype float16, expected float32"),
    Bad("value bf16", lambda: {"value": t(B, H, LK, D).bfloat16()}, TypeError, "value: got dtype bfloat16, expected"),
    Bad("value int", lambda: {"value": torch.ones(B, H, LK, D).int()}, TypeError, "value: got dtype int32, expected"),
    Bad(
        "mask int64",
        lambda: {"attn_mask": torch.ones(LQ, LK, dtype=torch.int64)},
        TypeError,
        r"attn_mask: got dtype int64, expected one of bool, float32; where 1 means attend, pass attn_mask.bool\(\)",
    ),
    Bad(
        "mask uint8",
        lambda: {"attn_mask": torch.ones(LQ, LK).byte()},
        TypeError,
        r"attn_mask: got dtype uint8.*bool\(\)",
    ),
    Bad("mask double", lambda: {"attn_mask": t(LQ, LK).double()}, TypeError, "attn_mask: got dtype float64, expected"),
    Bad("mask half", lambda: {"attn_mask": t(LQ, LK).half()}, TypeError, "attn_mask: got dtype float16, expected one"),
    Bad("mask complex", lambda: {"attn_mask": t(LQ, LK) + 0j}, TypeError, "attn_mask: got dtype complex64, expected"),
    # devices
    Bad("key meta", lambda: {"key": t(B, H, LK, D, device="meta")}, ValueError, "key: got device meta, expected cpu"),
    Bad("value meta", lambda: {"value": t(B, H, LK, D, device="meta")}, ValueError, "value: got device meta"),
    Bad("mask meta", lambda: {"attn_mask": t(LQ, LK, device="meta")}, ValueError, "attn_mask: got device meta"),
    Bad(
        "query meta", lambda: {"query": t(B, H, LQ, D, device="meta")}, ValueError, "key: got device cpu, expected meta"
    ),
    # ranks
    Bad("query scalar", lambda: {"query": t()}, ValueError, r"query: got shape \[\], expected at least 2 dimensions"),
    Bad("query vector", lambda: {"query": t(D)}, ValueError, r"query: got shape \[8\], expected at least 2 dimensions"),
    Bad("key vector", lambda: {"key": t(D)}, ValueError, r"key: got shape \[8\], expected at least 2 dimensions"),
    Bad(
        "value vector", lambda: {"value": t(LK)}, ValueError, r"value: got shape \[5\], expected at least 2 dimensions"
    ),
    Bad(
        "grouped heads without heads",
        lambda: {"query": t(LQ, D), "key": t(LK, D), "value": t(LK, D), "enable_gqa": True},
        ValueError,
        r"query: got shape \[3, 8\], expected at least 3 dimensions: \[..., heads, length, head_dim\]",
    ),
    # sizes
    Bad("key head dim", lambda: {"key": t(B, H, LK, D + 1)}, ValueError, "key: got head dim 9, expected 8 like query"),
    Bad("value length", lambda: {"value": t(B, H, LK + 1, D)}, ValueError, "value: got length 6, expected 5 like key"),
    Bad(
        "head dim 0",
        lambda: {"query": t(B, H, LQ, 0), "key": t(B, H, LK, 0)},
        ValueError,
        "query: got head dim 0, expected 1 to 512",
    ),
    Bad(
        "head dim 513",
        lambda: {"query": t(B, H, LQ, 513), "key": t(B, H, LK, 513)},
        ValueError,
        "query: got head dim 513, expected 1 to 512",
    ),
    Bad("value dim 0", lambda: {"value": t(B, H, LK, 0)}, ValueError, "value: got head dim 0, expected 1 to 512"),
    Bad("value dim 513", lambda: {"value": t(B, H, LK, 513)}, ValueError, "value: got head dim 513, expected 1 to 512"),
    Bad(
        "fewer key heads",
        lambda: {"key": t(B, 2, LK, D), "value": t(B, 2, LK, D)},
        ValueError,
        "key: got 2 heads, expected 4 like query; enable_gqa=True",
        op_takes=True,
    ),
    Bad("more key heads", lambda: {"key": t(B, 8, LK, D), "value": t(B, 8, LK, D)}, ValueError, "key: got 8 heads"),
    Bad("value heads", lambda: {"value": t(B, 2, LK, D)}, ValueError, "value: got 2 heads, expected 4 like key"),
    Bad(
        "heads that do not divide",
        lambda: {"key": t(B, 3, LK, D), "value": t(B, 3, LK, D), "enable_gqa": True},
        ValueError,
        "key: got 3 heads, expected a divisor of query's 4",
    ),
    Bad(
        "grouped value heads",
        lambda: {"key": t(B, 2, LK, D), "value": t(B, 1, LK, D), "enable_gqa": True},
        ValueError,
        "value: got 1 heads, expected 2 like key",
    ),
    Bad(
        "no key heads",
        lambda: {"key": t(B, 0, LK, D), "value": t(B, 0, LK, D), "enable_gqa": True},
        ValueError,
        "key: got 0 heads, expected a divisor of query's 4",
    ),
    Bad("key batch", lambda: {"key": t(B + 1, H, LK, D)}, ValueError, "key: got batch size 3, expected 2 like query"),
    Bad(
        "value batch", lambda: {"value": t(B + 1, H, LK, D)}, ValueError, "value: got batch size 3, expected 2 like key"
    ),
    Bad(
        "batch of rank 3",
        lambda: {"query": t(B, LQ, D), "key": t(3, LK, D), "value": t(3, LK, D)},
        ValueError,
        "key: got batch size 3, expected 2 like query",
    ),
    Bad(
        "outer batch of rank 5",
        lambda: {"query": t(3, B, H, LQ, D), "key": t(4, B, H, LK, D)},
        ValueError,
        "key: got batch size 4, expected 3 like query",
    ),
    # mask shapes
    *(
        Bad(
            f"mask {shape}",
            lambda shape=shape: {"attn_mask": torch.ones(shape, dtype=torch.bool)},  # type: ignore[misc]
            ValueError,
            r"attn_mask: got shape \[.*\], expected one that broadcasts to \[2, 4, 3, 5\]",
        )
        for shape in (
            (LK, LQ),
            (LQ, LK + 1),
            (2, LQ, LK),
            (3, 1, LQ, LK),
            (B, 2, LQ, LK),
            (1, B, H, LQ, LK),
            (0,),
            (LQ, 0),
        )
    ),
    Bad(
        "mask enlarges the batch",
        lambda: {
            "query": t(1, H, LQ, D),
            "key": t(1, H, LK, D),
            "value": t(1, H, LK, D),
            "attn_mask": torch.ones(2, 1, LQ, LK, dtype=torch.bool),
        },
        ValueError,
        r"attn_mask: got shape \[2, 1, 3, 5\], expected one that broadcasts to \[1, 4, 3, 5\]",
    ),
    Bad(
        "mask of more dimensions",
        lambda: {
            "query": t(B, LQ, D),
            "key": t(B, LK, D),
            "value": t(B, LK, D),
            "attn_mask": torch.ones(B, 1, LQ, LK, dtype=torch.bool),
        },
        ValueError,
        r"attn_mask: got shape \[2, 1, 3, 5\], expected one that broadcasts to \[2, 3, 5\]",
    ),
    # numbers and flags
    Bad("dropout negative", lambda: {"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1, expected a probability"),
    Bad("dropout above 1", lambda: {"dropout_p": 1.5}, ValueError, "dropout_p: got 1.5, expected a probability"),
    Bad("dropout NaN", lambda: {"dropout_p": math.nan}, ValueError, "dropout_p: got nan, expected a probability"),
    Bad("dropout True", lambda: {"dropout_p": True}, TypeError, "dropout_p: got bool, expected float"),
    Bad("dropout string", lambda: {"dropout_p": "0.1"}, TypeError, "dropout_p: got str, expected float"),
    Bad("scale NaN", lambda: {"scale": math.nan}, ValueError, "scale: got nan, expected a finite number"),
    Bad("scale infinite", lambda: {"scale": -math.inf}, ValueError, "scale: got -inf, expected a finite number"),
    Bad("scale string", lambda: {"scale": "auto"}, TypeError, "scale: got str, expected float or None"),
    Bad("scale tuple", lambda: {"scale": (1.0,)}, TypeError, "scale: got tuple, expected float or None"),
    Bad("softcap negative", lambda: {"softcap": -1.0}, ValueError, "softcap: got -1.0, expected a finite number"),
    Bad("softcap infinite", lambda: {"softcap": math.inf}, ValueError, "softcap: got inf, expected a finite number"),
    Bad("softcap string", lambda: {"softcap": "1"}, TypeError, "softcap: got str, expected float"),
    Bad("window number", lambda: {"window": 3}, TypeError, r"window: got int, expected a pair \(left, right\)"),
    Bad("window of one", lambda: {"window": (3,)}, ValueError, r"window: got 1 entries, expected a pair"),
    Bad("window negative", lambda: {"window": (3, -2)}, ValueError, r"window: got -2 in it, expected -1"),
    Bad("window of floats", lambda: {"window": (3.0, 1)}, TypeError, r"window: got float in it, expected int or None"),
    Bad(
        "slopes shape", lambda: {"alibi_slopes": t(H + 1)}, ValueError, r"alibi_slopes: got shape \[5\], expected \[4\]"
    ),
    Bad(
        "relative shape",
        lambda: {"relative_bias": t(H, LQ + LK)},
        ValueError,
        r"relative_bias: got shape \[4, 8\], expected \[4, 7\], a number for every distance",
    ),
    Bad(
        "relative heads", lambda: {"relative_bias": t(3, LQ + LK - 1)}, ValueError, r"relative_bias: got shape \[3, 7\]"
    ),
    Bad("relative vector", lambda: {"relative_bias": t(LQ + LK - 1)}, ValueError, r"relative_bias: got shape \[7\]"),
    Bad(
        "relative dtype",
        lambda: {"relative_bias": t(H, LQ + LK - 1).half()},
        TypeError,
        "relative_bias: got dtype float16, expected one of float32",
    ),
    Bad("relative list", lambda: {"relative_bias": [0.0]}, TypeError, "relative_bias: got .*list, expected torch"),
    Bad(
        "blocks of a float mask",
        lambda: {"attn_mask": t(2, 3), "mask_block_size": 2},
        ValueError,
        "mask_block_size: got 2, expected 1 unless attn_mask is a boolean tensor",
    ),
    Bad("blocks of no mask", lambda: {"mask_block_size": 2}, ValueError, "mask_block_size: got 2, expected 1 unless"),
    Bad(
        "blocks of nothing",
        lambda: {"attn_mask": t(2, 3) > 0, "mask_block_size": 0},
        ValueError,
        "mask_block_size: got 0, expected 1 or more",
    ),
    Bad(
        "blocks of a fraction",
        lambda: {"attn_mask": t(2, 3) > 0, "mask_block_size": 2.5},
        TypeError,
        "mask_block_size: got float, expected int",
    ),
    Bad(
        "pairs for blocks",
        lambda: {"attn_mask": t(LQ, LK) > 0, "mask_block_size": 2},
        ValueError,
        r"attn_mask: got shape \[3, 5\], expected one that broadcasts to \[2, 4, 2, 3\]",
    ),
    Bad("slopes scalar", lambda: {"alibi_slopes": t()}, ValueError, r"alibi_slopes: got shape \[\], expected \[4\]"),
    Bad("slopes number", lambda: {"alibi_slopes": 0.5}, TypeError, "alibi_slopes: got .*float, expected torch.Tensor"),
    Bad("sinks batch", lambda: {"sinks": t(B + 1, H)}, ValueError, r"sinks: got shape \[3, 4\], expected \[4\] or"),
    Bad("sinks dtype", lambda: {"sinks": torch.ones(H).int()}, TypeError, "sinks: got dtype int32, expected one of"),
    Bad("sinks meta", lambda: {"sinks": t(H, device="meta")}, ValueError, "sinks: got device meta, expected cpu"),
    Bad(
        "triangle of another size",
        lambda: {"attn_mask": causal_lower_right(LQ, LK + 1)},
        ValueError,
        r"attn_mask: got a triangle of \[3, 6\], expected \[3, 5\]",
    ),
    Bad(
        "triangle and causal",
        lambda: {"attn_mask": causal_lower_right(LQ, LK), "is_causal": True},
        ValueError,
        "is_causal: got True, expected False beside an attn_mask that is a causal triangle",
        op_takes=True,
    ),
    Bad("causal string", lambda: {"is_causal": "yes"}, TypeError, "is_causal: got str, expected bool"),
    Bad(
        "causal mask in its place",
        lambda: {"is_causal": torch.ones(LQ, LK, dtype=torch.bool)},
        TypeError,
        "is_causal: got Tensor, expected bool",
    ),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*(beta|deprecated|prototype)")

each_bad = pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)


def test_table_is_large_enough() -> None:
    assert len(BAD) >= 40
    assert len({bad.name for bad in BAD}) == len(BAD)


@each_bad
def test_public_function(bad: Bad) -> None:
    with pytest.raises(bad.error, match=f"^attention: {bad.message}"):
        ptk.attention(**(good() | bad.changes()))


@each_bad
def test_where_a_gradient_is_needed(bad: Bad) -> None:
    arguments = good()
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()} | bad.changes()
    with pytest.raises(bad.error, match=f"^attention: {bad.message}"):
        ptk.attention(**arguments)


@each_bad
def test_explain(bad: Bad) -> None:
    with pytest.raises(bad.error, match=f"^attention: {bad.message}"):
        ptk.explain(ptk.attention, **(good() | bad.changes()))


@each_bad
def test_operator_underneath(bad: Bad) -> None:
    """Raises as well, with the words of the C++ glue or of torch's dispatcher."""
    arguments = good() | bad.changes()
    if bad.op_takes or arguments.pop("dropout_p", None) is not None:
        pytest.skip("valid or absent in the operator's schema")
    arguments.pop("enable_gqa", None)
    window = arguments.pop("window", None)
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            pytest.skip("two numbers in the operator's schema")
        arguments["window_left"], arguments["window_right"] = window
    with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
        torch.ops.ptkernels.attention(**arguments)
    assert str(raised.value)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_operator_takes_four_dimensions(rank: int) -> None:
    for name in ("query", "key", "value"):
        arguments = good()
        shape = (1, *arguments[name].shape) if rank == 5 else arguments[name].shape[4 - rank :]
        arguments[name] = t(*shape)
        with pytest.raises(RuntimeError, match=f"attention: {name}: got {rank} dimensions, expected 4"):
            torch.ops.ptkernels.attention(**arguments)


def backward_arguments() -> dict[str, Any]:
    arguments = good()
    out, lse = torch.ops.ptkernels.attention(**arguments)
    return {"grad_out": torch.ones_like(out), "grad_lse": torch.ones_like(lse), **arguments, "out": out, "lse": lse}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_out", lambda: t(B, H, LQ, D + 1)),
        ("grad_out", lambda: t(B, H, LQ, D).double()),
        ("grad_out", lambda: t(LQ, D)),
        ("grad_out", lambda: t(B, H, LQ, D, device="meta")),
        ("grad_lse", lambda: t(B, H, LQ, 1)),
        ("grad_lse", lambda: t(B, H, LQ).half()),
        ("out", lambda: t(B, H, LK, D)),
        ("out", lambda: t(B, H, LQ, D).bfloat16()),
        ("lse", lambda: t(B, H, LK)),
        ("lse", lambda: t(B, H, LQ).double()),
        ("query", lambda: t(B, H, LQ, D + 1)),
        ("key", lambda: t(B, 3, LK, D)),
        ("value", lambda: t(B, H, LK + 1, D)),
        ("attn_mask", lambda: torch.ones(LK, LQ)),
        ("attn_mask", lambda: torch.ones(LQ, LK).long()),
        ("scale", lambda: math.inf),
        ("output_mask", lambda: [True, True]),
    ],
)
def test_backward_operator(name: str, value: Callable[[], Any]) -> None:
    arguments = backward_arguments()
    torch.ops.ptkernels._attention_backward(**arguments)
    arguments[name] = value()
    with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
        torch.ops.ptkernels._attention_backward(**arguments)
    assert str(raised.value)


def test_bad_call_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ptk.attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"key: got head dim 9, expected 8 like query"):
        compiled(**(good() | {"key": t(B, H, LK, D + 1)}))


def test_bad_call_on_meta_and_fake_tensors() -> None:
    arguments = {name: tensor.to("meta") for name, tensor in good().items()}
    arguments["value"] = t(B, H, LK + 1, D, device="meta")
    with pytest.raises(ValueError, match=r"^attention: value: got length 6, expected 5 like key"):
        ptk.attention(**arguments)
    with (
        torch._subclasses.FakeTensorMode(),
        pytest.raises(ValueError, match=r"^attention: value: got length 6, expected 5 like key"),
    ):
        ptk.attention(t(B, H, LQ, D), t(B, H, LK, D), t(B, H, LK + 1, D))


def test_dtypes_may_differ_where_autocast_unites_them() -> None:
    arguments = good()
    arguments["key"] = arguments["key"].half()
    with torch.autocast("cpu", torch.bfloat16):
        assert ptk.attention(**arguments).dtype == torch.bfloat16
        assert ptk.attention(**arguments, dropout_p=0.5).dtype == torch.bfloat16


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"^backend: name: got 'gpu', expected one of cpu, cuda, triton, reference"):
        ptk.backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_that_cannot_run(name: str) -> None:
    with pytest.raises(BackendError, match=f"^backend: '{name}' cannot run here: "):
        ptk.backend(name)


def test_backend_without_kernel_for_the_call() -> None:
    arguments = good()
    arguments["query"].requires_grad_()
    with ptk.backend("cpu"):
        (grad,) = torch.autograd.grad(ptk.attention(**arguments).sin().sum(), arguments["query"], create_graph=True)
        with pytest.raises(BackendError, match=r"attention: backend 'cpu' was asked for and has no kernel.*double"):
            grad.sum().backward()
    arguments = {name: tensor.to("meta") for name, tensor in good().items()}
    with ptk.backend("cpu"), pytest.raises(BackendError, match=r"attention: backend 'cpu' was asked for, got .* meta"):
        ptk.attention(**arguments)


@pytest.mark.usefixtures("strict")
def test_strict_refuses_the_reference() -> None:
    arguments = good()
    with pytest.raises(FallbackError, match=r"forward-mode differentiation has no kernel"):
        torch.func.jvp(lambda key: ptk.attention(**(arguments | {"key": key})), (t(B, H, LK, D),), (t(B, H, LK, D),))
    query = arguments["query"].requires_grad_()
    (grad,) = torch.autograd.grad(ptk.attention(**arguments).sin().sum(), query, create_graph=True)
    with pytest.raises(FallbackError, match=r"double backward has no kernel"):
        grad.sum().backward()
    with ptk.backend("reference"):
        ptk.attention(**arguments)


@pytest.mark.usefixtures("strict")
def test_strict_takes_every_option() -> None:
    mask = t(LQ, LK).requires_grad_()
    options = {"window": (1, None), "softcap": 3.0, "alibi_slopes": t(H), "sinks": t(H), "dropout_p": 0.1}
    ptk.attention(**good(), attn_mask=mask, **options).sum().backward()
    assert mask.grad is not None


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match=r"unknown operator 'atention', expected one of attention"):
        ptk.explain("atention")
