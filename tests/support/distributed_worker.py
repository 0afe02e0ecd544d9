# SPDX-License-Identifier: Apache-2.0
"""Training runs on given rollouts, one after the other in one launched process group; rank 0 writes their numbers.

`distributed_worker.py RUN.json`: what `engines.launch` wrote; a cell is a dictionary of `engines.CELL`.
"""

import copy
import json
import os
import random
import sys
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"], os.environ["CI"] = "1", "true"
sys.path.insert(0, str(Path(__file__).parent))

import fsdp2_on_cpu
import gathers
import page_cells
import torch
from engines import CELL, GLOBAL_BATCH, RESUME_FROM, STEPS, TEXTS, TOKEN_IDS, make_model, make_rows
from peft import LoraConfig, get_peft_model

from trl_opsd.commands.train import TRAINERS, finish
from trl_opsd.demo.tokenizer import build_tokenizer
from trl_opsd.evaluation.callback import EvaluationCallback
from trl_opsd.losses import tiles
from trl_opsd.model.sharding import local_part, release, whole_shape

IN_GROUPS = {"num_generations": GLOBAL_BATCH, "distillation_length": None}

LOGGED = ("loss", "grad_norm", "divergence", "student_entropy", "target_entropy")


def give_rollouts(trainer, choice, by_place):
    """Completions are a function of prompt and place in the batch, so every split over ranks has the same ones."""

    def sample(prompt_ids, *args, **kwargs):
        tokenizer = trainer.tokenizer
        first = trainer.accelerator.process_index * len(prompt_ids)
        places = [(first + row) % GLOBAL_BATCH for row in range(len(prompt_ids))]
        group = [place % trainer.num_generations for place in places]
        numbers = places if by_place else [len(ids) + n for ids, n in zip(prompt_ids, group, strict=True)]
        texts = [choice[number % len(choice)] for number in numbers]
        asked = ['"tags"' in tokenizer.decode(ids) for ids in prompt_ids]
        lessons = [page_cells.LESSON.replace("1+1", f"{place}+1") for place in places]
        texts = [lesson if is_asked else text for text, lesson, is_asked in zip(texts, lessons, asked, strict=True)]
        return [
            tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts
        ], None

    trainer._generate_single_turn = sample


def reward_short(completions, **kwargs):
    """Right where the completion is short: two of a group of four."""
    return [float(len(completion[0]["content"]) < 5) for completion in completions]


