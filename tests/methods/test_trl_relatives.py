# SPDX-License-Identifier: Apache-2.0
"""TRL's own SDPO and SDFT trainers beside ours, on the same rollouts, prompts and weights.

They are experimental in TRL and do not stand in its oldest versions. Where a setting has no counterpart, the difference is a
number that is computed here from the counts of the batch.
"""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from groups import TEXTS, reward_boxed
from pages import assert_same_step, gradients_of, moved, prepared, whole_step

from trl_opsd.losses import Divergence, Support, token_divergence
from trl_opsd.trainers.sdft import SDFTTrainer
from trl_opsd.trainers.sdpo import SDPOTrainer

sdft = pytest.importorskip("trl.experimental.sdft")
sdpo = pytest.importorskip("trl.experimental.sdpo")

GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 40}
KINDS = {"base": "base", "live": "live"}


@pytest.fixture
def build_theirs(make_model, tokenizer, tmp_path):
    """A function that makes one of TRL's trainers, whose rollouts are given texts."""

    def build(module, name, rows, texts, **settings):
        shared = {
            "output_dir": str(tmp_path / "theirs"),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "gradient_accumulation_steps": 1,
            "max_prompt_length": None,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        keywords = {"reward_funcs": reward_boxed} if name == "SDPO" else {}
        model = make_model(torch.float64)
        model.save_pretrained(tmp_path / "first")
        model.config._name_or_path = str(tmp_path / "first")  # from where TRL loads a teacher that is not the student
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL's, of what is experimental
            trainer = getattr(module, f"{name}Trainer")(
                model=model,
                args=getattr(module, f"{name}Config")(**{**shared, **settings}),
                train_dataset=rows,
                processing_class=copy.deepcopy(tokenizer),
                **keywords,
            )

        def generate(prompt_ids):
            return prompt_ids, [ids_of(tokenizer, texts[place % len(texts)]) for place in range(len(prompt_ids))]

        trainer._generate = generate
        return trainer

    return build


def ids_of(tokenizer, text):
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def their_step(trainer, rows):
    """Loss and gradients of TRL's step over `rows`, and its batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_training_batch(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return (loss.item(), gradients_of(trainer.model)), batch


def scaled(step, factor):
    return step[0] * factor, {name: gradient * factor for name, gradient in step[1].items()}


def old_shift(rows):
    """Changes of the sampled tokens' log-probabilities since they were sampled, of each of a batch's places."""
    return 0.8 * torch.randn(rows, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# SDPO

SDPO_ROWS = [index for index in (0, 5) for _ in range(4)]
FEEDBACK = "Test 2 failed."


@pytest.fixture
def sdpo_pair(build_group, build_theirs, dataset):
    """Our trainer and TRL's with equal settings, and their rows."""

    def build(kind="base", divergence="jsd", feedback=False, **ours):
        own = [{**row, "feedback": FEEDBACK, "privileged_context": FEEDBACK} for row in dataset]
        rows = Dataset.from_list(own) if feedback else dataset
        trainer = build_group(
            SDPOTrainer,
            TEXTS,
            rows=rows,
            teacher_model_kind=kind,
            divergence=divergence,
            **{**GROUPS, "support_size": 20, "loss_reduction": "sequence", **ours},
        )
        args = trainer.args
        theirs = build_theirs(
            sdpo,
            "SDPO",
            rows,
            TEXTS,
            **GROUPS,
            teacher_model_kind=kind,
            temperature=args.temperature,
            distillation_mode="topk_logits",
            distillation_topk=20,
            distillation_add_tail=True,
            distillation_alpha={"jsd": 0.5, "reverse_kl": 1.0}[divergence],
            distillation_is_clip=args.importance_cap,
            success_reward_threshold=args.reward_threshold,
            remove_thinking_from_demonstration=args.strip_thinking,
            reprompt_template="{prompt}{solution}{feedback}\n\nSolve the problem.",
            solution_template=args.peer_block.replace("{text}", "{successful_previous_attempt}"),
            feedback_template=args.feedback_block.replace("{text}", "{feedback_raw}"),
            include_environment_feedback=feedback,
            environment_feedback_only_without_solution=not args.feedback_beside_peer,
        )
        for each in (trainer, theirs):
            moved(each)
        return trainer, theirs, [rows[index] for index in SDPO_ROWS]

    return build


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
@pytest.mark.parametrize("kind", KINDS)
def test_sdpo_is_trls_but_for_the_rollouts_that_are_left_out(sdpo_pair, kind, divergence):
    """TRL divides by all rollouts of a batch, those without a peer among them; ours by those that are trained."""
    ours, theirs, rows = sdpo_pair(kind, divergence)
    step, batch = their_step(theirs, rows)
    used = batch["self_distillation_mask"].sum().item()
    assert used == 7
    got = whole_step(ours, rows)
    assert got[0] > 1e-3
    assert_same_step(got, scaled(step, 8 / used))


@pytest.mark.parametrize("beside", [False, True])
def test_sdpo_with_feedback_is_trls_to_rounding_where_every_rollout_is_trained(sdpo_pair, beside):
    ours, theirs, rows = sdpo_pair(feedback=True, feedback_beside_peer=beside)
    step, batch = their_step(theirs, rows)
    assert batch["self_distillation_mask"].all()
    assert_same_step(whole_step(ours, rows), step)


def test_sdpos_ratio_to_the_policy_that_sampled_is_trls(sdpo_pair):
    ours, theirs, rows = sdpo_pair(feedback=True)
    batch = prepared(ours, rows)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        now = ours.policy_logps(ours.model, batch)[0]
    order, shift = batch["rollout_index"], old_shift(8)[:, :length]  # TRL has shuffled our batch
    batch["old_per_token_logps"] = now + shift[order]
    ours.model.zero_grad()
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()
    own = torch.empty_like(now)
    own[order] = now
    their_batch = theirs._prepare_training_batch(rows)
    their_batch["old_per_token_logps"] = own + shift
    theirs.model.zero_grad()
    theirs.current_gradient_accumulation_steps = 1
    other = theirs.compute_loss(theirs.model, their_batch)
    other.backward()
    assert (-shift[their_batch["completion_mask"].bool()]).exp().max() > 2  # the cap binds
    assert_same_step((loss.item(), gradients_of(ours.model)), (other.item(), gradients_of(theirs.model)))


def test_sdpos_mean_over_tokens_differs_from_trls_by_the_lengths_of_rollouts(sdpo_pair):
    """The paper's mean is ours by default; from each rollout's mean of TRL's loss, and the lengths, it follows."""
    ours, theirs, rows = sdpo_pair(feedback=True, loss_reduction="token")
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    batch = theirs._prepare_training_batch(rows)
    with torch.no_grad():
        means = []
        for row in range(8):
            part = {name: value[row : row + 1] for name, value in batch.items() if torch.is_tensor(value)}
            means.append(theirs.compute_loss(theirs.model, part).item())
    lengths = batch["completion_mask"].sum(1).tolist()
    wanted = sum(mean * length for mean, length in zip(means, lengths, strict=True)) / sum(lengths)
    got = whole_step(ours, rows)[0]
    assert got == pytest.approx(wanted, rel=1e-6)
    assert abs(got - sum(means) / 8) > 1e-3 * got


# SDFT

LONG = ("1+2=3 or so", "so \\boxed{3}", "wait, 10 it is", "it is")


@pytest.fixture
def sdft_pair(build_group, build_theirs, dataset):
    def build(kind="base", skip=3, their_skip=None, texts=LONG, **theirs):
        rows = Dataset.from_list([{**row, "privileged_context": row["solution"]} for row in dataset])
        ours = build_group(
            SDFTTrainer,
            texts,
            rows=rows,
            teacher_model_kind=kind,
            max_completion_length=40,
            num_loss_tokens_to_skip=skip,
            loss_reduction="sequence",
        )
        settings = {"distillation_mode": "full_logits", "distillation_alpha": 0.0, **theirs}
        other = build_theirs(
            sdft,
            "SDFT",
            rows,
            texts,
            max_completion_length=40,
            per_device_train_batch_size=4,
            num_generations=4,  # of rows, which are given one by one below
            teacher_model_kind=kind,
            temperature=ours.args.temperature,
            num_loss_tokens_to_skip=skip,
            teacher_prompt_template=ours.args.teacher_prompt_template.replace("{solution}", "{privileged_context}"),
            **settings,
        )
        for each in (ours, other):
            moved(each)
        return ours, other, [rows[index] for index in range(4)]

    return build


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_sdft_is_trls_with_forward_kl_over_the_whole_vocabulary(sdft_pair, kind, skip):
    ours, theirs, rows = sdft_pair(kind, skip)
    step, _ = their_step(theirs, rows)
    got = whole_step(ours, rows)
    assert got[0] > 1e-3
    assert_same_step(got, step)


def test_sdft_divides_by_rollouts_that_are_longer_than_what_is_skipped_and_trl_by_all(sdft_pair):
    ours, theirs, rows = sdft_pair(texts=(*LONG[:3], "a"))
    step, batch = their_step(theirs, rows)
    assert (batch["completion_mask"].sum(1) > 3).sum() == 3
    assert_same_step(whole_step(ours, rows), scaled(step, 4 / 3))


def test_sdft_in_trls_default_is_another_loss(sdft_pair):
    """JSD over the student's 100 likeliest tokens, put to 1, where the paper's runs had forward KL over all."""
    ours, theirs, rows = sdft_pair(distillation_mode="topk_logits", distillation_alpha=0.5, distillation_topk=20)
    default, _ = their_step(theirs, rows)
    ours.method_loss.divergence = Divergence("jsd", support=Support(20, remainder="renormalise"))
    assert_same_step(whole_step(ours, rows), default)
    ours.method_loss.divergence = Divergence("forward_kl")
    assert whole_step(ours, rows)[0] > 1.5 * default[0]


# The loss functions alone


@pytest.mark.parametrize(("name", "alpha"), [("forward_kl", 0.0), ("jsd", 0.3), ("reverse_kl", 1.0)])
@pytest.mark.parametrize("tail", [True, False])
def test_the_functions_of_trl_over_likely_tokens_are_ours_with_a_support(name, alpha, tail):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    settings = {"distillation_topk": 4, "distillation_alpha": alpha, "distillation_add_tail": tail}
    results = []
    for value_of in (
        lambda logits: compute_topk_self_distillation_loss(logits, teacher, **settings),
        lambda logits: token_divergence(
            logits,
            teacher,
            divergence=name,
            mixture_weight=alpha or 0.5 if name == "jsd" else 0.5,
            support=Support(4, remainder="tail" if tail else "renormalise"),
        ),
    ):
        logits = student.clone().requires_grad_()
        values = value_of(logits)
        results.append((values.detach(), torch.autograd.grad(values.sum(), logits)[0]))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
