# SPDX-License-Identifier: Apache-2.0
"""Steps of groups whose rollouts are given, some of them right."""

import copy

import torch

# transformers computes norms and rotary angles in float32, whatever the model's dtype.
EXACT = {"rel": 1e-6, "abs": 1e-9}
TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "it is \\boxed{10} then", "a", "no", "5", "\\boxed{6}")
SMALL = {"max_completion_length": 40, "distillation_length": 6}


def reward_boxed(completions, **kwargs):
    """Right where the completion boxes anything."""
    return [float("boxed" in completion[0]["content"]) for completion in completions]


def step(trainer, rows):
    trainer._buffered_inputs, trainer._step = None, 0
    monkey = list(rows)
    batch = trainer._prepare_inputs(monkey)
    return trainer.compute_loss(trainer.model, batch), batch


def ids_of(trainer, prompt, **kwargs):
    return trainer.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs
    )["input_ids"]


def logits_of(model, context, completion):
    ids = torch.tensor([context + completion])
    return model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].detach()


def privileged(trainer, row, template, text):
    content = template.replace("{prompt}", row["prompt"][-1]["content"]).replace("{solution}", text)
    return ids_of(trainer, [{"role": "user", "content": content}], **trainer.args.teacher_chat_template_kwargs)


def bare(trainer):
    model = copy.deepcopy(trainer.model)
    model.__dict__.pop("forward")
    return model


def reward_every_other(completion_ids, **kwargs):
    return [float(index % 2) for index in range(len(completion_ids))]


GROUPS = {"num_generations": 4, "reward_funcs": reward_every_other}
