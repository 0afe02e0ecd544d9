# SPDX-License-Identifier: Apache-2.0
"""A run of `DiffusionOPSDTrainer` in a launched process group; writes the numbers of its steps and what it learned."""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"], os.environ["CI"] = "1", "true"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from masked import make_rows, make_trainer
from peft import LoraConfig

from trl_opsd.commands.train import finish

NUMBERS = ("loss", "grad_norm", "divergence", "states/trained")


def train(folder, verifier, lora):
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["Wqkv", "Wo"], lora_dropout=0.0) if lora else None
    trainer = make_trainer(
        folder,
        rows=make_rows(),
        dtype=torch.float64,
        peft_config=adapter,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        updates_per_sample=2,
        num_samples=2,
        verifier=verifier,
        max_steps=6,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    sums = [parameter.detach().double().abs().sum().item() for parameter in trainer.model.parameters()]
    return trainer, {"steps": [[entry.get(name, 0.0) for name in NUMBERS] for entry in logs], "weights": sums}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    # Of the first, a process can have nothing to train on while another has.
    runs = [
        train(folder / name, verifier, lora)
        for name, verifier, lora in (("full", "masked:some", False), ("lora", "masked:anything", True))
    ]
    if runs[0][0].is_world_process_zero():
        (folder / "numbers.json").write_text(json.dumps([numbers for _, numbers in runs]))
    for trainer, _ in runs:
        trainer.model_wrapped = trainer.model  # DistributedDataParallel holds the group
    finish(runs[-1][0])
