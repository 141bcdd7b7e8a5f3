"""Attention's peers: the eager composition, ONNX Runtime's fastest form, OpenVINO's fused operator."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptkernels.cli.bench.gate import Part
from ptkernels.cli.bench.limits import available_memory
from ptkernels.cli.bench.problem import Contender, Peer, Problem, UnsupportedError
from ptkernels.ops.attention.reference import pairs_of_blocks

from . import EAGER, SDPA, compile_peer, torch_peer
from .engines import OnnxSession, OpenVinoRequest, onnx_type, openvino_type


def composition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention as models wrote it before there were fused operators: two products with a softmax between."""
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's fused attention, with nothing around it that would cost time."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def peers() -> list[Peer]:
    found = [
        torch_peer(SDPA, sdpa),
        _holding_scores(torch_peer(EAGER, composition)),
        _holding_scores(compile_peer(composition)),
        _holding_scores(Peer("onnxruntime", _onnxruntime_version, _onnxruntime)),
        Peer("openvino", _openvino_version, _openvino),
    ]
    return [_with_mask_of_pairs(peer) for peer in found]


def _with_mask_of_pairs(peer: Peer) -> Peer:
    """A peer that knows no masks of blocks: it gets one of pairs, made before the clock starts."""

    def prepare(problem: Problem, threads: int) -> Contender:
        size = problem.named["mask_block_size"]
        if size != 1:
            mask = pairs_of_blocks(
                problem.named["attn_mask"], size, problem.named["query"].shape[2], problem.named["key"].shape[2]
            )
            problem = copy.copy(problem)
            problem.kwargs = {**problem.kwargs, "attn_mask": mask}
            del problem.kwargs["mask_block_size"]
            problem.named = {**problem.named, "attn_mask": mask, "mask_block_size": 1}
        return peer.prepare(problem, threads)

    return dataclasses.replace(peer, prepare=prepare)


def _holding_scores(peer: Peer) -> Peer:
    """A peer that stores all scores: it is left out where they might not fit into memory."""

    def prepare(problem: Problem, threads: int) -> Contender:
        batch, heads, length = problem.named["query"].shape[:3]
        copies = 8 if problem.backward else 4
        needed = copies * batch * heads * length * problem.named["key"].shape[2] * 4
        free = available_memory()
        if free is not None and needed > free:
            raise UnsupportedError(f"its scores take about {needed >> 20} MiB, {free >> 20} MiB are free")
        return peer.prepare(problem, threads)

    return dataclasses.replace(peer, prepare=prepare)


