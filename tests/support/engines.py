# SPDX-License-Identifier: Apache-2.0
"""The engines and how a test launches them; what a cell of the matrix of distributed training is and must hold."""

import json
import os
import socket
import subprocess
import sys
from math import nan
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trl_opsd.demo.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RECIPES = ROOT / "recipes" / "accelerate"
WORKER = str(ROOT / "tests" / "support" / "distributed_worker.py")

TEXTS = ("1+2", "so 4", "wait, 10 it is", "1+2=3")
TOKEN_IDS = list(range(20, 30))
GLOBAL_BATCH = 4
STEPS = 3
RESUME_FROM = 2

RUNNING: list[subprocess.Popen] = []

# One training run and its defaults.
CELL = {
    "method": "opsd",
    "page": None,  # a name of `page_cells.PAGES`, in place of a method and a kind
    "kind": "base",
    "lora": False,
    "initialisation": True,  # of the adapter
    "tied": False,
    "head": False,  # modules_to_save of the adapter has the head
    "checkpointing": False,
    "generate": False,  # sample greedily instead of the given rollouts
    "gather_for_generation": True,
    "clip": False,  # a term at the clip's edge makes the gradient jump with the last bit of a sum
    "bf16": False,
    "seed_by_rank": False,  # a model object that every rank made on its own
    "wrong_on_last_rank": False,  # rollouts by place: the first ranks have right ones only
    "resume": False,
    "measures": False,  # an EvaluationCallback samples greedily on the way
}

METHODS = ("opsd", "ogls-sd", "purified-opsd")
KINDS = ("base", "live", "ema")
ENGINES = ("single", "ddp", "zero2", "zero3", "fsdp2")
CELLS = [{"method": m, "lora": lora, "kind": k} for m in METHODS for lora in (False, True) for k in KINDS]

# What CI runs under every engine: each pair of the matrix's choices, and the traps.
COVER = [
    {"clip": True, "checkpointing": True},
    {"method": "ogls-sd", "kind": "ema", "tied": True, "resume": True},
    {"method": "ogls-sd", "kind": "live", "lora": True, "wrong_on_last_rank": True},
    {"method": "purified-opsd", "kind": "ema", "lora": True, "head": True, "resume": True},
    {"kind": "live", "generate": True},
    {"kind": "ema", "lora": True, "generate": True, "gather_for_generation": False},
    {"method": "purified-opsd", "seed_by_rank": True},
    {"method": "ogls-sd", "lora": True, "checkpointing": True},
    {"method": "purified-opsd", "kind": "live"},
    {"lora": True, "initialisation": "pissa"},  # whose base teacher is a copy
]


def make_rows():
    """Sixteen rows whose prompts differ in length."""
    rows = []
    for index in range(16):
        chain = "+".join(str(n) for n in range(1, index + 2))
        prompt = [{"role": "user", "content": f"{chain}=?"}]
        rows.append({"prompt": prompt, "solution": f"{chain} is so \\boxed{{{index}}}"})
    return Dataset.from_list(rows)


def make_model(tokenizer, tied):
    """A Qwen3 of a few thousand parameters from torch's current random state."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def save_models(folder):
    """Folders of the models that cells load by name, as users do."""
    tokenizer = build_tokenizer()
    models = {"plain": str(folder / "plain"), "tied": str(folder / "tied")}
    for name, path in models.items():
        torch.manual_seed(0)
        make_model(tokenizer, name == "tied").save_pretrained(path)
    return models


def command_of(engine):
    accelerate = [str(BIN / "accelerate"), "launch", "--main_process_port", str(free_port()), "--config_file"]
    if engine == "single":
        return [sys.executable]
    if engine.startswith("zero"):
        return [*accelerate, str(RECIPES / f"{engine}_cpu.yaml")]
    # The GPU file itself, in two processes; the worker puts them on the CPU.
    return [*accelerate, str(RECIPES / f"{engine}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]


def launch(engine, folder, cells, models, *, one_token_tiles=False, extra=(), timeout=900):
    """Run `cells` one after the other under an engine; a list of results per rank for each.

    A cell that hangs takes the rest of its launch with it: results that were not written are errors of that name.
    """
    folder.mkdir(parents=True)
    run = {"cells": cells, "folder": str(folder), "models": models, "one_token_tiles": one_token_tiles}
    (folder / "run.json").write_text(json.dumps(run))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # With ACCELERATE_USE_CPU set, accelerate would take DDP whatever the DeepSpeed file says.
    environment |= {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    # DeepSpeed builds its CPU operators with the environment's ninja.
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    command = [*command_of(engine), *extra, WORKER, str(folder / "run.json")]
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        RUNNING.append(started)
        try:
            code = started.wait(timeout)
        except subprocess.TimeoutExpired:
            code = "timeout"
        finally:
            started.terminate()  # a launcher ends its workers when it is asked to, not when it is killed
            started.wait()
            RUNNING.remove(started)
    world = 1 if engine == "single" else 2
    results = [[_read(folder / str(n) / f"numbers-{rank}.json") for rank in range(world)] for n in range(len(cells))]
    return code, results


def _read(path):
    return json.loads(path.read_text()) if path.exists() else {"error": "NoResult", "message": "ended before it"}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def reload_difference(folder, cell, models):
    """The largest difference of the saved model's logits, read in this process, from those of the trained model."""
    base = models["tied" if cell.get("tied") else "plain"]
    if cell.get("lora"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "model")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([TOKEN_IDS])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    wanted = torch.load(folder / "logits.pt")
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()


def relative(a, b):
    return abs(a - b) / max(abs(b), 1e-12)


def flaws(engine, cell, results, one, folder, models, first_step=1e-4, later=5e-4):
    """What a finished cell does not hold, as sentences; none for a cell that passes.

    Args:
        engine: which it was to run on.
        cell: its options.
        results: its result on each rank.
        one: the same cell's result in one process.
        folder: where it saved its model.
        models: folders of the models by name.
        first_step: relative tolerance of the first step's numbers.
        later: of the steps behind an optimizer, which turns last bits of small gradients into steps; below the
            smallest difference between two kinds of teacher, 9e-4.
    """
    found = []
    for rank, result in enumerate(results):
        if "error" in result:
            found.append(f"rank {rank}: {result['error']}: {result['message'][:300]}")
    if found:
        return found
    first = results[0]
    if (first["engine"], first["world"]) != (engine, 1 if engine == "single" else 2):
        found.append(f"ran under {first['engine']} in {first['world']} processes")
    found += differences(first["history"][:1], one["history"][:1], first_step, "one process")
    found += differences(first["history"][1:], one["history"][1:], later, "one process")
    if "resumed" in first:
        found += differences(first["resumed"], first["history"][RESUME_FROM:], first_step, "uninterrupted")
    difference = reload_difference(folder, cell, models)
    if not difference < 1e-5:
        found.append(f"the saved model differs from the trained one by {difference:.1e}")
    if first["teacher_reread"] != 0:
        found.append(f"the saved teacher differs by {first['teacher_reread']:.1e}")
    if first["targets_with_graph"]:
        found.append(f"{first['targets_with_graph']} targets were scored with a graph")
    if first["empty_groups"]:
        found.append(f"{first['empty_groups']} empty parameter groups")
    return found


def differences(ours, theirs, tolerance, name):
    if len(ours) != len(theirs) or not ours:
        return [f"{len(ours)} steps, {name} {len(theirs)}"]
    return [
        f"step {step} {key}: {a[key]:.7g}, {name} {b[key]:.7g}"
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True))
        for key in a | b
        if not relative(a.get(key, nan), b.get(key, nan)) <= tolerance
    ]
