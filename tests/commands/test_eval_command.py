# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd eval`: models on sets of questions, resumable, compared question by question with the first."""

import copy
import json
import shutil
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.card import add_results
from trl_opsd.commands import cli
from trl_opsd.commands.eval import run as eval_command
from trl_opsd.commands.eval.models import EvaluatedModel, resolve_models
from trl_opsd.commands.eval.questions import BENCHMARKS, benchmark_row
from trl_opsd.demo import build_rows, model_path
from trl_opsd.errors import UsageError
from trl_opsd.evaluation.samples import sample_lines
from trl_opsd.verification import verify


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in build_rows("test", 6)))
    return path


@pytest.fixture
def spoilt(tmp_path):
    """The demo model with its output head set to nothing: it answers no question."""
    model = AutoModelForCausalLM.from_pretrained(model_path())
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.save_pretrained(tmp_path / "spoilt")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path / "spoilt")
    return tmp_path / "spoilt"


def words(tmp_path, *more):
    quick = ["--num_samples", "1", "--temperature", "0", "--max_new_tokens", "64", "--thinking", "off"]
    return ["eval", *quick, "--output_dir", str(tmp_path / "results"), *map(str, more)]


def test_two_models_are_compared_on_the_same_questions(tmp_path, questions, spoilt, capsys):
    cli.main(words(tmp_path, "--models", model_path(), spoilt, "--datasets", questions, "--seeds", 0, 1))
    base, other = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert base["avg_at_k"] == 1.0 and base["difference"] is None  # decoded greedily the demo model is always right
    assert other["avg_at_k"] == 0.0 and tuple(other["difference"]) == (-1.0, -1.0, -1.0)
    assert base["num_questions"] == 6 and base["avg_per_seed"] == [1.0, 1.0]
    table = (tmp_path / "results" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| 1.000 | [1.000, 1.000] |" in table and "| -1.000 [-1.000, -1.000] |" in table
    assert len(list((tmp_path / "results").rglob("seed-*.json"))) == 4


def test_a_mode_that_was_not_chosen_is_named_where_the_template_has_two(tmp_path, questions, capsys):
    line = words(tmp_path, "--models", model_path(), "--datasets", questions, "--num_questions", 1)
    cli.main(line)
    assert "thinking switch" not in capsys.readouterr().out
    place = line.index("--thinking")
    cli.main([*line[:place], *line[place + 2 :], "--output_dir", str(tmp_path / "other")])
    assert capsys.readouterr().out.count("give --thinking off to measure what was trained") == 1


def test_a_template_with_one_mode_is_not_said_to_have_two(tokenizer):
    prompt = [{"role": "user", "content": "1+1=?"}]
    assert eval_command.note_of_mode(tokenizer, prompt, "default") != ""
    one = copy.deepcopy(tokenizer)
    one.chat_template = "{{ messages[0].content }}"
    assert eval_command.note_of_mode(one, prompt, "default") == ""
    assert eval_command.note_of_mode(tokenizer, "1+1=", "default") == ""


def test_finished_results_are_not_run_again_and_other_settings_are_refused(tmp_path, questions, monkeypatch, capsys):
    line = words(tmp_path, "--models", model_path(), "--datasets", questions)
    cli.main(line)
    path = next((tmp_path / "results").rglob("seed-0.json"))
    before = path.read_text()
    assert json.loads(before)["settings"]["max_new_tokens"] == 64 and "completions" not in json.loads(before)
    loads = []
    load = eval_command.load_model
    monkeypatch.setattr(eval_command, "load_model", lambda *given: loads.append(given) or load(*given))
    cli.main(line)
    assert "done before" in capsys.readouterr().out and path.read_text() == before and not loads
    cli.main([*line, "--seeds", "0", "1"])
    assert len(loads) == 1 and path.read_text() == before
    assert cli.main([*line, "--max_new_tokens", "32"]) == 2
    assert "max_new_tokens was 64, is 32" in capsys.readouterr().err
    assert cli.main([*line, "--backend", "vllm"]) == 2
    assert "backend was 'transformers', is 'vllm'" in capsys.readouterr().err


def test_a_result_that_was_not_finished_is_run_again(tmp_path, questions, monkeypatch):
    line = words(tmp_path, "--models", model_path(), "--datasets", questions)

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_command, "evaluate_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.main(line)
    assert not list((tmp_path / "results").rglob("seed-*.json"))


def test_completions_are_saved_when_asked_for_and_questions_limited(tmp_path, questions):
    cli.main(
        words(tmp_path, "--models", model_path(), "--datasets", questions, "--save_completions", "--num_questions", 2)
    )
    record = json.loads(next((tmp_path / "results").rglob("seed-0.json")).read_text())
    assert len(record["completions"]) == 2 and "\\boxed" in record["completions"][0][0][0]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_leave_as_one_line_each_with_what_was_asked_and_what_came_of_it(tmp_path, questions, spoilt):
    path = tmp_path / "deep" / "samples.jsonl"
    line = words(tmp_path, "--models", model_path(), spoilt, "--datasets", questions, "--num_questions", 3)
    assert cli.main([*line, "--seeds", "0", "4", "--samples", str(path), "--max_new_tokens", "40"]) == 0
    lines, rows = read_lines(path), build_rows("test", 3)
    source = [(one["model"], one["dataset"], one["seed"], one["question"], one["sample"]) for one in lines]
    models = (str(model_path()), str(spoilt))
    assert source == [
        (model, str(questions), seed, place, 0) for model in models for seed in (0, 4) for place in range(3)
    ]
    for one in lines:
        row = rows[one["question"]]
        assert (one["prompt"], one["solution"]) == (row["prompt"], row["solution"])
        assert one["score"] == int(verify(one["completion"], row["solution"])) and one["unscored"] is False
        assert one["cut"] == (one["length"] == 40)
    assert {one["score"] for one in lines} == {0, 1} and {one["cut"] for one in lines} == {False, True}
    right = lines[0]
    assert right["score"] == 1 and right["completion"] == right["solution"] and right["answer"] is not None
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert right["length"] == len(tokenizer(right["completion"])["input_ids"]) + 1  # the end token
    record = json.loads(next((tmp_path / "results").rglob("seed-0.json")).read_text())
    assert len(record["completions"]) == len(record["verdicts"]) == 3  # so that it can be written again
    before = path.read_text()
    assert cli.main([*line, "--seeds", "0", "4", "--samples", str(path), "--max_new_tokens", "40"]) == 0
    assert path.read_text() == before


def test_results_without_samples_are_refused_where_samples_are_to_leave(tmp_path, questions, monkeypatch, capsys):
    line = words(tmp_path, "--models", model_path(), "--datasets", questions, "--num_questions", 1)
    assert cli.main(line) == 0
    monkeypatch.setattr(eval_command, "load_model", None)
    assert cli.main([*line, "--samples", str(tmp_path / "s.jsonl"), "--seeds", "1", "0"]) == 2
    assert "seed-0.json was made without its completions" in capsys.readouterr().err
    assert not (tmp_path / "s.jsonl").exists()


def test_without_inspect_ai_the_command_says_how_to_get_it_before_it_samples(tmp_path, questions, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    monkeypatch.setattr(eval_command, "load_model", None)
    line = words(tmp_path, "--models", model_path(), "--datasets", questions, "--inspect_logs", tmp_path / "logs")
    assert cli.main(line) == 2
    told = capsys.readouterr().err
    assert "--inspect_logs: inspect-ai cannot be imported" in told and "pip install 'trl-opsd[inspect-ai]'" in told


def test_a_text_that_ran_out_of_time_has_no_score():
    completions, verdicts = [[["a", 2, False], ["b", 3, True]]], [[[None, None, True], [False, "b", False]]]
    rows = [{"prompt": "p", "solution": "s"}]
    out, wrong = sample_lines(rows, completions, verdicts, seed=0)
    assert (out["score"], out["unscored"], out["length"], out["cut"]) == (None, True, 2, False)
    assert (wrong["score"], wrong["unscored"], wrong["answer"], wrong["cut"]) == (0, False, "b", True)


def test_a_lora_adapter_is_a_model_too(tmp_path, questions):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model_path())
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1000 if "lora" in name else 1)  # an update that is read wrecks the answers
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path / "adapter")
    cli.main(words(tmp_path, "--models", tmp_path / "adapter", "--datasets", questions, "--num_questions", 2))
    assert json.loads((tmp_path / "results" / "summary.json").read_text())[0]["avg_at_k"] == 0.0


