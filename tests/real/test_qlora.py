# SPDX-License-Identifier: Apache-2.0
"""QLoRA: the embedded model in 4 or 8 bits of bitsandbytes, whose CPU backend runs it, with adapters over it."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.commands.train import main
from trl_opsd.demo import build
from trl_opsd.model.quantized import prepare_quantized
from trl_opsd.teacher.contexts import TeacherContext

functional = pytest.importorskip(
    "bitsandbytes.functional", reason="bitsandbytes is not installed: `pip install bitsandbytes`"
)

# bitsandbytes 0.50 on a CPU narrows what an 8-bit layer reads, and says so; PEFT's layer reads a name that torch renamed.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")

MODEL = str(Path(build.__file__).parent / "model")
BITS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4 bits twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}
STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
LORA = LoraConfig(r=4, target_modules="all-linear")


def rows():
    questions = [(f"{n}+{n + 2}=?", 2 * n + 2) for n in range(1, 5)]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": text}], "solution": f"{text} {value}, so \\boxed{{{value}}}"}
            for text, value in questions
        ]
    )


def make(folder, model=MODEL, bits="4 bits", peft_config=LORA, **settings):
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 12,
        "max_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **settings,
    }
    return OPSDTrainer(
        model=model,
        args=OPSDConfig(str(folder), **values),
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        quantization_config=BitsAndBytesConfig(**BITS[bits]) if isinstance(model, str) else None,
        peft_config=copy.deepcopy(peft_config),
    )


def quantized(bits="4 bits", as_trained=True):
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=BitsAndBytesConfig(**BITS[bits]), device_map={"": "cpu"}
    )
    if as_trained:  # a repacked layer computes in bfloat16
        prepare_quantized(model)
    return model


def as_dense(model):
    """The embedded model with what its 4-bit layers hold as plain weights."""
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            dense.get_submodule(name).weight.data = functional.dequantize_4bit(module.weight.data, state).float()
    return dense


def adapters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


IDS = torch.arange(20, 32)[None]


def test_a_steps_loss_and_gradient_are_those_of_the_dense_weights_below(tmp_path):
    """Also after sampling and scoring, at whose first forward bitsandbytes would repack the layers."""
    trainer = make(tmp_path, clip=None)
    dense = get_peft_model(as_dense(quantized()), copy.deepcopy(LORA))
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(adapters(trainer.model).items())):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.05 * noise)
            dense.get_parameter(name).copy_(parameter)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(list(trainer.train_dataset)[:2])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    heat, total, count = trainer.args.temperature, 0.0, 0
    for row, index in enumerate(batch["rollout_index"].tolist()):
        source = trainer.train_dataset[index]
        prompt, completion = (
            batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()][None] for part in ("prompt", "completion")
        )
        view = TeacherContext("teacher", source["solution"])
        context = torch.tensor([trainer.scorer.collator.encode(source["prompt"], view).ids])
        length = completion.size(1)
        student = dense(input_ids=torch.cat([prompt, completion], 1), use_cache=False).logits[0, -length - 1 : -1]
        with torch.no_grad(), dense.disable_adapter():
            target = dense(input_ids=torch.cat([context, completion], 1), use_cache=False).logits[0, -length - 1 : -1]
        log_q, log_p = (student / heat).log_softmax(-1), (target / heat).log_softmax(-1)
        total, count = total + (log_p.exp() * (log_p - log_q)).sum(), count + length
    (total / count).backward()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-4)
    wanted = {name: parameter.grad for name, parameter in adapters(dense).items()}
    for name, parameter in adapters(trainer.model).items():
        largest = wanted[name].abs().max()
        assert largest > 0, name
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-3 * largest.item(), msg=name)


@pytest.mark.parametrize("bits", BITS)
def test_the_teacher_is_the_quantized_base_itself_and_nothing_is_there_twice(tmp_path, bits):
    base = logits(quantized(bits).eval(), IDS)
    trainer = make(tmp_path, bits=bits, **{**STEPS, "save_strategy": "no"})
    layers, size = len(list(trainer.model.modules())), sum(p.nbytes for p in trainer.model.parameters())
    trainer.train()
    student = logits(trainer.model.eval(), IDS)
    with trainer.teacher.active():
        torch.testing.assert_close(logits(trainer.model, IDS), base, rtol=1e-4, atol=1e-4)
    assert (student - base).abs().max() > 1e-2
    assert trainer.teacher.adapter_off and not trainer.teacher.values
    assert len(list(trainer.model.modules())) == layers
    assert sum(p.nbytes for p in trainer.model.parameters()) == size
    assert {p.dtype for p in adapters(trainer.model).values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
@pytest.mark.parametrize("bits", BITS)
def test_resumed_equals_uninterrupted_bitwise(tmp_path, bits, kind):
    settings = {**STEPS, "bits": bits, "teacher_model_kind": kind, "teacher_update_rate": 0.3}
    whole, resumed = make(tmp_path, **settings), make(tmp_path, **settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert set(whole.teacher.values) <= set(adapters(whole.model))
    for name, value in whole.teacher.values.items():
        assert torch.equal(value, resumed.teacher.values[name]), name


@pytest.mark.parametrize("bits", BITS)
def test_a_saved_adapter_over_the_same_bits_is_the_trained_model(tmp_path, bits):
    trainer = make(tmp_path / "run", bits=bits, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    read = PeftModel.from_pretrained(quantized(bits), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(logits(read, IDS), logits(trainer.model.eval(), IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("command", ["opsd", "grpo", "sft"])
def test_the_command_line_trains_over_four_bits(tmp_path, command):
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "{n}+1=", "solution": "{n + 1}"}}\n' for n in range(1, 9))
    )
    words = (
        f"--model_name_or_path {MODEL} --dataset_name {tmp_path}/rows.jsonl --output_dir {tmp_path}/run --use_cpu true"
    )
    words += " --bf16 false --load_in_4bit true --use_peft true --lora_target_modules all-linear --max_steps 1 --report_to none"
    words += " --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
    words += {"sft": "", "opsd": " --max_completion_length 8"}.get(
        command, " --max_completion_length 8 --num_generations 2"
    )
    trainer = main(command, words.split())
    assert trainer.state.global_step == 1 and trainer.model.get_base_model().is_loaded_in_4bit
    assert {p.dtype for p in adapters(trainer.model).values()} == {torch.float32}
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in trainer.model.modules())


def test_a_model_that_has_generated_on_this_cpu_is_refused_by_name(tmp_path):
    if not functional.has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, so nothing is repacked")
    model = quantized(as_trained=False).eval()
    logits(model, IDS)
    with pytest.raises(ValueError, match=r"has repacked .*layers\.0\..* no gradient goes through it"):
        make(tmp_path, model=model)


def test_quantized_weights_without_an_adapter_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="purely quantized models"):
        make(tmp_path, peft_config=None)
