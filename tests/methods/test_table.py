# SPDX-License-Identifier: Apache-2.0
"""Every method times every property: a new method is a row of `METHODS` and gets the tests for nothing.

Two ranks are one in `tests/engines`, whose cells take the same rows.
"""

import copy
import operator
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from groups import reward_boxed
from steps import EXACT, loss_of_rows

from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.experimental.brts.trainer import BRTSTrainer
from trl_opsd.experimental.dasd.trainer import DASDTrainer
from trl_opsd.experimental.egrsd.trainer import EGRSDTrainer
from trl_opsd.experimental.msd.trainer import MSDTrainer
from trl_opsd.experimental.sort.trainer import SORTTrainer
from trl_opsd.experimental.ssopd.trainer import SSOPDTrainer
from trl_opsd.experimental.stableopd.trainer import StableOPDTrainer
from trl_opsd.experimental.trace.trainer import TRACETrainer
from trl_opsd.experimental.vpd.trainer import VPDTrainer
from trl_opsd.teacher.prompts import TeacherCollator
from trl_opsd.trainers.antisd import AntiSDTrainer
from trl_opsd.trainers.critique import CritiqueSDTrainer
from trl_opsd.trainers.demopsd import DemoPSDTrainer
from trl_opsd.trainers.mopd import MOPDTrainer
from trl_opsd.trainers.pbsd import PBSDTrainer
from trl_opsd.trainers.popd import POPDTrainer
from trl_opsd.trainers.rcsd import RCSDTrainer
from trl_opsd.trainers.resd import RESDTrainer
from trl_opsd.trainers.rethinking_opd import RethinkingOPDTrainer
from trl_opsd.trainers.rlrt import RLRTTrainer
from trl_opsd.trainers.rlsd import RLSDTrainer
from trl_opsd.trainers.sdft import SDFTTrainer
from trl_opsd.trainers.sdpo import SDPOTrainer
from trl_opsd.trainers.sgsd import SGSDTrainer
from trl_opsd.trainers.vopd import VOPDTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.* is experimental")  # which pages of experimental/ say

TEXTS = ("so \\boxed{3}", "wait, 10 it is", "a", "it is \\boxed{10} then", "no", "5 or \\boxed{6}")
MOSTLY_WRONG = ("wait, 10 it is", "a", "so \\boxed{3}", "\\boxed{10}", "no", "5", "b", "it is 6 then")
MOSTLY_RIGHT = ("so \\boxed{3}", "\\boxed{10}", "a", "it is \\boxed{10} then", "5 or \\boxed{6}", "no")
SKILLS = (["Add in pairs.", "Do not guess."], ["Carry."], ["Count up.", "Check.", "Box it."])
FEEDBACK = ("test 2 failed", None, "off by 1")
CRITIQUES = ("first add, then \\boxed{3}", "1+2 is 3, then go on", "it is right")
RUBRICS = (["adds", "boxes"], [], ["adds"])


def spans_of(rollout):
    """A short key span in longer texts."""
    return [(1, 4, "K", "a sum")] if len(rollout.completion) > 12 else []


def no_columns(place: int) -> dict[str, Any]:
    return {}


def trained_tokens(batch) -> float:
    return batch["num_loss_items"].item()


def trained_rollouts(batch) -> float:
    return batch["num_loss_rows"].item()


def sampled_tokens(batch) -> float:
    return batch["completion_mask"].sum().item()


