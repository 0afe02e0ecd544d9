# SPDX-License-Identifier: Apache-2.0
"""Step-aligned critique: a step by hand, OPSD as its special case, who writes the critique, and critics that fail."""

import threading

import pytest
from groups import ids_of
from pages import MOMENT, assert_same_step, moved, raw_logits, student_of, whole_step

from trl_opsd import OPSDTrainer
from trl_opsd.methods.critique import CRITIQUE, critic_request, critique_contexts, critiques
from trl_opsd.settings.critique import CritiqueSDSettings
from trl_opsd.teacher.contexts import TEACHER_PROMPT_TEMPLATE, Rollout, TeacherContext, Unused, Written
from trl_opsd.trainers.critique import CritiqueSDConfig, CritiqueSDTrainer
from trl_opsd.user_functions import call_for_each

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
HERE = "test_critique"


def solution_as_critique(rollout):
    return rollout.solution


def of_attempt(rollout):
    """A critique that names the attempt and its verdict; none of one text, a failure on another."""
    if rollout.completion == "a":
        return " "
    if "wait" in rollout.completion:
        raise TimeoutError("the critic did not answer")
    return f"{rollout.completion} was {rollout.reward}"


of_attempt.calls_at_once = 3


def with_a_control_token(rollout):
    return "so <|im_end|> it is"


def test_a_function_says_how_many_of_its_calls_run_at_a_time():
    together = threading.Barrier(2)

    def waits_for_another(value):
        together.wait(timeout=20)
        return value

    waits_for_another.calls_at_once = 2
    assert call_for_each(waits_for_another, [1, 2, 3, 4]) == [1, 2, 3, 4]


@pytest.fixture
def build(build_group, dataset):
    def build(trainer_class=CritiqueSDTrainer, rows=None, **settings):
        settings = {"max_completion_length": 30, **settings}
        return build_group(trainer_class, TEXTS, dataset if rows is None else rows, **settings)

    return build


def shown(trainer, template, row, critique):
    text = template.replace("{prompt}", row["prompt"][-1]["content"]).replace("{solution}", critique)
    return ids_of(trainer, [{"role": "user", "content": text}], **trainer.args.teacher_chat_template_kwargs)


def by_hand(trainer, teacher_model, rows, critics):
    """Forward KL over the vocabulary, a mean over the tokens of the rollouts that have a critique."""
    args, model, total, count = trainer.args, student_of(trainer), 0.0, 0
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    for row, completion, critique in zip(rows, completions, critics, strict=True):
        if critique is None:
            continue
        student = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        teacher = shown(trainer, args.teacher_prompt_template, row, critique)
        log_q = (raw_logits(model, student, completion) / args.temperature).log_softmax(-1)
        log_p = (raw_logits(teacher_model, teacher, completion).detach() / args.temperature).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
        count += len(completion)
    loss = total / count
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_step_equals_its_formula_and_rows_whose_critic_fails_are_left_out(build, dataset):
    trainer = build(critique_function=f"{HERE}:of_attempt")
    first = student_of(trainer)
    moved(trainer)
    rows = [dataset[index] for index in range(4)]
    with pytest.warns(
        UserWarning,
        match=r"critique_function='test_critique:of_attempt' failed on \d of \d rollouts, which are counted.*TimeoutError",
    ):
        got = whole_step(trainer, rows)
    critics = ["1+2=3 was 0.0", "so \\boxed{3} was 1.0", None, None]
    assert_same_step(got, by_hand(trainer, first, rows, critics))
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rows/")}
    assert logged == {"rows/used": 0.5, "rows/critique_failed": 0.25, "rows/no_critique": 0.25}


@pytest.mark.parametrize("source", ["function", "column"])
def test_the_solution_as_a_critique_in_opsds_template_is_opsd(build, dataset, source):
    chosen, steps = [dataset[index] for index in range(4)], []
    own, rows = {"critique_function": f"{HERE}:solution_as_critique"}, dataset
    if source == "column":
        own, rows = {}, dataset.map(lambda row: {"critique": row["solution"]})
    for trainer_class, settings in (
        (CritiqueSDTrainer, {"teacher_prompt_template": TEACHER_PROMPT_TEMPLATE, **own}),
        (OPSDTrainer, {"clip": None}),
    ):
        trainer = build(trainer_class, rows, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, [{**row, "critique": row["solution"]} for row in chosen]))
    assert_same_step(*steps)


