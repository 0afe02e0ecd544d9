# SPDX-License-Identifier: Apache-2.0
"""One run of the trainer that the OPSD paper's authors published (github.com/siyan-zhao/OPSD), for `train_step.py`.

Run by the Python of an environment of its own, where their pins stand: transformers 4.57.1, trl 0.26.0, accelerate 1.11.0,
peft 0.17.1, datasets, and the torch that the other contenders have. Without vLLM it samples with `generate`, on a CPU too.

Theirs are the step, the loss and the optimizer. Set to be ours:
  tokens   a collator gives it the prompts of the others, not its chat, and pads them on the left. Its own pads on the
           right and then reads the first completion token's logits at a pad wherever a prompt is not the longest
  order    the rows as they stand, each as often as the others take rollouts of it
  loss     beta 0 is forward KL on the whole vocabulary, temperature 1
  teacher  the weights of the step. Their fixed teacher is a switched-off LoRA adapter, so it does not go with full
           fine-tuning: the losses are comparable on the first step, the time on all
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "true")

from datasets import Dataset
from steps import SAMPLING, load, make_rows, make_settings, measure_steps
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, PreTrainedTokenizerFast


def load_tokenizer(folder):
    """Its settings are those of transformers 5, which 4 cannot read."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {name: settings[name] for name in ("eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", **special)


def load_student(folder):
    """The weights, with RoPE's base where transformers 4 looks for it."""
    config = AutoConfig.from_pretrained(folder)
    config.rope_theta = config.rope_parameters["rope_theta"]
    return load(folder, config=config)


def collate(tokenizer, rows):
    """The student's prompts and the teacher's, under the names that the trainer reads."""
    texts = {
        "student": [row["prompt"] for row in rows],
        "teacher": [f"{row['prompt']}\n\n{row['solution']}" for row in rows],
    }
    batch = {}
    for reader, prompts in texts.items():
        encoded = tokenizer(prompts, padding=True, return_tensors="pt")
        batch[f"{reader}_prompts"] = encoded["input_ids"]
        batch[f"{reader}_prompt_attention_mask"] = encoded["attention_mask"]
        batch[f"{reader}_prompt_length"] = encoded["input_ids"].size(1)
        batch[f"{reader}_prompt_lengths_per_example"] = encoded["attention_mask"].sum(dim=1)
    return batch


def make_trainer(case, tokenizer):
    sys.path.append(case["paper_repo"])
    from opsd_trainer import OPSDTrainer
    from trl.experimental.gold import GOLDConfig

    class InOrder(OPSDTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

    args = GOLDConfig(
        **make_settings(case),
        **SAMPLING,
        max_completion_length=case["completion"],
        max_length=None,
        beta=0.0,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = [row for row in make_rows(case) for _ in range(case["generations"])]
    return InOrder(
        load_student(case["student"]),
        args=args,
        data_collator=partial(collate, tokenizer),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def main():
    case = json.loads(sys.argv[sys.argv.index("--case") + 1])
    if case["batch"] % case["generations"]:
        # Given rollouts tell a prompt's copies apart within a micro-batch, which is all that this trainer samples at once.
        raise SystemExit("For paper, --batch is to be a multiple of --generations.")
    tokenizer = load_tokenizer(Path(case["tokenizer"]))
    measure_steps(make_trainer(case, tokenizer), tokenizer, case)


if __name__ == "__main__":
    main()