@dataclass
class Row:
    """A method under test.

    Attributes:
        trainer: its class.
        settings: of its config, where a tiny step needs others than the paper's.
        columns: from a row's place in the dataset to the columns that the method reads beside prompt and solution.
        texts: that are sampled, four of them in a row by a group.
        not_zero: why a teacher that reads what the student reads does not give loss and gradient 0; empty where it
            does.
        equality: where `not_zero` says that it is not 0: settings of that step, and those by which a step with the
            method's own contexts is the same; None where no setting takes the teacher out.
        count: from a micro-batch to the count that its loss is divided by, or a part of it.
        not_divided: why the loss of a batch is not that of its groups by one count; empty where it is.
        memory: what the method remembers, held where groups are compared with and without companions, which it also
            sums up; None where it remembers nothing.
        updates: of a generation batch, in the run that is resumed.
    """

    trainer: type
    settings: dict[str, Any] = field(default_factory=dict)
    columns: Callable[[int], dict[str, Any]] = no_columns
    texts: tuple[str, ...] = TEXTS
    not_zero: str = ""
    equality: tuple[dict[str, Any], dict[str, Any]] | None = None
    count: Callable[[Any], float] = trained_tokens
    not_divided: str = ""
    memory: dict[str, Any] | None = None
    updates: int = 2


GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 24}
METHODS = {
    "OPSD": Row(OPSDTrainer, {"clip": None}),
    "OPSD in groups with a reward": Row(
        OPSDTrainer,
        {**GROUPS, "clip": None, "reward_weight": 0.5},
        not_zero="the policy gradient reads no teacher",
    ),
    "OGLS-SD": Row(OGLSSDTrainer, {**GROUPS, "clip": None, "distillation_length": 6, "steering_warmup_steps": 0}),
    "Purified OPSD": Row(PurifiedOPSDTrainer, {"decomposition_steps": 0}),
    "SDPO": Row(SDPOTrainer, {**GROUPS, "support_size": 20}),
    "SDPO with feedback": Row(
        SDPOTrainer,
        {**GROUPS, "support_size": None, "divergence": "reverse_kl", "feedback_beside_peer": True},
        columns=lambda place: {"feedback": FEEDBACK[place % 3]},
    ),
    "VPD": Row(
        VPDTrainer,
        {**GROUPS, "gradient_accumulation_steps": 1, "maximization_steps": 1, "teacher_model_kind": "live"},
        memory={"midpoint": 0.1},
        updates=1,
    ),
    "SDFT": Row(SDFTTrainer, {"max_completion_length": 24, "num_loss_tokens_to_skip": 1}),
    "MOPD": Row(
        MOPDTrainer,
        {**GROUPS, "support_size": 20},
        columns=lambda place: {"feedback": FEEDBACK[place % 3]},
    ),
    "RESD": Row(
        RESDTrainer,
        {"max_completion_length": 24, "support_size": 20},
        columns=lambda place: {"feedback": FEEDBACK[place % 3]},
        memory={"weights": [1.5, 0.75], "solutions": {}},
    ),
    "DemoPSD": Row(DemoPSDTrainer, {**GROUPS, "support_size": 20}),
    "AntiSD": Row(
        AntiSDTrainer,
        {**GROUPS, "gate_warmup_batches": 0, "ascent_strength": 2.0},
        not_zero="it is GRPO where the teacher says nothing",
        equality=({}, {"ascent_strength": 0.0}),
        count=sampled_tokens,
        memory={"warmup": [], "gate": 1.0, "ascends": 1.0},
    ),
    "EGRSD": Row(
        EGRSDTrainer,
        {"max_completion_length": 24},
        not_zero="the teacher moves the size of a token's reward, which is there without it",
        equality=({"entropy_gate_strength": 0.0}, {"entropy_gate_strength": 0.0, "evidence_bound": 0.0}),
        memory={"rewards": [8, 0.5, 2.0], "largest_entropy": 3.0},
    ),
    "SGSD": Row(
        SGSDTrainer,
        {"max_completion_length": 24},
        columns=lambda place: {"skills": SKILLS[place % 3]},
        count=trained_rollouts,
    ),
    "CritiqueSD": Row(CritiqueSDTrainer, columns=lambda place: {"critique": CRITIQUES[place % 3]}),
    "RCSD": Row(RCSDTrainer, columns=lambda place: {"rubric": RUBRICS[place % 3]}),
    "PBSD": Row(
        PBSDTrainer,
        not_zero="a pair without a margin costs log 2 and pulls its sequences apart",
        count=trained_rollouts,
    ),
    "BRTS": Row(
        BRTSTrainer,
        {"max_completion_length": 24, "num_generations": 1, "support_size": 20, "candidate_weight": 0.7},
        not_divided="the rollouts' part is divided by their tokens and the candidates' by theirs",
    ),
    "SSOPD": Row(
        SSOPDTrainer,
        {**GROUPS, "clip": None, "frontier_strength": 2.0},
        not_zero="GRPO stays",
        equality=({}, {"frontier_strength": 0.0}),
        count=sampled_tokens,
        not_divided="GRPO's part is divided by tokens and the other by rollouts",
    ),
    "TRACE": Row(
        TRACETrainer,
        {**GROUPS, "clip": None, "span_weight": 2.0, "annotator_function": "test_table:spans_of"},
        not_zero="GRPO stays, though off the spans alone",
        count=sampled_tokens,
        not_divided="GRPO's part is divided by tokens and the other by rollouts",
    ),
    "MSD": Row(
        MSDTrainer,
        {"critical_top_k": 8},
        columns=lambda place: {"translation": f"add {place} numbers"},
        count=trained_rollouts,
    ),
    "SORT": Row(
        SORTTrainer,
        {**GROUPS, "repair_weight": 0.7},
        columns=lambda place: {"plan": f"add {place} numbers"},
        texts=MOSTLY_WRONG,
        not_zero="a solution is learnt whether or not a plan explains it",
        equality=({}, {"plan_share": 0.0}),
        count=trained_rollouts,
        not_divided="GRPO's part is divided by tokens and the repair by repaired groups",
    ),
    "vOPD": Row(VOPDTrainer, {"max_completion_length": 24, "gradient_accumulation_steps": 1}),
    "Rethinking OPD": Row(
        RethinkingOPDTrainer,
        {"max_completion_length": 24, "num_generations": 1, "support_of": "union", "support_size": 4},
        updates=1,
    ),
    "Rethinking OPD, sampled token": Row(
        RethinkingOPDTrainer, {"max_completion_length": 24, "num_generations": 1, "support_size": 0}
    ),
    "POPD": Row(POPDTrainer, {"max_completion_length": 24, "distillation_length": "4..8 in 3"}),
    "StableOPD": Row(
        StableOPDTrainer,
        {**GROUPS, "gradient_accumulation_steps": 1, "golden_weight": 0.7, "reference_weight": 0.3},
        not_zero="the solution is learnt whatever the teacher says",
        not_divided="the rollouts' part is divided by their tokens and the solutions' by theirs",
    ),
    "StableOPD without solutions": Row(
        StableOPDTrainer,
        {**GROUPS, "gradient_accumulation_steps": 1, "golden_weight": 0.0, "reference_weight": 0.3},
    ),
    "RLSD": Row(
        RLSDTrainer,
        {**GROUPS, "gradient_accumulation_steps": 1, "evidence_bound": 0.9},
        not_zero="it is GRPO where the teacher says nothing",
        equality=({}, {"evidence_strength": 0.0}),
        count=sampled_tokens,
    ),
    "RLRT": Row(
        RLRTTrainer,
        {**GROUPS, "gradient_accumulation_steps": 1, "evidence_bound": 0.9},
        texts=MOSTLY_RIGHT,
        not_zero="it is GRPO where the teacher says nothing",
        equality=({}, {"evidence_strength": 0.0}),
        count=sampled_tokens,
    ),
    "DASD": Row(
        DASDTrainer,
        {**GROUPS, "gradient_accumulation_steps": 1, "direction_strength": 2.0},
        not_zero="it is GRPO where the teacher says nothing",
        # The read view is kept in float32, and its rounding is divided by 0.01 nats.
        equality=({"direction_strength": 0.1}, {"direction_strength": 0.0}),
        count=sampled_tokens,
    ),
}


