# SPDX-License-Identifier: Apache-2.0
"""What a method may say beside contexts: marks, reasons, numbers for the log, and which parts are inferred."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from groups import ids_of
from pages import assert_same_step, raw_logits, student_of, token_log_probs, whole_step

from trl_opsd import OPSDConfig, SDPOConfig
from trl_opsd.card.sections import method_section
from trl_opsd.methods import OPSD
from trl_opsd.rows.token_texts import text_ends
from trl_opsd.settings.fields import option
from trl_opsd.teacher.contexts import TeacherContext, Unused
from trl_opsd.trainers.columns import engine_weights
from trl_opsd.trainers.self_distillation import SelfDistillationTrainer

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")


def make_method(**fields):
    """The loss of a rollout is its mean of mark times log q, unless another is given."""
    defaults = {
        "name": "seams",
        "contexts": lambda group, settings, moment: [(TeacherContext("plain", None, read=1.0),) for _ in group],
        "has_target": False,
        "reads_views": True,
        "loss": lambda facts, settings, moment: (facts.given["mark"] * facts.log_prob).sum(-1),
    }
    return replace(OPSD, **{**defaults, **fields})


def make_owner(method, config=OPSDConfig):
    return type("Seams", (SelfDistillationTrainer,), {"method": method, "config_class": config})


def on_letters(rollout):
    """1 for a token whose text holds a letter, by the places that the rollout names."""
    starts = (0, *rollout.token_ends)
    return [
        float(any(letter.isalpha() for letter in rollout.completion[start:end]))
        for start, end in zip(starts, rollout.token_ends, strict=False)
    ]


MARKS = {
    "of rollouts": lambda group, settings, moment: [float(len(rollout.completion)) for rollout in group],
    "of tokens": lambda group, settings, moment: [on_letters(rollout) for rollout in group],
}


@pytest.mark.parametrize("kind", MARKS)
def test_marks_reach_the_loss_at_their_places(kind, build_group, dataset):
    trainer = build_group(make_owner(make_method(marks=MARKS[kind])), TEXTS, max_completion_length=30)
    model, rows, loss = student_of(trainer), [dataset[index] for index in range(4)], 0.0
    for row, ids in zip(rows, trainer._generate_single_turn([None] * 4)[0], strict=True):
        prompt = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        log_prob = token_log_probs(raw_logits(model, prompt, ids), ids, trainer.args.temperature)
        words = [trainer.tokenizer.decode([token], skip_special_tokens=True) for token in ids]
        letters = torch.tensor([float(any(map(str.isalpha, word))) for word in words])
        mark = letters if kind == "of tokens" else float(len("".join(words)))
        loss = loss + (mark * log_prob).sum() / 4
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_step(whole_step(trainer, rows), (loss.item(), gradients))


def test_places_of_tokens_are_in_the_text_without_control_tokens(tokenizer):
    ids = [*tokenizer("so 12", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ends = text_ends(tokenizer, ids)
    assert len(ends) == len(ids) and ends[-1] == ends[-2] == len("so 12") and sorted(ends) == list(ends)


def some_unused(reasons):
    def contexts(group, settings, moment):
        found = [reasons[len(rollout.completion) % len(reasons)] for rollout in group]
        return [Unused(reason) if reason else (TeacherContext("plain", None, read=1.0),) for reason in found]

    return make_method(contexts=contexts, loss=lambda facts, settings, moment: facts.log_prob)


def test_rows_that_cannot_be_used_are_counted_by_reason(build_group, dataset):
    trainer = build_group(make_owner(some_unused(["no hint", ""])), TEXTS)
    whole_step(trainer, [dataset[index] for index in range(4)])
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rows/")}
    share = sum(len(text) % 2 == 0 for text in trainer._batch.texts) / 4
    assert 0 < share < 1 and logged == {"rows/used": 1 - share, "rows/no_hint": share}


def test_ten_batches_without_a_usable_row_are_told_once_and_survive_a_resume(build_group, dataset):
    trainer = build_group(make_owner(some_unused(["no hint"])), TEXTS)
    rows = [dataset[index] for index in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(9):
            whole_step(trainer, rows)
    trainer.groups.restore(trainer.groups.state())
    with pytest.warns(UserWarning, match=r"no rollout of 10 generation batches.*'no hint': 40"):
        whole_step(trainer, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole_step(trainer, rows)


def test_numbers_of_the_memory_are_logged(build_group, dataset):
    method = make_method(
        loss=lambda facts, settings, moment: facts.log_prob,
        remember=lambda memory, seen, settings: {"batches": memory.get("batches", 0) + 1},
        report=lambda memory: {"batches": memory["batches"]},
    )
    trainer = build_group(make_owner(method), TEXTS)
    for _ in range(2):
        whole_step(trainer, [dataset[index] for index in range(4)])
    assert trainer._metrics["train"]["method/batches"] == [1.0, 2.0]


def test_what_is_inferred_is_told_at_the_start_and_in_the_card(build_group):
    method = make_method(loss=lambda facts, settings, moment: facts.log_prob, inferred="The weight is ours.")
    with pytest.warns(UserWarning, match=r"seams is experimental\. The weight is ours\."):
        trainer = build_group(make_owner(method), TEXTS)
    assert "experimental. The weight is ours." in method_section(trainer.args, method, None)


@dataclass
class EngineConfig(OPSDConfig):
    """Corrects for the engine unless the cap is None."""

    engine_weight_cap: float | None = option(2.0, "Largest weight.")


def test_a_cap_of_the_engine_weight_switches_the_correction_on(tmp_path):
    config = EngineConfig(str(tmp_path), bf16=False)
    assert config.vllm_importance_sampling_correction and config.vllm_importance_sampling_mode == "token_truncate"
    assert config.vllm_importance_sampling_clip_max == 2.0
    assert not EngineConfig(str(tmp_path), bf16=False, engine_weight_cap=None).vllm_importance_sampling_correction


def test_engine_weights_are_one_without_a_correction():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert engine_weights({}, mask).tolist() == [[1.0] * 3] * 2
    of_tokens = torch.tensor([[1.5, 0.5, 1.0, 9.0], [2.0, 1.0, 1.0, 9.0]])
    assert engine_weights({"importance_sampling_ratio": of_tokens}, mask).tolist() == of_tokens[:, :3].tolist()
    of_rows = torch.tensor([[0.25], [2.0]])
    assert engine_weights({"importance_sampling_ratio": of_rows}, mask).tolist() == [[0.25] * 3, [2.0] * 3]


def test_the_moving_average_may_follow_generation_batches(build_group, dataset, monkeypatch):
    settings = {"teacher_model_kind": "ema", "teacher_update_rate": 0.5}
    trainer = build_group(
        make_owner(make_method(loss=lambda facts, settings, moment: facts.log_prob)),
        TEXTS,
        max_steps=4,
        steps_per_generation=2,
        **settings,
    )
    trainer.args.teacher_sync_steps = None  # a setting of the methods whose authors set it
    updates = []
    monkeypatch.setattr(trainer.teacher, "update", lambda: updates.append(trainer.state.global_step) or 0.0)
    trainer.train()
    assert updates == [2, 4]


@pytest.mark.parametrize("value", [0, -1])
def test_an_interval_of_the_moving_average_is_positive(value, tmp_path):
    with pytest.raises(ValueError, match="teacher_sync_steps"):
        SDPOConfig(str(tmp_path), bf16=False, teacher_sync_steps=value)


def test_only_the_teacher_or_the_student_writes(build_group, dataset):
    method = make_method(
        loss=lambda facts, settings, moment: facts.log_prob,
        asks=lambda rollout, settings: TeacherContext("teacher", rollout.solution, weights="base"),
    )
    trainer = build_group(make_owner(method), TEXTS)
    with pytest.raises(ValueError, match=r"asks names the weights \['base'\].*'teacher' or 'live'"):
        whole_step(trainer, [dataset[index] for index in range(4)])
