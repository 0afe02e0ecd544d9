# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd build mixsd`: rows that SFT reads, failures counted, and a build that goes on where it was ended."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_opsd.builders import build as loop
from trl_opsd.builders.build import Plan, Source, build, build_batch, kept_entries, output_row
from trl_opsd.builders.cli import make_parser
from trl_opsd.builders.journal import Journal
from trl_opsd.builders.mixsd import Coin, useful_tries
from trl_opsd.commands import cli
from trl_opsd.commands.train import main as train
from trl_opsd.demo import TEACHER_PROMPT_TEMPLATE, build_rows, model_path
from trl_opsd.rows.formats import from_messages
from trl_opsd.trainers.baselines import SFTBaselineConfig, sft_row
from trl_opsd.verification import verify


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in build_rows("test", 5)))
    return path


def words(problems, output, *more):
    line = ["build", "mixsd", "--model_name_or_path", model_path(), "--dataset_name", problems, "--output", output]
    line += ["--expert_template", TEACHER_PROMPT_TEMPLATE, "--max_new_tokens", 48, "--batch_size", 2]
    return [str(word) for word in (*line, *more)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_verified_completions_with_their_prompt_reference_tries_and_seed(problems, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert cli.main(words(problems, out, "--naive_share", 0.5, "--temperature", 1, "--seed", 3)) == 0
    told, rows = capsys.readouterr().out, build_rows("test", 5)
    for row in lines(out):
        source = rows[row["row"]]
        assert row["prompt"] == source["prompt"] and row["reference"] == source["solution"] and row["seed"] == 3
        assert row["correct"] is True and verify(row["solution"], row["reference"]) and 1 <= row["tries"] <= 10
        assert row["completion"] == [{"role": "assistant", "content": row["solution"]}]
    assert f"rows 5, right {len(lines(out))}" in told and "share drawn from: bare prompt 0." in told


def test_a_build_that_was_ended_writes_what_an_uninterrupted_one_writes(problems, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    more = ["--naive_share", 0.5, "--temperature", 1.2, "--tries", 2, "--failures", "write"]
    cli.main(words(problems, whole, *more))
    journal = tmp_path / "parts.jsonl.journal"
    text = (tmp_path / "whole.jsonl.journal").read_text().splitlines(keepends=True)
    journal.write_text("".join(text[:4]) + text[4][:20])  # the header, three rows, so one of a batch, and half a line
    sampled = []
    batch = loop.build_batch
    monkeypatch.setattr(
        loop, "build_batch", lambda rows, start, *rest: sampled.append(start) or batch(rows, start, *rest)
    )
    cli.main(words(problems, parts, *more))
    assert sampled == [2, 4]
    assert parts.read_bytes() == whole.read_bytes() and journal.read_text() == "".join(text)
    sampled.clear()
    cli.main(words(problems, parts, *more))
    assert not sampled and parts.read_bytes() == whole.read_bytes()


def test_other_settings_or_rows_under_the_same_output_are_refused_by_name(problems, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    cli.main(words(problems, out, "--num_rows", 1, "--temperature", 1))
    assert cli.main(words(problems, out, "--num_rows", 1, "--temperature", 0.5, "--seed", 9)) == 2
    told = capsys.readouterr().err
    assert "seed was 0, is 9" in told and "temperature was 1.0, is 0.5" in told and "Choose another --output" in told
    problems.write_text(json.dumps(build_rows("train", 1)[0]) + "\n")
    assert cli.main(words(problems, out, "--num_rows", 1, "--temperature", 1)) == 2
    assert "sha256 of the rows was" in capsys.readouterr().err
    (tmp_path / "other.jsonl.journal").write_text("not ours\n")
    assert cli.main(words(problems, tmp_path / "other.jsonl")) == 2
    assert "it is no journal of a build" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--naive_share", 1.5, "set it to a probability"),
        ("--temperature", -1, "set it to 0 or more"),
        ("--temperature", "nan", "set it to 0 or more"),
        ("--tries", 0, "set it to 1 or more"),
        ("--batch_size", 0, "set it to 1 or more"),
        ("--verifier", "guess", "is not one of math"),
        ("--expert_template", "{prompt}", "does not contain {solution}"),
    ],
)
def test_options_outside_their_range_are_refused_before_anything_is_read(tmp_path, capsys, option, value, told):
    assert cli.main(words(tmp_path / "none.jsonl", tmp_path / "out.jsonl", option, value)) == 2
    error = capsys.readouterr().err
    assert option in error and str(value) in error and told in error and not list(tmp_path.iterdir())


def test_a_greedy_completion_of_one_prompt_alone_is_tried_once():
    assert [useful_tries(10, share, 0) for share in (0, 0.5, 1)] == [1, 10, 1]
    assert [useful_tries(10, share, 1.0) for share in (0, 0.5, 1)] == [10, 10, 10]
    assert make_parser().parse_args(words("a", "b")[1:]).failures == "discard"


# A source without a model: completions are told by the row and the try.
TEXTS = {"right": "\\boxed{1}", "wrong": "\\boxed{2}"}


class Speller:
    pad_token_id, eos_token_id = 0, 9

    def decode(self, ids, skip_special_tokens):
        return TEXTS["right" if 1 in ids else "wrong"]


def told_source(monkeypatch, script):
    """`script`: of each row the ids that its tries give, the last again and again."""

    def draw(prompts, randoms, source, plan):
        tries = seen.setdefault("tries", {})
        result = []
        for (ids,) in prompts:
            number = tries[ids[0]] = tries.get(ids[0], 0) + 1
            said = script[ids[0]]
            result.append(loop.Draws(said[min(number, len(said)) - 1], [0] * 2))
        return result

    seen = {}
    monkeypatch.setattr(loop, "_draw", draw)
    config = SimpleNamespace(max_position_embeddings=40)
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=9))
    return Source(("one",), (model,), lambda row: [row["ids"]], lambda: Coin(0), Speller())


