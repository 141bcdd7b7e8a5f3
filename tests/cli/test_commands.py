"""``ptkernels env``, ``gradcheck`` and ``explain``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ptkernels import _registry, reference
from ptkernels.cli import gradcheck, main


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ptkernels", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=tiny.environment(**environment),
    )


def test_env_json_says_what_runs_here() -> None:
    done = command("env", "--json", PTKERNELS_MAX_ISA="baseline", PTKERNELS_STRICT="1")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["versions"]["torch"] == torch.__version__
    assert content["settings"].items() >= {"PTKERNELS_MAX_ISA": "baseline", "PTKERNELS_STRICT": True}.items()
    assert content["isa"]["cap"] == "baseline"
    if content["build"]:
        assert content["isa"]["active"] == "baseline"
    libraries = {library["name"]: library for library in content["libraries"]}
    assert libraries["libptkernels.so"]["loaded"]
    assert libraries["libptkernels_cuda.so"]["reason"]
    assert set(content["ops"]) == set(_registry.all_ops())
    assert all(kernels for kernels in content["ops"].values())


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_env_text(rich: bool) -> None:
    hide = "" if rich else "sys.modules['rich'] = None; "
    code = f"import sys; {hide}from ptkernels.cli import main; sys.exit(main(['env']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=tiny.environment()
    )
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert "libptkernels_cuda.so" in done.stdout
    assert "reference" in done.stdout


def test_env_refuses_a_bad_setting() -> None:
    done = command("env", PTKERNELS_MAX_ISA="avx9")
    assert done.returncode != 0
    assert "PTKERNELS_MAX_ISA: got 'avx9'" in done.stderr


def some_samples(*arguments: Any) -> list[_registry.Sample]:
    return list(SAMPLES(*arguments))[:2]


SAMPLES = _registry.get("attention").samples


@pytest.mark.filterwarnings("ignore::ptkernels.errors.FallbackWarning")
def test_gradcheck_passes_and_writes_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "outcomes.json"
    with tiny.replaced(samples=some_samples):
        assert main(["gradcheck", "--op", "attention", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["passed"]
    assert [(one["check"], one["passed"]) for one in content["outcomes"]] == [
        ("gradcheck", True),
        ("gradgradcheck", True),
    ] * 2
    assert "4 passed, 0 failed" in capsys.readouterr().out


def test_gradcheck_names_a_broken_backward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return reference.attention(query, key, WrongBackward.apply(value), **options)

    path = tmp_path / "outcomes.json"
    with tiny.replaced(samples=some_samples, function=function):
        assert main(["gradcheck", "--json", str(path)]) == 1
    failed = [one for one in json.loads(path.read_text())["outcomes"] if not one["passed"]]
    assert {(one["sample"], one["check"]) for one in failed} >= {("plain", "gradcheck"), ("causal", "gradcheck")}
    assert all("\n" not in one["message"] for one in failed)
    error = capsys.readouterr().err
    assert "FAILED attention plain gradcheck: GradcheckError: Jacobian mismatch" in error


def test_gradcheck_without_samples_is_not_a_success() -> None:
    with tiny.replaced(samples=lambda *arguments: iter(())):
        assert main(["gradcheck"]) == 1


def test_gradcheck_reports_an_operator_that_raises() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("nothing works")

    with tiny.replaced(function=function):
        spec = _registry.get("attention")
        outcome = gradcheck.attempt(spec, gradcheck.samples_of(spec)[0], "gradcheck", fast=True)
    assert not outcome.passed
    assert outcome.message == "RuntimeError: nothing works"


def test_explain_prints_what_the_function_says(capsys: pytest.CaptureFixture[str]) -> None:
    import ptkernels as ptk

    arguments = [
        "explain",
        "attention",
        "--shape",
        "1,8,64,32",
        "--shape",
        "key=1,2,48,32",
        "--shape",
        "value=1,2,48,32",
    ]
    arguments += ["--dtype", "bfloat16", "--causal", "--set", "enable_gqa=true", "--shape", "attn_mask=64,48:bool"]
    query = torch.empty(1, 8, 64, 32, dtype=torch.bfloat16)
    key = torch.empty(1, 2, 48, 32, dtype=torch.bfloat16)
    mask = torch.empty(64, 48, dtype=torch.bool)
    expected = ptk.explain("attention", query, key, key, attn_mask=mask, is_causal=True, enable_gqa=True)
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(expected)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel"] == expected.kernel


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing", "--shape", "1"], "unknown operator 'nothing'"),
        (["attention", "--shape", "query=1,2,3,4"], "key needs a shape"),
        (["attention", "--shape", "1,2,3,4", "--set", "causal=true"], "no argument causal"),
        (["attention", "--shape", "1,x"], "shape: got '1,x'"),
        (["attention", "--shape", "1,2,3,4", "--dtype", "float33"], "dtype: got 'float33'"),
        (["attention", "--shape", "1,2,3,4", "--set", "scale"], "set: got 'scale'"),
        (["attention", "--shape", "1,2,3,4", "--shape", "key=1,3,3,4"], "attention: "),
    ],
)
def test_explain_refuses(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("env", "bench", "gradcheck", "explain"))