def test_columns_of_a_local_file_are_mapped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "1+1?", "gold": "\\frac{4}{2}"}) + "\n")
    columns = ["--problem_column", "question", "--answer_column", "gold", "--prompt_template", "{prompt} Box it."]
    options = eval_command.make_parser().parse_args(words(tmp_path, "--models", "m", "--datasets", path, *columns)[1:])
    (row,) = eval_command.load_questions(str(path), options)
    assert row["prompt"] == [{"role": "user", "content": "1+1? Box it."}] and verify("\\boxed{2}", row["solution"])


def test_gold_answers_that_cannot_be_read_are_said_to_count_as_wrong(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "solution": text}) + "\n" for text in ("\\boxed{2}", "clearly")))
    options = eval_command.make_parser().parse_args(words(tmp_path, "--models", "m", "--datasets", path)[1:])
    assert len(eval_command.load_questions(str(path), options)) == 2
    assert "1 of 2 gold answers cannot be read" in capsys.readouterr().out


def test_no_question_is_an_error(tmp_path, questions):
    options = eval_command.make_parser().parse_args(
        words(tmp_path, "--models", "m", "--datasets", questions, "--num_questions", 0)[1:]
    )
    with pytest.raises(UsageError, match="no question"):
        eval_command.load_questions(str(questions), options)


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("aime24", {"problem": "p", "solution": "s", "answer": "033"}, "33"),
        ("aime25", {"problem": "p", "answer": 70}, "70"),
        ("hmmt25", {"problem": "p", "answer": "\\frac{1}{576}"}, "1/576"),
        ("math500", {"problem": "p", "solution": "s", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}, "(3,\\pi/2)"),
        ("gsm8k", {"question": "p", "answer": "48/2 = <<48/2=24>>24\n#### 24"}, "24"),
    ],
)
def test_gold_answers_of_the_benchmarks_verify(name, row, answer):
    made = benchmark_row(row, BENCHMARKS[name])
    assert made["prompt"] == [{"role": "user", "content": "p"}]
    assert verify(f"so it is \\boxed{{{answer}}}", made["solution"])
    assert not verify("so it is \\boxed{-5}", made["solution"])


