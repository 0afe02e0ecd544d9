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
from datasets import Dataset
from engines import GLOBAL_BATCH, make_model, make_rows
from peft import LoraConfig
from two_terms import TwoTerms

from trl_opsd.commands.train import finish
from trl_opsd.demo.tokenizer import build_tokenizer
from trl_opsd.experimental.brts.trainer import BRTSTrainer
from trl_opsd.experimental.msd.trainer import MSDTrainer
from trl_opsd.experimental.sort.trainer import SORTTrainer
from trl_opsd.experimental.ssopd.trainer import SSOPDTrainer
from trl_opsd.experimental.stableopd.trainer import StableOPDTrainer
from trl_opsd.experimental.trace.trainer import TRACETrainer
from trl_opsd.trainers.critique import CritiqueSDTrainer
from trl_opsd.trainers.mopd import MOPDTrainer
from trl_opsd.trainers.pbsd import PBSDTrainer
from trl_opsd.trainers.rcsd import RCSDTrainer
from trl_opsd.trainers.resd import RESDTrainer
from trl_opsd.trainers.rethinking_opd import RethinkingOPDTrainer
from trl_opsd.trainers.rlrt import RLRTTrainer
from trl_opsd.trainers.sdpo import SDPOTrainer
from trl_opsd.trainers.sgsd import SGSDTrainer
from trl_opsd.trainers.vopd import VOPDTrainer

MIX = {"teacher_model_kind": "base", "live_share": 0.4}
GROUP = {"num_generations": GLOBAL_BATCH, "support_size": 20}
BANK = str(Path(__file__).parent / "skill_bank.jsonl")
PAGES = {
    "sgsd": (SGSDTrainer, {}),
    "pbsd": (PBSDTrainer, {}),
    "rcsd": (RCSDTrainer, {}),
    "sdpo": (SDPOTrainer, GROUP),
    "sdpo-mix": (SDPOTrainer, GROUP | MIX),
    "mopd": (MOPDTrainer, GROUP),
    "resd": (RESDTrainer, {"support_size": 20, "chat_template_kwargs": {"enable_thinking": False}}),
    "critique": (CritiqueSDTrainer, {"critique_function": "page_worker:critique"}),
    "sgsd-bank": (SGSDTrainer, {"skill_bank": BANK, "skill_bank_refresh_steps": 2}),
    "msd": (MSDTrainer, {}),
    "ssopd": (SSOPDTrainer, {"num_generations": GLOBAL_BATCH, "frontier_strength": 2.0}),
    "trace": (
        TRACETrainer,
        {"num_generations": GLOBAL_BATCH, "span_weight": 2.0, "annotator_function": "page_worker:annotate"},
    ),
    "brts": (BRTSTrainer, {"num_generations": 2, "support_size": 20, "candidate_weight": 0.7}),
    "sort": (SORTTrainer, {"num_generations": 2, "repair_weight": 0.5}),
    "vopd": (VOPDTrainer, {"baseline_size": 20}),
    "rethinking-opd": (RethinkingOPDTrainer, {"num_generations": 1, "support_size": 4, "support_of": "intersection"}),
    "stableopd": (StableOPDTrainer, {"num_generations": 2, "golden_weight": 0.7, "reference_weight": 0.3}),
    "two-terms": (TwoTerms, {"divergence": "reverse_kl", "clip": None}),
    "rlrt": (RLRTTrainer, {"num_generations": GLOBAL_BATCH, "evidence_bound": 0.9}),
}
LESSON = '{"tags": [{"id": 1, "tag": "helpful"}], "add": [{"section": "code", "lesson": "1+1"}]}'  # RESD's playbook
TEXTS = ("1+2=3", "so 4", "wait, 10 it is", "a", "it is 3 then")


def critique(rollout):
    """None of some rollouts, so that ranks use other numbers of them."""
    return None if "wait" in rollout.completion else f"{rollout.completion} was {rollout.reward}"


def annotate(rollout):
    return [(1, 3, "K", "a sum")] if len(rollout.completion) > 8 else []


def give_rollouts(trainer):
    """Completions are a function of prompt and place in the batch, so every split over ranks has the same ones."""

    def sample(prompts, *args, **kwargs):
        tokenizer = trainer.tokenizer
        first = trainer.accelerator.process_index * len(prompts)
        places = [(first + row) % GLOBAL_BATCH for row in range(len(prompts))]
        texts = [
            LESSON.replace("1+1", f"{place}+1")
            if '"tags"' in tokenizer.decode(ids)
            else TEXTS[(len(ids) + place) % len(TEXTS)]
            for ids, place in zip(prompts, places, strict=True)
        ]
        return [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts
        ], None

    trainer._generate_single_turn = sample


def reward_short(completions, **columns):
    """Right where the completion is short."""
    return [float(len(completion[0]["content"]) < 6) for completion in completions]


def rows_of_pages():
    """Only every second row has skills, and no two as many, so that ranks read other numbers of views."""
    skills = (["add"], [], ["carry", "look twice", "count"], [])
    reports = ("test 2 failed", None, "off by 1")
    columns = [
        {
            "skills": skills[index % 4],
            "rubric": ["adds"] * (index % 3),
            "plan": "add",
            "translation": f"add {index}",
            "feedback": reports[index % 3],
        }
        for index in range(8)
    ]
    return Dataset.from_list([{**row, **own} for row, own in zip(make_rows(), columns, strict=False)])


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
    parser.add_argument("--page", required=True, choices=PAGES)
    parser.add_argument("--padded", action="store_true")
    options = parser.parse_args()
    trainer_class, settings = PAGES[options.page]
    world, tokenizer = int(os.environ.get("WORLD_SIZE", 1)), build_tokenizer()
    torch.manual_seed(0)
    args = trainer_class.config_class(
        output_dir=str(options.output / "out"),
        per_device_train_batch_size=GLOBAL_BATCH // world // 2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        max_completion_length=16,
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
        processing_class=copy.deepcopy(tokenizer),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        if "live_share" in settings
        else None,
    )
    give_rollouts(trainer)
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
            "weights": sum(p.double().square().sum().item() for p in trainer.model.parameters() if p.requires_grad),
        }
        (options.output / "numbers.json").write_text(json.dumps(numbers))
    finish(trainer)


if __name__ == "__main__":
    main()
