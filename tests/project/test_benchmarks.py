# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the loss head and of growth run at toy sizes; their numbers are not tests, their errors are."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opsd.losses import projection, tiles

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.1), ("pure-bfloat16", 0.1)])
def test_every_contender_has_a_row_and_its_gradient_is_that_of_float64(load, tmp_path, capsys, dtype, bound):
    benchmark = load("loss_head")
    output = tmp_path / "results" / "rows.jsonl"
    arguments = ["--shapes", "8x16x64", "--head", "frozen", "trained", "--repeats", "1", "--device", "cpu"]
    benchmark.main([*arguments, "--dtype", dtype, "--output", str(output)])
    rows = {(row["what"], row["backend"], row["head"]): row for row in read(output)}
    assert len(rows) == len(benchmark.CASES) * len(benchmark.CONTENDERS) * 2  # the floor, but nothing compiled
    for (what, backend, _), row in rows.items():
        if row["note"] is not None:
            assert backend == "liger" or row["note"] == benchmark.CASES[what].lack
            assert row["median_s"] is None
        else:
            assert row["median_s"] > 0 and row["tokens_per_s"] > 0
            assert (row["loss_error"] is None) == (backend == "floor")
    with_loss = [row for row in rows.values() if row["loss_error"] is not None]
    assert dtype != "float32" or all(row["gradient_error"] < bound for row in with_loss)  # all of 64 tokens are top-100
    ours = [row for row in with_loss if row["backend"] == "ours"]
    assert len(ours) == 2 * len(benchmark.CASES)
    assert all(row["note"] is None for row in ours)
    # A log-ratio of the sampled token has no bound, and what bfloat16 rounds of it grows with its size.
    ours = [row for row in ours if dtype == "float32" or row["what"] not in benchmark.METHODS]
    assert all(row["loss_error"] < bound for row in ours)
    # A clipped term has no gradient: next to the bound, rounding decides.
    assert all(row["gradient_error"] < bound for row in ours if dtype == "float32" or "clip" not in row["what"])
    printed = capsys.readouterr().out
    for words in (
        "| floor s | floor GFLOP/s |",
        "ours / floor",
        "chunked / ours",
        "MB ours / chunked",
        "OGLS-SD / OPSD: ",
    ):
        assert words in printed


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.02), ("pure-bfloat16", 0.02)])
def test_with_the_products_of_a_gpu_the_gradient_is_that_of_float64_up_to_rounding(load, tmp_path, dtype, bound):
    output = tmp_path / "rows.jsonl"
    arguments = [
        "--shapes",
        "32x64x512",
        "--head",
        "trained",
        "--backends",
        "ours",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    load("loss_head").main([*arguments, "--dtype", dtype, "--narrow-products", "--output", str(output)])
    rows = [row for row in read(output) if row["backend"] == "ours"]
    assert {row["products"] for row in rows} == {"narrow"}
    rows = [row for row in rows if row["what"] not in load("loss_head").METHODS]  # whose log-ratios have no bound
    assert all(row["loss_error"] < bound / 10 for row in rows)
    unclipped = [
        row["gradient_error"] for row in rows if row["what"] in ("forward_kl", "reverse_kl", "jsd", "purified")
    ]
    assert len(unclipped) == 4 and max(unclipped) < bound
    assert dtype == "float32" or min(unclipped) > 1e-4  # the inputs of products were rounded


class Products(TorchDispatchMode):
    """FLOP of the matrix products within it, from their operands' shapes."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_"):
            left, right = args[-2:]
            self.flop += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("what", "trained", "products"),
    [("forward_kl", False, 3), ("forward_kl", True, 4), ("purified", True, 5), ("sampled token", False, 2)],
)
def test_the_floors_flop_are_those_of_the_products_that_it_runs(load, what, trained, products):
    contenders = load("contenders")
    inputs = contenders.Inputs.draw(300, 5, 7, "cpu", torch.float32)  # of two tiles
    with Products() as counted:
        contenders.floor(inputs, contenders.CASES[what], trained)
    assert contenders.floor_flop(contenders.CASES[what], trained, 300, 5, 7) == counted.flop == products * 21_000


def test_the_floors_speed_is_its_flop_over_its_seconds(load):
    speed = load("loss_head")._floor_speed
    assert speed("forward_kl", "frozen", "512x1024x65536", 2.0) == "103"  # 3 products of 68.7 GFLOP in two seconds
    assert speed("forward_kl", "trained", "512x1024x65536", None) == "-"


def test_a_heads_gradient_is_added_up_over_tiles_a_slice_at_a_time(load, monkeypatch):
    contenders, narrow = load("contenders"), load("narrow_products")
    inputs = contenders.Inputs.draw(32, 64, 512, "cpu", torch.bfloat16)
    grads = []
    monkeypatch.setattr(tiles, "TILE_BYTES", {"cpu": 0})
    for tile, rows in ((32, 8192), (10, 100)):
        monkeypatch.setattr(tiles, "MIN_TILE_TOKENS", tile)
        monkeypatch.setattr(projection, "WIDENED_ROWS", rows)
        with narrow.narrow_products():
            case = contenders.CASES["jsd"]
            grads.append(contenders.backpropagate(contenders.ours, inputs, case, True, False))
    assert grads[0].weight.shape == (512, 64)
    torch.testing.assert_close(grads[1].weight, grads[0].weight)  # of two that were rounded to bfloat16
    torch.testing.assert_close(grads[1].hidden, grads[0].hidden)


def test_running_out_of_memory_is_a_row(load, monkeypatch, capsys):
    benchmark = load("loss_head")
    monkeypatch.setitem(benchmark.CONTENDERS, "dense", lambda inputs, case: torch.empty(2**48))
    benchmark.main(["--shapes", "4x8x32", "--what", "jsd", "--repeats", "1", "--device", "cpu", "--no-exact"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    notes = {row["backend"]: row["note"] for row in rows}
    assert notes["dense"] == "out of memory" and notes["ours"] is None
    assert all(row["loss_error"] is None for row in rows)


def test_growth_has_an_exponent_and_a_picture_for_each_curve(load, tmp_path, monkeypatch, capsys):
    benchmark = load("growth")
    monkeypatch.setattr(benchmark, "SIZES", {over: (4, 16) for over in benchmark.SIZES})
    output, picture = tmp_path / "rows.jsonl", tmp_path / "growth.png"
    small = ["--vocabulary", "64", "--positions", "8", "--width", "16", "--context", "8", "--span", "4"]
    small += ["--layers", "1", "--hidden", "64", "--rollouts", "2", "--repeats", "1", "--device", "cpu"]
    benchmark.main([*small, "--output", str(output), "--picture", str(picture)])
    rows = read(output)
    points = benchmark.curves(rows)
    assert {over for over, _ in points} == set(benchmark.SIZES) and len(points) == len(benchmark.SIZES) + 2
    assert all([row["size"] for row in curve] == [4, 8, 16] for curve in points.values())
    assert all(math.isfinite(benchmark.exponent(curve, "median_s")) for curve in points.values())
    assert picture.stat().st_size > 0
    assert "time exponent" in capsys.readouterr().out


def test_rows_by_length_leave_the_fewest_positions_and_the_same_gradient(load, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    small = ["--rows", "8", "--batch", "2", "--prompt", "8", "--median", "20", "--cap", "60", "--steps", "1"]
    small += ["--layers", "1", "--hidden", "64", "--vocabulary", "128", "--device", "cpu"]
    load("padding").main([*small, "--output", str(output)])
    rows = {row["way"]: row for row in read(output)}
    ratios = [rows[way]["positions_per_token"] for way in ("padded", "cut", "by length")]
    assert ratios[0] > ratios[1] > ratios[2] >= 1
    assert all(row["difference"] < 1e-5 for row in rows.values()) and rows["by length"]["difference"] > 0
    load("padding").main([*small, "--regroup", "off"])
    assert "by length" not in capsys.readouterr().out.rpartition("| way")[2]


def test_an_exponent_is_the_slope_of_the_upper_half(load):
    exponent = load("growth").exponent
    rows = [{"size": size, "median_s": max(100.0, size**2.0), "peak_extra_mb": None} for size in (1, 2, 4, 16, 32, 64)]
    assert exponent(rows, "median_s") == pytest.approx(2.0)
    assert exponent(rows, "peak_extra_mb") is None


def test_the_checks_of_rows_are_timed_for_every_limit_and_a_second_run(load, tmp_path, capsys):
    benchmark = load("row_checks")
    output = tmp_path / "rows.jsonl"
    benchmark.main(["--rows", "20", "--output", str(output)])
    rows = read(output)
    assert [row["limits"] for row in rows] == list(benchmark.LIMITS)
    assert all(row["rows"] == 20 for row in rows)
    assert all(row[name] > 0 for row in rows for name in ("first_rows_s", "cpu_s", "wall_s", "again_s"))


def test_seeds_of_a_run_stand_side_by_side_in_the_table_with_their_first_logs(load):
    benchmark = load("digit_reversal")
    first, later = {"completions/mean_length": 30.0, "entropy_gap": -0.07}, {"completions/mean_length": 31.0}
    results = [
        {"name": "OPSD", "base": 0.5, "teacher": 0.2, "after": after, "gain": [after - 0.5, -0.4, -0.2], "log": log}
        for after, log in (
            (0.2, [first | {"divergence/right": 0.2, "divergence/wrong": 0.4}, later]),
            (0.3, [{"loss": 1.0}, first | {"divergence/right": 0.0, "divergence/wrong": 0.4}]),
        )
    ]
    grpo = {"name": "GRPO", "base": 0.5, "teacher": 0.2, "after": 0.6, "gain": [0.1, 0.0, 0.2], "log": [later]}
    lines = benchmark.table([*results, grpo]).splitlines()
    gains = "-30.0 [-40.0, -20.0], -20.0 [-40.0, -20.0]"
    assert lines[2] == f"| OPSD | 0.500 | 0.200 | 0.200, 0.300 | {gains} | 0.50, 0.00 | -0.070, -0.070 |"
    assert lines[3] == "| GRPO | 0.500 | 0.200 | 0.600 | +10.0 [+0.0, +20.0] | - | - |"


def test_masks_of_the_saliency_reward_have_a_row_for_each_choice_and_length(load, tmp_path):
    benchmark, output = load("saliency"), tmp_path / "rows.jsonl"
    benchmark.main(["--problems", "2", "--steps", "2", "--starts", "-2", "-5", "--output", str(output)])
    weak, strong = read(output)
    assert weak["rollouts"] == strong["rollouts"] > 0
    assert weak["first_loss"] < strong["first_loss"] and 0 < strong["reward"] < weak["reward"] < 1
    benchmark.main(["--cost", "8", "--steps", "1", "--output", str(output)])
    assert all(read(output)[2][name] > 0 for name in ("reasoning", "once_s", "step_s", "whole_step_s"))


@pytest.mark.filterwarnings("ignore")
def test_host_time_leaves_out_the_pauses_of_engine_and_teacher(load, tmp_path, monkeypatch):
    benchmark = load("host_time")
    monkeypatch.setattr(benchmark.scorer, "score_contexts", benchmark.scorer.score_contexts)  # put back afterwards
    output = tmp_path / "rows.jsonl"
    small = ["--rollouts", "8", "--tokens", "16", "--repeats", "1", "--sampling", "1", "--teacher", "1"]
    monkeypatch.setattr("sys.argv", ["host_time.py", *small, "--methods", "grpo", "opsd", "--output", str(output)])
    benchmark.main()
    rows = read(output)
    assert [row["method"] for row in rows] == ["grpo", "opsd"]
    for row in rows:
        assert row["before_s"] > 0 and row["behind_s"] > 0 and row["host_s"] < 2


def test_passes_over_a_tile_are_counted_by_hand(load):
    benchmark = load("sweep_passes")
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    with benchmark.Passes(12) as counted:
        (a + b).exp_().sum().item()  # three, then two, then one; the sum is no tile
        a[:2].mul(2.0)
    assert (counted.moved / 12, counted.operations) == (6, 3)
    passes, operations = benchmark.plain_passes(benchmark.Divergence("forward_kl"), (4, 50))
    assert operations > 10 and passes > operations
