# SPDX-License-Identifier: Apache-2.0
"""The memory plan: counts against real models, parts against real tensors, the docs' tables against the code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opsd import OGLSSDConfig, OPSDTrainer, PurifiedOPSDConfig, PurifiedOPSDTrainer
from trl_opsd.commands import plan as command
from trl_opsd.experimental.planning.footprint import Growth, load_config, measure_footprint
from trl_opsd.experimental.planning.memory import GIB, plan_memory
from trl_opsd.experimental.planning.workload import Workload
from trl_opsd.methods import OGLS_SD, OPSD, PURIFIED_OPSD
from trl_opsd.pages import trainer_of

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(r=4, target_modules="all-linear")


def small_config(**overrides):
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    return Qwen3Config(**{**settings, **overrides})


@pytest.fixture(scope="module")
def footprints():
    """Of the small model: all weights, and an adapter."""
    return {
        lora: measure_footprint(small_config(), torch.float32, autocast=False, peft_config=LORA if lora else None)
        for lora in (False, True)
    }


def real_model(lora):
    model = Qwen3ForCausalLM(small_config()).train()
    return get_peft_model(model, LORA) if lora else model


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_parameters_are_counted_as_in_the_real_model(footprints, lora):
    real = list(real_model(lora).parameters())
    assert footprints[lora].parameters == sum(p.numel() for p in real)
    assert footprints[lora].trainable == sum(p.numel() for p in real if p.requires_grad)
    assert footprints[lora].head == (96, 32) and footprints[lora].head_trains != lora


@pytest.mark.parametrize("length", [70, 300])
@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_what_is_kept_for_the_backward_is_what_the_real_model_keeps_of_a_padded_batch(footprints, lora, length):
    model, kept = real_model(lora), {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    backbone = (model.get_base_model() if lora else model).base_model
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, :3] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = backbone(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False)
    assert output.last_hidden_state.requires_grad
    real = sum(storage.nbytes() for storage in kept.values())
    planned = footprints[lora]
    told = 5 * planned.saved_layer.at(1, length) + planned.saved_rest.at(1, length)
    assert told == pytest.approx(real, rel=1e-6)


def test_a_growth_is_the_parabola_through_its_counts():
    growth = Growth.through((2, 5, 11), [7 + 3 * n + 0.5 * n * n for n in (2, 5, 11)])
    assert (growth.fixed, growth.token, growth.pair) == pytest.approx((7, 3, 0.5))
    assert growth.at(4, 10) == pytest.approx(7 + 4 * (3 * 10 + 0.5 * 100))
    assert growth.at(4, 10, attended=30) == pytest.approx(7 + 4 * (3 * 10 + 0.5 * 300))
    above = Growth.above((2, 5, 11), [max(40 * n, 4 * n * n) for n in (2, 5, 11)])
    assert above.at(1, 2) == pytest.approx(80) and above.at(1, 11) == pytest.approx(484) and above.at(1, 5) >= 200


def test_the_cache_holds_keys_and_values_of_every_layer(footprints):
    assert footprints[False].cache == 5 * 2 * (2 * 8) * 4


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "count"), [("Qwen3-4B", 4_022_468_096), ("Qwen3-8B", 8_190_735_360)])
def test_the_published_shapes_have_their_published_number_of_parameters(shape, count):
    assert measure_footprint(load_config(shape), torch.bfloat16, autocast=False).parameters == count


def bytes_of(plan, name):
    return sum(part.bytes for part in plan.parts if part.name.startswith(name))


def test_the_teacher_of_a_fresh_adapter_is_free_and_another_base_is_a_copy(footprints, make_args):
    args = make_args()
    assert bytes_of(plan_memory(footprints[True], args, OPSD), "teacher's") == 0
    whole = footprints[False]
    assert bytes_of(plan_memory(whole, args, OPSD), "teacher's") == 4 * whole.parameters
    assert bytes_of(plan_memory(whole, make_args(teacher_model_kind="live"), OPSD), "teacher's") == 0
    averaged = plan_memory(footprints[True], make_args(teacher_model_kind="ema"), OPSD)
    assert bytes_of(averaged, "teacher's") == 4 * footprints[True].trainable


def test_an_engine_splits_what_it_says(footprints, make_args):
    model, args = footprints[False], make_args()
    plans = {
        engine: plan_memory(model, args, OPSD, engine=engine, num_gpus=4)
        for engine in ("ddp", "zero2", "zero3", "fsdp2")
    }
    weights = {engine: bytes_of(plan, "weights") / model.parameters for engine, plan in plans.items()}
    assert weights == {"ddp": 4, "zero2": 2, "zero3": 0.5, "fsdp2": 1}
    states = {engine: bytes_of(plan, "optimizer") / model.parameters for engine, plan in plans.items()}
    assert states == {"ddp": 8, "zero2": 3, "zero3": 3, "fsdp2": 2}


@pytest.mark.parametrize("trainer_class", [OPSDTrainer, PurifiedOPSDTrainer])
def test_the_targets_part_is_the_size_of_the_targets_of_a_batch(
    footprints, make_model, make_args, tokenizer, dataset, given_rollouts, trainer_class
):
    config = None if trainer_class is OPSDTrainer else PurifiedOPSDConfig
    args = make_args(config, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = trainer_class(model=make_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
    given_rollouts(trainer, texts=("1234567890",))
    batch = trainer._generate_and_score_completions([dict(dataset[index]) for index in range(4)])
    real = sum(batch[name].nbytes for name in ("anchor_hidden", "direction_hidden") if name in batch)
    assert bytes_of(plan_memory(footprints[False], args, trainer_class.method), "targets") == real


@pytest.mark.parametrize("name", ["pbsd", "egrsd"])
def test_the_numbers_of_views_that_are_read_are_the_size_of_a_batchs(
    name, footprints, make_model, make_args, tokenizer, dataset, given_rollouts
):
    kind = trainer_of(name)
    args = make_args(kind.config_class, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = kind(model=make_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
    given_rollouts(trainer, texts=("1234567890",))
    batch = trainer._generate_and_score_completions([dict(dataset[index]) for index in range(4)])
    parts = [f"{prefix}{part}" for prefix in ("", "extra_") for part in ("view_log_probs", "view_entropies")]
    plan = plan_memory(footprints[False], args, kind.method)
    assert bytes_of(plan, "numbers of the views") == sum(batch[part].nbytes for part in parts if part in batch)
    assert bytes_of(plan, "targets") == 0


def test_texts_and_sequences_beside_the_rollouts_are_planned(footprints, make_args):
    settings = {"max_completion_length": 256, "gradient_checkpointing": False}
    pairs, alone, written = (
        plan_memory(
            footprints[False], make_args(kind.config_class, **settings), kind.method, workload=Workload(50, 200)
        )
        for kind in map(trainer_of, ("pbsd", "egrsd", "rcsd"))
    )
    assert bytes_of(pairs, "activations") == pytest.approx(2 * bytes_of(alone, "activations"), rel=0.01)
    assert bytes_of(written, "KV cache") == pytest.approx(bytes_of(alone, "KV cache") * (50 + 200 + 256) / (50 + 256))


@pytest.mark.parametrize("name", ["antisd", "sgsd", "pbsd", "sort"])
def test_the_command_names_what_a_rollout_costs(name, capsys):
    words = ["--model_name_or_path", "Qwen3-1.7B", "--method", name, "--per_device_train_batch_size", "8"]
    command.main([*words, "--use_peft"])
    text = capsys.readouterr().out
    told = {"antisd": "1 x verdict (read)", "sgsd": "8 x skill (read)", "pbsd": "a second sequence", "sort": "1 x plan"}
    assert told[name] in text and "numbers of the views that are read" in text


def test_settings_that_save_memory_do(footprints, make_args):
    def peak(footprint=footprints[False], method=OPSD, **settings):
        args = make_args(**{"max_completion_length": 1024, **settings})
        return plan_memory(footprint, args, method)

    assert bytes_of(peak(gradient_checkpointing=True), "activations") < bytes_of(peak(), "activations") / 2
    assert peak(footprints[True]).total < peak().total
    assert peak(teacher_tokens_per_forward=8192).of_phase("scoring") < peak().of_phase("scoring")
    assert bytes_of(peak(), "targets") > bytes_of(peak(gradient_accumulation_steps=2**15), "targets") == 0
    served = plan_memory(footprints[False], make_args(use_vllm=True, vllm_mode="server"), OPSD)
    assert served.of_phase("sampling") == 0 and bytes_of(served, "vLLM") == 0
    colocated = make_args(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.25)
    assert bytes_of(plan_memory(footprints[False], colocated, OPSD), "vLLM") == 20 * GIB


def test_purified_needs_two_buffers_and_groups_a_cache(footprints, make_args):
    opsd = plan_memory(footprints[False], make_args(), OPSD)
    purified = plan_memory(footprints[False], make_args(PurifiedOPSDConfig), PURIFIED_OPSD)
    assert bytes_of(purified, "targets") == 2 * bytes_of(opsd, "targets")
    grouped = make_args(OGLSSDConfig, num_generations=4, distillation_length=8)
    steered = plan_memory(footprints[False], grouped, OGLS_SD, workload=Workload(50, 200))
    assert bytes_of(steered, "KV cache of shared") > 0 == bytes_of(purified, "KV cache of shared")


def test_a_head_that_trains_holds_its_gradient_beside_the_tiles(footprints, make_args):
    args, peaks = make_args(max_completion_length=256, per_device_train_batch_size=8), {}
    for trains in (False, True):
        # So wide a vocabulary that the tiles are the peak, and no backward of layers.
        wide = replace(footprints[False], head=(100_000, 32), head_trains=trains)
        peaks[trains] = bytes_of(plan_memory(wide, args, OPSD), "loss, then backward")
    assert peaks[True] - peaks[False] == 4 * 100_000 * 32


def test_the_decomposition_holds_three_views(footprints, make_args):
    for rows, decomposed in ((4, 4), (16, 8)):
        args = make_args(
            PurifiedOPSDConfig, decomposition_steps=1, max_completion_length=10, per_device_train_batch_size=rows
        )
        plan = plan_memory(footprints[False], args, PURIFIED_OPSD)
        assert bytes_of(plan, "views of the decomposition") == 3 * decomposed * 10 * 32 * 4
    assert not bytes_of(plan_memory(footprints[False], make_args(), OPSD), "views of the decomposition")


@pytest.mark.parametrize(("engine", "told"), [("zero1", "engine='zero1' is not known"), ("single", "num_gpus=4")])
def test_an_impossible_engine_is_refused(footprints, make_args, engine, told):
    with pytest.raises(ValueError, match=told):
        plan_memory(footprints[False], make_args(), OPSD, engine=engine, num_gpus=4)


@pytest.mark.parametrize("file", ["zero2", "zero3"])
def test_the_engine_is_read_from_an_accelerate_file(file):
    path = str(ROOT / "recipes" / "accelerate" / f"{file}_cpu.yaml")
    assert command.read_engine(path, None) == (file, 2)
    assert command.read_engine(path, 8) == (file, 8)
    assert command.read_engine(None, 1) == ("single", 1) and command.read_engine(None, 2) == ("ddp", 2)
    with pytest.raises(ValueError, match="accelerate_config='zero9' is neither a file nor one of"):
        command.read_engine("zero9", 1)


@pytest.fixture
def folder(tmp_path):
    small_config(hidden_size=1024, intermediate_size=4096).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_the_command_prints_the_parts_and_a_verdict(folder, capsys):
    words = ["--model_name_or_path", folder, "--method", "opsd", "--num_gpus", "2", "--accelerate_config", "zero2"]
    command.main(words)
    printed = capsys.readouterr().out
    assert "| always | weights |" in printed and "| **peak** |" in printed and "Fits into 80 GiB." in printed


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_groups_that_only_all_gpus_together_make_are_planned(folder, capsys):
    words = ["--model_name_or_path", folder, "--method", "ogls-sd", "--num_gpus", "8", "--distillation_length", "64"]
    words += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--num_generations", "8"]
    command.main(words)
    assert "ogls-sd, 8 GPUs, ddp" in capsys.readouterr().out
    args, _ = command._run_arguments("ogls-sd", words[6:], 8)
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (1, 1)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ("gradient_checkpointing", {}),
    ],
)
def test_the_verdict_names_a_change_with_which_the_run_fits(make_args, change, settings):
    common = {"per_device_train_batch_size": 1, "max_completion_length": 1024, "teacher_tokens_per_forward": 1}
    args = make_args(**common, use_vllm=True, vllm_mode="server", **settings)
    config = small_config(hidden_size=512, intermediate_size=2048)
    run = command.Planned(config, args, "opsd", None, "float32", True, Workload(50, 50))
    saving = run.changed(**{change: True}).plan("ddp", 2).total
    run.gpu_gib = (saving + run.plan("ddp", 2).total) / 2 / GIB
    assert "Does not fit" in command.verdict(run, "ddp", 2)
    assert command.verdict(run, "ddp", 2).endswith(f"It does with {change}=True.")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_the_tables_of_the_docs_are_what_the_code_gives():
    assert command.docs_tables() in (ROOT / "docs" / "scale.md").read_text()