def test_rows_are_tried_until_they_are_right_and_every_kind_of_failure_is_counted(monkeypatch, tmp_path):
    script = {0: [[2, 9], [2, 9], [1, 9]], 1: [[2, 9]], 2: [[1, 2]], 3: [[1, 9]]}
    rows = [{"ids": [place], "prompt": "p", "solution": "\\boxed{1}"} for place in range(4)]
    rows += [{"ids": [3] * 31, "prompt": "p", "solution": "\\boxed{1}"}, {"ids": [3], "prompt": "p", "solution": " "}]
    rows += [{"ids": [3], "prompt": "p", "solution": "nothing to read"}]
    plan = Plan(True, 4, 3, 0, "math", 10, 0.0, 64)
    journal = Journal(tmp_path / "o.jsonl", {})
    build(rows, lambda: told_source(monkeypatch, script), plan, journal)
    found = [(entry["kind"], entry["tries"], entry["tokens"], entry["draws"]) for entry in journal.entries]
    assert found == [
        ("right", 3, 2, [6]),
        ("wrong", 4, 2, [8]),
        ("cut", 4, 2, [8]),  # its answer is right, but SFT would teach to stop in the middle
        ("right", 1, 2, [2]),
        ("too long", 0, 0, [0]),
        ("no reference", 0, 0, [0]),
        ("unreadable reference", 0, 0, [0]),
    ]
    assert [entry["row"] for entry in kept_entries(journal, False)] == [0, 3]
    assert [entry["row"] for entry in kept_entries(journal, True)] == [0, 1, 2, 3]
    assert [entry["row"] for entry in kept_entries(journal, True, ("cut",))] == [0, 1, 3]
    assert output_row(rows[1], journal.entries[1], 5)["correct"] is False
    told = loop.report(journal, kept_entries(journal, False), ("one",), 0.0)
    assert "rows 7, right 2, of these at the first try 1, tries 12" in told
    assert "kept 2, discarded 5 (" in told and "1 too long" in told
    assert "tokens drawn 24 (all tries), of rows kept 4; share drawn from: one 1.000" in told


def test_a_row_without_a_reference_has_no_verdict_where_none_is_needed(monkeypatch):
    source = told_source(monkeypatch, {0: [[1, 9]]})
    (entry,) = build_batch([{"ids": [0], "prompt": "p"}], 0, source, Plan(False, 1, 1, 0, "math", 10, 0.0, 64))
    assert entry["kind"] == "unverified" and output_row({"prompt": "p"}, entry, 0)["correct"] is None


@pytest.fixture
def built(problems, tmp_path):
    out = tmp_path / "built.jsonl"
    cli.main(words(problems, out, "--num_rows", 2, "--naive_share", 1, "--failures", "write"))
    assert len(lines(out)) == 2
    return out


def test_the_sft_command_learns_the_completion_and_nothing_else(built, tmp_path):
    quick = ["--max_steps", "1", "--report_to", "none", "--bf16", "false", "--use_cpu", "true", "--save_strategy", "no"]
    line = ["--model_name_or_path", model_path(), "--dataset_name", str(built), "--output_dir", str(tmp_path / "run")]
    trainer = train("sft", [*line, "--per_device_train_batch_size", "2", *quick])
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    for row, source in zip(trainer.train_dataset, lines(built), strict=True):
        learnt = [token for token, mask in zip(row["input_ids"], row["labels"], strict=True) if mask != -100]
        assert tokenizer.decode(learnt, skip_special_tokens=True) == source["solution"]
        assert learnt[-1] == tokenizer.eos_token_id


def test_trls_own_sft_trainer_learns_the_assistants_turn_alone(built, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_list([{key: row[key] for key in ("prompt", "completion", "correct")} for row in lines(built)])
    args = SFTConfig(output_dir=str(tmp_path / "trl"), report_to="none", bf16=False, use_cpu=True, max_steps=1)
    trainer = SFTTrainer(model=model_path(), args=args, train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    told = {
        tokenizer.decode(ids[mask != -100], skip_special_tokens=True).strip()
        for ids, mask in zip(batch["input_ids"], batch["labels"], strict=True)
    }
    assert told == {row["solution"] for row in lines(built)}


def test_of_chat_messages_as_tessys_rows_are_sft_learns_the_last_turn_alone():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    turns = [{"role": "user", "content": "1+2=?"}, {"role": "assistant", "content": "1+2=3\n\\boxed{3}"}]
    row = sft_row(from_messages({"messages": turns}), tokenizer, SFTBaselineConfig(use_cpu=True, bf16=False))
    learnt = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(learnt, skip_special_tokens=True) == "1+2=3\n\\boxed{3}"
    assert learnt[-1] == tokenizer.eos_token_id and len(learnt) < len(row["input_ids"])