def parts(problem: Problem, flops: float) -> list[Part]:
    """Whole groups of heads (all query heads that share a key head): as many, evenly spread, as ``flops`` allow."""
    named = problem.named
    batches, kv_heads = named["key"].shape[:2]
    group = named["query"].shape[1] // max(kv_heads, 1)
    count = batches * kv_heads
    checked = min(count, max(2, int(count * flops / max(problem.case.work_flops, 1))))
    if checked >= count:
        return [Part(named, lambda index, tensor: tensor)]
    chosen = sorted({round(i * (count - 1) / (checked - 1)) for i in range(checked)})
    return [_part(named, index // kv_heads, index % kv_heads, group, problem.leaf_names) for index in chosen]


def _part(named: dict[str, Any], batch: int, kv_head: int, group: int, leaf_names: tuple[str, ...]) -> Part:
    heads = {name: slice(kv_head, kv_head + 1) for name in ("key", "value")}
    heads["query"] = slice(kv_head * group, (kv_head + 1) * group)

    def cut(index: int, tensor: Tensor) -> Tensor:
        name = leaf_names[index - 1] if index > 0 else "query"
        return tensor[batch : batch + 1, heads[name]]

    smaller = dict(named)
    for name, selected in heads.items():
        smaller[name] = named[name][batch : batch + 1, selected]
    if named["attn_mask"] is not None:
        mask = named["attn_mask"]
        mask = mask[(None,) * (4 - mask.dim())]
        smaller["attn_mask"] = mask[
            batch : batch + 1 if mask.shape[0] > 1 else slice(None),
            heads["query"] if mask.shape[1] > 1 else slice(None),
        ]
    return Part(smaller, cut)


def _scale(named: dict[str, Any]) -> float:
    scale = named["scale"]
    return 1 / math.sqrt(named["query"].shape[-1]) if scale is None else float(scale)


def _require_inference(problem: Problem) -> None:
    problem.require_forward()
    if problem.named["dropout_p"] > 0:
        raise UnsupportedError("no dropout at inference")
    if problem.named.get("return_lse"):
        raise UnsupportedError("does not return the log-sum-exp")


def _fold_groups(named: dict[str, Any]) -> Tensor:
    """The query with the heads that share a key head as further rows of it, where no mask tells the rows apart."""
    query: Tensor = named["query"]
    kv_heads = named["key"].shape[1]
    if query.shape[1] == kv_heads or named["is_causal"] or named["attn_mask"] is not None:
        return query
    folded: Tensor = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    return folded


def _onnxruntime_version() -> str:
    import onnx  # noqa: F401  the graphs are built with it
    import onnxruntime

    return str(onnxruntime.__version__)


def _onnxruntime(problem: Problem, threads: int) -> Contender:
    """The fastest of the ways to write attention for ONNX Runtime, by a short trial."""
    _require_inference(problem)
    if problem.case.dtype == torch.bfloat16:
        raise UnsupportedError("no bfloat16 kernels on the CPU")
    best: tuple[float, str, OnnxSession, Callable[[Tensor], Tensor]] | None = None
    reason = "no form of attention fits the case"
    for name, build in (("Attention", _onnx_attention), ("MultiHeadAttention", _onnx_mha), ("MatMul", _onnx_matmul)):
        try:
            session, restore = build(problem, threads)
            session.run()
        except UnsupportedError as error:
            reason = str(error)
            continue
        seconds = min(_timed(session.run) for _ in range(3))
        if best is None or seconds < best[0]:
            best = (seconds, name, session, restore)
    if best is None:
        raise UnsupportedError(reason)
    _, name, session, restore = best

    def outputs() -> tuple[Tensor, ...]:
        session.run()
        return (restore(session.output()),)

    return Contender("onnxruntime", session.run, outputs, name)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _onnx_graph(
    nodes: list[Any], inputs: dict[str, Tensor], shape: list[int], constants: list[Any] | None = None
) -> Any:
    from onnx import helper

    dtype = next(iter(inputs.values())).dtype
    return helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, onnx_type(t.dtype), list(t.shape)) for name, t in inputs.items()],
        [helper.make_tensor_value_info("out", onnx_type(dtype), shape)],
        constants or [],
    )


