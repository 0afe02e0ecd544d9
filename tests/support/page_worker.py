# SPDX-License-Identifier: Apache-2.0
"""One training run of a page on given rollouts, on one process or under a launcher; rank 0 writes its numbers."""

import argparse
import copy
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"], os.environ["CI"] = "1", "true"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate.utils import gather_object
from agents import calculate, call, scripted, tool_tokenizer
from engines import GLOBAL_BATCH, make_model
from page_cells import PAGES, of_page, rows_of_pages

from trl_opsd import OPSDTrainer
from trl_opsd.commands.train import finish
from trl_opsd.demo.tokenizer import build_tokenizer

TEXTS = ("1+2=3", "so 4", "wait, 10 it is", "a", "it is 3 then")  # long and short, so that rows change ranks
TOOLS = {"clip": None, "guard": "off", "chat_template_kwargs": {"enable_thinking": False}}
# Only the first rows of a batch call tools, so that ranks sample other numbers of turns.
SCRIPTS = (
    (call("calculate", expression="1+2"), call("calculate", expression="3*3"), "9<|im_end|>"),
    (call("calculate", expression="1+2"), "so 3<|im_end|>"),
    *[(f"{text}<|im_end|>",) for text in ("1+2=3", "wait, 10 it is")] * ((GLOBAL_BATCH - 2) // 2),
)


def give_rollouts(trainer):
    """Completions are a function of prompt and place in the batch, so every split over ranks has the same ones."""

    def sample(prompts, *args, **kwargs):
        tokenizer = trainer.tokenizer
        first = trainer.accelerator.process_index * len(prompts)
        places = [(first + row) % GLOBAL_BATCH for row in range(len(prompts))]
        texts = [TEXTS[(len(ids) + place) % len(TEXTS)] for ids, place in zip(prompts, places, strict=True)]
        return [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts
        ], None

    trainer._generate_single_turn = sample


def reward_short(completions, **columns):
    """Right where the completion is short."""
    return [float(len(completion[0]["content"]) < 6) for completion in completions]


def watch_rows(trainer, padded):
    """Positions that the student computes on this rank, and how many rows came from another; `padded` leaves them all."""
    watched, arrange = {"positions": 0, "moved": 0}, trainer.arrange_rows

    def arranged(batches):
        before = {index for batch in batches for index in batch["rollout_index"].tolist()}
        batches = batches if padded else arrange(batches)
        watched["moved"] += len({index for batch in batches for index in batch["rollout_index"].tolist()} - before)
        return batches

    def count(module, args, kwargs):
        watched["positions"] += torch.is_grad_enabled() * kwargs["input_ids"].numel()

    trainer.arrange_rows = arranged
    trainer.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return watched


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", required=True, choices=(*PAGES, "tools"))
    parser.add_argument("--padded", action="store_true")
    options = parser.parse_args()
    trainer_class, settings = (OPSDTrainer, TOOLS) if options.page == "tools" else of_page(options.page)
    world, tokenizer = int(os.environ.get("WORLD_SIZE", 1)), build_tokenizer()
    torch.manual_seed(0)
    args = trainer_class.config_class(
        output_dir=str(options.output / "out"),
        per_device_train_batch_size=GLOBAL_BATCH // world // 2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        max_completion_length=300 if options.page == "tools" else 16,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    trainer = trainer_class(
        model=make_model(tokenizer, False),
        reward_funcs=reward_short,
        args=args,
        train_dataset=rows_of_pages(),
        processing_class=tool_tokenizer(tokenizer) if options.page == "tools" else copy.deepcopy(tokenizer),
        tools=[calculate] if options.page == "tools" else None,
    )
    give_rollouts(trainer)
    if options.page == "tools":
        trainer._generate_single_turn = scripted(trainer, SCRIPTS)
    watched = watch_rows(trainer, options.padded)
    trainer.train()
    watched = gather_object([watched])
    if trainer.accelerator.is_main_process:
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        numbers = {
            "rows": watched,
            "world": trainer.accelerator.num_processes,
            "losses": [entry["loss"] for entry in entries],
            "norms": [entry["grad_norm"] for entry in entries],
            "weights": sum(p.double().square().sum().item() for p in trainer.model.parameters()),
        }
        (options.output / "numbers.json").write_text(json.dumps(numbers))
    finish(trainer)


if __name__ == "__main__":
    main()
