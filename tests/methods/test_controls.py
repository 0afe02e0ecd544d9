# SPDX-License-Identifier: Apache-2.0
"""Controls of the reference: another problem's solution, none, or the shortest right rollout in the solution's place."""

from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset
from groups import reward_boxed
from pages import assert_same_step, moved, whole_step

from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.methods.controls import controlled, other_solutions, shortest_others, with_other_solutions
from trl_opsd.methods.privileged import PrivilegedText
from trl_opsd.pages import PAGES, trainer_of
from trl_opsd.rows.texts import fill_template
from trl_opsd.teacher.contexts import TEACHER_PROMPT_TEMPLATE, Rollout
from trl_opsd.trainers.rlsd import RLSDTrainer
from trl_opsd.trainers.sdpo import SDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.* is experimental")

HERE = "test_controls"
TEXTS = ("1+2=3", "so \\boxed{3}", "it is \\boxed{10} then", "a")
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 4}
SHORT, LONG = TEXTS[1], TEXTS[2]


@pytest.fixture
def build(build_group, dataset):
    def build(trainer_class=OPSDTrainer, rows=None, texts=TEXTS, **settings):
        return build_group(
            trainer_class, texts, dataset if rows is None else rows, max_completion_length=40, **GROUPS, **settings
        )

    return build


def step(trainer, row):
    moved(trainer)
    return whole_step(trainer, [row] * 4)


def with_prompts(dataset, template, **texts):
    """The rows with prompts of their own, the template filled by hand."""
    filled = (fill_template(template, prompt=row["prompt"][-1]["content"], **texts) for row in dataset)
    return Dataset.from_list([{**row, "teacher_prompt": text} for row, text in zip(dataset, filled, strict=True)])


def views_as_text(trainer):
    batch, tokenizer = trainer._batch, trainer.tokenizer
    rows = zip(batch.prompts, batch.contexts, strict=True)
    return [
        [tokenizer.decode(trainer.scorer.encode(prompt, view, "").ids) for view in views if view.template != "plain"]
        for prompt, views in rows
    ]


# Nothing


@pytest.mark.parametrize("trainer_class", [OPSDTrainer, RLSDTrainer])
def test_without_a_reference_the_teacher_reads_the_template_with_nothing_in_it(build, dataset, trainer_class):
    trainer = build(trainer_class, shown_solution="empty")
    rows = with_prompts(dataset, TEACHER_PROMPT_TEMPLATE, solution="")
    assert_same_step(step(trainer, dataset[0]), step(build(trainer_class, rows), rows[0]))


def test_both_views_of_purified_opsd_lose_the_solution_and_it_is_not_decomposed(build, dataset):
    trainer = build(PurifiedOPSDTrainer, shown_solution="empty", decomposition_steps=1)
    step(trainer, dataset[0])
    for teacher, reference in views_as_text(trainer):
        assert dataset[0]["solution"] not in teacher + reference
        assert "begins ===\n\n=== Reference" in teacher and "begins ===\n\n=== Reference" in reference
    assert not [name for name in trainer._metrics["train"] if name.startswith("decomposition")]


def test_ogls_sd_has_no_solution_among_its_right_rollouts(build, dataset):
    trainer = build(OGLSSDTrainer, shown_solution="empty")
    step(trainer, dataset[0])
    wrong = trainer._batch.contexts[0]
    assert {view.slot for view in wrong if view.direction > 0} == {SHORT, LONG}


def test_hints_alone_are_a_column_and_no_solution(build, dataset):
    template = "{prompt}\n\nHint: {hint}\n{solution}\nSolve it."
    rows = Dataset.from_list([{**row, "hint": "add in pairs"} for row in dataset])
    trainer = build(rows=rows, shown_solution="empty", teacher_prompt_template=template)
    own = with_prompts(dataset, template, solution="", hint="add in pairs")
    assert_same_step(step(trainer, rows[0]), step(build(rows=own), own[0]))


# Another problem's solution


@pytest.mark.parametrize("trainer_class", [OPSDTrainer, OGLSSDTrainer, PurifiedOPSDTrainer])
def test_shuffled_is_a_dataset_whose_solutions_were_changed_by_hand(build, dataset, trainer_class):
    trainer = build(trainer_class, shown_solution="shuffled")
    row = trainer.train_dataset[0]
    other = row["solution_of_another_row"]
    assert other != row["solution"] and other in list(dataset["solution"])
    rows = [{**each, "solution": other} for each in dataset]
    assert_same_step(step(trainer, row), step(build(trainer_class, Dataset.from_list(rows)), rows[0]))