def test_a_model_with_a_slash_in_its_name_gets_one_folder(tmp_path):
    options = eval_command.make_parser().parse_args(words(tmp_path, "--models", "a/b", "--datasets", "aime24")[1:])
    assert (
        eval_command.result_path(options, "a/b", "aime24", 3)
        == tmp_path / "results" / "a--b" / "aime24" / "seed-3.json"
    )


@pytest.fixture
def run_folder(tmp_path, spoilt):
    """A run: a wrecked checkpoint 2, a good one 10, a half-written 20, a wrecked model at the end, a card."""
    run = tmp_path / "run"
    shutil.copytree(spoilt, run)
    shutil.copytree(spoilt, run / "checkpoint-2")
    shutil.copytree(model_path(), run / "checkpoint-10")
    shutil.copytree(model_path(), run / "checkpoint-20")
    for step in (2, 10):
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (run / "README.md").write_text(
        '# Run\n\n## Results\n\nNot measured\n\n## Method\n\n"evaluation": "not measured", kept\n'
    )
    return run


def test_a_run_counts_by_its_last_model(tmp_path, run_folder):
    assert resolve_models(["a/b", str(run_folder)]) == [
        EvaluatedModel("a/b", "a/b", "as given"),
        EvaluatedModel(str(run_folder), str(run_folder), "last"),
    ]
    (run_folder / "config.json").unlink()
    newest = str(run_folder / "checkpoint-10")  # not 20, which is half-written, and not 2, which is last by name
    assert resolve_models([str(run_folder)], "all") == [EvaluatedModel(str(run_folder), newest, "last")]
    for step in (2, 10):
        shutil.rmtree(run_folder / f"checkpoint-{step}")
    with pytest.raises(UsageError, match="no complete checkpoint"):
        resolve_models([str(run_folder)])