def of_rows(applies):
    """Parametrise a test by the methods that a property applies to."""
    cases = [pytest.param(row, id=name) for name, row in METHODS.items() if applies(row)]
    return pytest.mark.parametrize("row", cases)


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def row(request):
    return request.param


@pytest.fixture
def rows(row, dataset):
    """The dataset with the columns that the method reads."""
    return Dataset.from_list([{**own, **row.columns(place)} for place, own in enumerate(dataset)])


@pytest.fixture
def make(row, make_model, make_args, rows, tokenizer, monkeypatch):
    """A function that makes the row's trainer, whose rollouts are a function of prompt and copy alone."""

    def make(method=None, **settings):
        owner = row.trainer if method is None else type("Changed", (row.trainer,), {"method": method})
        trainer = owner(
            model=make_model(torch.float64),
            reward_funcs=reward_boxed,
            args=make_args(row.trainer.config_class, **{**row.settings, **settings}),
            train_dataset=rows,
            processing_class=copy.deepcopy(tokenizer),
        )

        def sample(prompt_ids, *args, **kwargs):
            copies, ids = Counter(), []
            for prompt in map(tuple, prompt_ids):
                text = row.texts[(len(prompt) + copies[prompt]) % len(row.texts)]
                copies[prompt] += 1
                ids.append([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            return [own[: trainer.max_completion_length] for own in ids], None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        return trainer

    return make


@pytest.fixture
def groups_of(row, rows):
    """A function from places in the dataset to the rows of their groups."""
    size = row.settings.get("num_generations", 1)
    return lambda *places: [rows[place] for place in places for _ in range(size)]


def gradients(trainer, rows):
    trainer.model.zero_grad()
    loss, batch = loss_of_rows(trainer, rows)
    loss.backward()
    grads = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat([grad.flatten() for grad in grads]).clone(), batch


def on_equal_terms(method):
    """The method with a teacher that reads the student's own prompt in every view, of extras too."""

    def plain(views):
        return tuple(replace(view, template="plain", slot=None, slot_tokens=None, texts=()) for view in views)

    def contexts(*args):
        return [plain(views) for views in method.contexts(*args)]

    def extras(*args):
        found = method.extras(*args)
        return [extra and extra._replace(contexts=plain(extra.contexts)) for extra in found]

    return replace(method, contexts=contexts, extras=method.extras and extras)


def by_itself(row):
    """The method where a group decides alone what becomes of it: its draws are its prompt's, and memory is given."""
    method = row.trainer.method

    def contexts(group, settings, moment):
        return method.contexts(group, settings, replace(moment, draw=random.Random(str(group[0].prompt))))

    remember = None if row.memory is None else lambda memory, seen, settings: row.memory
    return replace(method, contexts=contexts, remember=remember)


def equal_step(row, make, groups, **settings):
    """A step with a teacher on equal terms, which is the first weights unless the row says otherwise: a moving average is kept in
    float32."""
    settings = {"teacher_model_kind": row.settings.get("teacher_model_kind", "base"), **settings}
    return gradients(make(on_equal_terms(row.trainer.method), **settings), groups)


def test_a_step_has_a_gradient(row, make, groups_of):
    _, gradient, batch = gradients(make(), groups_of(0, 5))
    assert gradient.abs().max() > 1e-5 and row.count(batch) > 0


@of_rows(lambda row: not row.not_zero)
def test_a_teacher_that_reads_what_the_student_reads_teaches_nothing(row, make, groups_of):
    loss, gradient, _ = equal_step(row, make, groups_of(0, 5))
    assert abs(loss) < 1e-12 and gradient.abs().max() < 1e-10


@of_rows(lambda row: row.not_zero)
def test_where_such_a_teacher_still_has_a_loss_something_else_is_learnt(row, make, groups_of):
    _, gradient, _ = equal_step(row, make, groups_of(0, 5))
    assert gradient.abs().max() > 1e-5


@of_rows(lambda row: row.equality is not None)
def test_such_a_teacher_leaves_what_the_method_is_without_one(row, make, groups_of):
    equal, without = row.equality
    one = equal_step(row, make, groups_of(0, 5), **equal)
    other = gradients(make(**without), groups_of(0, 5))
    assert one[0] == pytest.approx(other[0], **EXACT)
    assert_close(one[1], other[1])


def assert_close(one, other):
    """Gradients agree relative to the largest: norms and TRL's advantages are float32."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * other.abs().max().item())


def test_order_changes_nothing(row, make, groups_of):
    one, other = (gradients(make(by_itself(row)), groups_of(*places)) for places in ((0, 5), (5, 0)))
    assert one[0] == pytest.approx(other[0], **EXACT)
    assert_close(one[1], other[1])


@of_rows(lambda row: not row.not_divided)
def test_padding_and_companions_change_nothing(row, make, groups_of):
    """Loss and gradient of two groups are those of each alone, by the counts that each is divided by."""
    trainer = make(by_itself(row))
    together, gradient, batch = gradients(trainer, groups_of(0, 5))
    alone = [gradients(trainer, groups_of(place)) for place in (0, 5)]
    shares = [row.count(own) / row.count(batch) for *_, own in alone]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    losses, slopes, _ = zip(*alone, strict=True)
    assert together == pytest.approx(sum(map(operator.mul, shares, losses)), **EXACT)
    assert_close(gradient, sum(map(operator.mul, shares, slopes)))


def test_nothing_that_the_teacher_says_has_a_gradient(make, groups_of):
    trainer = make()
    before = {name: value.clone() for name, value in trainer.teacher.values.items()}
    _, _, batch = gradients(trainer, groups_of(0, 5))
    assert not [name for name, column in batch.items() if torch.is_tensor(column) and column.requires_grad]
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.values.items())


def test_accumulation_changes_nothing(row, make):
    size, weights = row.settings.get("per_device_train_batch_size", 4), []
    for steps in (1, 2, 4):
        trainer = make(
            per_device_train_batch_size=size // steps,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=1e9,
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-8)  # TRL's advantages are float32


def test_a_resumed_run_is_the_uninterrupted_one(row, make, tmp_path):
    size = row.settings.get("per_device_train_batch_size", 4)
    settings = {
        "per_device_train_batch_size": size // 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2 * row.updates,  # at two updates step 3 stands in the middle of a generation batch
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "output_dir": str(tmp_path / "run"),
    }
    whole, resumed = make(**settings), make(**settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        # A micro-batch that was read back lies elsewhere in memory, which may round a product otherwise: by one bit in
        # float64.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14, msg=name)


def test_methods_that_show_what_a_row_holds_say_so():
    found = {
        name.split(",")[0].split(" with")[0] for name, row in METHODS.items() if row.trainer.method.contexts_from_rows
    }
    assert found == {
        "OPSD",
        "OPSD in groups",
        "Purified OPSD",
        "SDFT",
        "vOPD",
        "Rethinking OPD",
        "POPD",
        "StableOPD",
        "MSD",
    }


@of_rows(lambda row: row.trainer.method.contexts_from_rows)
def test_contexts_of_rows_are_encoded_while_the_engine_samples_and_change_nothing(row, make, groups_of, monkeypatch):
    threads, encode = Counter(), TeacherCollator.encode

    def recorded(collator, prompt, context):
        threads[context.template, threading.current_thread() is threading.main_thread()] += 1
        return encode(collator, prompt, context)

    monkeypatch.setattr(TeacherCollator, "encode", recorded)
    trainer = make()
    threads.clear()  # of the checks before training
    ahead = gradients(trainer, groups_of(0, 5))
    # Not once for each rollout, and none by the thread that waits for the engine.
    assert set(threads.values()) == {2} and not any(waits for _, waits in threads)
    trainer = make(replace(row.trainer.method, contexts_from_rows=False))
    threads.clear()
    plain = gradients(trainer, groups_of(0, 5))
    assert any(waits for _, waits in threads)
    assert ahead[0] == plain[0] and torch.equal(ahead[1], plain[1])
