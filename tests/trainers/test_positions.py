# SPDX-License-Identifier: Apache-2.0
"""Models with learned absolute positions: what TRL computes on prompts padded on the left equals unpadded rows."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_opsd import OPSDTrainer
from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.teacher.forwards import counted_positions

SETTINGS = {"num_generations": 2, "reward_weight": 0.5, "clip": None}

PLAIN = TeacherContext("plain", None)


def reward(completions, **kwargs):
    return [float(index % 3) for index, _ in enumerate(completions)]


def seeded(model_class, config, tokenizer):
    torch.manual_seed(0)
    model = model_class(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture
def gpt2(tokenizer):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.3}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    return seeded(
        GPT2LMHeadModel, GPT2Config(vocab_size=len(tokenizer), **sizes, **dropouts, **tokens), tokenizer
    ).double()


@pytest.fixture
def build(make_args, dataset, tokenizer, given_rollouts):
    def build(model, peft_config=None, **settings):
        trainer = OPSDTrainer(
            model=model,
            reward_funcs=reward,
            args=make_args(**{**SETTINGS, **settings}),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
            peft_config=peft_config,
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return given_rollouts(trainer)

    return build


def batch_of(trainer, dataset):
    """The first micro-batch of two prompts of unequal length, and per row the ids without padding."""
    batch = trainer._prepare_inputs([dataset[index] for index in (0, 7) for _ in range(2)])
    assert not batch["prompt_mask"].all()
    return batch, [
        [batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()].tolist() for part in ("prompt", "completion")]
        for row in range(len(batch["prompt_ids"]))
    ]


def logits_of(model, context, completion):
    return model(input_ids=torch.tensor([context + completion]), use_cache=False).logits[0, len(context) - 1 : -1]


def test_distillation_with_a_reward_equals_unpadded_rows_in_loss_and_gradient(build, gpt2, dataset):
    trainer = build(gpt2)
    model, heat = copy.deepcopy(gpt2), trainer.args.temperature
    model.__dict__.pop("forward")
    batch, rows = batch_of(trainer, dataset)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    distilled, policy, value = 0.0, 0.0, 0.0
    for row, (prompt, completion) in enumerate(rows):  # in the order that TRL shuffled them to
        (source,) = (
            source
            for source in (dataset[0], dataset[7])
            if trainer.scorer.collator.encode(source["prompt"], PLAIN).ids == prompt
        )
        context = trainer.scorer.collator.encode(source["prompt"], TeacherContext("teacher", source["solution"])).ids
        log_q = (logits_of(model, prompt, completion) / heat).log_softmax(-1)
        log_p = (logits_of(model, context, completion) / heat).log_softmax(-1).detach()
        distilled = distilled + (log_p.exp() * (log_p - log_q)).sum()
        advantage = batch["advantages"][row]
        policy = policy - advantage * log_q.gather(1, torch.tensor(completion)[:, None]).sum()
        value -= advantage.item() * len(completion)
    count = sum(len(completion) for _, completion in rows)
    assert batch["advantages"].abs().max() > 0.1
    assert loss.item() == pytest.approx((distilled.item() + 0.5 * value) / count, rel=1e-4)
    ((distilled + 0.5 * policy) / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gpt2.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["reference model", "adapter off"])
def test_old_and_reference_log_probabilities_are_those_of_unpadded_rows(build, gpt2, dataset, tmp_path, lora):
    gpt2.float().save_pretrained(tmp_path / "gpt2")  # which a reference model is read from
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True) if lora else None
    trainer = build(model, adapter, beta=0.1, num_iterations=2)
    batch, rows = batch_of(trainer, dataset)
    for row, (prompt, completion) in enumerate(rows):
        logits = logits_of(gpt2, prompt, completion) / trainer.args.temperature
        want = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].detach()
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            torch.testing.assert_close(batch[name][row, : len(completion)], want, rtol=1e-4, atol=1e-4)


def test_the_forward_of_a_routers_loss_counts_positions_on_tokens(build, tokenizer, dataset):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), **sizes, **heads, **experts)
    trainer = build(seeded(Qwen3MoeForCausalLM, config, tokenizer), reward_weight=0.0)
    batch, rows = batch_of(trainer, dataset)
    seen = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    trainer.compute_loss(trainer.model, batch)
    ((positions,),) = (seen,)
    for row, (prompt, completion) in enumerate(rows):
        first = batch["prompt_ids"].size(1) - len(prompt)
        counted = positions[row, first : first + len(prompt) + len(completion)]
        assert counted.tolist() == list(range(len(counted)))


def test_positions_that_are_given_stay_and_a_model_without_any_is_left_alone(gpt2):
    ids = torch.tensor([[3, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]])}
    given = {"position_ids": torch.tensor([[5, 6, 7]])}
    want, padded = gpt2(**inputs, **given).logits, gpt2(**inputs).logits
    with counted_positions(gpt2, gpt2):
        torch.testing.assert_close(gpt2(**inputs, **given).logits, want)
        assert (gpt2(**inputs).logits - padded)[0, -1].abs().max() > 1e-3
    torch.testing.assert_close(gpt2(**inputs).logits, padded)

    class NoPositions(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids

    model = NoPositions()
    with counted_positions(model, model):
        assert model(**inputs) is ids
