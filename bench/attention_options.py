"""What each option of `ptk.attention` costs: beside the same call without it, and beside torch's best way to it.

    python bench/attention_options.py [--quick] [--case NAME] [--option NAME] [--dtype NAME] [--direction NAME]
                                      [--threads N] [--json FILE]

The call with its option, the call without and torch's fastest way run in alternating blocks, each checked against the
float64 reference before. Torch's ways are its fused attention, with all that depends on a pair of query and key in one
mask; flex_attention, which has no backward on CPUs; and the plain composition, eager and compiled. Filters may be
repeated; `--quick` takes short sequences and compiles nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ptkernels._registry import BenchCase, Direction
from ptkernels.cli import files, machine
from ptkernels.cli.bench.gate import PEER_SLACK, Oracle, Part, Verdict
from ptkernels.cli.bench.peers import COMPILE, EAGER, SDPA, compile_peer
from ptkernels.cli.bench.peers.attention import composition, sdpa
from ptkernels.cli.bench.problem import BACKWARD, Contender, Problem, dtype_name
from ptkernels.cli.bench.results import commit_id
from ptkernels.cli.bench.timing import interleave
from ptkernels.ops.attention.options import is_triangle
from ptkernels.ops.attention.reference import pairs_of_blocks
from ptkernels.ops.attention.spec import SPEC

OURS, PLAIN, FLEX = "ptkernels", "plain", "torch-flex"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
BLOCK = 64
SECONDS_PER_CONTENDER, QUICK_SECONDS_PER_CONTENDER = 0.2, 0.04
Kwargs = dict[str, Any]
# As in the operator's bench cases, queries and keys of the same length.
CASES: dict[str, Kwargs] = {
    "bert-base-512": {"B": 8, "Hq": 12, "Hkv": 12, "L": 512, "D": 64, "causal": False},
    "llama3-8b-768": {"B": 1, "Hq": 32, "Hkv": 8, "L": 768, "D": 128, "causal": True},
}
QUICK_CASES: dict[str, Kwargs] = {
    "bert-base-128": {"B": 4, "Hq": 12, "Hkv": 12, "L": 128, "D": 64, "causal": False},
    "llama3-8b-256": {"B": 1, "Hq": 32, "Hkv": 8, "L": 256, "D": 128, "causal": True},
}


@dataclass(frozen=True)
class Drawn:
    """What the arguments of an option are made from."""

    shape: Kwargs
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def length(self) -> int:
        return int(self.shape["L"])

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.dtype)


def bool_mask(drawn: Drawn) -> Kwargs:
    pairs = (drawn.shape["B"], 1, drawn.length, drawn.length)
    # Every row sees itself: torch's answer for a row that sees nothing is NaN.
    return {"attn_mask": (torch.rand(pairs, generator=drawn.generator) < 0.7) | torch.eye(drawn.length).bool()}


def key_padding(drawn: Drawn) -> Kwargs:
    size = (drawn.shape["B"], 1, 1, 1)
    lengths = torch.randint(drawn.length // 2, drawn.length, size, generator=drawn.generator)
    return {"attn_mask": torch.arange(drawn.length) < lengths}


def float_mask(drawn: Drawn) -> Kwargs:
    return {"attn_mask": drawn.normal(1, 1, drawn.length, drawn.length)}


def bias(drawn: Drawn) -> Kwargs:
    return {"attn_mask": drawn.normal(1, drawn.shape["Hq"], drawn.length, drawn.length)}


def window(drawn: Drawn) -> Kwargs:
    reach = drawn.length // 8
    return {"window": (reach, None if drawn.shape["causal"] else reach)}


def alibi(drawn: Drawn) -> Kwargs:
    return {"alibi_slopes": torch.logspace(-8 / drawn.shape["Hq"], -8, drawn.shape["Hq"], base=2.0)}


def sinks(drawn: Drawn) -> Kwargs:
    return {"sinks": drawn.normal(drawn.shape["Hq"])}


def relative_bias(drawn: Drawn) -> Kwargs:
    return {"relative_bias": drawn.normal(drawn.shape["Hq"], 2 * drawn.length - 1)}


def block_mask(drawn: Drawn) -> Kwargs:
    """A block sees itself, its neighbours and the first."""
    blocks = torch.arange(drawn.length // BLOCK)
    return {"attn_mask": ((blocks - blocks[:, None]).abs() <= 1) | (blocks == 0), "mask_block_size": BLOCK}


def lower_right(drawn: Drawn) -> Kwargs:
    return {"attn_mask": causal_lower_right(drawn.length // 2, drawn.length)}


@dataclass(frozen=True)
class Option:
    """``make`` gives the arguments that the option adds to a call; ``learned`` are those that get a gradient.

    ``triangle`` says that it stands in place of the model's own causality: the call without it sees all pairs.
    """

    make: Callable[[Drawn], Kwargs]
    learned: tuple[str, ...] = ()
    backward_only: bool = False
    triangle: bool = False
    keys_per_query: int = 1


OPTIONS = {
    "bool mask": Option(bool_mask),
    "key padding": Option(key_padding),
    "float mask": Option(float_mask),
    "bias": Option(bias),
    "bias with gradient": Option(bias, ("attn_mask",), backward_only=True),
    "window": Option(window),
    "softcap": Option(lambda drawn: {"softcap": 50.0}),
    "alibi": Option(alibi),
    "alibi with gradient": Option(alibi, ("alibi_slopes",), backward_only=True),
    "sinks": Option(sinks, ("sinks",)),
    "relative bias": Option(relative_bias, ("relative_bias",)),
    "dropout": Option(lambda drawn: {"dropout_p": 0.1}),
    "block mask": Option(block_mask),
    "is_causal": Option(lambda drawn: {"is_causal": True}, triangle=True),
    "causal lower right": Option(lower_right, triangle=True, keys_per_query=2),
}


def nothing(drawn: Drawn) -> Kwargs:
    return {}


def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the same dropout in every call."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return function(*args, **kwargs)

    return run


SEEDED = dataclasses.replace(SPEC, reference=seeded(SPEC.reference), baseline=seeded(SPEC.baseline))


def problem_of(name: str, dtype: torch.dtype, direction: Direction, option: Option) -> Problem:
    shape = {**CASES, **QUICK_CASES}[name]

    def make(generator: torch.Generator) -> tuple[tuple[Any, ...], Kwargs]:
        drawn = Drawn(shape, dtype, generator)
        lengths = (drawn.length // option.keys_per_query, drawn.length, drawn.length)
        heads = (shape["Hq"], shape["Hkv"], shape["Hkv"])
        operands = tuple(
            drawn.normal(shape["B"], h, length, shape["D"]) for h, length in zip(heads, lengths, strict=True)
        )
        kwargs = {"is_causal": shape["causal"] and not option.triangle, "enable_gqa": shape["Hq"] != shape["Hkv"]}
        kwargs |= option.make(drawn)
        if direction == BACKWARD:
            for tensor in (*operands, *(kwargs[learned] for learned in option.learned)):
                tensor.requires_grad_()
        return operands, kwargs

    # Problems are cut here by heads, not by what they cost: nobody reads how much work they are.
    return Problem(SEEDED, BenchCase(name, name, shape, dtype, direction, make, work_flops=0, work_bytes=0))


def oracle_of(problem: Problem, results: tuple[Tensor, ...]) -> Oracle:
    """Checks the heads that share the first and the last key head.

    Under dropout the first alone: the number of a head says what is dropped, and the last would become the first.
    """
    last = problem.named["key"].shape[1] - 1
    chosen = (0,) if problem.named["dropout_p"] else (0, last)
    return Oracle(problem, [part(problem, kv_head) for kv_head in chosen], results)


def part(problem: Problem, kv_head: int) -> Part:
    """Of all sequences: gradients of what they share are their sums."""
    named = dict(problem.named)
    if is_triangle(named["attn_mask"]):  # holds no data, and does not survive `detach`
        named["attn_mask"] = seen_pairs(named)
    group = named["query"].shape[1] // named["key"].shape[1]

    def select(name: str, tensor: Tensor) -> Tensor:
        count = 1 if name in ("key", "value") else group
        heads = slice(kv_head * count, (kv_head + 1) * count)
        if name in ("alibi_slopes", "sinks", "relative_bias"):
            return tensor[heads]
        shared = name == "attn_mask" and (tensor.dim() < 4 or tensor.shape[1] == 1)
        return tensor if shared else tensor[:, heads]

    def cut(index: int, tensor: Tensor) -> Tensor:
        return select(problem.leaf_names[index - 1] if index > 0 else "query", tensor)

    return Part({name: select(name, item) if isinstance(item, Tensor) else item for name, item in named.items()}, cut)


def band(named: Kwargs) -> tuple[int | None, int | None]:
    """How many keys before and after the one of its own number a row sees; None for all."""
    left, right = named["window"] or (None, None)
    if is_triangle(named["attn_mask"]):
        right = named["key"].shape[2] - named["query"].shape[2]
    return left, 0 if named["is_causal"] else right


def seen_pairs(named: Kwargs) -> Tensor:
    """What a band and a mask of blocks let through, ``[Lq, Lk]``: the pairs that there is work for."""
    queries, keys = named["query"].shape[2], named["key"].shape[2]
    left, right = band(named)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if right is not None:
        seen = seen.tril(right)
    if left is not None:
        seen = seen.triu(-left)
    if named["mask_block_size"] > 1:
        seen = seen & pairs_of_blocks(named["attn_mask"], named["mask_block_size"], queries, keys)
    return seen


def in_one_mask(named: Kwargs) -> Kwargs:
    """The arguments with all that depends on a pair in ``attn_mask``, of two or four dimensions: others are slow."""
    query, key, mask = named["query"], named["key"], named["attn_mask"]
    distances = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
    no_pairs = named["mask_block_size"] > 1 or is_triangle(mask)
    if no_pairs:
        mask = None
    if named["alibi_slopes"] is not None:
        mask = (-named["alibi_slopes"][:, None, None] * distances.abs()).to(query.dtype)[None]
    if named["relative_bias"] is not None:
        # An embedding, as T5 has it: its backward takes less time than that of an index.
        mask = F.embedding(distances + query.shape[2] - 1, named["relative_bias"].t()).permute(2, 0, 1)[None]
    is_causal = named["is_causal"]
    if no_pairs or named["window"] is not None or (is_causal and mask is not None):
        seen, is_causal = seen_pairs(named), False
        if mask is None or mask.dtype == torch.bool:
            mask = seen if mask is None else mask & seen
        else:
            mask = mask.masked_fill(~seen, -math.inf)
    rest = ("query", "key", "value", "dropout_p", "enable_gqa", "softcap", "sinks")
    return {name: named[name] for name in rest} | {"attn_mask": mask, "is_causal": is_causal}


def fused(*, softcap: float, sinks: Tensor | None, **named: Any) -> Tensor:
    """Torch's fused attention, called without the two options that have no place in a mask."""
    return sdpa(**named)


