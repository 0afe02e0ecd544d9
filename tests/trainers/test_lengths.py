# SPDX-License-Identifier: Apache-2.0
"""Rows of an optimizer step stand by length in micro-batches without needless padding, and nothing else changes."""

import inspect
import re
from itertools import chain

import pytest
import torch
from datasets import Dataset
from pages import assert_same_step, moved, whole_step
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from trl_opsd import AntiSDTrainer, OGLSSDTrainer, OPSDTrainer, PBSDTrainer, SGSDTrainer
from trl_opsd._trl.versions import adds_up_over_rows, installed_fields
from trl_opsd.teacher.states import TargetStates
from trl_opsd.trainers import lengths
from trl_opsd.trainers.lengths import Lengths, by_length, cheapest_groups, shares_of_ranks

# From two tokens to eighty; right and wrong in every group of four.
TEXTS = (
    "so we add and carry, and add and carry, then look at it once more and get \\boxed{3}",
    "a",
    "wait, 10 it is, or 11 is it then, or 12 if not",
    "\\boxed{6}",
    "1+2=3",
    "no",
    "it is \\boxed{10} then, I would think so, but why would I think so, and not otherwise",
    "5 is it",
)
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_completion_length": 100}
GROUP = {"num_generations": 4}
METHODS = {
    "OPSD": (OPSDTrainer, {}),
    "OPSD with a short horizon": (OPSDTrainer, {"distillation_length": 5, "loss_reduction": "sequence"}),
    "OPSD with a reward": (OPSDTrainer, {**GROUP, "reward_weight": 0.5, "num_iterations": 2, "loss_type": "grpo"}),
    "OGLS-SD": (OGLSSDTrainer, {**GROUP, "distillation_length": None, "steering_warmup_steps": 0}),
    "AntiSD": (AntiSDTrainer, {**GROUP, "gate_warmup_batches": 0, "ascent_strength": 2.0}),
    "PBSD": (PBSDTrainer, {}),
    "SGSD": (SGSDTrainer, {}),
}


@pytest.fixture
def rows(dataset):
    """Rows of which some have no skill, and no two as many."""
    skills = (["Add in pairs.", "Do not guess."], ["Carry."], [], ["Count up.", "Check.", "Box it."])
    return Dataset.from_list([{**row, "skills": skills[place % 4]} for place, row in enumerate(dataset)])


@pytest.fixture
def make(build_group, rows):
    def make(trainer_class=OPSDTrainer, **settings):
        trainer = build_group(trainer_class, TEXTS, rows, **{**STEP, **settings})
        sample, calls = trainer._generate_single_turn, []

        def other_texts_at_each_call(prompts, *args, **kwargs):
            ids, rest = sample(prompts, *args, **kwargs)
            calls.append(len(ids))
            return ids[1 - len(calls) :] + ids[: 1 - len(calls)], rest

        if trainer.method.asks is not None:  # the model writes what its rollouts are compared with
            trainer._generate_single_turn = other_texts_at_each_call
        moved(trainer)
        return trainer

    return make


