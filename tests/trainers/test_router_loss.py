# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: the loss that balances their router is counted once, whatever else is in the loss."""

import copy

import pytest
import torch
from groups import reward_every_other
from pages import assert_same_step, gradients_of, token_log_probs, whole_step
from peft import LoraConfig
from steps import forward_kl_terms, ids_of, teacher_prompt
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_opsd import AntiSDTrainer, OPSDTrainer
from trl_opsd._trl.versions import HAS_ROUTER_LOSS
from trl_opsd.model.heads import causal_lm

pytestmark = pytest.mark.skipif(not HAS_ROUTER_LOSS, reason="this TRL has no router's loss")

COEFFICIENT, EXPERTS, CHOSEN = 0.3, 4, 2  # the coefficient is large enough to be seen beside a divergence
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "router_aux_loss_coef": COEFFICIENT}
FAMILIES = {
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"moe_intermediate_size": 8, "head_dim": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {}),
}
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "clip": None}
# Under LoRA the router is no linear layer that PEFT takes up, so it stays as it is.
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def make(build, tokenizer):
    def make(family="qwen3-moe", **settings):
        model_class, config_class, own = FAMILIES[family]
        torch.manual_seed(0)
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
        model = model_class(config_class(**SIZES, **HEADS, **ROUTED, **own, **tokens)).double()
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        return build(model=model, **{**STEP, **settings})

    return make


def read(model, prompt, completion):
    """Logits (T, V) that predict `completion`, and every layer's router probabilities (S, experts) over the whole row."""
    output = model(
        input_ids=torch.tensor([prompt + completion]), use_cache=False, output_router_logits=True, return_dict=True
    )
    return output.logits[0, len(prompt) - 1 : -1], [logits.softmax(-1) for logits in output.router_logits]


def balance(rows):
    """The Switch Transformer's loss (2101.03961, eq. 4) of a forward: experts times the sum of share chosen by mean probability."""
    probabilities = torch.cat([layer for layers in rows for layer in layers])
    chosen = torch.zeros(EXPERTS, dtype=torch.float64)
    for row in probabilities.tolist():
        for expert in sorted(range(EXPERTS), key=lambda expert: -row[expert])[:CHOSEN]:
            chosen[expert] += 1 / len(probabilities)
    return EXPERTS * (chosen * probabilities.mean(0)).sum()


def by_hand(trainer, model, dataset):
    """Divergence, router's loss and policy loss of the step whose micro-batches the trainer holds, each with its gradient."""
    args, places = trainer.args, [batch["rollout_index"].tolist() for batch in trainer._buffered_inputs]
    size = args.num_generations
    distilled, router, policy, count = 0.0, 0.0, 0.0, 0
    for batch, indices in zip(trainer._buffered_inputs, places, strict=True):
        probabilities = []
        for row, index in enumerate(indices):
            source = dataset[index // size]
            prompt = ids_of(trainer.tokenizer, source["prompt"], **args.chat_template_kwargs)
            completion = trainer._generate_single_turn([prompt])[0][0]
            context = ids_of(trainer.tokenizer, teacher_prompt(args, source), **args.teacher_chat_template_kwargs)
            logits, layers = read(model, prompt, completion)
            target = read(model, context, completion)[0].detach()
            distilled = distilled + forward_kl_terms(logits, target, args.temperature).sum()
            log_prob = token_log_probs(logits, completion, args.temperature)
            policy = policy - batch["advantages"][row] * (log_prob - log_prob.detach()).exp().sum()
            probabilities.append(layers)
            count += len(completion)
        router = router + COEFFICIENT * balance(probabilities) / len(places)
    return distilled / count, router, policy / count


def micro_batch(trainer, batch):
    """Router probabilities of a micro-batch's rows, whose padding is left out."""
    rows = []
    for row in range(len(batch["prompt_ids"])):
        ids = [
            batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()].tolist() for part in ("prompt", "completion")
        ]
        rows.append([layer.detach() for layer in read(trainer.model, *ids)[1]])
    return rows


def steps_of(trainer, dataset):
    """A whole step by the trainer, and the same by hand on a copy of the model as a function of the reward's weight."""
    model, size = copy.deepcopy(trainer.model), trainer.args.num_generations
    causal_lm(model).__dict__.pop("forward")  # the trainer's patch
    rows = [dataset[index] for index in range(4 // size) for _ in range(size)]
    got = whole_step(trainer, rows)
    distilled, router, policy = by_hand(trainer, model, rows[::size])
    loss = distilled + router + trainer.args.reward_weight * policy
    loss.backward()
    return got, (loss.item(), gradients_of(model)), router


@pytest.mark.parametrize("lora", [False, True], ids=["router trains", "router frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_routers_loss_is_the_mean_over_micro_batches_beside_the_divergence(make, dataset, family, lora):
    trainer = make(family, peft_config=LORA if lora else None)
    got, wanted, router = steps_of(trainer, dataset)
    assert router.item() > COEFFICIENT  # which even routing gives, and none gives less
    assert_same_step(got, wanted, rel=1e-5)
    assert any("gate" in name for name in got[1]) is not lora


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.0])
def test_a_routers_loss_counts_once_whatever_the_reward_weighs(make, dataset, weight):
    settings = {"num_generations": 2, "reward_weight": weight, "reward_funcs": reward_every_other}
    got, wanted, _ = steps_of(make(**settings), dataset)
    assert_same_step(got, wanted, rel=1e-5)


@pytest.mark.parametrize("trainer_class", [AntiSDTrainer, OPSDTrainer], ids=["by advantages", "by a divergence"])
def test_a_step_with_the_routers_loss_is_that_without_it_and_its_mean(make, dataset, trainer_class):
    group = {"num_generations": 2, "reward_funcs": reward_every_other} if trainer_class is AntiSDTrainer else {}
    rows, steps = [dataset[0], dataset[0], dataset[1], dataset[1]], []
    for coefficient in (0.0, COEFFICIENT):
        trainer = make(trainer_class=trainer_class, router_aux_loss_coef=coefficient, **group)
        torch.manual_seed(5)  # TRL shuffles
        steps.append(whole_step(trainer, rows)[0])
    router = sum(balance(micro_batch(trainer, batch)) / 2 for batch in trainer._buffered_inputs)
    assert steps[1] - steps[0] == pytest.approx(COEFFICIENT * router.item(), rel=1e-5)


def test_a_mixture_under_lora_on_its_experts_resumes_bit_for_bit(make, tmp_path):
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts),
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.3,
        "output_dir": str(tmp_path / "run"),
    }
    whole, resumed = make(**settings), make(**settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert any(".experts." in name for name in whole.teacher.values)
    for name, value in whole.teacher.values.items():
        assert torch.equal(value, resumed.teacher.values[name]), name
