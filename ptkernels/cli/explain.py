"""Say which kernel a call would run, why, and what would make it faster.

For example ``ptkernels explain attention --shape 1,16,2048,128 --dtype bfloat16 --causal``. A shape without a name goes
to every required tensor argument; ``--shape key=1,8,2048,128`` overrides one of them or adds an optional one.
"""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import asdict
from typing import Any

import torch

from ptkernels import _registry
from ptkernels._registry import OpSpec
from ptkernels.cli.arguments import parse_dtype, parse_setting, parse_shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("op", metavar="OP", help="name of the operator")
    parser.add_argument("--shape", action="append", required=True, metavar="[NAME=]N,N,...[:DTYPE]")
    parser.add_argument("--dtype", default="float32", help="of the tensors (default: float32)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--causal", action="store_true", help="the same as --set is_causal=true")
    parser.add_argument("--grad", action="store_true", help="the required tensor arguments require grad")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other argument")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def call_arguments(spec: OpSpec, arguments: argparse.Namespace) -> dict[str, Any]:
    """The operator's arguments by name, with uninitialised tensors of the shapes asked for.

    Raises:
        ValueError: a name is not an argument of the operator, or a required one has no shape.
    """
    parameters = inspect.signature(spec.function).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    tensors: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for name, shape, dtype in map(parse_shape, arguments.shape):
        tensors.update(dict.fromkeys(required if name is None else [name], (shape, dtype)))
    values: dict[str, Any] = dict(map(parse_setting, arguments.set))
    if arguments.causal:
        values["is_causal"] = True
    unknown = [name for name in (*tensors, *values) if name not in parameters]
    if unknown:
        raise ValueError(f"{spec.name} has no argument {unknown[0]}, expected one of {', '.join(parameters)}")
    missing = [name for name in required if name not in tensors and name not in values]
    if missing:
        raise ValueError(f"{spec.name}: {missing[0]} needs a shape: --shape {missing[0]}=N,N,...")
    for name, (shape, dtype) in tensors.items():
        values[name] = torch.empty(
            shape,
            dtype=parse_dtype(dtype or arguments.dtype),
            device=arguments.device,
            requires_grad=arguments.grad and name in required,
        )
    return values


def run(arguments: argparse.Namespace) -> int:
    spec = _registry.get(arguments.op)
    explanation = spec.explain(**call_arguments(spec, arguments))
    print(json.dumps(asdict(explanation), indent=1) if arguments.json else explanation)
    return 0