def _mask_input(named: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    mask = named["attn_mask"]
    if mask is not None:
        if mask.dtype not in (torch.bool, named["query"].dtype):
            mask = mask.to(named["query"].dtype)
        yield "mask", mask[(None,) * (4 - mask.dim())]


def _onnx_attention(problem: Problem, threads: int) -> tuple[OnnxSession, Callable[[Tensor], Tensor]]:
    """The standard's own Attention operator; grouped heads follow from the shapes."""
    from onnx import helper

    named = problem.named
    inputs = {"q": named["query"], "k": named["key"], "v": named["value"], **dict(_mask_input(named))}
    if "mask" in inputs:
        inputs["mask"] = inputs["mask"].expand(-1, -1, named["query"].shape[2], named["key"].shape[2])
    node = helper.make_node("Attention", list(inputs), ["out"], is_causal=int(named["is_causal"]), scale=_scale(named))
    shape = [*named["query"].shape[:3], named["value"].shape[3]]
    return OnnxSession(_onnx_graph([node], inputs, shape), {"": 23}, inputs, threads), lambda out: out


def _onnx_mha(problem: Problem, threads: int) -> tuple[OnnxSession, Callable[[Tensor], Tensor]]:
    """Microsoft's contributed operator on ``[B, L, H * D]``, with its flash-attention path for float32."""
    from onnx import helper

    named = problem.named
    query, key, value = named["query"], named["key"], named["value"]
    if query.shape[1] != key.shape[1] or named["attn_mask"] is not None:
        raise UnsupportedError("MultiHeadAttention takes neither grouped heads nor this mask")
    if named["is_causal"] and query.shape[2] != key.shape[2]:
        raise UnsupportedError("MultiHeadAttention aligns the causal mask to the bottom right")
    inputs = {name: t.transpose(1, 2).flatten(2) for name, t in (("q", query), ("k", key), ("v", value))}
    heads = query.shape[1]
    node = helper.make_node(
        "MultiHeadAttention",
        list(inputs),
        ["out"],
        domain="com.microsoft",
        num_heads=heads,
        unidirectional=int(named["is_causal"]),
        scale=_scale(named),
    )
    shape = [query.shape[0], query.shape[2], heads * value.shape[3]]
    session = OnnxSession(_onnx_graph([node], inputs, shape), {"": 17, "com.microsoft": 1}, inputs, threads)
    return session, lambda out: out.unflatten(-1, (heads, -1)).transpose(1, 2)


def _onnx_matmul(problem: Problem, threads: int) -> tuple[OnnxSession, Callable[[Tensor], Tensor]]:
    """Two products with a softmax between: the form every exporter could always write."""
    from onnx import helper

    named = problem.named
    query, key, value = _fold_groups(named), named["key"], named["value"]
    if query.shape[1] != key.shape[1]:
        raise UnsupportedError("the plain form would have to repeat the grouped heads")
    mask = next((mask for _, mask in _mask_input(named)), None)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if named["is_causal"]:
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        causal = torch.zeros(future.shape, dtype=query.dtype).masked_fill(future, torch.finfo(query.dtype).min)
        mask = causal[None, None] if mask is None else mask + causal
    # The scale is folded into the query and the key is stored transposed: neither is charged to the engine.
    inputs = {"q": query.detach() * _scale(named), "k": key.transpose(-2, -1), "v": value}
    nodes = [helper.make_node("MatMul", ["q", "k"], ["products"])]
    if mask is not None:
        inputs["mask"] = mask
        nodes.append(helper.make_node("Add", ["products", "mask"], ["scores"]))
    nodes.append(helper.make_node("Softmax", [nodes[-1].output[0]], ["weights"], axis=-1))
    nodes.append(helper.make_node("MatMul", ["weights", "v"], ["out"]))
    shape = [*query.shape[:3], value.shape[3]]
    session = OnnxSession(_onnx_graph(nodes, inputs, shape), {"": 17}, inputs, threads)
    return session, lambda out: out.reshape(*named["query"].shape[:3], value.shape[3])


def _openvino_version() -> str:
    import openvino

    return str(openvino.__version__).split("-")[0]


def _openvino(problem: Problem, threads: int) -> Contender:
    """OpenVINO's fused operator; grouped heads that cannot be folded are broadcast, as in exported models."""
    _require_inference(problem)
    import openvino
    from openvino import opset13 as ops

    named = problem.named
    inputs = {"query": _fold_groups(named), "key": named["key"], "value": named["value"]}
    mask, causal = _openvino_mask(named)
    if mask is not None:
        inputs["mask"] = mask
    parameters = {name: ops.parameter(list(t.shape), openvino_type(t.dtype), name=name) for name, t in inputs.items()}
    heads, kv_heads = inputs["query"].shape[1], named["key"].shape[1]
    nodes: dict[str, Any] = dict(parameters)
    if heads != kv_heads:
        for name in ("key", "value"):
            nodes[name] = _repeat_heads(nodes[name], list(named[name].shape), heads // kv_heads)
    extra = [nodes["mask"]] if mask is not None else []
    if named["scale"] is not None:
        dtype = openvino_type(problem.case.dtype)
        extra = [*(extra or [ops.constant(0.0, dtype)]), ops.constant(float(named["scale"]), dtype)]
    out = ops.scaled_dot_product_attention(nodes["query"], nodes["key"], nodes["value"], *extra, causal=causal)
    model = openvino.Model([out], list(parameters.values()), "attention")
    request = OpenVinoRequest(model, list(inputs.values()), problem.case.dtype, threads)

    def outputs() -> tuple[Tensor, ...]:
        request.run()
        return (request.output().reshape(*named["query"].shape[:3], named["value"].shape[3]),)

    return Contender("openvino", request.run, outputs, "ScaledDotProductAttention")


def _openvino_mask(named: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """The mask to pass and whether to ask for the causal one: OpenVINO ignores a mask beside its causal flag."""
    mask = next((mask for _, mask in _mask_input(named)), None)
    if mask is None or not named["is_causal"]:
        return mask, bool(named["is_causal"])
    future = torch.ones(named["query"].shape[2], named["key"].shape[2], dtype=torch.bool).triu(1)
    return (mask & ~future if mask.dtype == torch.bool else mask.masked_fill(future, -math.inf)), False


def _repeat_heads(node: Any, shape: list[int], times: int) -> Any:
    from openvino import opset13 as ops

    batch, heads, length, dim = shape
    grouped = ops.unsqueeze(node, [2])
    repeated = ops.broadcast(grouped, [batch, heads, times, length, dim])
    return ops.reshape(repeated, [batch, heads * times, length, dim], False)
