# SPDX-License-Identifier: Apache-2.0
"""A quantized base with float32 adapters over it; the layers are stand-ins, tests/real/test_qlora.py has bitsandbytes' own."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_opsd.model.quantized import is_quantized, prepare_quantized


@pytest.fixture
def quantized(make_model):
    """An adapter as TRL makes it over four bits: in bfloat16, and a layer that bitsandbytes may repack on this CPU."""
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_base_model().is_loaded_in_4bit = True
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu, layer.quant_state = True, types.SimpleNamespace()
    return model


def dtypes(model, trains):
    return {p.dtype for p in model.parameters() if p.requires_grad is trains}


def test_adapters_become_float32_layers_stay_as_training_needs_them_and_the_base_as_it_is(quantized):
    base = {n: p.detach().clone() for n, p in quantized.named_parameters() if not p.requires_grad}
    prepare_quantized(quantized)
    assert dtypes(quantized, True) == {torch.float32}
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in quantized.modules())
    assert all(torch.equal(quantized.get_parameter(name), value) for name, value in base.items())


def test_a_layer_that_was_repacked_already_is_refused_by_name(quantized):
    quantized.get_base_model().model.layers[0].mlp.up_proj.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"has repacked .*layers\.0\.mlp\.up_proj .* no gradient goes through it"):
        prepare_quantized(quantized)


def test_other_models_keep_their_dtype(make_model):
    model = make_model(torch.bfloat16)
    prepare_quantized(model)
    assert not is_quantized(model) and dtypes(model, True) == {torch.bfloat16}


def test_a_trainer_prepares_its_model(build, quantized):
    trainer = build(model=quantized)
    assert dtypes(trainer.model, True) == {torch.float32}


def test_bfloat16_would_lose_steps_of_the_papers_rate_on_most_of_a_fresh_adapter(make_model):
    """Why adapters are float32: a step of Adam is about the learning rate."""
    values = torch.tensor([0.002, 0.01, 0.1])
    assert torch.equal(values.bfloat16() + 5e-6, values.bfloat16()) and not torch.equal(values + 5e-6, values)
    assert torch.tensor(0.001).bfloat16() + 5e-6 != torch.tensor(0.001).bfloat16()
    model = get_peft_model(make_model(hidden_size=512), LoraConfig(r=4, target_modules=["q_proj"]))
    fresh = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_A." in name])
    assert (fresh.abs() > 0.002).float().mean() > 0.9
