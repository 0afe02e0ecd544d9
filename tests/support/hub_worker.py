# SPDX-License-Identifier: Apache-2.0
"""Trains and pushes against the stand-in of the Hub that HF_ENDPOINT names; the endpoint is read at import, hence a process.

python tests/support/hub_worker.py SCENARIO FOLDER
"""

import json
import os
import sys
import warnings
from pathlib import Path

from datasets import Dataset

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.card import publishing
from trl_opsd.commands.train import finish

ROWS = [
    {"prompt": [{"role": "user", "content": f"{n}+1=?"}], "solution": f"{n}+1={n + 1}\n\\boxed{{{n + 1}}}"}
    for n in range(8)
]
SETTINGS = {"temperature": 1.0, "thinking": "off"}
EVALUATION = [
    {"dataset": "sums", "model": "base", "num_questions": 5, "num_samples": 2, "avg_at_k": 0.125, "settings": SETTINGS},
    {
        "dataset": "sums",
        "model": "trained",
        "num_questions": 5,
        "num_samples": 2,
        "avg_at_k": 0.625,
        "difference": [0.5, 0.25, 0.75],
        "settings": SETTINGS,
    },
]


def make_trainer(folder, **settings):
    args = OPSDConfig(
        output_dir=str(folder),
        push_to_hub=True,
        hub_model_id=f"tester/{Path(folder).name}",
        hub_token=os.environ["TEST_TOKEN"],
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_completion_length=8,
        logging_steps=1,
        save_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    print(repr(args), args)  # as a user's log would hold it
    args.model_init_kwargs = {"token": os.environ["TEST_TOKEN"]}
    return OPSDTrainer(model="tester/base", args=args, train_dataset=Dataset.from_list(ROWS))


def run_whole(folder):
    """Train, push every checkpoint, push the end with a card that has numbers."""
    trainer = make_trainer(folder)
    trainer.train()
    info = trainer.push_to_hub(dataset_name="tester/sums", evaluation=EVALUATION)
    print("pushed", info.commit_url)
    finish(trainer)


def run_retried(folder):
    """The final upload meets a fault that passes."""
    trainer = make_trainer(folder, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    finish(trainer)


def run_refused(folder):
    """No upload of a checkpoint gets through, nor the last one; what is saved is whole."""
    trainer = make_trainer(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught if "Uploading a checkpoint" in str(warning.message)]
    try:
        trainer.push_to_hub()
        error = None
    except RuntimeError as raised:
        error = str(raised)
    Path(os.environ["TEST_RESULT"]).write_text(json.dumps({"warnings": messages, "error": error}))
    finish(trainer)


if __name__ == "__main__":
    publishing._SECONDS_BEFORE_RETRIES = (0, 0)
    {"whole": run_whole, "retried": run_retried, "refused": run_refused}[sys.argv[1]](sys.argv[2])
