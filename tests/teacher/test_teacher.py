# SPDX-License-Identifier: Apache-2.0
"""Whose weights the teacher has: the moving average, its files, and the head it predicts with."""

import copy
import inspect

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora_layer
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_opsd.model.heads import attach_head_function
from trl_opsd.teacher.contexts import TEACHER_KINDS
from trl_opsd.teacher.forwards import TeacherForward
from trl_opsd.teacher.low_rank import average_low_rank
from trl_opsd.teacher.weights import Teacher, changes_nothing

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def ids():
    return torch.arange(20, 26)[None]


@torch.no_grad()
def move(model, size=0.1, seed=1):
    """What an optimizer step does: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def observed_head(teacher, model, ids):
    with teacher.active():
        TeacherForward(model, model, teacher.observe_head)(ids, torch.ones_like(ids), 2)
    return teacher.head


@pytest.mark.parametrize("kind", TEACHER_KINDS)
def test_a_teacher_starts_as_the_student_and_gives_the_student_back(make_model, ids, kind):
    model = make_model()
    teacher = Teacher(kind, model)
    before, own = weights(model), logits(model, ids)
    model.train()
    with teacher.active():
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(logits(model, ids), own)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", TEACHER_KINDS)
def test_each_kind_follows_the_student_as_it_promises(make_model, ids, kind, lora):
    model = get_peft_model(make_model(), LoraConfig(**LORA)) if lora else make_model()
    teacher = Teacher(kind, model, fresh_adapter=lora, update_rate=1.0)
    start = logits(model, ids)
    move(model)
    student = logits(model, ids)
    assert (student - start).abs().max() > 1e-3

    def taught():
        with teacher.active():
            return logits(model, ids)

    torch.testing.assert_close(taught(), student if kind == "live" else start)
    assert teacher.update() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(taught(), start if kind == "base" else student, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, ids), student)


def test_the_student_returns_after_an_error_while_scoring(make_model, ids):
    model = make_model().train()
    teacher = Teacher("base", model)
    move(model)
    own = weights(model)
    with pytest.raises(RuntimeError, match="mine"), teacher.active():
        raise RuntimeError("mine")
    assert model.training
    assert all(torch.equal(value, own[name]) for name, value in weights(model).items())


def test_the_moving_average_follows_its_formula(make_model):
    model, rate = make_model(torch.float64), 0.3
    teacher = Teacher("ema", model, update_rate=rate)
    expected = weights(model)
    for step in range(3):
        move(model, seed=step)
        assert teacher.update() == 0.0
        expected = {name: (1 - rate) * expected[name] + rate * value for name, value in weights(model).items()}
    for name, value in teacher.values.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("kind", ["base", "live"])
def test_only_a_moving_average_moves(make_model, kind):
    model = make_model()
    teacher = Teacher(kind, model, update_rate=0.5)
    before = {name: value.clone() for name, value in teacher.values.items()}
    move(model)
    assert teacher.update() == 0.0
    assert all(torch.equal(value, before[name]) for name, value in teacher.values.items())


def test_small_rates_do_not_vanish_in_bfloat16(make_model):
    model = make_model(torch.bfloat16)
    teacher = Teacher("ema", model, update_rate=1e-4)
    start = {name: value.clone() for name, value in teacher.values.items()}
    move(model, size=1.0)
    for _ in range(100):
        teacher.update()
    share = 1 - (1 - 1e-4) ** 100
    for name, parameter in model.named_parameters():
        assert teacher.values[name].dtype == torch.float32
        wanted = start[name] + share * (parameter.detach().float() - start[name])
        torch.testing.assert_close(teacher.values[name], wanted, rtol=1e-3, atol=1e-4)
    with teacher.active():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def pair(rank, seed, out=7, inner=9):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, inner, generator=generator, dtype=torch.float64),
        torch.randn(out, rank, generator=generator, dtype=torch.float64),
    )


def dense(a, b):
    return b @ a


@pytest.mark.parametrize("rate", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_averaged_pair_is_the_best_of_its_rank(rank, rate):
    teacher, student = pair(rank, 0), pair(rank, 1)
    average = (1 - rate) * dense(*teacher) + rate * dense(*student)
    a, b, lost = average_low_rank(teacher, student, rate)
    assert a.shape == teacher[0].shape and b.shape == teacher[1].shape
    u, s, v = torch.linalg.svd(average)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(dense(a, b), best)
    assert lost == pytest.approx((s[rank:].norm() / s.norm()).item(), abs=1e-9)
    assert lost == pytest.approx(((average - dense(a, b)).norm() / average.norm()).item(), abs=1e-9)


def test_the_average_is_exact_where_the_rank_holds_it():
    teacher = pair(4, 0)
    mixing = pair(4, 1, out=4, inner=4)[0]
    student = (mixing @ teacher[0], teacher[1])  # the same row space: the sum has rank 4
    a, b, lost = average_low_rank(teacher, student, 0.4)
    torch.testing.assert_close(dense(a, b), 0.6 * dense(*teacher) + 0.4 * dense(*student))
    assert lost < 1e-9


def test_a_rank_above_the_matrix_size_is_exact_and_padded():
    teacher, student = pair(8, 0, out=3, inner=5), pair(8, 1, out=3, inner=5)
    a, b, lost = average_low_rank(teacher, student, 0.4)
    assert a.shape == (8, 5) and b.shape == (3, 8) and lost < 1e-9
    torch.testing.assert_close(dense(a, b), 0.6 * dense(*teacher) + 0.4 * dense(*student))


def test_two_empty_updates_average_to_nothing():
    empty = (torch.randn(2, 5), torch.zeros(4, 2))
    a, b, lost = average_low_rank(empty, empty, 0.5)
    assert dense(a, b).abs().max() == 0 and lost == 0.0


def lora_updates(values):
    return {
        name: value @ values[name.replace("lora_B.", "lora_A.")].to(value)
        for name, value in values.items()
        if "lora_B." in name
    }


def test_the_lora_average_is_that_of_the_products_within_the_reported_loss(make_model):
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    move(model, seed=5)
    teacher = Teacher("ema", model, update_rate=0.3)
    for step in range(3):
        move(model, seed=step)
        before = lora_updates(teacher.values)
        student = lora_updates({name: parameter.detach() for name, parameter in model.named_parameters()})
        lost, errors = teacher.update(), []
        for name, update in lora_updates(teacher.values).items():
            wanted = 0.7 * before[name] + 0.3 * student[name]
            errors.append(((update - wanted).norm() / wanted.norm()).item())
        assert lost == pytest.approx(max(errors), rel=1e-3)
        assert 0 < lost < 0.7


EXPERTS = ["gate_up_proj", "down_proj"]  # each one parameter of all experts


@pytest.fixture
def make_experts():
    """A function that makes a mixture of four experts under LoRA on their weights."""

    def make():
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 16,
            "moe_intermediate_size": 8,
            "head_dim": 8,
        }
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **layers, num_experts=4, num_experts_per_tok=2))
        targets = {"target_modules": [], "target_parameters": [f"mlp.experts.{name}" for name in EXPERTS]}
        return get_peft_model(model, LoraConfig(r=2, **targets)).eval()

    return make


def updates_of_experts(model):
    """What PEFT itself adds to the weights (E, out, in), layer by layer."""
    layers = [
        module for module in model.modules() if getattr(module, "num_experts", 1) > 1 and hasattr(module, "lora_A")
    ]
    return [layer.get_delta_weight("default").detach().clone() for layer in layers]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # of older PEFT, which goes on
def test_the_average_of_experts_is_each_ones_own_within_the_rank(make_experts):
    model = make_experts()
    move(model, seed=5)
    teacher, before = Teacher("ema", model, update_rate=0.3), updates_of_experts(model)
    move(model, seed=6)
    student = updates_of_experts(model)
    lost = teacher.update()
    with teacher.active():
        taught = updates_of_experts(model)
    assert len(taught) == 4 and all(len(update) == 4 for update in taught)
    errors = []
    for own, first, last in zip(taught, before, student, strict=True):
        wanted = 0.7 * first + 0.3 * last
        errors.append(((own - wanted).norm() / wanted.norm()).item())
        for expert, update in zip(own, wanted, strict=True):
            u, s, v = torch.linalg.svd(update)
            torch.testing.assert_close(expert, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
    assert lost == pytest.approx(max(errors), rel=1e-3) and 0 < lost < 0.7
    assert all(torch.equal(own, last) for own, last in zip(updates_of_experts(model), student, strict=True))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # of older PEFT, which goes on
@pytest.mark.parametrize("kind", TEACHER_KINDS)
def test_a_teacher_of_experts_under_lora_follows_as_its_kind_promises(make_experts, kind):
    model, ids = make_experts(), torch.arange(20, 26)[None]
    teacher, start = Teacher(kind, model, fresh_adapter=True, update_rate=1.0), logits(model, ids)
    assert teacher.adapter_off is (kind == "base")
    move(model, size=0.5)
    teacher.update()
    student = logits(model, ids)
    with teacher.active():
        torch.testing.assert_close(logits(model, ids), start if kind == "base" else student, rtol=1e-4, atol=1e-4)
    assert (student - start).abs().max() > 0.1


def test_a_fresh_adapter_needs_no_copy_and_an_old_one_does(make_model, ids):
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    assert Teacher("base", model, fresh_adapter=True).values == {}
    move(model)
    old = logits(model, ids)
    teacher = Teacher("base", model, fresh_adapter=False)
    assert set(teacher.values) == {name for name, p in model.named_parameters() if p.requires_grad}
    move(model, seed=2)
    with teacher.active():
        torch.testing.assert_close(logits(model, ids), old)


TOOK = {  # initialisations that take what they add out of the weights below
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "dora on pissa": {"init_lora_weights": "pissa", "use_dora": True},
}
SAME_OFF = {
    "lora": {},
    "gaussian": {"init_lora_weights": "gaussian", "use_rslora": True},
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "whole modules and tokens": {"modules_to_save": ["lm_head"], "trainable_token_indices": [20, 21]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
if '"mica"' in inspect.getsource(lora_layer):  # which older versions of PEFT lack
    SAME_OFF["A of zeros"] = {"init_lora_weights": "mica"}
ADDED = {  # a copy is right, though off would be too, or nobody can know
    "orthogonal": LoraConfig(**LORA, init_lora_weights="orthogonal"),
    "random": LoraConfig(**LORA, init_lora_weights=False),
    "biases below": LoraConfig(**LORA, bias="all"),
    "adalora": AdaLoraConfig(init_r=2, target_modules=["q_proj"], total_step=10),
    "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
}


def taught_after_a_move(model, teacher, ids):
    move(model, size=0.5)
    with teacher.active():
        return logits(model, ids)


@pytest.mark.parametrize("settings", TOOK.values(), ids=TOOK)
def test_where_an_initialisation_takes_its_update_out_of_the_weights_the_teacher_is_a_copy(make_model, ids, settings):
    original = logits(make_model(), ids)
    model = get_peft_model(make_model(), LoraConfig(**LORA, **settings)).eval()
    teacher = Teacher("base", model, fresh_adapter=True)
    assert not teacher.adapter_off and set(teacher.values) == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(taught_after_a_move(model, teacher, ids), original, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert (logits(model, ids) - original).abs().max() > 0.1


@pytest.mark.parametrize("settings", SAME_OFF.values(), ids=SAME_OFF)
def test_a_fresh_adapter_that_changes_nothing_needs_no_copy(make_model, ids, settings):
    original = logits(make_model(attention_bias=True), ids)
    model = get_peft_model(make_model(attention_bias=True), LoraConfig(**{**LORA, **settings})).eval()
    teacher = Teacher("base", model, fresh_adapter=True)
    assert teacher.adapter_off and teacher.values == {}
    torch.testing.assert_close(taught_after_a_move(model, teacher, ids), original, rtol=0, atol=0)
    assert not torch.equal(logits(model, ids), original)


@pytest.mark.parametrize("adapter", ADDED.values(), ids=ADDED)
def test_of_every_other_adapter_the_teacher_is_the_student_as_it_starts(make_model, ids, adapter):
    model = get_peft_model(make_model(attention_bias=True), copy.deepcopy(adapter)).eval()
    start = logits(model, ids)
    teacher = Teacher("base", model, fresh_adapter=True)
    assert not teacher.adapter_off
    torch.testing.assert_close(taught_after_a_move(model, teacher, ids), start, rtol=0, atol=0)
    assert not torch.equal(logits(model, ids), start)


def test_one_update_that_is_not_zero_is_enough_for_a_copy(make_model):
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    assert changes_nothing(model)
    *_, last = (parameter for name, parameter in model.named_parameters() if "lora_B." in name)
    last.data[-1, -1] = 1e-4
    assert not changes_nothing(model)


def test_a_saved_average_is_read_back_whole(make_model, tmp_path):
    model = make_model()
    teacher = Teacher("ema", model, update_rate=0.5)
    move(model)
    teacher.update()
    teacher.save(tmp_path)
    other = Teacher("ema", model, update_rate=0.5)
    assert any(not torch.equal(value, teacher.values[name]) for name, value in other.values.items())
    other.load(tmp_path)
    assert all(torch.equal(value, teacher.values[name]) for name, value in other.values.items())


@pytest.mark.parametrize("kind", ["base", "live"])
def test_other_kinds_write_and_read_nothing(make_model, tmp_path, kind):
    teacher = Teacher(kind, make_model())
    teacher.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    teacher.load(tmp_path)


def test_a_checkpoint_without_an_average_is_refused_by_name(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"teacher\.safetensors is missing.*teacher_model_kind='ema'"):
        Teacher("ema", make_model()).load(tmp_path)


def test_tied_weights_are_saved_once(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    Teacher("ema", model).save(tmp_path)
    saved = load_file(tmp_path / "teacher.safetensors")
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight is table
    assert [name for name, value in saved.items() if value.shape == table.shape] == ["model.embed_tokens.weight"]
    assert sum(value.numel() for value in saved.values()) == sum(weight.numel() for weight in model.parameters())


def test_a_frozen_head_is_shared_and_a_trained_one_is_the_teachers_own(make_model, ids):
    frozen = get_peft_model(make_model(), LoraConfig(**LORA))
    attach_head_function(frozen)
    assert observed_head(Teacher("base", frozen, fresh_adapter=True), frozen, ids) is None
    model = make_model()
    attach_head_function(model)
    teacher, start = Teacher("base", model), model.lm_head.weight.detach().clone()
    move(model)
    assert torch.equal(observed_head(teacher, model, ids).weight, start)
    assert not torch.equal(model.lm_head.weight, start)


def test_a_base_teacher_keeps_the_original_head_beside_one_in_modules_to_save(make_model, ids):
    model = get_peft_model(make_model(), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    attach_head_function(model)
    teacher = Teacher("base", model, fresh_adapter=True)
    student = model.get_base_model().get_output_embeddings()
    original = student.weight.detach().clone()
    move(model)
    head = observed_head(teacher, model, ids)
    assert torch.equal(head.weight, original)
    assert (student.weight - original).abs().max() > 0.01


def test_a_live_teachers_head_is_the_students_unless_it_has_to_outlive_updates(make_model, ids):
    model = make_model()
    attach_head_function(model)
    assert observed_head(Teacher("live", model), model, ids) is None
    start = model.lm_head.weight.detach().clone()
    head = observed_head(Teacher("live", model, keep_head=True), model, ids)
    assert not head.weight.requires_grad
    move(model)
    assert torch.equal(head.weight, start)


def test_a_head_is_observed_anew_at_each_scoring(make_model, ids):
    model = make_model()
    attach_head_function(model)
    teacher = Teacher("live", model, keep_head=True)
    first = observed_head(teacher, model, ids).weight
    move(model)
    assert not torch.equal(observed_head(teacher, model, ids).weight, first)