def flex(named: Kwargs) -> Callable[[], Tensor]:
    """What is seen as a mask of blocks, made before the call; what is done to a score as a function of its place."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # all of torch.compile

    queries, keys, size = named["query"].shape[2], named["key"].shape[2], named["mask_block_size"]
    blocks, (left, right) = named["attn_mask"], band(named)
    softcap, slopes, relative = (named[name] for name in ("softcap", "alibi_slopes", "relative_bias"))

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if right is not None:
            seen = seen & (j <= i + right)
        if left is not None:
            seen = seen & (j >= i - left)
        return seen & blocks[i // size, j // size] if size > 1 else seen

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[h] * (j - i).abs()
        return score if relative is None else score + relative[h, j - i + queries - 1]

    changes: Kwargs = {"enable_gqa": named["enable_gqa"]}
    if (left, right, size) != (None, None, 1):
        changes["block_mask"] = create_block_mask(mask_mod, None, None, queries, keys, device="cpu")
    if softcap or slopes is not None or relative is not None:
        changes["score_mod"] = score_mod

    def run() -> Tensor:
        out: Tensor = flex_attention(named["query"], named["key"], named["value"], **changes)
        return out

    return run


def ways_of(problem: Problem, compiling: bool) -> Iterator[str]:
    """Torch's ways to a call, without those that lost wherever they were tried.

    Those are fused attention with a mask that has a gradient, which is the composition then, and the composition where
    fused attention has the option: eager in float32, compiled everywhere.
    """
    named = problem.named
    mask, dropout = named["attn_mask"], bool(named["dropout_p"])
    in_a_mask = not named["softcap"] and named["sinks"] is None
    has_it = in_a_mask and len(problem.leaves) <= 3
    if has_it:
        yield SDPA
    if not has_it or dropout or named["query"].dtype != torch.float32:
        yield EAGER
    if not compiling:
        return
    masks_pairs = mask is not None and named["mask_block_size"] == 1 and not is_triangle(mask)
    by_place = any(named[name] is not None for name in ("window", "alibi_slopes", "relative_bias"))
    by_place |= named["mask_block_size"] > 1 or is_triangle(mask) or named["is_causal"] or bool(named["softcap"])
    if by_place and not (problem.backward or masks_pairs or dropout or named["sinks"] is not None):
        yield FLEX
    elif not has_it or dropout:
        yield COMPILE


def contender_of(way: str, problem: Problem) -> Contender:
    named = problem.named
    if way == FLEX:
        run = flex(named)
    else:
        attend = fused if way == SDPA else composition
        # A mask is made before the clock starts, as models do once for all layers, unless a gradient flows through it.
        through = {"attn_mask", "alibi_slopes", "relative_bias"} & set(problem.leaf_names)
        made = None if through else in_one_mask(named)

        def run() -> Tensor:
            return attend(**(in_one_mask(named) if made is None else made))

    def function(*args: Any, **kwargs: Any) -> Tensor:
        return run()

    if way in (FLEX, COMPILE):
        return compile_peer(function).prepare(problem, torch.get_num_threads())
    return problem.contender(way, function)


@dataclass(frozen=True)
class Checked:
    """A call of ours that has passed its check, and what others are checked against."""

    problem: Problem
    ours: Contender
    oracle: Oracle
    verdict: Verdict


def checked(name: str, dtype: torch.dtype, direction: Direction, option: Option) -> Checked:
    problem = problem_of(name, dtype, direction, option)
    outputs = problem.contender(OURS, seeded(SPEC.function)).outputs()
    oracle = oracle_of(problem, outputs[:1])
    verdict = oracle.check(outputs)
    if not verdict.passed:
        raise AssertionError(f"{name} {dtype} {direction}: {verdict.text}")
    return Checked(problem, problem.contender(OURS, SPEC.function), oracle, verdict)


# What all options of one direction are put beside: without causality, with it, and with half the queries.
checked_once = functools.lru_cache(maxsize=3)(checked)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def torch_contenders(given: Checked, plain: Checked, compiling: bool, notes: list[str]) -> dict[str, Contender]:
    """Torch's ways that pass the check; ``notes`` say what became of the others."""
    passed = {}
    dropout = bool(given.problem.named["dropout_p"])
    # Torch drops other weights than the reference: its ways are checked without dropout.
    judge = plain if dropout else given
    for way in ways_of(given.problem, compiling):
        try:
            contender = contender_of(way, judge.problem)
            verdict = judge.oracle.check(contender.outputs(), PEER_SLACK)
            if verdict.passed:
                if dropout:
                    contender = contender_of(way, given.problem)
                    contender.call()  # which may compile
                passed[way] = contender
            else:
                notes.append(f"{way}: wrong result, {verdict.text}")
        except Exception as error:  # whatever torch raises concerns this way alone
            notes.append(f"{way}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return passed


def measure(
    name: str, dtype: torch.dtype, direction: Direction, title: str, compiling: bool, budget: float
) -> dict[str, Any]:
    option = OPTIONS[title]
    without = Option(nothing, triangle=option.triangle, keys_per_query=option.keys_per_query)
    plain = checked_once(name, dtype, direction, without)
    given = checked(name, dtype, direction, option)
    notes: list[str] = []
    ways = torch_contenders(given, plain, compiling, notes)
    # The check was the first call, and compiled: one more tells.
    trials = {way: seconds(contender.call) for way, contender in ways.items()}
    best = min(trials, key=trials.__getitem__, default=None)
    calls = {OURS: given.ours.call, PLAIN: plain.ours.call}
    if best is not None:
        calls[best] = ways[best].call
    times = interleave(calls, budget * len(calls))
    pairs, of_plain = (int(seen_pairs(one.problem.named).sum()) for one in (given, plain))
    return {
        "case": name,
        "dtype": dtype_name(dtype),
        "direction": direction,
        "option": title,
        "seconds": times[OURS],
        "plain_seconds": times[PLAIN],
        "ratio_to_plain": times[OURS] / times[PLAIN],
        "pairs_of_plain": pairs / of_plain,
        "torch": best,
        "torch_seconds": times[best] if best else None,
        "speedup": times[best] / times[OURS] if best else None,
        "trials": trials,
        "error": given.verdict.error,
        "error_bound": given.verdict.bound,
        "notes": notes,
    }


HEADER = "case           dtype    direction        option                    ms x plain pairs torch ms speedup"


def line(row: dict[str, Any]) -> str:
    ours = "{case:14} {dtype:8} {direction:16} {option:19}".format(**row)
    ours += f" {row['seconds'] * 1e3:8.3f} {row['ratio_to_plain']:7.2f} {row['pairs_of_plain']:5.2f}"
    if row["torch"] is None:
        return f"{ours} {'; '.join(row['notes'])}"
    return f"{ours} {row['torch_seconds'] * 1e3:8.2f} {row['speedup']:6.1f}x {row['torch']}"


def about() -> dict[str, Any]:
    return {
        "cpu": machine.cpu_model(),
        "isa": machine.isa()["active"],
        "threads": torch.get_num_threads(),
        "commit": commit_id(),
        **machine.versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, nothing compiled")
    parser.add_argument("--case", action="append", choices=[*CASES, *QUICK_CASES])
    parser.add_argument("--option", action="append", choices=list(OPTIONS))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--direction", action="append", choices=DIRECTIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    plan = itertools.product(
        chosen.case or (QUICK_CASES if chosen.quick else CASES),
        chosen.dtype or DTYPES,
        chosen.direction or DIRECTIONS,
        chosen.option or OPTIONS,
    )
    budget = QUICK_SECONDS_PER_CONTENDER if chosen.quick else SECONDS_PER_CONTENDER
    rows = []
    print(HEADER)
    for name, dtype, direction, title in plan:
        if direction == BACKWARD or not OPTIONS[title].backward_only:
            rows.append(measure(name, DTYPES[dtype], direction, title, not chosen.quick, budget))
            print(line(rows[-1]), flush=True)
    if chosen.json:
        files.write_atomically(chosen.json, json.dumps({"machine": about(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