def engine_of(trainer):
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        return f"zero{state.deepspeed_plugin.zero_stage}"
    if trainer.is_fsdp_enabled:
        return f"fsdp{state.fsdp_plugin.fsdp_version}"
    return {"NO": "single", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp"}[trainer.accelerator.distributed_type.name]


def method_of(cell):
    """The trainer of a cell, and the settings that are its own: a page has the page's, and its kind of teacher."""
    sampling = {"top_k": 1} if cell["generate"] else {}
    if cell["page"]:
        trainer_class, own = page_cells.of_page(cell["page"])
        return trainer_class, own | sampling
    groups = IN_GROUPS if cell["method"] == "ogls-sd" else {}
    own = {"teacher_model_kind": cell["kind"]} | ({} if cell["clip"] else {"clip": None})
    return TRAINERS[cell["method"]], groups | own | sampling


def make_trainer(cell, run, folder):
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer_class, own = method_of(cell)
    args = trainer_class.config_class(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=GLOBAL_BATCH // world // 2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        max_completion_length=16 if cell["page"] else 8,
        logging_steps=1,
        save_strategy="steps" if cell["resume"] else "no",
        save_steps=RESUME_FROM,
        bf16=cell["bf16"],
        use_cpu=True,
        gradient_checkpointing=cell["checkpointing"],
        ds3_gather_for_generation=cell["gather_for_generation"],
        report_to=[],
        disable_tqdm=True,
        teacher_update_rate=0.5,
        **own,
    )
    tokenizer = build_tokenizer()
    model = run["models"]["tied" if cell["tied"] else "plain"]
    if cell["seed_by_rank"]:
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        model = make_model(tokenizer, cell["tied"])
        if cell["lora"]:  # ranks that made different adapters
            model = get_peft_model(model, LoraConfig(**lora_settings(cell)))
    lora = cell["lora"] and not cell["seed_by_rank"]
    trainer = trainer_class(
        reward_funcs=reward_short,
        model=model,
        args=args,
        train_dataset=page_cells.rows_of_pages() if cell["page"] else make_rows(),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=LoraConfig(**lora_settings(cell)) if lora else None,
    )
    if not cell["generate"]:
        give_rollouts(trainer, page_cells.TEXTS if cell["page"] else TEXTS, cell["wrong_on_last_rank"])
    return trainer


def lora_settings(cell):
    return {
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "modules_to_save": ["lm_head"] if cell["head"] else None,
        "init_lora_weights": cell["initialisation"],
    }


def history_of(trainer):
    """What each step logged; a step in which nothing was distilled has no divergence."""
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [{key: entry[key] for key in LOGGED if key in entry} for entry in steps]


def logits_of(trainer):
    """The trained model's logits, through the engine; a collective."""
    ids = torch.tensor([TOKEN_IDS])
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model_wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float()


def parts_of(trainer):
    """Elements that this rank's teacher keeps in memory, of a whole teacher, and of this rank's part of the student."""
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    values = list(trainer.teacher.values.values())
    release(trainer.model)
    return {
        "teacher": sum(value.untyped_storage().nbytes() // value.element_size() for value in values),
        "whole": sum(whole_shape(p).numel() for p in trainable) if values else 0,
        "student": sum(local_part(p).numel() for p in trainable),
    }


def reread_teacher(trainer, folder):
    """The largest difference of the teacher's values after writing, spoiling and reading them."""
    teacher = trainer.teacher
    folder.mkdir(exist_ok=True, parents=True)
    before = {name: value.clone() for name, value in teacher.values.items()}
    teacher.save(folder)
    trainer.accelerator.wait_for_everyone()
    if teacher.kind == "ema":
        for value in teacher.values.values():
            value.add_(1.0)
    teacher.load(folder)
    differences = [(teacher.values[name] - value).abs().max().item() for name, value in before.items() if value.numel()]
    return max(differences, default=0.0)


def measure_on_the_way(trainer):
    """Three questions, which two ranks cannot share evenly; returns a list that gets the texts of every measurement."""
    callback = EvaluationCallback(
        trainer, list(make_rows())[:3], every=2, num_samples=1, temperature=0.0, max_new_tokens=12, batch_size=1
    )
    seen, sample = [], callback._sample

    def note():
        samples = sample()
        seen.append([completion.text for group in samples for completion in group])
        return samples

    callback._sample = note
    trainer.add_callback(callback)
    return seen


def run_cell(cell, run, folder):
    trainer = make_trainer(cell, run, folder)
    counter = gathers.HeadGathers(trainer)
    targets = []
    score = trainer.scorer.score

    def scored(*args, **kwargs):
        result = score(*args, **kwargs)
        targets.append(result[0].anchor.requires_grad)
        return result

    trainer.scorer.score = scored
    groups = []
    create = trainer.create_optimizer

    def created(*args):
        optimizer = create(*args)  # DeepSpeed empties the groups later
        groups.extend(len(group["params"]) for group in optimizer.param_groups)
        return optimizer

    trainer.create_optimizer = created
    texts = measure_on_the_way(trainer) if cell["measures"] else []
    with counter:
        trainer.train()
    numbers = {
        "texts": texts,
        "measured": [entry["step"] for entry in trainer.state.log_history if "eval/k" in entry],
        "engine": engine_of(trainer),
        "world": trainer.accelerator.num_processes,
        "history": history_of(trainer),
        "memory": trainer.memory,
        "kinds": sorted({name for entry in trainer.state.log_history for name in entry if name.startswith("groups/")}),
        "head_gathers": counter.count,
        "targets_with_graph": sum(targets),
        "empty_groups": groups.count(0),
        "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()),
    }
    numbers["parts"] = trainer.accelerator.gather(torch.tensor([list(parts_of(trainer).values())])).tolist()
    trainer.save_model(str(folder / "model"))
    logits = logits_of(trainer)
    if trainer.accelerator.is_main_process:
        torch.save(logits, folder / "logits.pt")
    numbers["teacher_reread"] = reread_teacher(trainer, folder / "teacher")
    let_go(trainer)
    if cell["resume"]:
        trainer = make_trainer(cell, run, folder)
        trainer.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{RESUME_FROM}"))
        numbers["resumed"] = history_of(trainer)[RESUME_FROM:]
        let_go(trainer)
    return numbers, trainer


def let_go(trainer):
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()


def main():
    run = json.loads(Path(sys.argv[1]).read_text())
    fsdp2_on_cpu.allow()
    gathers.partition_small_parameters_too()
    if run["one_token_tiles"]:
        tiles.MIN_TILE_TOKENS, tiles.TILE_BYTES["cpu"] = 1, 1
    trainer = None
    for number, options in enumerate(run["cells"]):
        folder = Path(run["folder"]) / str(number)
        folder.mkdir(exist_ok=True)
        random.seed(0)
        torch.manual_seed(0)
        try:
            result, trainer = run_cell({**CELL, **options}, run, folder)
        except (Exception, SystemExit) as error:
            result = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
            result["before_training"] = "in make_trainer" in result["traceback"]
        rank = int(os.environ.get("RANK", 0))
        (folder / f"numbers-{rank}.json").write_text(json.dumps(result))
        if "error" in result and rank == 0:
            print(result["traceback"], file=sys.stderr)
    if trainer is not None:
        finish(trainer)


if __name__ == "__main__":
    main()
