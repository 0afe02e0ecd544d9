# SPDX-License-Identifier: Apache-2.0
"""d-OPSD: a masked-diffusion language model learns from itself that sees a part of its own right answer.

    python -m trl_opsd.demo.masked --output outputs/masked   # a tiny model of written-out arithmetic
    python examples/diffusion.py --model outputs/masked --max_steps 40

For a model of your own, give rows of your own and the model's lengths; docs/methods/d-opsd.md has the authors' settings for LLaDA.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer

from trl_opsd.demo.masked import COMPLETION_LENGTH, NUM_OPERATIONS
from trl_opsd.demo.task import build_rows
from trl_opsd.experimental.diffusion.trainer import DiffusionOPSDConfig, DiffusionOPSDTrainer

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a masked-diffusion model and its tokenizer")
    parser.add_argument("--output_dir", default="outputs/diffusion")
    parser.add_argument("--max_steps", type=int, default=40)
    options = parser.parse_args()

    args = DiffusionOPSDConfig(
        options.output_dir,
        max_prompt_length=32,
        max_completion_length=COMPLETION_LENGTH,
        block_length=8,
        diffusion_steps=12,  # as the authors do, two tokens a step
        updates_per_sample=1,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        max_steps=options.max_steps,
        bf16=False,
        report_to="none",
    )
    trainer = DiffusionOPSDTrainer(
        model=AutoModelForMaskedLM.from_pretrained(options.model),
        args=args,
        train_dataset=Dataset.from_list(build_rows("train", 256, num_operations=NUM_OPERATIONS)),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    trainer.save_model()
