# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd plot`: from a run's folder to a picture, for one run or several."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from trl_opsd.card.plots import plot_folders, read_history
from trl_opsd.commands.cli import main


def write_state(folder, num_steps, **changes):
    entry = {"divergence": 0.2, "loss": 0.1, "entropy_gap": 0.05, "reward": 0.5, "completions/mean_length": 30.0}
    history = [{**entry, **changes, "step": step} for step in range(1, num_steps + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": num_steps, "log_history": [*history, {"train_loss": 1.0, "step": num_steps}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_one_run_makes_a_png(tmp_path, capsys):
    run = write_state(tmp_path / "run", 5)
    main(["plot", str(run), "--output", str(tmp_path / "deep" / "run.png")])
    assert (tmp_path / "deep" / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "run.png" in capsys.readouterr().out


def test_several_runs_make_one_svg_that_names_them_all(tmp_path):
    runs = [write_state(tmp_path / f"seed-{seed}", 3, reward=0.1 * seed) for seed in range(9)]
    path = plot_folders(runs, tmp_path / "runs.svg")
    text = path.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for seed in range(9):
        assert f"<!-- seed-{seed} -->" in text
    assert "<!-- not in these logs -->" in text, "no markers were logged"


def test_the_furthest_checkpoint_is_read(tmp_path):
    for step in (5, 10):
        write_state(tmp_path / f"checkpoint-{step}", step)
    assert [entry["step"] for entry in read_history(tmp_path)] == list(range(1, 11))
    write_state(tmp_path, 12)
    assert len(read_history(tmp_path)) == 12
    assert len(read_history(tmp_path / "checkpoint-5" / "trainer_state.json")) == 5


def test_runs_whose_folders_share_a_name_are_told_apart(tmp_path):
    runs = [write_state(tmp_path / seed / "run", 2) for seed in ("a", "b")]
    text = plot_folders(runs, tmp_path / "runs.svg").read_text()
    assert all(f"<!-- {run} -->" in text for run in runs)


def test_a_baselines_run_is_drawn_beside_a_methods_with_what_it_has(tmp_path):
    run = write_state(tmp_path / "opsd", 3)
    for name, entry in {
        "sft": {"loss": 0.7},
        "grpo": {"loss": 0.1, "reward": 0.5, "completions/mean_length": 9},
    }.items():
        history = [{**entry, "step": step} for step in (1, 2)]
        (tmp_path / name).mkdir()
        state = {"global_step": 2, "log_history": history}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    assert main(["plot", str(tmp_path / "sft"), "--output", str(tmp_path / "sft.svg")]) == 0
    assert (tmp_path / "sft.svg").read_text().count("<!-- not in these logs -->") == 5, "all panels but the loss"
    text = plot_folders([run, tmp_path / "sft", tmp_path / "grpo"], tmp_path / "runs.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("opsd", "sft", "grpo"))


def test_what_cannot_be_drawn_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"holds no trainer_state\.json"):
        plot_folders([tmp_path], tmp_path / "run.png")
    state = tmp_path / "trainer_state.json"
    for text, message in (
        (json.dumps({"global_step": 1, "log_history": [{"train_runtime": 1.0}]}), "has logged no step"),
        ("[]", "is no trainer_state.json"),
        ("{", "is no JSON"),
    ):
        state.write_text(text)
        with pytest.raises(ValueError, match=message):
            plot_folders([tmp_path], tmp_path / "run.png")
    with pytest.raises(ValueError, match=r"end it with \.png or \.svg"):
        plot_folders([tmp_path], tmp_path / "run.jpg")