def test_rewards_read_the_rows_own_solution(build_group, dataset):
    seen = []

    def reward(completions, solution, **columns):
        seen.extend(solution)
        return reward_boxed(completions)

    settings = {"max_completion_length": 40, **GROUPS}
    trainer = build_group(OPSDTrainer, TEXTS, dataset, reward, shown_solution="shuffled", **settings)
    step(trainer, trainer.train_dataset[0])
    assert seen == [dataset[0]["solution"]] * 4


def test_each_of_several_evaluation_sets_has_a_column_of_its_own(dataset, make_args):
    parts = {"a": dataset, "b": dataset.select(range(4))}
    found = with_other_solutions(parts, make_args(shown_solution="shuffled"), "eval_dataset")
    assert {key: len(part["solution_of_another_row"]) for key, part in found.items()} == {"a": len(dataset), "b": 4}
    assert with_other_solutions(None, make_args(shown_solution="shuffled"), "eval_dataset") is None


def test_another_row_differs_in_problem_and_solution_whatever_the_order_of_ranks():
    prompts, solutions = ["p", "p", "q", "r", "s", "t"], ["1", "2", "2", "3", None, "1"]
    for seed in range(20):
        found = other_solutions(prompts, solutions, seed, "rows")
        assert found == other_solutions(prompts, solutions, seed, "rows") and found[4] is None
        for prompt, own, other in zip(prompts, solutions, found, strict=True):
            places = [place for place, solution in enumerate(solutions) if solution == other and other is not None]
            assert own is None or (other != own and any(prompts[place] != prompt for place in places))
    assert len({tuple(other_solutions(prompts, solutions, seed, "rows")) for seed in range(20)}) > 1


def test_with_different_rows_each_solution_is_shown_once():
    numbers = [str(number) for number in range(50)]
    assert sorted(other_solutions(numbers, numbers, 0, "rows")) == sorted(numbers)


@pytest.mark.parametrize(
    ("prompts", "solutions", "place"), [(["p"], ["1"], 0), (["p", "q"], ["1", "1"], 0), (["p", "p"], ["1", "2"], 0)]
)
def test_rows_without_another_solution_are_refused(prompts, solutions, place):
    with pytest.raises(ValueError, match=r"shown_solution='shuffled': no row of train_dataset differs from row \d"):
        other_solutions(prompts, solutions, 0, "train_dataset")


def test_a_solution_that_is_too_long_beside_another_problem_is_found_before_the_first_step(build_group, make_model):
    turns = [[{"role": "user", "content": text}] for text in ("1+1=?", "2+" * 200 + "2=?")]
    solutions = ("is 2 " * 80 + "\\boxed{2}", "\\boxed{402}")
    rows = [{"prompt": turn, "solution": solution} for turn, solution in zip(turns, solutions, strict=True)]
    model = make_model(max_position_embeddings=1024)
    assert build_group(OPSDTrainer, TEXTS, Dataset.from_list(rows), model=model, **GROUPS) is not None
    with pytest.raises(ValueError, match=r"train_dataset row 1: .*positions for 1024"):
        build_group(OPSDTrainer, TEXTS, Dataset.from_list(rows), model=model, shown_solution="shuffled", **GROUPS)


def test_a_stream_cannot_be_shuffled(build, dataset):
    with pytest.raises(ValueError, match="'shuffled' needs every solution of train_dataset before training"):
        build(rows=dataset.to_iterable_dataset(), shown_solution="shuffled")


# The shortest right rollout


def of_shortest(rollout):
    """What the control shows, by hand: the shorter of the two right ones, or the longer to the shorter itself."""
    text = LONG if rollout.completion == SHORT else SHORT
    return fill_template(TEACHER_PROMPT_TEMPLATE, prompt=rollout.prompt[-1]["content"], solution=text)


@pytest.mark.parametrize("trainer_class", [OPSDTrainer, RLSDTrainer])
def test_the_shortest_other_right_rollout_is_the_reference(build, dataset, trainer_class):
    trainer = build(trainer_class, shown_solution="shortest_rollout")
    by_hand = build(trainer_class, teacher_prompt_template=f"{HERE}:of_shortest")
    assert_same_step(step(trainer, dataset[0]), step(by_hand, dataset[0]))