def step_of(trainer, rows, arranged=True):
    """Loss and gradients of a step, its micro-batches, and the positions that the student computed."""
    if not arranged:
        trainer.arrange_rows = lambda batches: batches
    positions = []
    hook = trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    torch.manual_seed(5)  # TRL shuffles
    trainer.model.train()
    size = trainer.num_generations
    step = whole_step(trainer, [rows[place] for place in range(8 // size) for _ in range(size)])
    hook.remove()
    batches = trainer._buffered_inputs
    return step, batches, positions[-len(batches) :]


def places(batches):
    return [batch["rollout_index"].tolist() for batch in batches]


@pytest.mark.parametrize("trainer_class, settings", METHODS.values(), ids=METHODS)
def test_loss_gradient_and_every_rows_log_are_those_of_padded_batches(make, rows, trainer_class, settings):
    ours, padded = make(trainer_class, **settings), make(trainer_class, **settings)
    got, batches, positions = step_of(ours, rows)
    wanted, before, computed = step_of(padded, rows, arranged=False)
    assert_same_step(got, wanted, rel=1e-6, abs=1e-8)
    assert places(batches) != places(before)
    assert sorted(chain(*places(batches))) == sorted(chain(*places(before)))
    assert sum(positions) < 0.85 * sum(computed)
    logged = [trainer.diagnostics["train"] for trainer in (ours, padded)]
    assert logged[0].row_divergences() == pytest.approx(logged[1].row_divergences(), rel=1e-5, abs=1e-9)
    means = [each.means(lambda sums: sums, torch.device("cpu")) for each in logged]
    assert means[0] == pytest.approx(means[1], rel=1e-5, abs=1e-9) and means[0]


def test_the_student_computes_each_micro_batch_to_its_longest_row(make, rows):
    """Prompts are equally long here, so the fewest positions are those of the rollouts by length."""
    trainer = make(num_generations=8)
    _, batches, positions = step_of(trainer, rows)
    own = sorted((len(trainer.tokenizer(text)["input_ids"]) + 1 for text in TEXTS), reverse=True)
    prompt = batches[0]["prompt_ids"].size(1)
    assert positions == [2 * (prompt + max(own[start : start + 2])) for start in range(0, 8, 2)]
    real = 8 * prompt + sum(own)
    assert sum(positions) < 1.15 * real
    trainer.arrange_rows = lambda batches: batches
    assert sum(step_of(trainer, rows, arranged=False)[2]) == 8 * (prompt + own[0]) > 1.5 * real


def test_of_a_row_that_nothing_is_distilled_of_one_token_is_read(make, rows):
    _, batches, positions = step_of(make(SGSDTrainer), [{**rows[0], "skills": own["skills"]} for own in rows])
    counts = dict(
        zip(chain(*places(batches)), torch.cat([batch["distillation_mask"].sum(1) for batch in batches]), strict=True)
    )
    assert counts[2] == counts[6] == 0 and TEXTS[6] == max(TEXTS, key=len)
    own = sorted((max(1, count.item()) for count in counts.values()), reverse=True)
    prompt = batches[0]["prompt_ids"].size(1)
    assert positions == [2 * (prompt + max(own[start : start + 2])) for start in range(0, 8, 2)]


def test_rows_stay_in_their_optimizer_step(make, rows):
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
    ours, padded = (step_of(make(**settings), rows, arranged)[1] for arranged in (True, False))
    assert places(ours) != places(padded)
    for step in (slice(0, 2), slice(2, 4)):
        assert sorted(chain(*places(ours[step]))) == sorted(chain(*places(padded[step])))
        assert len({batch["num_loss_items"].item() for batch in (*ours[step], *padded[step])}) == 1


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.5}, *[{name: 0.1} for name in installed_fields("entropy_coef")]],
    ids=str,
)
def test_where_trl_divides_by_a_micro_batch_it_is_cut_and_its_rows_stay(make, rows, settings):
    settings = {**GROUP, "reward_weight": 1.0, **settings}
    got, batches, positions = step_of(make(**settings), rows)
    wanted, before, computed = step_of(make(**settings), rows, arranged=False)
    assert places(batches) == places(before) and sum(positions) < sum(computed)
    assert_same_step(got, wanted, rel=1e-6, abs=1e-8)


def test_regrouping_would_change_what_trl_divides_by_a_micro_batch(make, rows, monkeypatch):
    settings = {**GROUP, "reward_weight": 1.0, "loss_type": "bnpo"}
    wanted = step_of(make(**settings), rows)[0][0]
    monkeypatch.setattr("trl_opsd.trainers.self_distillation.adds_up_over_rows", lambda config: True)
    assert step_of(make(**settings), rows)[0][0] != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("loss_type", ["cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"])
def test_the_losses_that_are_said_to_add_up_over_rows_do(make, rows, loss_type):
    settings = {**GROUP, "reward_weight": 1.0, "num_iterations": 2, "loss_type": loss_type}
    try:
        trainers = [make(**settings) for _ in range(2)]
        wanted = step_of(trainers[1], rows, arranged=False)
    except ValueError as error:
        assert f"Unknown loss type: {loss_type}" in str(error)  # of an older TRL
        return
    assert adds_up_over_rows(trainers[0].args)
    got = step_of(trainers[0], rows)
    assert places(got[1]) != places(wanted[1])
    assert_same_step(got[0], wanted[0], rel=1e-6, abs=1e-8)


