# SPDX-License-Identifier: Apache-2.0
"""A whole step of a trainer on given rollouts, and its parts by hand from the model's own logits."""

import copy

import torch

from trl_opsd import OPSDTrainer

# transformers computes norms and rotary angles in float32, whatever the model's dtype.
EXACT = {"rel": 1e-6, "abs": 1e-9}


def make_trainer(make_model, make_args, dataset, tokenizer, trainer_class=OPSDTrainer, model=None, **settings):
    keywords = {key: settings.pop(key) for key in ("peft_config", "reward_funcs", "eval_dataset") if key in settings}
    return trainer_class(
        model=model if model is not None else make_model(torch.float64),
        args=make_args(trainer_class.config_class, **settings),
        train_dataset=dataset,
        processing_class=copy.deepcopy(tokenizer),
        **keywords,
    )


def loss_of_rows(trainer, rows):
    """The loss of a whole step over `rows` and the micro-batch it was taken on."""
    trainer.model.train()
    trainer._buffered_inputs, trainer._step, trainer.current_gradient_accumulation_steps = None, 0, 1
    batch = trainer._prepare_inputs(list(rows))
    return trainer.compute_loss(trainer.model, batch), batch


def ids_of(tokenizer, prompt, **kwargs):
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs)[
        "input_ids"
    ]


def logits_of(model, context, completion):
    """Raw logits (T, V) that predict `completion`, one unpadded row, the model's own forward."""
    ids = torch.tensor([context + completion])
    return model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]


def teacher_prompt(args, row):
    text = args.teacher_prompt_template.replace("{prompt}", row["prompt"][-1]["content"])
    return [{"role": "user", "content": text.replace("{solution}", row["solution"])}]


def completion_of(trainer, row, index=0):
    student = ids_of(trainer.tokenizer, row["prompt"], **trainer.args.chat_template_kwargs)
    return student, trainer._generate_single_turn([student])[0][0]


def forward_kl_terms(student, target, temperature):
    log_q, log_p = (student / temperature).log_softmax(-1), (target / temperature).log_softmax(-1)
    return log_p.exp() * (log_p - log_q)