def test_a_rollout_without_another_right_one_is_left_out_and_counted(build, dataset):
    trainer = build(texts=("a", SHORT, "b", "c"), shown_solution="shortest_rollout")
    assert not trainer.method.contexts_from_rows  # nothing is encoded before they are sampled
    step(trainer, dataset[0])
    assert [len(views) for views in trainer._batch.contexts] == [1, 0, 1, 1]
    assert trainer._metrics["train"]["rows/no_right_peer"] == [0.25]


def test_the_shortest_is_by_tokens_the_first_of_equals_and_without_its_thinking():
    def rollout(text, reward, tokens):
        return Rollout("p", "s", text, reward, tokens)

    group = [rollout("w", 0.0, 1), rollout("<think>x</think>\nr", 1.0, 5), rollout("s", 1.0, 5), rollout("t", None, 2)]
    assert shortest_others(group, 0.5) == ["r", "s", "r", "r"]
    assert shortest_others(group[:2], 0.5) == ["r", None]


# What is refused, and what a person sees


@pytest.mark.parametrize(
    ("trainer_class", "settings", "message"),
    [
        (
            OPSDTrainer,
            {"shown_solution": "shuffle"},
            "shown_solution='shuffle' is not valid.*'shuffled', 'empty', 'shortest_rollout'",
        ),
        (OPSDTrainer, {"shown_solution": "empty", "teacher_prompt_template": f"{HERE}:of_shortest"}, "no place for"),
        (
            SDPOTrainer,
            {"shown_solution": "empty"},
            "'empty' is not possible with SDPO: its teacher is shown no solution",
        ),
        (
            OGLSSDTrainer,
            {"shown_solution": "shortest_rollout"},
            "not possible with OGLS-SD: its teacher is shown rollouts",
        ),
    ],
)
def test_a_control_that_cannot_be_is_refused_before_the_first_step(build, trainer_class, settings, message):
    with pytest.raises(ValueError, match=message):
        build(trainer_class, **settings)


def test_a_rollout_alone_has_no_other(make_args):
    with pytest.raises(ValueError, match="'shortest_rollout' with num_generations=1: a rollout alone has no other"):
        make_args(shown_solution="shortest_rollout")


def test_a_rows_own_prompt_has_no_place_for_a_control(build, dataset):
    rows = with_prompts(dataset, TEACHER_PROMPT_TEMPLATE, solution="x")
    with pytest.raises(ValueError, match=r"train_dataset has the column `teacher_prompt`.*shown_solution='empty'"):
        build(rows=rows, shown_solution="empty")


def test_a_control_is_described_in_words_and_in_the_card(build, dataset, make_args):
    trainer = build(shown_solution="shuffled")
    assert PrivilegedText(trainer.method, trainer.args).describe() == (
        "in place of the row's solution that of another problem"
    )
    trainer.create_model_card(model_name="m")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert (
        "in place of the row's solution that of another problem" in card and "| `shown_solution` | shuffled |" in card
    )


def test_without_a_control_a_method_is_itself(make_args):
    assert controlled(OPSDTrainer.method, make_args()) is OPSDTrainer.method


def controls_of(name, folder):
    trainer = trainer_of(name)
    own = next(field.default for field in fields(trainer.config_class) if field.name == "num_generations")
    beside = {"annotator_function": f"{HERE}:of_shortest"} if name == "trace" else {}
    args = trainer.config_class(
        str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=max(own or 1, 4), **beside
    )
    taken = []
    for control in ("shuffled", "empty", "shortest_rollout"):
        args.shown_solution = control
        try:
            controlled(trainer.method, args)
        except ValueError as error:
            assert "docs/privileged-text.md lists those that take it" in str(error)
        else:
            taken.append(control)
    return taken


@pytest.mark.filterwarnings("ignore")
def test_the_docs_list_the_controls_of_every_method(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "privileged-text.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    documented = {cells[0]: cells[3] for cells in lines if cells[0] in PAGES}
    words = {
        ("shuffled", "empty", "shortest_rollout"): "all",
        ("shuffled", "empty"): "`shuffled`, `empty`",
        (): "no",
    }
    assert documented == {name: words[tuple(controls_of(name, tmp_path))] for name in PAGES}