@pytest.mark.skipif(not installed_fields("router_aux_loss_coef"), reason="this TRL has no router's loss")
def test_a_routers_loss_keeps_its_rows(build_group, rows, tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    results = []
    for arranged in (True, False):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **sizes, **heads, **experts))
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        results.append(step_of(build_group(OPSDTrainer, TEXTS, rows, model=model, **STEP), rows, arranged))
    (got, batches, positions), (wanted, before, computed) = results
    assert places(batches) == places(before) and sum(positions) < sum(computed)
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)


def test_a_batch_for_evaluation_is_cut_too(make, rows):
    trainer = make(SGSDTrainer)
    trainer.model.eval()
    batch = trainer._prepare_inputs([rows[2], rows[3]])
    assert batch["rollout_index"].tolist() == [0, 1]
    assert batch["distillation_mask"].any(0)[-1] and batch["prompt_mask"].any(0)[0]


def test_every_column_that_trl_makes_is_known():
    """But those of images, which no trainer here takes."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    named = set(re.findall(r'output\["(\w+)"\] = ', source)) | set(re.findall(r'^ {12}"(\w+)": ', source, re.MULTILINE))
    images = {"image", "pixel", "spatial", "token_type", "mm_token", "num_images", "num_tiles"}
    named = {name for name in named if not any(name.startswith(word) for word in images)}
    assert {"prompt_ids", "completion_mask", "old_per_token_logps", "advantages"} <= named
    assert named - {"num_items_in_batch"} <= set(lengths._TOKENS)


SHARED = ("number", "nothing")


def a_batch(*, rollouts, prompts, **columns):
    """Rows whose tokens are counted from 1, padded as TRL does."""
    width, before = 12, 6
    batch = {
        "prompt_ids": torch.tensor([[*[0] * (before - own), *range(1, own + 1)] for own in prompts]),
        "completion_ids": torch.tensor([[*range(1, own + 1), *[0] * (width - own)] for own in rollouts]),
        "number": torch.tensor(7),
        "nothing": None,
        "index": torch.arange(len(rollouts)) + columns.pop("first", 0),
    }
    for part in ("prompt", "completion"):
        batch[f"{part}_mask"] = (batch[f"{part}_ids"] != 0).long()
    batch["distillation_mask"] = batch["completion_mask"][:, :8].clone()
    batch["anchor_hidden"] = batch["completion_ids"][:, :8, None] * torch.ones(3)
    batch["view_log_probs"] = batch["completion_ids"][:, None, :10] * torch.ones(2, 1)
    batch["view_weights"] = torch.ones(len(rollouts), 2)
    batch["importance_sampling_ratio"] = torch.ones(len(rollouts), 1)
    return batch | columns


def test_columns_keep_their_rows_and_are_as_wide_as_the_longest_part():
    batches = [a_batch(rollouts=(2, 9), prompts=(1, 2)), a_batch(rollouts=(10, 3), prompts=(2, 5), first=2)]
    long, short = by_length(batches, regroups=True, reads_whole=False)
    assert long["index"].tolist() == [1, 2] and sorted(short["index"].tolist()) == [0, 3]
    assert long["prompt_ids"].tolist() == [[1, 2]] * 2 and short["prompt_ids"].size(1) == 5
    assert [long[name].size(-1) for name in ("completion_ids", "distillation_mask", "view_log_probs")] == [10, 8, 8]
    assert [short[name].size(-1) for name in ("completion_ids", "distillation_mask", "view_log_probs")] == [3, 3, 3]
    assert short["anchor_hidden"].shape == (2, 3, 3) and short["view_weights"].shape == (2, 2)
    assert torch.equal(short["anchor_hidden"][..., 0].long(), short["completion_ids"])
    assert short["importance_sampling_ratio"].shape == (2, 1) and short["number"] == 7 and short["nothing"] is None


def test_a_multiple_is_kept_as_far_as_the_batch_goes():
    (batch,) = by_length([a_batch(rollouts=(5, 2), prompts=(3, 1))], regroups=True, reads_whole=True, multiple=4)
    assert batch["prompt_ids"].size(1) == 4 and batch["completion_ids"].size(1) == 8
    (batch,) = by_length([a_batch(rollouts=(5, 2), prompts=(5, 1))], regroups=True, reads_whole=True, multiple=4)
    assert batch["prompt_ids"].size(1) == 6


def test_every_column_that_the_teacher_fills_is_known():
    columns = TargetStates.empty(
        (2, 3, 4),
        torch.float32,
        torch.device("cpu"),
        with_direction=True,
        view_weights=[[1.0]] * 4,
        num_view_tokens=3,
        extra_shape=(2, 5, 4),
    ).columns()
    assert len(columns) == 9
    assert all(lengths._is_known(name, column) for name, column in columns.items())


def test_a_column_of_an_unknown_kind_keeps_a_batch_as_it_is():
    for column in (torch.ones(2, 12), ["a", "b"]):
        batches = [a_batch(rollouts=(2, 9), prompts=(1, 2), later=column) for _ in range(2)]
        for own, batch in zip(by_length(batches, regroups=True, reads_whole=True), batches, strict=True):
            assert own.keys() == batch.keys() and all(own[name] is batch[name] for name in batch)


def test_a_batch_without_a_token_to_train_on_keeps_one_place():
    batch = a_batch(rollouts=(3, 2), prompts=(1, 2))
    batch["distillation_mask"].zero_()
    batch["completion_mask"].zero_()
    (cut,) = by_length([batch], regroups=True, reads_whole=True)
    assert cut["distillation_mask"].shape == cut["completion_ids"].shape == (2, 1)


def test_rows_stay_where_no_order_is_better():
    same = [Lengths(3, 5, 5, 0)] * 4
    assert cheapest_groups(same, 2, True) == [[0, 1], [2, 3]]
    assert cheapest_groups([Lengths(3, own, own, 0) for own in (1, 9, 4, 8)], 1, True) == [[0], [1], [2], [3]]
    assert cheapest_groups([Lengths(3, own, own, 0) for own in (1, 9, 2, 8)], 2, True) == [[1, 3], [2, 0]]
    extras = [Lengths(1, 1, 1, own) for own in (9, 1, 9, 1)]
    assert cheapest_groups(extras, 2, False) == [[0, 2], [1, 3]]


def rollouts_of(*sizes):
    return [Lengths(3, own, own, 0) for own in sizes]


def test_ranks_get_about_equal_work_the_longest_first():
    """The first rank sampled all that is long."""
    shares = shares_of_ranks(rollouts_of(90, 80, 70, 60, 4, 3, 2, 1), num_ranks=2, size=1, reads_whole=True)
    assert shares == [[[0], [3], [4], [7]], [[1], [2], [5], [6]]]
    shares = shares_of_ranks(rollouts_of(90, 88, 80, 70, 4, 3, 2, 1), num_ranks=2, size=2, reads_whole=True)
    assert shares == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]


def test_rows_keep_their_rank_where_moving_saves_it_little():
    shares = shares_of_ranks(rollouts_of(90, 4, 89, 3), num_ranks=2, size=1, reads_whole=True)
    assert shares == [[[0], [1]], [[2], [3]]]
    shares = shares_of_ranks(rollouts_of(90, 80, 4, 89, 3, 2), num_ranks=1, size=3, reads_whole=True)
    assert shares == [[[0, 3, 1], [2, 4, 5]]]


def test_rows_of_another_rank_are_padded_where_theirs_are():
    """Of other widths and another number of views."""
    ours = a_batch(rollouts=(2, 9), prompts=(1, 4))
    theirs = {name: column[:1] for name, column in a_batch(rollouts=(5,), prompts=(2,)).items() if name not in SHARED}
    theirs["view_log_probs"], theirs["view_weights"] = torch.ones(1, 3, 5), torch.ones(1, 3)
    rows = [*lengths._rows_of(ours, [*theirs]), *lengths._rows_of(theirs, [*theirs])]
    rows[2] = {name: lengths._cut(name, column, Lengths(2, 5, 5, 1)) for name, column in rows[2].items()}
    batch = lengths._join([rows[0], rows[2]], Lengths(2, 5, 5, 1))
    assert batch["prompt_ids"].tolist() == [[0, 1], [1, 2]]
    assert batch["completion_ids"].tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert batch["view_log_probs"].shape == (2, 3, 5) and batch["view_weights"].tolist() == [[1, 1, 0], [1, 1, 1]]
    longer = lengths._join([rows[2], rows[1]], Lengths(4, 9, 8, 1))
    assert longer["prompt_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert longer["completion_mask"].sum(1).tolist() == [5, 9] and longer["anchor_hidden"].shape == (2, 8, 3)
    assert longer["anchor_hidden"][0, 5:].abs().sum() == 0 and longer["importance_sampling_ratio"].shape == (2, 1)
