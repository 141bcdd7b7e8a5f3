"""``ptkernels bench``: what it writes, what it refuses to time, and how it stops."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ptkernels import _registry, reference
from ptkernels.cli import main
from ptkernels.cli.bench import peers, pretrained, results, runner
from ptkernels.cli.bench.gate import Oracle
from ptkernels.cli.bench.peers import attention as attention_peers
from ptkernels.cli.bench.peers import peers_of
from ptkernels.cli.bench.problem import Problem, UnsupportedError
from ptkernels.ops.attention.spec import _bench_case

pytest.importorskip("rich")

SCRIPT = Path(tiny.__file__)
ENGINES = ("onnxruntime", "openvino")


def run_bench(*arguments: str) -> int:
    return main(["bench", "--quick", "--case", "tiny", *arguments])


def read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def wrong(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return reference.attention(query, key, value, **options) * 1.1


def test_json_has_the_documented_form(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, html = tmp_path / "run.json", tmp_path / "run.html"
    with tiny.replaced():
        assert run_bench("--peers", "torch-sdpa,torch-eager", "--json", str(path), "--html", str(html)) == 0
    content = read(path)
    assert set(content) == {"machine", "commit", "rows", "model", "notes", "status"}
    assert content["status"] == "complete"
    assert {"cpu", "cores", "threads", "isa", "versions", "limits"} <= set(content["machine"])
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert content["machine"]["limits"]["unknown"] == {}
    assert len(content["rows"]) == len(tiny.cases())
    for row in content["rows"]:
        assert tuple(row) == results.ROW_KEYS
        assert set(row["peers"]) == {"torch-sdpa", "torch-eager"}
        assert row["best_peer"] == min(row["peers"], key=row["peers"].get)
        assert row["ratio"] == pytest.approx(row["peers"][row["best_peer"]] / row["seconds"])
        assert 0 <= row["error"] <= row["error_bound"]
        assert row["limit_fraction"] > 0
    page = html.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert all(row["case"] in page for row in content["rows"])
    # Self-contained: nothing is loaded from anywhere (xmlns attributes are names, not addresses).
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href", "xlink:href"))
    assert "@import" not in page


def test_quick_takes_the_smallest_case_of_every_model() -> None:
    case = tiny.cases()[0]
    larger = type(case)(**{**vars(case), "name": "larger", "work_flops": case.work_flops + 1})
    from ptkernels.cli.bench.runner import quick_cases

    assert quick_cases([larger, case]) == [case]


def test_means_are_per_dtype_and_direction() -> None:
    from ptkernels.cli.bench.report import mean_lines

    names = dict.fromkeys(results.ROW_KEYS)
    rows = [
        results.Row(**{**names, "dtype": dtype, "direction": "forward", "ratio": ratio})
        for dtype, ratio in (("float32", 1.0), ("float32", 4.0), ("bfloat16", 0.5), ("bfloat16", None))
    ]
    assert mean_lines(rows) == [
        "float32 forward: 2.00 times the best peer's speed (geometric mean of 2; least 1.00)",
        "bfloat16 forward: 0.50 times the best peer's speed (geometric mean of 1; least 0.50)",
    ]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (wrong, "does not agree with the float64 reference"),
        (lambda query, key, value, **options: torch.full_like(query, torch.nan), "does not agree"),
        (lambda query, key, value, **options: query.new_zeros(1, 1, 1, 1), "got shape"),
    ],
    ids=["scaled", "nan", "shape"],
)
def test_a_wrong_kernel_is_not_timed(function: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with tiny.replaced(function=function):
        assert run_bench("--direction", "forward", "--peers", "torch-sdpa", "--json", str(path)) == 1
    content = read(path)
    assert len(content["rows"]) == 4
    assert all(row["seconds"] is None and row["ratio"] is None and not row["peers"] for row in content["rows"])
    failures = [note["text"] for note in content["notes"] if note["failure"]]
    assert len(failures) == 4
    assert all(complaint in text for text in failures)


def test_a_wrong_gradient_is_not_timed(tmp_path: Path) -> None:
    class DoubledGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return reference.attention(query, DoubledGradient.apply(key), value, **options)

    path = tmp_path / "run.json"
    with tiny.replaced(function=function):
        assert run_bench("--dtype", "float32", "--peers", "none", "--json", str(path)) == 1
    content = read(path)
    assert {row["direction"] for row in content["rows"] if row["seconds"] is None} == {"forward+backward"}
    assert all("gradient of key" in note["text"] for note in content["notes"] if note["failure"])


def test_a_kernel_that_raises_fails_its_case_only(tmp_path: Path) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if options["is_causal"]:
            raise RuntimeError("no causal here")
        return reference.attention(query, key, value, **options)

    path = tmp_path / "run.json"
    with tiny.replaced(function=function):
        assert run_bench("--direction", "forward", "--peers", "none", "--json", str(path)) == 1
    rows = read(path)["rows"]
    assert {row["case"]: row["seconds"] is None for row in rows} == {"tiny-full": False, "tiny-causal": True}


def test_a_wrong_peer_is_noted_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    monkeypatch.setattr(attention_peers, "peers", lambda: [peers.torch_peer("bad", wrong)])
    with tiny.replaced():
        assert run_bench("--dtype", "float32", "--direction", "forward", "--json", str(path)) == 0
    content = read(path)
    assert all(row["seconds"] is not None and row["peers"] == {} for row in content["rows"])
    noted = [note for note in content["notes"] if note["contender"] == "bad"]
    assert len(noted) == 2
    assert all("wrong result" in note["text"] and not note["failure"] for note in noted)


def attention_spec() -> Any:
    from ptkernels._registry import get

    return get("attention")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_checking_parts_sees_every_part(direction: str) -> None:
    case = next(case for case in tiny.cases() if case.direction == direction and case.dtype == torch.float32)
    with tiny.replaced():
        problem = Problem(attention_spec(), case)
        outputs = problem.contender("ours", reference.attention).outputs()
        # Cheap enough for two of the four groups of heads: the first and the last.
        parts = peers.parts_of(problem, case.work_flops / 2)
        assert len(parts) == 2
        oracle = Oracle(problem, parts, outputs[:1])
        assert oracle.check(outputs).passed
        for index, output in enumerate(outputs):
            for corner in ((0, 0), (-1, -1)):
                damaged = [one.clone() for one in outputs]
                damaged[index][corner][0, 0] += 0.1 * (1 + output.abs().max())
                assert not oracle.check(tuple(damaged)).passed


def test_a_peer_that_needs_too_much_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny.replaced():
        spec = attention_spec()
        problem = Problem(spec, tiny.cases()[0])
        eager = next(peer for peer in peers.peers_of(spec) if peer.name == peers.EAGER)
        scores = 2 * tiny.HEADS * tiny.LENGTH**2 * 4
        monkeypatch.setattr(attention_peers, "available_memory", lambda: 4 * scores)
        eager.prepare(problem, 1)
        monkeypatch.setattr(attention_peers, "available_memory", lambda: 4 * scores - 1)
        with pytest.raises(UnsupportedError, match="MiB are free"):
            eager.prepare(problem, 1)


def test_a_case_that_needs_too_much_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    monkeypatch.setattr(runner, "available_memory", lambda: 4 * tiny.cases()[0].work_bytes - 1)
    with tiny.replaced():
        assert run_bench("--direction", "forward", "--peers", "none", "--json", str(path)) == 0
    content = read(path)
    assert {row["dtype"] for row in content["rows"]} == {"bfloat16"}
    assert all(note["text"].startswith("skipped: needs about") for note in content["notes"])


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with tiny.replaced():
        assert run_bench("--peers", "nobody") == 2
        assert run_bench("--op", "nothing") == 2
        assert run_bench("--dtype", "float3") == 2
    message = capsys.readouterr().err
    assert "'nobody'" in message
    assert "'nothing'" in message
    assert "'float3'" in message


def test_nothing_selected_is_an_error() -> None:
    with tiny.replaced():
        assert main(["bench", "--quick", "--case", "no-such-case"]) == 2


def test_missing_rich_says_what_to_install() -> None:
    code = "import sys; sys.modules['rich'] = None; from ptkernels.cli import main; sys.exit(main(['bench']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=tiny.environment()
    )
    assert done.returncode == 2
    assert "pip install ptkernels[bench]" in done.stderr


def test_missing_peers_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    for name in ENGINES:
        monkeypatch.setitem(sys.modules, name, None)
    with tiny.replaced():
        arguments = ("--dtype", "float32", "--direction", "forward", "--peers", ",".join(ENGINES))
        assert run_bench(*arguments, "--json", str(path)) == 0
    noted = {(note["contender"], note["text"]) for note in read(path)["notes"]}
    assert noted == {(name, f"{name} is not installed (pip install ptkernels[bench])") for name in ENGINES}


def test_interrupting_leaves_valid_partial_results(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    command = [sys.executable, str(SCRIPT), "bench", "--peers", "none", "--case", "tiny", "--json", str(path)]
    # Long enough that the signal arrives before the last case, however busy the machine is.
    environment = tiny.environment(**{tiny.PAUSE: "1"})
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # A shell starts what it puts in the background with the signal ignored, and all that comes of it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not path.exists():
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130
    content = read(path)
    assert content["status"] == "interrupted"
    assert 1 <= len(content["rows"]) < len(tiny.cases())
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptkernels.cli.files import write_atomically

    path = tmp_path / "run.json"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_compare_and_page_read_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    with tiny.replaced():
        assert run_bench("--dtype", "float32", "--peers", "none", "--json", str(before)) == 0
    content = read(before)
    for row in content["rows"]:
        row["seconds"] /= 4
    after.write_text(json.dumps(content))
    page = tmp_path / "compared.html"
    assert main(["bench", "compare", str(before), str(after), "--html", str(page)]) == 0
    assert "geometric mean: 4.00 times faster over 4 cases" in capsys.readouterr().out
    assert "<svg" in page.read_text()
    assert main(["bench", "page", str(before), str(page)]) == 0
    assert "tiny-full" in page.read_text()
    after.write_text('{"rows": 3}')
    assert main(["bench", "compare", str(before), str(after)]) == 2


def test_the_model_section_is_in_results_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    spec = attention_spec()
    row = results.Row(
        "attention", "sentences", {}, "float32", "forward", "cpu", "k", seconds=1.0, peers={"torch-sdpa": 2}
    )
    section = results.ModelRun(
        "model", "package", "float32", "k", 3, 30, {"ptkernels": 1.0, "torch-sdpa": 2.0}, 1e-7, 1e-7, 2e-7, 0
    )
    monkeypatch.setattr(pretrained, "run", lambda *arguments: (section, row))
    path, html = tmp_path / "run.json", tmp_path / "run.html"
    with tiny.replaced():
        assert spec.name == "attention"
        arguments = [
            "bench",
            "--quick",
            "--dtype",
            "float32",
            "--peers",
            "none",
            "--json",
            str(path),
            "--html",
            str(html),
        ]
        assert main(arguments) == 0
    content = read(path)
    assert content["model"]["seconds"] == section.seconds
    assert content["rows"][-1]["case"] == "sentences"
    assert "nearest neighbours changed: 0 of 3" in html.read_text()


def test_scaling_has_a_row_per_length_and_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, page = tmp_path / "run.json", tmp_path / "run.html"
    arguments = ["--dtype", "float32", "--direction", "forward", "--json", str(path), "--html", str(page)]
    threads = torch.get_num_threads()
    assert main(["bench", *arguments, "scaling", "--longest", "256", "--thread-counts", "1", "2"]) == 0
    assert torch.get_num_threads() == threads
    rows = read(path)["rows"]
    assert [(row["shape"]["Lq"], row["shape"]["threads"]) for row in rows] == [(128, 1), (256, 1), (128, 2), (256, 2)]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and list(row["peers"]) == ["torch-sdpa"] for row in rows)
    assert "Time over length" in page.read_text()
    assert "doubling-256" in capsys.readouterr().out


def test_a_mask_of_blocks_is_a_mask_of_pairs_to_peers() -> None:
    """Hidden blocks are neither counted as work nor seen by a peer that knows only pairs."""
    spec = _registry.get("attention")
    case = next(c for c in spec.bench_cases() if c.name == "longformer-4096" and c.direction == "forward")
    shape = {**case.shape, "Hq": 1, "Hkv": 1, "Lq": 640, "Lk": 640}
    small = _bench_case("small", "Longformer", shape, torch.float32, "forward")
    problem = Problem(spec, small)
    seen = int(problem.named["attn_mask"].sum()) * 64 * 64
    assert small.work_flops == 4 * 64 * seen < 4 * 64 * 640 * 640
    ours = problem.contender("ours", spec.function).outputs()[0]
    for peer in peers_of(spec)[:2]:
        torch.testing.assert_close(peer.prepare(problem, 1).outputs()[0], ours, rtol=1e-4, atol=1e-4)
    assert problem.named["mask_block_size"] == 64