def test_a_checkpoint_that_is_named_is_taken_as_given(run_folder):
    path = str(run_folder / "checkpoint-2")
    assert resolve_models([path]) == [EvaluatedModel(path, path, "as given")]


def test_the_rule_is_stated_and_the_best_of_a_course_is_no_result(tmp_path, questions, run_folder, capsys):
    line = words(tmp_path, "--models", model_path(), run_folder, "--datasets", questions, "--num_questions", 2)
    cli.main(line)
    assert "Checkpoint rule: last." in capsys.readouterr().out
    assert not list((tmp_path / "results").rglob("*checkpoint-*"))
    cli.main([*line, "--checkpoints", "all", "--add_to_card"])
    shown = capsys.readouterr().out
    assert "1 half-written checkpoints are passed over" in shown and "are a course, not results" in shown
    assert "chosen by these very questions and therefore too high: 1.000 (checkpoint-10)" in shown
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert [(entry["checkpoint"], entry["avg_at_k"]) for entry in summary] == [
        ("as given", 1.0),
        ("on the way", 0.0),
        ("on the way", 1.0),
        ("last", 0.0),
    ]
    card = (run_folder / "README.md").read_text()
    assert "| this model | 0.000 |" in card and "checkpoint-10" not in card and str(tmp_path) not in card
    assert '"checkpoint_rule": "last"' in card and '"evaluation": "off"' in card and "kept" in card
    assert card.count("| questions.jsonl: 2, k = 1 |") == 2
    accuracy = ModelCard(card).data.eval_results[0]
    assert (accuracy.dataset_name, accuracy.metric_name, accuracy.metric_value) == ("questions.jsonl", "avg@1", 0.0)


def test_without_a_course_nothing_is_said_of_a_best(tmp_path, questions, capsys):
    cli.main(words(tmp_path, "--models", model_path(), "--datasets", questions, "--num_questions", 1))
    shown = capsys.readouterr().out
    assert "Checkpoint rule: every model as it was named." in shown and "Best of" not in shown


def test_numbers_go_into_the_card_that_trl_wrote_of_a_baseline(tmp_path):
    line = {"dataset": "d", "model": "this model", "num_questions": 2, "num_samples": 1, "avg_at_k": 0.25}
    (tmp_path / "README.md").write_text("---\nbase_model: b\n---\n# Run\n\n## Training procedure\n\nSFT.\n\n## Cite\n")
    for value in (0.25, 0.5):  # a second time in place of the first
        add_results(tmp_path, [{**line, "avg_at_k": value}])
        card = (tmp_path / "README.md").read_text()
        assert f"| this model | {value:.3f} |" in card and card.count("## Results") == 1
        assert (
            card.index("# Run") < card.index("## Results") < card.index("## Training procedure") < card.index("## Cite")
        )
    (tmp_path / "README.md").write_text("# Run\n")
    for value in (0.25, 0.5):
        add_results(tmp_path, [{**line, "avg_at_k": value}])
        card = (tmp_path / "README.md").read_text()
        assert "---\n# Run\n\n## Results\n" in card and f"{value:.3f}" in card and card.count("avg@k") == 1


def test_a_model_without_a_card_is_refused_before_anything_is_sampled(tmp_path, questions, spoilt, capsys):
    line = words(tmp_path, "--models", model_path(), spoilt, "--datasets", questions, "--add_to_card")
    assert cli.main(line) == 2
    assert "has no README.md" in capsys.readouterr().err and not (tmp_path / "results").exists()


