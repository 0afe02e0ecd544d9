# SPDX-License-Identifier: Apache-2.0
"""Every so often the terminal shows a few rollouts, at any width; whole ones are for files and trackers."""

import unicodedata
from types import SimpleNamespace

import pytest

from trl_opsd.commands.rollout_table import cut, rollout_table
from trl_opsd.commands.step_lines import RolloutTables, show_steps

LONG = "Two numbers are added, and then their sum is added to itself until it is larger than a hundred. What is it?"
ROWS = [
    {"prompt": "1+2=?", "completion": "\\boxed{3}", "divergence": 0.12345678},
    {
        "prompt": [{"role": "user", "content": LONG}],
        "completion": f"{LONG}\n\nIt is \\boxed{{128}}.",
        "divergence": 12345.6,
    },
    {"prompt": "二" * 60, "completion": "\x1b[2Jdone", "divergence": float("nan")},
]


def columns(text):
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def test_a_table_at_80_columns_reads_as_it_is_meant_to():
    assert rollout_table(ROWS, [1.0, 0.0, None], 80).splitlines() == [
        "  reward  divergence  question, and end of the answer",
        "       1      0.1235  1+2=?",
        "                      \\boxed{3}",
        "       0   1.235e+04  Two numbers are added, and then their sum is added to ...",
        "                      ... larger than a hundred. What is it? It is \\boxed{128}.",
        "       -           -  " + "二" * 27 + "...",
        "                      \\x1b[2Jdone",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_of_a_table_reaches_the_edge(width):
    text = rollout_table(ROWS, [1.0, 0.0, None], width)
    lines = text.splitlines()[1:]
    assert all(columns(line) < width for line in lines)
    assert "\x1b" not in text and len(lines) == 6


def test_a_cut_text_keeps_its_beginning_or_its_end():
    assert cut("abcdefgh", 8) == "abcdefgh"
    assert cut("abcdefgh", 7) == "abcd..." and cut("abcdefgh", 7, keeps_end=True) == "...efgh"


class Trainer:
    """What the callback asks of a trainer."""

    num_completions_to_print = None

    def __init__(self, **settings):
        vars(self).update(settings)

    def table_rows(self):
        return [{"prompt": f"question {n}", "completion": "answer", "divergence": 1.0} for n in range(6)]

    def reward_of_row(self, row):
        return 1.0


def printed(capsys, trainer, steps=None, max_steps=30, logged=range(1, 31), is_first=True, logs=None):
    """Steps at which rollouts were printed, and the questions of the last ones."""
    callback, shown, last = RolloutTables(trainer, steps), [], []
    for step in logged:
        state = SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=is_first)
        callback.on_log(None, state, None, logs={"loss": 1.0} if logs is None else logs)
        text = capsys.readouterr().out
        if text:
            shown.append(step)
            last = [int(line.split()[-1]) for line in text.splitlines() if "question " in line]
    return shown, last


def test_rollouts_are_shown_at_the_first_step_and_at_every_tenth_of_the_run(capsys):
    assert printed(capsys, Trainer()) == ([1, 4, 7, 10, 13, 16, 19, 22, 25, 28], [0, 2, 4])
    assert printed(capsys, Trainer(), max_steps=5, logged=range(1, 4))[0] == [1, 2, 3]
    assert printed(capsys, Trainer(), logged=range(5, 31, 5))[0] == [5, 10, 15, 20, 25, 30]


def test_how_often_and_how_many_can_be_set_and_both_can_be_none(capsys):
    assert printed(capsys, Trainer(), steps=12)[0] == [1, 13, 25]
    assert printed(capsys, Trainer(num_completions_to_print=1))[1] == [0]
    assert printed(capsys, Trainer(num_completions_to_print=100))[1] == [0, 1, 2, 3, 4, 5]
    for settings in ({"steps": 0}, {"is_first": False}, {"logs": {"eval_loss": 1.0}}):
        assert printed(capsys, Trainer(), **settings) == ([], [])
    assert printed(capsys, Trainer(num_completions_to_print=0)) == ([], [])
    with pytest.raises(ValueError, match="rollout_table_steps=-1 is negative"):
        show_steps(Trainer(), -1)


def test_a_run_prints_its_rollouts_in_short_and_none_whole(build, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    trainer = build(max_steps=2, log_completions=True, num_completions_to_print=2)
    show_steps(trainer)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    headers = [index for index, line in enumerate(lines) if line.startswith("  reward  divergence")]
    assert len(headers) == 2 and not any("--- rollout" in line for line in lines)
    row = trainer.table_rows()[0]
    assert lines[headers[-1] - 1].startswith("step 2/2  ")
    reward, divergence, question = lines[headers[-1] + 1].split()
    assert float(reward) == trainer.reward_of_row(row) and float(divergence) == pytest.approx(
        row["divergence"], rel=1e-3
    )
    assert question == row["prompt"][-1]["content"]
    assert lines[headers[-1] + 2].strip() == row["completion"][-1]["content"].strip()
    assert len(lines) == headers[-1] + 5 + 1  # two rollouts, and that it has trained


def test_a_verbose_run_keeps_whole_rollouts(build, capsys, monkeypatch):
    monkeypatch.setenv("TRL_OPSD_VERBOSE", "1")
    trainer = build(log_completions=True, num_completions_to_print=2)
    show_steps(trainer)
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("--- rollout") >= 2 and "question, and end" not in out


def test_a_rows_reward_is_weighed_and_one_that_nobody_judged_is_none(build):
    def half(completions, **kwargs):
        return [0.5] * len(completions)

    def nobody(completions, **kwargs):
        return [None] * len(completions)

    trainer = build(reward_funcs=[half, nobody], reward_weights=[3.0, 1.0])
    row = {"half": 0.5, "nobody": float("nan")}
    assert trainer.reward_of_row(row) == 1.5
    assert trainer.reward_of_row({**row, "half": float("nan")}) is None
