# SPDX-License-Identifier: Apache-2.0
"""What the inspector shows of a method is what the trainer's own step computes of the same rollouts, one method of each kind.

The trainer's rules are recorded while it takes a step; the inspector reads the same rollouts with the same weights, dense.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from inspected import GROUPS, HOT, TEXTS, WRONG, close
from trl import ModelConfig

from trl_opsd.commands.train import parse_as
from trl_opsd.inspect.page import page_payload
from trl_opsd.inspect.records import SampledRollout
from trl_opsd.inspect.rules import group_advantages
from trl_opsd.inspect.run import InspectArguments, make_inspector, run_inspect
from trl_opsd.inspect.views import pool_names
from trl_opsd.pages import trainer_of
from trl_opsd.teacher.contexts import TeacherContext


def by_row(step, choose):
    """What is chosen of the facts and the weights of each tile, as rows (B, D)."""
    shape = step.batch["distillation_mask"].shape
    flat = torch.zeros(shape.numel(), dtype=torch.float64)
    flat[step.batch["distilled_positions"]] = torch.cat(
        [choose(*tile).double() for tile in step.recorded["token_weight"]]
    )
    return flat.view(shape)


@pytest.mark.parametrize("name", ["sdpo", "demopsd"])
def test_a_weighed_divergence_is_the_trainers(step, name):
    taken = step(name, **GROUPS, **HOT, support_size=20)
    divergences, weights = (by_row(taken, choose) for choose in (lambda facts, _: facts.divergence, lambda _, own: own))
    total = 0.0
    assert len(taken.records) == 4
    for record in taken.records:
        row, length = taken.row_of(record), len(record.ids)
        close(record.values["divergence"], divergences[row, :length])
        close(record.values["weight"], weights[row, :length])
        close(record.values["term"], (weights * divergences)[row, :length])
        total += sum(record.values["term"])
    assert total / taken.batch["num_loss_items"].item() == pytest.approx(taken.loss.item(), rel=1e-5)
    names = [view.name for view in taken.records[0].views]
    assert names[:2] == ["student", "target"] and ("peer" if name == "sdpo" else "teacher") in names


def test_views_of_other_weights_and_several_that_are_read_have_names_of_their_own():
    shares = [TeacherContext("peer", "x", anchor=1.0, weights=owner) for owner in ("base", "live")]
    assert pool_names(shares) == ["peer (base)", "peer (live)"]
    skills = [TeacherContext("skill", None, texts=(("skill", text),), read=0.5) for text in "ab"]
    assert pool_names(skills) == ["skill 1", "skill 2"]
    assert pool_names(skills[:1]) == ["skill"]


def test_advantages_and_the_read_view_are_the_trainers(step):
    taken = step("antisd", **GROUPS, **HOT, ascent_strength=2.0, gate_warmup_batches=0)
    (facts, advantages), used = taken.recorded["advantages"][0], 0
    for record in taken.records:
        row, length = taken.row_of(record), len(record.ids)
        close(record.values["advantage"], advantages[row, :length])
        (view,) = [view for view in record.views if view.weight is not None]
        close(view.log_prob, facts.given["view_log_probs"][0, row, :length])
        close(view.entropy, facts.given["view_entropies"][0, row, :length])
        close(record.values["ratio@0"], (facts.given["view_log_probs"][0] - facts.log_prob)[row, :length])
        assert record.numbers["advantage of TRL"] == pytest.approx(facts.given["advantage"][row, 0].item(), abs=1e-5)
        assert "divergence" not in record.values and view.name == "verdict"
        used += 1
    assert used == 4 and taken.inspector.memory["ascends"] == 1.0


def test_without_the_memory_of_a_run_the_gate_does_not_act(step):
    taken = step("antisd", **GROUPS, ascent_strength=2.0, gate_warmup_batches=0)
    group = [SampledRollout(record.rollout, record.ids) for record in taken.records]
    fresh = replace(taken.inspector, memory={}).inspect_group(group)
    for record in fresh:
        close(record.values["advantage"], torch.full((len(record.ids),), record.numbers["advantage of TRL"]))


def test_a_term_of_a_loss_and_its_push_are_the_trainers(step):
    taken = step("egrsd", max_completion_length=24, **HOT)
    (_, terms), *_ = taken.recorded["loss"]
    texts = [rollout.completion for rollout in taken.trainer._batch.rollouts]
    single = [
        SampledRollout(rollout, ids)
        for rollout, ids in zip(taken.trainer._batch.rollouts, taken.trainer._batch.ids, strict=True)
    ]
    total = 0.0
    for place, sampled in enumerate(single):
        (record,) = taken.inspector.inspect_group([sampled])
        row, length = taken.order.index(place), len(record.ids)
        close(record.values["term"], terms[row, :length])
        total += sum(record.values["term"])
        own = torch.tensor(record.views[0].log_prob, dtype=torch.float64)
        close(torch.tensor(record.values["push"]) * own, -terms[row, :length])  # the term is linear in log q
    assert total / taken.batch["num_loss_items"].item() == pytest.approx(taken.loss.item(), rel=1e-5)
    assert len(set(texts)) == 4


def test_a_loss_of_the_rollout_and_its_views_are_the_trainers(step):
    taken = step("sgsd", max_completion_length=24)
    (facts, losses), *_ = taken.recorded["loss"]
    for place, (rollout, ids) in enumerate(zip(taken.trainer._batch.rollouts, taken.trainer._batch.ids, strict=True)):
        (record,) = taken.inspector.inspect_group([SampledRollout(rollout, ids)])
        row = taken.order.index(place)
        assert record.numbers["loss of the rollout"] == pytest.approx(losses[row].item(), abs=1e-5)
        read = [view for view in record.views if view.weight is not None]
        assert [view.name for view in read] == ["skill 1", "skill 2"]
        for k, view in enumerate(read):
            assert view.weight == pytest.approx(facts.given["view_weights"][k, row, 0].item())
            given = facts.given["view_log_probs"][k, row, : len(ids)]  # up to the last token that counts
            close(view.log_prob[: len(given)], given)
        ended = record.values["trained"]
        assert ended[-1] == 0.0 and record.values["push"][-1] == 0.0, "the end token is never trained on"


def test_the_sequence_beside_a_rollout_is_shown_with_its_push(step):
    taken = step("sort", texts=WRONG, **GROUPS, repair_weight=0.7)
    (facts, losses), *_ = taken.recorded["loss"]
    rollout, beside = taken.records
    row = taken.row_of(rollout)
    assert rollout.numbers["loss of the rollout"] == pytest.approx(losses[row].item(), abs=1e-5)
    assert losses[row] > 0 and beside.is_extra and not rollout.is_extra
    length = len(beside.ids)
    close(beside.views[0].log_prob, facts.extra.log_prob[row, :length])
    (view,) = [view for view in beside.views if view.weight is not None]
    close(view.log_prob, facts.extra.given["view_log_probs"][0, row, :length])
    weight = (0.5 * (torch.tensor(view.log_prob) + torch.tensor(beside.views[0].log_prob))).exp()
    close(beside.values["push"], 0.7 * weight)  # of the mean over tokens, times their number


def test_a_page_of_rollouts_that_are_not_read_says_why(tmp_path):
    from trl_opsd.demo import model_path

    rows = [
        {"prompt": [{"role": "user", "content": "1+2=?"}], "completion": text, "solution": "\\boxed{3}"}
        for text in WRONG
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--method", "sdpo", "--model_name_or_path", model_path(), "--output_dir", str(tmp_path / "x")]
    words += ["--completions", str(tmp_path / "rows.jsonl"), "--schedule_step", "7", "--num_generations", "4"]
    words += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"]
    with pytest.raises(
        ValueError, match=r"none of the 4 rollouts, by reason \{'no (view|right peer).*': 4\}.*\(7 now\)"
    ):
        run_inspect(words)


def test_what_the_model_writes_is_sampled_for_the_page(step):
    taken = step("pbsd", max_completion_length=24)
    rollout = replace(taken.trainer._batch.rollouts[0], written=None)
    record, beside = taken.inspector.inspect_group([SampledRollout(rollout, taken.trainer._batch.ids[0])])
    assert record.rollout.written.ids[:24] == beside.ids
    payload = page_payload([record, beside], str, "t", {})
    assert payload["rollouts"][0]["written"] == record.rollout.written.text
    assert payload["rollouts"][1]["isExtra"]
    assert "loss of the rollout" in payload["rollouts"][0]["numbers"]


def test_marks_reach_the_rules_and_the_page(step):
    taken = step("egrsd", max_completion_length=24)
    method = replace(
        taken.trainer.method,
        marks=lambda group, settings, moment: [[float(end) for end in rollout.token_ends] for rollout in group],
        loss=lambda facts, settings, moment: facts.given["mark"] * facts.log_prob,
    )
    inspector = replace(taken.inspector, method=method)
    (record,) = inspector.inspect_group([SampledRollout(taken.trainer._batch.rollouts[0], taken.trainer._batch.ids[0])])
    close(record.values["push"], -torch.tensor(record.values["mark"]))
    assert record.values["mark"][0] > 0


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_of_a_group_are_trls(make_args, scale):
    from trl_opsd.trainers.antisd import AntiSDConfig

    args = make_args(AntiSDConfig, num_generations=4, scale_rewards=scale, reward_weight=2.0)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5])
    expected = 2 * (rewards - rewards.mean()) / (rewards.std() + 1e-4 if scale == "group" else 1.0)
    close(group_advantages(rewards.tolist(), args), expected)
    assert group_advantages([1.0, None, 0.0, None], args)[1] == 0.0
    assert group_advantages([1.0], args) == [0.0]


@pytest.mark.parametrize("name", ["antisd", "sdpo"])
def test_memory_and_moving_average_of_a_run_are_read_from_its_checkpoint(name, step, tmp_path, tokenizer):
    run, base, page = tmp_path / "run", tmp_path / "base", tmp_path / "page.html"
    settings = {
        "output_dir": str(run),
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
        "learning_rate": 1e-2,
    }
    taken = step(name, **GROUPS, **settings)
    trainer = taken.trainer
    taken.inspector.teacher.float().save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer.train()
    words = ["--method", name, "--model_name_or_path", str(base), "--output_dir", str(tmp_path / "x")]
    words += ["--num_generations", "4", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"]
    words += ["--student_model_name_or_path", str(run / "checkpoint-1"), "--max_completion_length", "24"]
    rows = [
        {"prompt": [{"role": "user", "content": "1+2=?"}], "completion": text, "solution": "\\boxed{3}"}
        for text in TEXTS
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words += ["--completions", str(tmp_path / "rows.jsonl"), "--output", str(page)]
    types = (InspectArguments, trainer_of(name).config_class, ModelConfig)
    made = make_inspector(*parse_as(types, "inspect", ["--bf16", "false", *words]))
    if name == "antisd":
        assert made.memory == trainer.memory and made.memory["warmup"]
    else:
        own, values = dict(made.average.named_parameters()), trainer.teacher.values
        assert all(torch.allclose(own[key], value.float()) for key, value in values.items())
        assert not torch.equal(own["lm_head.weight"], made.student.lm_head.weight)
    run_inspect(words)
    (text,) = re.findall(r'id="payload">(.*?)</script>', page.read_text(), re.DOTALL)
    facts = json.loads(text)["facts"]
    assert ("memory of the method" in facts) is (name == "antisd")
    assert facts["teacher's weights"] == {"antisd": "the student's", "sdpo": "moving average"}[name]


SINGLE = {"max_completion_length": 24}
FAMILY = {
    "sdft": SINGLE,
    "mopd": {**GROUPS, "support_size": 20},
    "resd": {**SINGLE, "support_size": 20, "write_review": False},
    "vopd": SINGLE,
    "vpd": {**GROUPS, "support_size": 20, "gradient_accumulation_steps": 1},
    "rethinking-opd": {**GROUPS, "support_size": 5},
    "popd": {**SINGLE, "distillation_length": 6},
    "rlsd": GROUPS,
    "rlrt": GROUPS,
    "dasd": {**GROUPS, "direction_strength": 1.0},
    "ssopd": {**GROUPS, "frontier_strength": 2.0},
    "trace": {**GROUPS, "span_weight": 2.0, "max_span_share": 1.0},
    "msd": SINGLE,
}


@pytest.mark.parametrize("name", FAMILY)
def test_what_every_other_rule_gives_is_the_trainers(step, name):
    """Weights, terms, losses of rollouts and advantages, whichever the method has."""
    taken = step(name, **FAMILY[name])
    own, found = taken.trainer._batch, 0
    weights = by_row(taken, lambda _, given: given) if "token_weight" in taken.recorded else None
    size = taken.trainer.args.num_generations
    for start in range(0, len(own.ids), size):
        group = [SampledRollout(own.rollouts[place], own.ids[place]) for place in range(start, start + size)]
        for record in taken.inspector.inspect_group(group):
            place = next(
                i for i in range(start, start + size) if own.rollouts[i].completion == record.rollout.completion
            )
            row, length = taken.order.index(place), len(record.ids)
            mask = taken.batch["distillation_mask"][row, :length].double()
            if weights is not None:
                close(record.values["weight"], weights[row, :length])
            for rule, value in (("loss", "term"), ("advantages", "advantage")):
                for facts, result in taken.recorded[rule]:
                    if taken.trainer.method.pointwise:
                        whole = torch.zeros_like(taken.batch["distillation_mask"], dtype=result.dtype)
                        whole.view(-1)[taken.batch["distilled_positions"]] = result
                        close(record.values[value], whole[row, :length])
                    elif result.ndim == 1:
                        assert record.numbers["loss of the rollout"] == pytest.approx(result[row].item(), abs=1e-4)
                    elif rule == "loss":
                        close(record.values[value], result[row, :length] * mask)
                    else:
                        known = facts.given["advantage"][row, :length].double()
                        close(record.values[value], torch.where(mask != 0, result[row, :length].double(), known))
            found += 1
    assert found > 0 and (weights is not None or taken.recorded)


def test_a_term_of_extras_is_shown_beside_the_rollout_with_its_weight(step):
    taken = step("stableopd", **GROUPS, **HOT, gradient_accumulation_steps=1, golden_weight=0.7, reference_weight=0.3)
    (_, terms), total, golden = taken.recorded["loss"][0], 0.0, []
    for record in taken.records:
        if record.is_extra:
            golden.append(sum(record.values["term"]) / len(record.ids))
            close(record.values["push"], torch.full((len(record.ids),), 0.7))
            close(record.values["term"], -0.7 * torch.tensor(record.views[0].log_prob))
        else:
            close(record.values["term"], terms[taken.row_of(record), : len(record.ids)])
            total += sum(record.values["term"])
    assert len(golden) == 1 and len(taken.records) == 5
    assert total / taken.batch["num_loss_items"].item() + golden[0] == pytest.approx(taken.loss.item(), rel=1e-5)
    target = [view for view in taken.records[0].views if view.name == "plain (base)"]
    assert len(target) == 1 and max(taken.records[0].values["divergence"]) > 1e-3


@pytest.mark.filterwarnings("ignore:.* is experimental")
def test_the_chosen_draft_is_shown_beside_the_rollout_and_the_parts_add_up_to_the_loss(step):
    small = {"num_generations": 1, "per_device_train_batch_size": 4, "max_completion_length": 24}
    taken = step("brts", **small, **HOT, gradient_accumulation_steps=1, candidate_weight=0.7, support_size=20)
    totals, counts = {False: 0.0, True: 0.0}, {False: 0, True: 0}
    for record in taken.records:
        values = record.values["term" if record.is_extra else "divergence"]
        totals[record.is_extra] += sum(values)
        counts[record.is_extra] += len(values)
    assert min(counts.values()) > 0 and min(totals.values()) > 1e-2
    total = totals[False] / counts[False] + totals[True] / counts[True]
    assert total == pytest.approx(taken.loss.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.* is experimental")
def test_drafts_that_are_not_known_are_written_rewarded_and_compared(step):
    small = {"num_generations": 1, "per_device_train_batch_size": 4, "max_completion_length": 24}
    taken = step("brts", **small, gradient_accumulation_steps=1, support_size=20)
    own = taken.trainer._batch
    bare_ones = [SampledRollout(replace(each, drafts=()), ids) for each, ids in zip(own.rollouts, own.ids, strict=True)]
    drafts = [record.rollout.drafts for sampled in bare_ones for record in taken.inspector.inspect_group([sampled])]
    found = [draft for each in drafts for draft in each]
    assert {len(each) for each in drafts} <= {2, 3}
    assert all(each[0].ids != each[1].ids for each in drafts), "two answers to one prompt"
    assert {draft.reward for draft in found} <= {0.0, 1.0} and 0 < max(draft.overlap for draft in found) <= 1