@pytest.mark.parametrize("metadata", ["a: [", "- a list", "model-index: 5"])
def test_a_card_whose_metadata_cannot_be_read_is_refused_before_anything_is_sampled(
    tmp_path, questions, run_folder, capsys, metadata
):
    (run_folder / "README.md").write_text(f"---\n{metadata}\n---\n# Run\n")
    line = words(tmp_path, "--models", model_path(), run_folder, "--datasets", questions, "--add_to_card")
    assert cli.main(line) == 2
    told = capsys.readouterr().err
    assert "README.md, between its first lines `---`, cannot be read" in told and len(told.splitlines()) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--backend", "vllm", "--batch_size", "4"], "--batch_size is of --backend transformers"),
        (["--vllm_options", "{}"], "--vllm_options is of --backend vllm"),
    ],
)
def test_settings_of_the_other_backend_are_refused(tmp_path, questions, capsys, given, message):
    assert cli.main(words(tmp_path, "--models", model_path(), "--datasets", questions, *given)) == 2
    assert message in capsys.readouterr().err


def test_the_table_shows_fractions_as_the_card_does_and_a_bar_in_a_name_ends_no_cell():
    from trl_opsd.card import results_section
    from trl_opsd.commands.eval.summary import table_of

    shares = {"avg_at_k": 0.0017, "pass_at_k": 0.25, "majority_at_k": 0.5, "cut_share": 0.125}
    line = {"dataset": "a|b", "model": "m", "checkpoint": "last", "num_samples": 4, "num_questions": 150, **shares}
    line |= {"mean_completion_length": 17.0, "markers_per_1000_tokens": 2.0, "interval": (0.0, 0.005)}
    line |= {"difference": (-0.351, -0.402, -0.298)}
    _, _, row, *_ = table_of([line]).splitlines()
    card = results_section([line])
    for number in ("0.002", "0.250", "0.500", "0.125", "-0.351 [-0.402, -0.298]"):
        assert f"| {number} |" in row and f"| {number} |" in card
    assert row.startswith("| a\\|b | m |") and "[0.000, 0.005]" in row


def test_a_set_of_words_is_named_and_read_by_the_verifier_that_is_given(tmp_path, capsys):
    path = tmp_path / "words.jsonl"
    path.write_text(json.dumps({"prompt": "1+1", "solution": "\\boxed{tac}"}) + "\n")
    line = words(tmp_path, "--models", model_path(), "--datasets", path)
    cli.main(line)
    assert "warning: " in (printed := capsys.readouterr().out) and "'tac' in row 0, a word" in printed
    assert cli.main([*line, "--verifier", "exact"]) == 2
    assert "verifier was 'math', is 'exact'" in capsys.readouterr().err
    cli.main([*line, "--verifier", "exact", "--output_dir", str(tmp_path / "exact")])
    assert "warning" not in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "exact" / "summary.json").read_text())
    assert record["settings"]["verifier"] == "exact" and record["unscored_share"] == 0.0
    assert cli.main([*line, "--verifier", "maths"]) == 2
    assert "--verifier='maths' is not one of math, exact, choice" in capsys.readouterr().err


def test_completions_that_were_not_scored_stand_under_the_table():
    from trl_opsd.commands.eval.summary import summarize, table_of

    result = {"per_question_scores": [0.5], "avg_at_k": 0.5, "pass_at_k": 1.0, "majority_at_k": 0.0, "cut_share": 0.0}
    result |= {"mean_completion_length": 3.0, "markers_per_1000_tokens": 0.0}
    model = EvaluatedModel("m", "m", "as given")
    for share in ({}, {"unscored_share": 0.25}):
        summary = summarize([model], {("m", "set"): [result | share]}, ["set"], [0], {"num_samples": 4})
        told = "ran out of time on 25 % of the completions of m on set; they count as wrong"
        assert (told in table_of(summary)) == bool(share)
