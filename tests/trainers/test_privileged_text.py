# SPDX-License-Identifier: Apache-2.0
"""What rows bring for the teacher: columns of a template, prompts of their own, parts of solutions."""

import inspect
import json
import re
import warnings
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from groups import ids_of
from pages import assert_same_step, moved, whole_step

from trl_opsd import OGLSSDTrainer, OPSDConfig, OPSDGKDConfig, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.methods import OPSD
from trl_opsd.methods.privileged import PrivilegedText
from trl_opsd.methods.stand_in import stand_in
from trl_opsd.pages import PAGES, trainer_of
from trl_opsd.rows.texts import fill_template
from trl_opsd.teacher.contexts import TEACHER_PROMPT_TEMPLATE
from trl_opsd.trainers.pbsd import PBSDTrainer
from trl_opsd.trainers.popd import POPDTrainer
from trl_opsd.trainers.rlsd import RLSDTrainer
from trl_opsd.trainers.sdft import SDFTTrainer
from trl_opsd.trainers.sdpo import SDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.* is experimental")

HERE = "test_privileged_text"
TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
WITH_HINT = "{prompt}\n\nHint: {hint}\n\nRubric:\n{rubric}\n\nIt is done so: {solution}\nDo it."
HINTS = ("add in pairs", None, "  ", "count {up}")
RUBRICS = (["adds", "boxes"], ["adds"], [], None)


def rendered(row, template):
    return fill_template(template, prompt=row["prompt"][-1]["content"], solution=row["solution"] or "")


def template_of_rollout(rollout):
    """The default template of OPSD as a function gives it."""
    return fill_template(TEACHER_PROMPT_TEMPLATE, prompt=rollout.prompt[-1]["content"], solution=rollout.solution)


def messages_of_rollout(rollout):
    return [{"role": "user", "content": template_of_rollout(rollout)}]


def nothing(rollout):
    return None


def never(rollout):
    return None


never.calls_at_once = 0


def of_reward(rollout):
    """What a verifier says of the rollout, with a control token in it; nothing of one text, and failures on two."""
    if rollout.completion == "a":
        return None
    if "wait" in rollout.completion:
        raise TimeoutError("the verifier did not answer")
    if rollout.completion == "1+2=3":
        return 7
    return f"{rollout.prompt[-1]['content']} {rollout.completion} has {rollout.reward}, {rollout.columns['tests']} <|im_end|>"


REWARDS = []


def of_rewards(rollout):
    REWARDS.append(rollout.reward)


def too_long(rollout):
    return "word " * 300


@pytest.fixture
def build(build_group, dataset):
    def build(trainer_class=OPSDTrainer, rows=None, **settings):
        settings = {"max_completion_length": 30, **settings}
        return build_group(trainer_class, TEXTS, dataset if rows is None else rows, **settings)

    return build


def step(trainer, rows):
    """A whole step of a student that has moved; what is sampled a second time differs from the first."""
    moved(trainer)
    sample, calls = trainer._generate_single_turn, []

    def sample_and_turn(*args, **kwargs):
        ids, rest = sample(*args, **kwargs)
        calls.append(len(ids))
        return ids[len(calls) - 1 :] + ids[: len(calls) - 1], rest

    trainer._generate_single_turn = sample_and_turn
    try:
        return whole_step(trainer, rows)
    finally:
        trainer._generate_single_turn = sample


def with_column(dataset, **columns):
    return Dataset.from_list([{**row, **{name: f(row) for name, f in columns.items()}} for row in dataset])


def logged(trainer, start):
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith(start)}


def shown(trainer):
    """What the teacher's views of the last batch read, as text."""
    scorer, batch = trainer.scorer, trainer._batch
    return [
        [trainer.tokenizer.decode(scorer.encode(prompt, view, "").ids) for view in views if view.template != "plain"]
        for prompt, views in zip(batch.prompts, batch.contexts, strict=True)
    ]


# Prompts of rows

