# SPDX-License-Identifier: Apache-2.0
"""Two runs of `OPSDGKDTrainer` in a launched process group, on given answers and on sampled ones; writes their numbers."""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"], os.environ["CI"] = "1", "true"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from engines import GLOBAL_BATCH, STEPS, make_model, make_rows

from trl_opsd import OPSDGKDConfig, OPSDGKDTrainer
from trl_opsd.commands.train import finish
from trl_opsd.demo.tokenizer import build_tokenizer


def train(folder, lmbda):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    answer = {"role": "assistant", "content": "so 4"}
    rows = make_rows().map(lambda row: {"messages": [*row["prompt"], answer]}, remove_columns="prompt")
    args = OPSDGKDConfig(
        str(folder / "out"),
        lmbda=lmbda,
        teacher_model_kind="ema",
        teacher_update_rate=0.5,
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        max_new_tokens=8,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        clip=None,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = OPSDGKDTrainer(
        model=make_model(tokenizer, tied=False), args=args, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    numbers = [[float(entry[name]) for name in ("loss", "grad_norm", "divergence")] for entry in logs]
    return trainer, numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    runs = [train(folder, lmbda) for lmbda in (0.0, 1.0)]
    if runs[0][0].is_world_process_zero():
        (folder / "numbers.json").write_text(json.dumps([numbers for _, numbers in runs]))
    runs[0][0].model_wrapped = runs[0][0].model  # DistributedDataParallel holds the group
    finish(runs[1][0])
