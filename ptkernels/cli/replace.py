"""Show what replace() does to a model: what it changes, and outputs, time and memory before and after.

``--demo`` builds a ResNet-50 (torchvision's where that is installed, otherwise transformers'), a BERT base and an LSTM
tagger, all with random weights, and measures each. ``MODULE:CALLABLE`` names something of yours that returns a model,
and prints the report of a dry run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptkernels import _replace
from ptkernels._replace import effects
from ptkernels._replace.verify import call
from ptkernels.cli import machine
from ptkernels.cli.bench.timing import Clock, interleave
from ptkernels.cli.console import print_table, progress
from ptkernels.cli.files import write_atomically


@dataclass(frozen=True)
class Subject:
    """A model to be replaced: what makes it, what it is called with, and the operators to bring in."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    """The model, and its inputs: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    ops: str


@dataclass(frozen=True)
class Measured:
    """One model before and after. Errors are those of outputs and gradients against the model in float64."""

    model: str
    ops: str
    parameters: int
    replaced: int
    output_difference: float
    """Largest difference of outputs before and after, relative to the largest output before."""
    checked: int
    closest_error: float
    closest_bound: float
    forward_before: float
    forward_after: float
    training_before: float
    training_after: float
    saved_before: int
    """Bytes kept for the backward pass."""
    saved_after: int
    moved_before: int
    """Bytes that operators are given and give back in a forward pass with gradients, in evaluation."""
    moved_after: int


class Tagger(nn.Module):
    """Words to tags by a bidirectional LSTM, written in plain torch."""

    def __init__(self, words: int, features: int, units: int, tags: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, features)
        self.lstm = nn.LSTM(features, units, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * units, tags)

    def forward(self, words: Tensor) -> Tensor:
        tags: Tensor = self.head(self.lstm(self.embedding(words))[0])
        return tags


def _resnet50(small: bool) -> Subject:
    image = torch.randn(2, 3, 64, 64) if small else torch.randn(2, 3, 224, 224)
    try:
        from torchvision.models import resnet50  # type: ignore[import-not-found,import-untyped,unused-ignore]

        width = 8 if small else 64
        return Subject("torchvision ResNet-50", lambda: (resnet50(width_per_group=width), image), "conv_bn_relu")
    except (ImportError, RuntimeError):  # absent, or built for another torch
        from transformers import ResNetConfig, ResNetModel

        narrow = {"embedding_size": 8, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]} if small else {}
        name = "transformers ResNet-50"
        return Subject(name, lambda: (ResNetModel(ResNetConfig(**narrow)), image), "conv_bn_relu")