GROUPS = {"num_generations": 4, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    "trainer_class, settings",
    [
        (OPSDTrainer, {}),
        (SDFTTrainer, {}),
        (POPDTrainer, {"distillation_length": "4..8 in 4"}),
        (PBSDTrainer, {}),
        (RLSDTrainer, GROUPS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("source", ["text", "messages", "function", "function of messages"])
def test_the_templates_own_rendering_as_a_rows_prompt_is_the_template(build, dataset, trainer_class, settings, source):
    own, template = dataset, TEACHER_PROMPT_TEMPLATE
    if source == "text":
        own = with_column(dataset, teacher_prompt=lambda row: rendered(row, TEACHER_PROMPT_TEMPLATE))
    elif source == "messages":
        own = with_column(
            dataset,
            teacher_prompt=lambda row: [{"role": "user", "content": rendered(row, TEACHER_PROMPT_TEMPLATE)}],
        )
    else:
        template = f"{HERE}:{'messages' if 'messages' in source else 'template'}_of_rollout"
    size = [0] * 4 if settings.get("num_generations") else range(4)
    trainers = [
        build(trainer_class, own, teacher_prompt_template=template, **settings),
        build(trainer_class, teacher_prompt_template=TEACHER_PROMPT_TEMPLATE, **settings),
    ]
    got = step(trainers[0], [own[place] for place in size])
    assert all(rollout.teacher_prompt is not None for rollout in trainers[0]._batch.rollouts)
    assert_same_step(got, step(trainers[1], [dataset[place] for place in size]))
    assert logged(trainers[0], "teacher_prompts") == {"teacher_prompts/own": 1.0, "teacher_prompts/failed": 0.0}
    assert not logged(trainers[1], "teacher_prompts")


def test_rows_without_a_prompt_of_their_own_take_the_template(build, dataset):
    own = ["read this alone", None, " ", "and {solution} that"]
    rows = [{**dataset[place], "teacher_prompt": own[place % 4]} for place in range(8)]
    trainer = build(rows=Dataset.from_list(rows))
    step(trainer, rows[:4])
    texts = shown(trainer)
    for row, (text,) in zip(rows, texts, strict=False):
        template = rendered(row, TEACHER_PROMPT_TEMPLATE)
        expected = template if (row["teacher_prompt"] or " ").isspace() else row["teacher_prompt"]
        kwargs = trainer.args.teacher_chat_template_kwargs
        assert text == trainer.tokenizer.decode(ids_of(trainer, [{"role": "user", "content": expected}], **kwargs))
    assert "{solution}" in texts[3][0]  # a row's own prompt is data
    assert logged(trainer, "teacher_prompts") == {"teacher_prompts/own": 0.5, "teacher_prompts/failed": 0.0}


def test_a_text_replaces_the_last_turn_and_messages_the_conversation(build, dataset):
    system = [{"role": "system", "content": "Be brief."}]
    first = [{**row, "prompt": system + row["prompt"], "teacher_prompt": "mine"} for row in dataset]
    trainer = build(rows=Dataset.from_list(first))
    step(trainer, first[:4])
    assert "Be brief." in shown(trainer)[0][0] and "mine" in shown(trainer)[0][0]
    other = [{**row, "teacher_prompt": [{"role": "user", "content": "mine"}]} for row in first]
    trainer = build(rows=Dataset.from_list(other))
    step(trainer, other[:4])
    assert "Be brief." not in shown(trainer)[0][0] and "mine" in shown(trainer)[0][0]


def test_a_row_with_its_own_prompt_needs_no_solution(build, dataset):
    rows = [{"prompt": row["prompt"], "teacher_prompt": row["solution"]} for row in dataset]
    loss, _ = step(build(rows=Dataset.from_list(rows)), rows[:4])
    assert loss > 0
    half = [{**row, "solution": None, "teacher_prompt": None if place == 2 else "x"} for place, row in enumerate(rows)]
    with pytest.raises(ValueError, match="train_dataset row 2: `solution` is None, but the teacher reads it"):
        build(rows=Dataset.from_list(half))


def test_a_function_sees_reward_and_columns_and_where_it_fails_the_template_is_read(build, dataset):
    rows = [{**row, "tests": f"{place} of 9 passed", "teacher_prompt": None} for place, row in enumerate(dataset)]
    trainer = build(rows=Dataset.from_list(rows), teacher_prompt_template=f"{HERE}:of_reward", clip=None)
    with pytest.warns(
        UserWarning, match=r"of_reward' failed on 2 of 4 rollouts, for which the teacher reads the template"
    ):
        step(trainer, rows[:4])
    texts = [text for (text,) in shown(trainer)]
    assert "so \\boxed{3} has 1.0, 1 of 9 passed " in texts[1] and texts[1].count("<|im_end|>") == 1
    assert all("Reference solution begins" in texts[place] for place in (0, 2, 3))
    assert logged(trainer, "teacher_prompts") == {"teacher_prompts/own": 0.25, "teacher_prompts/failed": 0.5}


def test_where_a_function_says_nothing_the_column_is_read(build, dataset):
    rows = [{**row, "teacher_prompt": "of the column"} for row in dataset]
    trainer = build(rows=Dataset.from_list(rows), teacher_prompt_template=f"{HERE}:nothing")
    step(trainer, rows[:4])
    assert all("of the column" in text for (text,) in shown(trainer))


def test_a_prompt_of_a_function_that_is_too_long_is_a_failure(build, dataset):
    trainer = build(teacher_prompt_template=f"{HERE}:too_long", max_teacher_prompt_length=600)
    with pytest.warns(UserWarning, match="takes [0-9]+ tokens, more than max_teacher_prompt_length=600"):
        step(trainer, [dataset[place] for place in range(4)])
    assert logged(trainer, "teacher_prompts") == {"teacher_prompts/own": 0.0, "teacher_prompts/failed": 1.0}


def test_rewards_are_known_to_the_function_although_others_are_verified_while_the_teacher_scores(build, dataset):
    rows, seen = [dataset[place] for place in range(4)], []
    for template in (TEACHER_PROMPT_TEMPLATE, f"{HERE}:of_rewards"):
        trainer = build(teacher_prompt_template=template)
        begun = []
        trainer.reward_funcs[0].begin = lambda *given, begun=begun: begun.append(given)
        REWARDS.clear()
        step(trainer, rows)
        seen.append((len(begun), REWARDS.copy()))
    assert seen == [(1, []), (0, [0.0, 1.0, 0.0, 0.0])]


def of_completion(rollout):
    return f"about {rollout.completion}"


def test_rollouts_of_one_prompt_may_bring_different_ones(build, dataset):
    trainer = build(teacher_prompt_template=f"{HERE}:of_completion")
    step(trainer, [dataset[0]] * 4)
    assert all(f"about {text}<" in shown_text for text, (shown_text,) in zip(TEXTS, shown(trainer), strict=True))


def test_pbsd_writes_and_reads_its_pair_under_the_rows_own_prompt(build, dataset):
    rows = [{**row, "teacher_prompt": f"mine {place}"} for place, row in enumerate(dataset)]
    trainer, asked = build(PBSDTrainer, Dataset.from_list(rows)), []
    sample = trainer._generate_single_turn
    trainer._generate_single_turn = lambda prompts, *rest, **named: (
        asked.append(prompts),
        sample(prompts, *rest, **named),
    )[1]
    whole_step(trainer, rows[:4])
    assert [f"mine {place}<" in trainer.tokenizer.decode(ids) for place, ids in enumerate(asked[1])] == [True] * 4
    owns = [json.loads(view.own_prompt) for extra in trainer._batch.extras for view in extra.contexts]
    assert owns == [f"mine {place}" for place in range(4)] and all("mine" in text for (text,) in shown(trainer))


TAKE_PROMPTS = {"opsd", "sdft", "pbsd", "brts", "popd", "vopd", "rethinking-opd", "rlsd", "egrsd"}
TAKE_SHARES = TAKE_PROMPTS | {"purified-opsd", "rcsd"}


def test_the_methods_that_take_them_are_those_that_the_page_lists():
    methods = {name: trainer_of(name).method for name in PAGES}
    assert {name for name, method in methods.items() if method.own_prompts} == TAKE_PROMPTS
    assert {name for name, method in methods.items() if method.solution_shares} == TAKE_SHARES
    page = (Path(__file__).parents[2] / "docs" / "privileged-text.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    listed = {row[0]: row[1:3] for row in rows if len(row) == 4 and row[1] in ("yes", "no")}
    names = {name: ["yes" if name in taking else "no" for taking in (TAKE_PROMPTS, TAKE_SHARES)] for name in PAGES}
    assert listed == names


@pytest.mark.parametrize("name", sorted(TAKE_SHARES))
def test_a_method_that_takes_a_share_shows_no_more_in_any_view(tmp_path, name):
    method, config = trainer_of(name).method, trainer_of(name).config_class
    args = config(str(tmp_path), bf16=False, use_cpu=True, shown_solution=0.5)
    found = stand_in(method, args, {"prompt": "1+1=?", "solution": "one\ntwo"})
    contexts = [context for _, context in found.views] + [found.request] * (found.request is not None)
    contexts += found.extra.contexts if found.extra is not None else ()
    assert {context.slot for context in contexts if context.template != "plain"} == {"one"}


@pytest.mark.parametrize("name", PAGES)
def test_by_default_no_method_reads_a_column_by_its_templates(tmp_path, name):
    config, given = trainer_of(name).config_class, {"write_critique": True} if name == "critique" else {}
    args = config(str(tmp_path), bf16=False, use_cpu=True, **given)
    assert PrivilegedText(trainer_of(name).method, args).columns == ()


@pytest.mark.parametrize("name", sorted(set(PAGES) - TAKE_PROMPTS))
def test_a_method_that_takes_no_prompts_refuses_column_and_function_by_name(tmp_path, name):
    method, config = trainer_of(name).method, trainer_of(name).config_class
    args = config(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=f"the column `teacher_prompt`, which {re.escape(method.name)} does not take"):
        PrivilegedText(method, args).check_columns(["prompt", "teacher_prompt"], "train_dataset")
    args.teacher_prompt_template = f"{HERE}:nothing"
    with pytest.raises(ValueError, match=f"teacher_prompt_template=.* not possible with {re.escape(method.name)}"):
        PrivilegedText(method, args)


def test_refusals_come_before_training(build, dataset):
    own = with_column(dataset, teacher_prompt=lambda row: "x")
    for trainer_class in (PurifiedOPSDTrainer, OGLSSDTrainer, SDPOTrainer):
        with pytest.raises(ValueError, match="train_dataset has the column `teacher_prompt`"):
            build(trainer_class, own, **GROUPS)
    with pytest.raises(ValueError, match=r"shown_solution='1..0.5 in 3' is not possible with OGLS-SD"):
        build(OGLSSDTrainer, shown_solution="1..0.5 in 3", **GROUPS)


# Columns of a template


def columned(dataset):
    return [{**row, "hint": HINTS[place % 4], "rubric": RUBRICS[place % 4]} for place, row in enumerate(dataset)]


BY_HAND = (
    "{prompt}\n\nHint: add in pairs\n\nRubric:\nadds\nboxes\n\nIt is done so: {solution}\nDo it.",
    "{prompt}\n\nRubric:\nadds\n\nIt is done so: {solution}\nDo it.",
    "{prompt}\n\nRubric:\n\nIt is done so: {solution}\nDo it.",
    "{prompt}\n\nHint: count {up}\n\nRubric:\n\nIt is done so: {solution}\nDo it.",
)


def test_columns_fill_their_slots_and_an_empty_one_leaves_its_line_out(build, dataset):
    rows = columned(dataset)
    trainer = build(rows=Dataset.from_list(rows), teacher_prompt_template=WITH_HINT)
    got = step(trainer, rows[:4])
    own = [{**row, "teacher_prompt": rendered(row, BY_HAND[place % 4])} for place, row in enumerate(dataset)]
    by_hand = build(rows=Dataset.from_list(own))
    wanted = step(by_hand, own[:4])
    assert shown(trainer) == shown(by_hand)
    assert_same_step(got, wanted)


def test_a_template_with_columns_of_equal_text_in_every_row_is_the_template_with_that_text(build, dataset):
    rows = [{**row, "hint": "add"} for row in dataset]
    template = TEACHER_PROMPT_TEMPLATE + "\nHint: {hint}"
    trainer = build(rows=Dataset.from_list(rows), teacher_prompt_template=template)
    plain = build(teacher_prompt_template=template.replace("{hint}", "add"))
    assert_same_step(step(trainer, rows[:4]), step(plain, [dataset[place] for place in range(4)]))


def test_both_views_of_purified_opsd_read_columns_and_part_of_the_solution(build, dataset):
    rows = [{**row, "hint": "a hint", "solution": f"one\ntwo\n{row['solution']}\nfour"} for row in dataset]
    settings = {
        "teacher_prompt_template": "{prompt} {hint} {solution}",
        "reference_prompt_template": "{hint}, {solution}",
        "shown_solution": 0.5,
        "decomposition_steps": 1,
    }
    trainer = build(PurifiedOPSDTrainer, Dataset.from_list(rows), **settings)
    step(trainer, rows[:4])
    for row, (teacher, reference) in zip(rows, shown(trainer), strict=False):
        assert f"{row['prompt'][0]['content']} a hint one\ntwo<" in teacher
        assert "a hint, one\ntwo<" in reference and row["prompt"][0]["content"] not in reference
    cut = [{**row, "solution": "one\ntwo"} for row in rows]
    whole = build(PurifiedOPSDTrainer, Dataset.from_list(cut), **{**settings, "shown_solution": 1.0})
    trainer = build(PurifiedOPSDTrainer, Dataset.from_list(rows), **settings)
    assert_same_step(step(trainer, rows[:4]), step(whole, cut[:4]))
    for each in (trainer, whole):
        each.state.global_step = 1
        whole_step(each, rows[:4] if each is trainer else cut[:4])
    one, other = (logged(each, "decomposition/") for each in (trainer, whole))
    assert one and one == pytest.approx(other)


def test_the_templates_of_a_method_name_columns_too(build, dataset):
    template = "{prompt}\n{solution}\nHouse rules: {rules}"
    rows = [{**dataset[0], "rules": "be brief"}] * 8
    trainer = build(SDPOTrainer, Dataset.from_list(rows), peer_prompt_template=template, **GROUPS)
    step(trainer, rows[:4])
    assert all("House rules: be brief" in text for texts in shown(trainer) for text in texts)
    assert any(shown(trainer))


def test_latex_and_numbers_in_a_template_are_no_slots(build, dataset):
    template = TEACHER_PROMPT_TEMPLATE + "\\boxed{answer} and \\frac{a}{b} and x^{ab} and x_{i} and [a-z]{2}"
    trainer = build(teacher_prompt_template=template)
    step(trainer, [dataset[place] for place in range(4)])
    assert "\\boxed{answer} and \\frac{a}{b} and x^{ab} and x_{i} and [a-z]{2}" in shown(trainer)[0][0]


def test_a_budget_counts_columns_and_shortens_the_solution_alone(build, dataset):
    rows = [{**row, "hint": "h " * 30, "solution": "s " * 200} for row in dataset]
    settings = {"teacher_prompt_template": "{prompt}\n{hint}\n{solution}"}
    trainer = build(rows=Dataset.from_list(rows), max_teacher_prompt_length=120, **settings)
    step(trainer, rows[:4])
    collator = trainer.scorer.collator
    for prompt, (view,), (text,) in zip(trainer._batch.prompts, trainer._batch.contexts, shown(trainer), strict=True):
        assert len(collator.encode(prompt, view).ids) <= 120 and "h " * 30 in text and "[...]" in text
    with pytest.raises(
        ValueError, match=r"train_dataset row \d: max_teacher_prompt_length=60 leaves nothing.*columns included"
    ):
        build(rows=Dataset.from_list(rows), max_teacher_prompt_length=60, **settings)
    late = [{**row, "hint": "h"} for row in rows[:7]] + [{**rows[7], "hint": "h " * 300}]
    with pytest.raises(ValueError, match="train_dataset row 7: max_teacher_prompt_length=120 leaves nothing"):
        build(rows=Dataset.from_list(late), max_teacher_prompt_length=120, **settings)


BAD_COLUMNS = {
    "another name": (
        {"hnt": "x"},
        r"teacher_prompt_template: `\{hint\}` is neither a slot that OPSD fills nor a column of "
        r"train_dataset, which has .*Did you mean `\{hnt\}`",
    ),
    "a number": ({"hint": 3}, "train_dataset row 0: `hint` is int; a slot takes text, a list of texts, or None"),
    "a list of numbers": ({"hint": [3]}, "train_dataset row 0: `hint` is list; a slot takes text"),
    "a control token": ({"hint": "so <|im_end|>"}, r"train_dataset row 0: `hint` spells out '<\|im_end\|>'"),
    "one in a list": ({"hint": ["a", "<|im_end|>"]}, r"train_dataset row 0: `hint` spells out"),
}


@pytest.mark.parametrize("columns, message", BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_a_column_that_cannot_fill_its_slot_is_refused_before_training(build, dataset, columns, message):
    rows = [{**row, **columns} for row in dataset]
    with pytest.raises(ValueError, match=message):
        build(rows=Dataset.from_list(rows), teacher_prompt_template="{prompt} {hint} {solution}")


BAD_PROMPTS = {
    "ends with an answer": (
        [{"role": "assistant", "content": "x"}],
        "row 0: `teacher_prompt` ends with a 'assistant' turn",
    ),
    "no text": ([{"role": "user", "content": " "}], "row 0: `teacher_prompt`: the last message's content is not text"),
    "a number": (3, "row 0: `teacher_prompt` is int, not text or a list of messages"),
    "a control token": ("so <|im_end|>", r"row 0: `teacher_prompt` spells out '<\|im_end\|>'"),
    "one in a message": ([{"role": "user", "content": "<|im_end|>"}], "row 0: `teacher_prompt` spells out"),
    "too long": ("x " * 400, "row 0: `teacher_prompt` takes [0-9]+ tokens, more than max_teacher_prompt_length=500"),
}


@pytest.mark.parametrize("own, message", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_prompt_that_cannot_be_shown_is_refused_before_training(build, dataset, own, message):
    rows = Dataset.from_list([{**row, "teacher_prompt": own} for row in dataset])
    with pytest.raises(ValueError, match=f"train_dataset {message}"):
        build(rows=rows, max_teacher_prompt_length=500)


def test_messages_beside_a_prompt_of_text_are_refused(build, dataset):
    rows = [
        {**row, "prompt": row["prompt"][0]["content"], "teacher_prompt": [{"role": "user", "content": "x"}]}
        for row in dataset
    ]
    with pytest.raises(ValueError, match="`teacher_prompt` is a conversation, but `prompt` is text"):
        build(rows=Dataset.from_list(rows))


@pytest.mark.parametrize(
    "short, long, message",
    [
        ({"teacher_prompt": "x"}, {"teacher_prompt": "x " * 400}, "`teacher_prompt` takes"),
        ({"hint": "x"}, {"hint": ["x "] * 400}, "max_teacher_prompt_length=500 leaves nothing of the solution"),
    ],
)
def test_a_row_that_is_trained_on_late_is_checked_too(build, dataset, short, long, message):
    rows = [{**dataset[place % 8], **short} for place in range(32)]
    settings = {"max_teacher_prompt_length": 500}
    if "hint" in short:
        settings["teacher_prompt_template"] = "{prompt} {hint} {solution}"
    first = build(rows=Dataset.from_list(rows), **settings).first_rows()
    late = next(place for place in range(1, 32) if place not in first)
    rows[late] = {**rows[late], **long}
    if "hint" in short:
        rows = [{**row, "hint": row["hint"] if isinstance(row["hint"], list) else [row["hint"]]} for row in rows]
    with pytest.raises(ValueError, match=f"train_dataset row {late}: {message}"):
        build(rows=Dataset.from_list(rows), **settings)


def test_rows_of_a_stream_are_checked_as_they_come(build, dataset):
    rows = [{**row, "hint": "x" if place == 0 else 3} for place, row in enumerate(dataset)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = build(rows=stream, teacher_prompt_template="{prompt} {hint} {solution}")
    with pytest.raises(ValueError, match="generation batch row 1: `hint` is int"):
        whole_step(trainer, rows[:4])
    with pytest.raises(ValueError, match=r"`\{hind\}` is neither .* of train_dataset row 0, .* mean `\{hint\}`"):
        build(rows=stream, teacher_prompt_template="{prompt} {hind} {solution}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shown_solution": 0}, "shown_solution=0 is not valid"),
        ({"shown_solution": 1.5}, "shown_solution=1.5 is not valid"),
        ({"shown_solution": True}, "shown_solution=True is not valid"),
        ({"shown_solution": "half"}, "shown_solution='half' is not valid.*'1.0..0.2 in 50'"),
        ({"shown_solution": "1..1 in 5"}, "shown_solution='1..1 in 5' is not valid"),
        ({"shown_solution": "1..0.5 in 0"}, "shown_solution='1..0.5 in 0' is not valid"),
        ({"shown_solution": "1..0 in 5"}, "shown_solution='1..0 in 5' is not valid"),
        ({"shown_solution": float("nan")}, "shown_solution=nan is not valid"),
        ({"teacher_prompt_template": "no"}, "teacher_prompt_template does not contain {prompt}: 'no'"),
        ({"teacher_prompt_template": f"{HERE}:absent"}, "teacher_prompt_template=.* is not `module:function`"),
        ({"teacher_prompt_template": f"{HERE}:never"}, "teacher_prompt_template=.* has calls_at_once=0"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


def test_the_gkd_trainer_refuses_columns_in_its_template(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_prompt_template: OPSDGKDTrainer fills .* not \{hint\}"):
        OPSDGKDConfig(str(tmp_path), teacher_prompt_template="{prompt} {hint} {solution}", bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="fills a template and calls no function"):
        OPSDGKDConfig(str(tmp_path), teacher_prompt_template=f"{HERE}:nothing", bf16=False, use_cpu=True)


# Parts of solutions


def test_the_share_moves_linearly_and_then_stays(make_args):
    args = make_args(shown_solution="1.0..0.2 in 4")
    assert [args.solution_share_at(step) for step in (0, 1, 2, 4, 9, None)] == pytest.approx(
        [1, 0.8, 0.6, 0.2, 0.2, 0.2]
    )
    assert {make_args(shown_solution=share).solution_share for share in (1, "1", None, 1.0)} == {1.0}
    assert make_args(shown_solution="0.25").solution_share_at(3) == 0.25
    assert make_args(shown_solution=".5..1 in 2").solution_share_at(1) == 0.75


@pytest.mark.parametrize("steps, kept", [(0, 4), (2, 3), (4, 2), (8, 2)])
def test_a_share_is_the_solution_cut_behind_its_first_steps(build, dataset, steps, kept):
    lines = ["one", "two", "three", "four"]
    rows = [{**row, "solution": "\n".join([*lines[:3], lines[3] + row["solution"]])} for row in dataset]
    trainer = build(rows=Dataset.from_list(rows), shown_solution="1.0..0.5 in 4")
    cut = [{**row, "solution": "\n".join(row["solution"].split("\n")[:kept])} for row in rows]
    wanted = build(rows=Dataset.from_list(cut))
    trainer.state.global_step = steps
    assert_same_step(step(trainer, rows[:4]), step(wanted, cut[:4]))
    assert trainer._metrics["train"]["solution_share"] == [pytest.approx(1 - 0.5 * min(1, steps / 4))]
    assert "solution_share" not in wanted._metrics["train"]


def test_a_share_of_one_changes_nothing(build, dataset):
    rows = [dataset[place] for place in range(4)]
    got, wanted = step(build(shown_solution=1.0), rows), step(build(), rows)
    assert got[0] == wanted[0] and all((got[1][name] == wanted[1][name]).all() for name in wanted[1])


def test_evaluation_shows_what_training_ends_with(build, dataset):
    rows = with_column(dataset, solution=lambda row: f"one\ntwo\n{row['solution']}")
    trainer = build(rows=rows, shown_solution="1..0.3 in 5")
    trainer.model.eval()
    trainer._prepare_inputs([rows[place] for place in range(4)])
    assert {rollout.shown_solution for rollout in trainer._batch.rollouts} == {"one"}


# What a person sees


def test_what_rows_bring_is_described_in_words(make_args):
    args = make_args(teacher_prompt_template=WITH_HINT, shown_solution="1..0.5 in 3")
    columns = "columns hint, rubric; a row's own prompt from the column teacher_prompt; "
    assert (
        PrivilegedText(OPSD, args).describe(["teacher_prompt"])
        == f"{columns}of the solution's steps a share of 1..0.5 in 3"
    )
    args = make_args(teacher_prompt_template=f"{HERE}:nothing")
    assert PrivilegedText(OPSD, args).describe([]) == f"a row's own prompt from the function {HERE}:nothing"
    assert PrivilegedText(OPSD, make_args()).describe(["hint"]) == ""


def test_the_card_says_what_rows_bring(build, dataset):
    rows = columned(dataset)
    trainer = build(rows=Dataset.from_list(rows), teacher_prompt_template=WITH_HINT)
    trainer.create_model_card(model_name="m")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "By row the teacher also reads: columns hint, rubric." in card and "| `shown_solution` | 1.0 |" in card


def test_a_run_of_several_steps_trains_and_is_saved(build, dataset):
    rows = columned(dataset)
    trainer = build(
        rows=Dataset.from_list(rows), teacher_prompt_template=WITH_HINT, shown_solution="1..0.5 in 2", max_steps=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    shares = [entry["solution_share"] for entry in trainer.state.log_history if "solution_share" in entry]
    assert shares == [1.0, 0.75, 0.5]


def test_settings_and_documented_names_are_these():
    """Two settings and a column are all that there is to know beside the template."""
    from trl_opsd.settings.privileged import PrivilegedTextSettings

    assert list(inspect.get_annotations(PrivilegedTextSettings)) == ["shown_solution"]
    assert issubclass(OPSDConfig, PrivilegedTextSettings)
