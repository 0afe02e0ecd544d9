# SPDX-License-Identifier: Apache-2.0
"""The loss reads hidden states and the head: both must be the model's own, family by family."""

import types

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_opsd.losses import OutputHead
from trl_opsd.model.heads import attach_head_function, causal_lm, check_output_head, head_function, head_shape
from trl_opsd.teacher.forwards import TeacherForward

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "qwen3-tied": Qwen3Config(**SIZE, head_dim=8, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZE),
    "gemma2-softcap": Gemma2Config(**SIZE, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "cohere-scale": CohereConfig(**SIZE, logit_scale=0.25),
    "granite-scaling": GraniteConfig(**SIZE, logits_scaling=4.0),
    "phi-bias": PhiConfig(**SIZE),
}


def make(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    return model


@pytest.fixture
def ids():
    return torch.arange(3, 15).view(2, 6)


def head_logits(model, ids, **keywords):
    with head_function(model, lambda hidden, head: head.logits(hidden), **keywords) as request:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return request.result, output


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_models_own_logits(family, ids):
    model = make(family)
    own = model(input_ids=ids).logits
    attach_head_function(model)
    check_output_head(model, model, ids[:1])
    torch.testing.assert_close(head_logits(model, ids)[0], own)
    ours, output = head_logits(model, ids, keep_forward=True)
    torch.testing.assert_close(ours, own)
    torch.testing.assert_close(output.logits, own)


def test_the_table_of_families_covers_every_part_of_a_head(ids):
    seen = []
    for family in ("gemma2-softcap", "cohere-scale", "granite-scaling", "phi-bias"):
        model = make(family)
        attach_head_function(model)
        with head_function(model, lambda hidden, head: (hidden.sum(), seen.append(head))):
            model(input_ids=ids)
    softcap, scale, scaling, bias = seen
    assert softcap.logit_softcap == 2.0
    assert (scale.logit_scale, scaling.logit_scale) == (0.25, 0.25)
    assert bias.bias is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_as_before_after_the_patch(family, ids):
    model = make(family)
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **settings)
    attach_head_function(model)
    assert torch.equal(model.generate(ids, **settings), before)
    head_logits(model, ids)
    assert torch.equal(model.generate(ids, **settings), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_completion_states_are_those_of_the_unpadded_row(family):
    model = make(family)
    attach_head_function(model)
    rows, length = [[5, 6, 7, 8, 9, 10], [11, 12, 13]], 2
    ids = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    heads = []
    with torch.no_grad():
        states = TeacherForward(model, model, heads.append)(ids, mask, length)
        assert states.shape == (2, length, 16) and heads[0].weight.shape == (40, 16)
        for row, tokens in enumerate(rows):
            own = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
            torch.testing.assert_close(states[row], own[-length - 1 : -1], rtol=1e-5, atol=1e-5)


def test_the_gradient_through_the_head_function_is_the_models_own(ids):
    model = make("qwen3-tied")
    model(input_ids=ids).logits.square().sum().backward()
    own = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    attach_head_function(model)
    with head_function(model, lambda hidden, head: head.logits(hidden).square().sum()):
        model(input_ids=ids)["loss"].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("change", ["scaled", "shifted", "nan"])
def test_a_model_whose_logits_are_not_its_head_is_refused_by_name(ids, change):
    model = make("llama")
    inner = model.forward
    changes = {
        "scaled": lambda z: z * 1.5,
        "shifted": lambda z: z.roll(1, -1),
        "nan": lambda z: z * float("nan"),
    }

    def forward(self, *args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = changes[change](output.logits)
        return output

    model.forward = types.MethodType(forward, model)
    attach_head_function(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM are not its output head"):
        check_output_head(model, model, ids[:1])


def test_a_token_that_the_heads_bias_forbids_hides_no_difference(ids):
    model = make("phi-bias")
    model.lm_head.bias.data[[3, 8]] = -torch.inf
    attach_head_function(model)
    check_output_head(model, model, ids[:1])
    inner = model.forward
    model.forward = lambda **inputs: types.SimpleNamespace(logits=inner(**inputs).logits * 1.5)
    with pytest.raises(ValueError, match="PhiForCausalLM are not its output head"):
        check_output_head(model, model.forward, ids[:1])


def test_a_model_without_a_head_over_a_backbone_is_refused_by_name():
    backbone = make("llama").model
    with pytest.raises(ValueError, match="LlamaModel has no backbone with a linear output head"):
        attach_head_function(backbone)


def test_attaching_twice_changes_nothing():
    model = make("llama")
    attach_head_function(model)
    first = model.forward
    attach_head_function(model)
    assert model.forward is first


def test_an_error_inside_the_function_leaves_the_model_usable(ids):
    model = make("llama")
    attach_head_function(model)

    def fail(hidden, head):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), head_function(model, fail):
        model(input_ids=ids)
    assert model(input_ids=ids).logits.shape == (2, 6, 40)


def lora(model, **settings):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings))