def _bert(small: bool) -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=1000, **sizes) if small else BertConfig()
    words = torch.randint(0, 1000, (2, 16) if small else (4, 256))
    mask = torch.ones_like(words)
    mask[0, words.size(1) // 2 :] = 0
    return BertModel(config), {"input_ids": words, "attention_mask": mask}


def _tagger(small: bool) -> tuple[nn.Module, Any]:
    return (Tagger(100, 8, 8, 5), torch.randint(0, 100, (2, 6))) if small else (
        Tagger(10000, 256, 256, 20), torch.randint(0, 10000, (16, 64)),
    )  # fmt: skip


def demo_subjects(small: bool) -> list[Subject]:
    """The three models of the demonstration."""
    return [
        _resnet50(small),
        Subject("transformers BERT base", lambda: _bert(small), "attention"),
        Subject("LSTM tagger", lambda: _tagger(small), "packed_rnn"),
    ]


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    returned = call(model, inputs)
    leaves = pytree.tree_leaves(dict(returned) if isinstance(returned, dict) else returned)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _train(model: nn.Module, inputs: Any) -> None:
    model.zero_grad(set_to_none=True)
    torch.stack([output.float().square().mean() for output in _outputs(model, inputs)]).sum().backward()


def measure(subject: Subject, seconds: float, clock: Clock = time.perf_counter) -> Measured:
    """Replace, verify and time a model; ``seconds`` are spent on each of forward and training."""
    torch.manual_seed(0)
    model, inputs = subject.make()
    before = copy.deepcopy(model).eval()
    after = model.eval()
    report = _replace.replace(after, subject.ops, verify=True, example_inputs=inputs)
    pair = {"before": before, "after": after}

    def timed(function: Callable[[nn.Module, Any], object]) -> dict[str, float]:
        return interleave(
            {name: functools.partial(function, one, inputs) for name, one in pair.items()}, seconds, clock
        )

    with torch.no_grad():
        old, new = (_outputs(one, inputs) for one in (before, after))
        # Some heads start as zeros, and so do their outputs.
        largest = [float(b.abs().max()) or 1.0 for b in old]
        difference = max(float((a - b).abs().max()) / c for a, b, c in zip(new, old, largest, strict=True))
        forward = timed(_outputs)
    for one in pair.values():
        one.train()
    training = timed(_train)
    closest = max((item for item in report.verified if item.bound), key=lambda item: item.error / item.bound)
    return Measured(
        subject.name,
        subject.ops,
        sum(parameter.numel() for parameter in model.parameters()),
        len(report.replaced),
        difference,
        len(report.verified),
        closest.error,
        closest.bound,
        forward["before"],
        forward["after"],
        training["before"],
        training["after"],
        effects.count(before, inputs)[None].kept,
        effects.count(after, inputs)[None].kept,
        sum(item.moved_before for item in report.predicted),
        sum(item.moved_after for item in report.predicted),
    )


def table_row(row: Measured) -> list[str]:
    """What the table says of a model, one text for each column of :data:`HEADER`."""

    def times(before: float, after: float) -> str:
        return f"{before * 1e3:.1f} -> {after * 1e3:.1f} ms ({before / after:.2f}x)"

    return [
        row.model,
        row.ops,
        str(row.replaced),
        f"{row.output_difference:.1e}",
        f"{row.checked}, closest {row.closest_error / row.closest_bound:.0%} of its bound",
        times(row.forward_before, row.forward_after),
        times(row.training_before, row.training_after),
        f"{row.saved_before / 2**20:.1f} -> {row.saved_after / 2**20:.1f} MiB",
    ]


HEADER = (
    "model", "operator", "replaced", "outputs differ by", "outputs and gradients against float64", "forward",
    "forward + backward", "kept for backward",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", nargs="?", metavar="MODULE:CALLABLE", help="what returns the model to report on")
    parser.add_argument("--demo", action="store_true", help="replace and measure three models")
    parser.add_argument("--small", action="store_true", help="with --demo: models of a few layers")
    parser.add_argument("--seconds", type=float, default=4.0, help="with --demo: per measurement (default: 4)")
    parser.add_argument("--json", metavar="FILE", help="with --demo: also write the measurements there")
    parser.add_argument("--op", action="append", metavar="NAME", help="with MODULE:CALLABLE: only this operator")


def run(arguments: argparse.Namespace) -> int:
    if arguments.demo == (arguments.factory is not None):
        raise ValueError("got neither or both of --demo and MODULE:CALLABLE, expected one of them")
    if not arguments.demo:
        ops = arguments.op or tuple(name for name in _replace._RULES if name != "quantized_matmul")
        print(_replace.replace(_made_by(arguments.factory), ops, dry_run=True))
        return 0
    subjects = demo_subjects(arguments.small)
    rows = []
    with progress("replace", len(subjects)) as bar:
        for subject in subjects:
            bar.describe(subject.name)
            rows.append(measure(subject, arguments.seconds))
            bar.advance()
    threads = torch.get_num_threads()
    title = f"Before and after replace(), {machine.cpu_model()}, {threads} threads"
    print_table(title, HEADER, [table_row(row) for row in rows])
    if arguments.json:
        about = {
            "cpu": machine.cpu_model(),
            "threads": threads,
            "versions": machine.versions("torchvision", "transformers"),
        }
        content = {"machine": about, "rows": [asdict(row) for row in rows]}
        write_atomically(arguments.json, json.dumps(content, indent=1) + "\n")
    return 0


def _made_by(factory: str) -> nn.Module:
    module, colon, name = factory.partition(":")
    if not colon:
        raise ValueError(f"factory: got {factory!r}, expected MODULE:CALLABLE")
    made = getattr(importlib.import_module(module), name)()
    if not isinstance(made, nn.Module):
        raise TypeError(f"factory: got a {type(made).__name__} from {factory}, expected a torch.nn.Module")
    return made