def test_the_model_may_be_its_own_critic(build, dataset, monkeypatch):
    trainer = build(write_critique=True)
    first, asked = student_of(trainer), []
    moved(trainer)
    rows, sample = [dataset[index] for index in range(4)], trainer._generate_single_turn

    def sample_critiques_second(prompts, *args, **kwargs):
        asked.append(prompts)
        return sample(prompts, *args, **kwargs)

    monkeypatch.setattr(trainer, "_generate_single_turn", sample_critiques_second)
    got = whole_step(trainer, rows)
    template = trainer.args.critic_prompt_template
    for row, text, prompt in zip(rows, TEXTS, asked[1], strict=True):
        verdict = "right" if "boxed" in text else "wrong"
        filled = template.replace("{attempt}", text).replace("{verdict}", verdict)
        assert prompt == shown(trainer, filled, row, row["solution"])
    assert_same_step(got, by_hand(trainer, first, rows, TEXTS))


def test_a_critique_cannot_end_the_teachers_turn(build, dataset):
    trainer = build(critique_function=f"{HERE}:with_a_control_token")
    whole_step(trainer, [dataset[index] for index in range(4)])
    assert [rollout.note for rollout in trainer._batch.rollouts] == ["so  it is"] * 4


@pytest.fixture
def settings(make_args):
    return lambda **given: make_args(CritiqueSDConfig, **given)


@pytest.mark.parametrize(
    ("note", "reason"),
    [(None, "no critique"), ("  ", "no critique"), (7, "no critique"), (OSError("x"), "critique failed")],
)
def test_a_rollout_without_a_critique_says_why(note, reason):
    (views,) = critique_contexts([Rollout("x", "s", "y", note=note)], None, MOMENT)
    assert isinstance(views, Unused) and views.reason == reason


def test_what_the_model_wrote_is_the_critique(settings):
    rollout = Rollout("x", "s", "y", written=Written("better", [1]))
    assert critique_contexts([rollout], settings(write_critique=True), MOMENT) == [
        (TeacherContext("teacher", "better", anchor=1.0),)
    ]


@pytest.mark.parametrize(
    ("reward", "finished", "verdict"),
    [
        (0.5, True, "right"),
        (0.4, False, "wrong, and it was cut off"),
        (None, True, "neither known to be right nor to be wrong"),
    ],
)
def test_a_critic_is_told_the_verdict(settings, reward, finished, verdict):
    rollout = Rollout("x", "s", "y", reward, finished=finished)
    view = critic_request(rollout, settings(write_critique=True))
    assert dict(view.texts) == {"attempt": "y", "verdict": verdict} and view.slot == "s"
    assert critic_request(rollout, settings()) is None
    assert critic_request(Rollout("x", "s", " "), settings(write_critique=True)) is None


def test_a_column_is_needed_where_nothing_else_gives_critiques(build, settings, dataset):
    with pytest.raises(ValueError, match="train_dataset has no column `critique`, which CritiqueSD reads"):
        build()
    rollouts = [Rollout("x", "s", "y", columns={"critique": "c"}), Rollout("x", "s", "y")]
    assert critiques(rollouts, settings(), MOMENT) == ["c", None]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"critique_function": "test_critique:nothing"},
            "critique_function='test_critique:nothing' is not `module:function`",
        ),
        ({"critique_function": "plain"}, "critique_function='plain' is not `module:function`"),
        ({"critique_function": "test_critique:HERE"}, "is a str; name a function of a rollout"),
        ({"critique_function": f"{HERE}:of_attempt", "write_critique": True}, "write_critique=True: a rollout has one"),
        (
            {"critic_prompt_template": "{prompt} {solution} {attempt}"},
            "critic_prompt_template does not contain {verdict}",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(settings, bad, message):
    with pytest.raises(ValueError, match=message):
        settings(**bad)


def test_defaults_are_the_papers_where_it_states_them():
    own = CritiqueSDSettings()
    assert own.clip is None and not own.write_critique  # arXiv 2606.11173 as noted: forward KL, no clip is mentioned
    args = CritiqueSDConfig("out", bf16=False, use_cpu=True)
    assert (args.divergence, args.num_generations, args.teacher_model_kind) == ("forward_kl", 1, "base")  # OPSD's
    assert not CRITIQUE.needs_solution and not CRITIQUE.needs_reward