def test_a_peft_model_gives_its_own_logits(ids):
    model = lora(make("qwen3"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)
    own = model(input_ids=ids).logits
    attach_head_function(model)
    check_output_head(model, model, ids[:1])
    torch.testing.assert_close(head_logits(model, ids)[0], own)
    assert causal_lm(model) is model.get_base_model() and head_shape(model) == (40, 16)
    with model.disable_adapter():
        assert (head_logits(model, ids)[0] - own).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_in_front_of_the_prompt_are_refused_by_name(kind):
    model = get_peft_model(make("qwen3"), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=rf"{kind.__name__} puts virtual tokens in front.*LoraConfig"):
        attach_head_function(model)


def test_a_head_in_modules_to_save_is_the_one_that_trains(ids):
    model = lora(make("qwen3"), modules_to_save=["lm_head"])
    attach_head_function(model)
    head = causal_lm(model).get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(2)
    check_output_head(model, model, ids[:1])
    trained = head_logits(model, ids)[0]
    with model.disable_adapter():
        torch.testing.assert_close(trained, 2 * head_logits(model, ids)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1]}},
    ],
    ids=["lora", "trainable-tokens"],
)
def test_an_adapter_on_the_head_is_refused_because_the_loss_would_miss_it(settings):
    model = get_peft_model(make("qwen3"), LoraConfig(r=2, **settings))
    with pytest.raises(ValueError, match=r"output head carries an adapter .*modules_to_save"):
        attach_head_function(model)


WHOLE_ADAPTERS = {  # which leave the head a plain layer
    "all linear layers": {"target_modules": "all-linear"},
    "input embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "copy of the input embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "copies of both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
if "ensure_weight_tying" in LoraConfig.__dataclass_fields__:  # which older versions of PEFT lack
    WHOLE_ADAPTERS["copies that are tied"] = {**WHOLE_ADAPTERS["copies of both"], "ensure_weight_tying": True}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")  # of older PEFT, which goes on
@pytest.mark.filterwarnings("ignore:Model (has|config has) `tie_word_embeddings:UserWarning")  # PEFT, about merging
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")  # PEFT, of a model that is not tied
@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize("settings", WHOLE_ADAPTERS.values(), ids=WHOLE_ADAPTERS)
def test_an_adapter_beside_the_head_gives_the_models_own_logits_tied_or_not(ids, family, settings):
    model = get_peft_model(make(family), LoraConfig(r=2, **settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    own = model(input_ids=ids).logits
    attach_head_function(model)
    check_output_head(model, model, ids[:1])
    torch.testing.assert_close(head_logits(model, ids)[0], own)


@pytest.mark.filterwarnings("ignore:Model (has|config has) `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("settings", [{"trainable_token_indices": [1]}], ids=["trainable tokens of both"])
def test_an_adapter_that_peft_ties_to_the_head_is_refused_too(settings):
    model = get_peft_model(make("qwen3-tied"), LoraConfig(r=2, target_modules=["q_proj"], **settings))
    with pytest.raises(ValueError, match=r"output head carries an adapter .*modules_to_save"):
        attach_head_function(model)


def test_the_head_applies_scale_bias_and_cap_in_the_order_of_transformers():
    hidden, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    logits = OutputHead(weight, bias, 0.5, 3.0).logits(hidden)
    torch.testing.assert_close(logits, 3 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3))


def test_an_encoder_decoder_reaches_no_head_function():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no backbone"):
        attach_head_function(model)
