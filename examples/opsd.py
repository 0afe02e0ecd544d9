# SPDX-License-Identifier: Apache-2.0
"""OPSD on a model and a dataset of your own, as a TRL script.

    accelerate launch examples/opsd.py \
        --model_name_or_path Qwen/Qwen3-1.7B \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --problem_column problem \
        --use_peft --lora_r 64 --lora_alpha 128 \
        --output_dir outputs/opsd

`--dataset_name` also takes a local .json, .jsonl or .parquet file; `--config recipe.yaml` sets defaults.
"""

from trl import ModelConfig, TrlParser, get_peft_config

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.commands.train import DataArguments, finish, load_rows

if __name__ == "__main__":
    parser = TrlParser((DataArguments, OPSDConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }

    trainer = OPSDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_rows(script_args, script_args.dataset_train_split),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    finish(trainer)
