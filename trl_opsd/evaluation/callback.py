# SPDX-License-Identifier: Apache-2.0
"""Base and model measured on held-out questions within a training run, which goes on as if nobody had looked.

The checkpoint rule is the last one: numbers along the way are logged as a curve, and what a card gets is measured at
the end. Sampling is transformers' `generate`, also in a run whose rollouts come from vLLM.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from .._trl.rollouts import model_for_generation
from ..rows.formats import rewrite_prompt
from ..verification import check_verifier, warn_of_golds, which_verify
from .measures import EvaluationResult, bootstrap_interval, paired_difference, summarize
from .samples import sample_lines, write_samples
from .sampling import Completion, check_sampling, generate_completions

FILE = "evaluation.json"
_LOGGED = {
    "avg_at_k": "eval/avg@k",
    "pass_at_k": "eval/pass@k",
    "majority_at_k": "eval/majority@k",
    "mean_completion_length": "eval/completion_length",
    "cut_share": "eval/cut_share",
    "markers_per_1000_tokens": "eval/reflection_markers_per_1000",
    "unscored_share": "eval/unscored",
}


class EvaluationCallback(TrainerCallback):
    """Measures the base before the first step and the model every so many steps and at the end.

    Add it with `trainer.add_callback`. The base is the model with its initial weights: the teacher's where they are
    those (`teacher_model_kind="base"`), otherwise the model before its first step. Both are sampled with the same
    settings and seed, and compared question by question. Random state, train mode and logging interval of the run are
    left as they were. `evaluation.json` in the output directory holds every measurement; the card written at the end
    shows the base and the last.

    Args:
        trainer: of this package, or `trl.GRPOTrainer`, whose base is the model before its first step.
        rows (`Sequence[Mapping]`): questions with a `prompt` and a `solution` that verifies; the trainer's
            `prompt_template` is applied.
        num_samples (`int`): k of avg@k, pass@k and majority@k; fewer than 16 do not show a difference of a point.
        every (`int`, *optional*): optimizer steps between two measurements; None measures base and end alone.
        name (`str`): of the questions, in the card.
        seed (`int`): of the sampling; ranks behind the first derive theirs from it.
        temperature, top_p, top_k, batch_size: as in [`generate_completions`].
        max_new_tokens (`int`, *optional*): length limit; the trainer's `max_completion_length` if None.
        chat_template_kwargs (`Mapping`, *optional*): the student's if None.
        verifier (`str`, *optional*): what compares answers: `math`, `exact`, `choice` or `module:function`; the trainer's
            if None.
        samples (`bool`): write each measurement's samples to `samples-MODEL.jsonl` beside `evaluation.json`, a line each.

    Raises:
        ValueError: no question, `every` below 1, no such verifier, several samples at temperature 0, or a trainer with tools.
    """

    def __init__(
        self,
        trainer,
        rows: Sequence[Mapping[str, Any]],
        *,
        num_samples: int = 16,
        every: int | None = None,
        name: str = "questions",
        seed: int = 0,
        temperature: float = 0.6,
        top_p: float = 0.95,
        top_k: int = 20,
        max_new_tokens: int | None = None,
        batch_size: int = 128,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        verifier: str | None = None,
        samples: bool = False,
    ):
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; set it to 1 or more steps, or to None to measure at the end alone.")
        check_sampling(num_samples, temperature)
        if getattr(trainer, "tools", None):
            raise ValueError(
                "EvaluationCallback samples answers of one turn, in which no tool would run, and this trainer has tools. Give the "
                "trainer an eval_dataset, whose rollouts call them, and leave the callback out."
            )
        args = trainer.args
        template = getattr(args, "prompt_template", None)
        self.trainer, self.every, self.name, self.seed = trainer, every, name, seed
        self.rows = [dict(row) if template is None else {**row, **rewrite_prompt(row, template)} for row in rows]
        if not self.rows:
            raise ValueError("rows is empty; give at least one question.")
        self.verifier = getattr(args, "verifier", "math") if verifier is None else verifier
        check_verifier(self.verifier)
        golds = [row["solution"] for row in self.rows]
        unread = sum(not read for read in which_verify(golds, self.verifier))
        if unread:
            self._tell(f"rows: {unread} of {len(self.rows)} solutions hold no answer to verify; they count as wrong.")
        warning = warn_of_golds(golds, self.verifier, "rows of EvaluationCallback")
        if warning is not None:
            self._tell(warning)
        if chat_template_kwargs is None:
            chat_template_kwargs = getattr(args, "chat_template_kwargs", None)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.num_samples, self.batch_size, self.keeps_samples = num_samples, batch_size, samples
        length = args.max_completion_length if max_new_tokens is None else max_new_tokens
        self.sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": length}
        self.records: list[dict[str, Any]] = []

    @property
    def checkpoint_rule(self) -> str:
        """Which weights the numbers of the end are of; fixed before the run."""
        args = self.trainer.args
        if args.load_best_model_at_end:
            return f"best checkpoint by {args.metric_for_best_model} (load_best_model_at_end)"
        return "last"

    def results(self) -> list[dict[str, Any]]:
        """Base and last measurement as `create_model_card(evaluation=...)` and `add_results` take them."""
        base, last = self._base(), self.records[-1:]
        chosen = last if base is None or last == [base] else [base, *last]
        return [{name: value for name, value in record.items() if name not in _OWN} for record in chosen]

    # Events

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the base; a resumed run reads it from its file."""
        self.records = [] if state.global_step == 0 else self._read(state.global_step)
        if self._base() is not None:
            return
        teacher = getattr(self.trainer, "teacher", None)
        initial = teacher is not None and teacher.kind == "base"
        if state.global_step > 0 and not initial:
            self._tell(
                f"{Path(args.output_dir) / FILE} holds no base measured with these questions and settings, and the "
                "initial weights are gone: no gain is logged. Evaluate the base with `trl-opsd eval`."
            )
            return
        with teacher.active() if initial else nullcontext():
            self._measure("base", 0, control)

    def on_step_end(self, args, state, control, **kwargs):
        """Measure the model every so many steps."""
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(f"step {state.global_step}", state.global_step, control)

    def on_train_end(self, args, state, control, **kwargs):
        """Measure the model that the run leaves, and keep the numbers for its card."""
        if args.load_best_model_at_end or not self.records or self.records[-1]["step"] != state.global_step:
            self._measure(f"step {state.global_step}", state.global_step, control)
        if hasattr(self.trainer, "publisher"):
            self.trainer.publisher.keep_evaluation(self.results())

    def _tell(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            warnings.warn(text, stacklevel=3)

    # Measuring

    def _measure(self, label: str, step: int, control) -> None:
        """Sample, verify, log and write; a collective."""
        result = self._evaluate(label)
        record = {"step": step, "model": label, **self._settings(), **asdict(result)}
        del record["completions"], record["verdicts"]
        base = self._base()
        scores, record["difference"] = result.per_question_scores, None
        record["interval"] = bootstrap_interval(scores)
        if base is not None:
            record["difference"] = tuple(paired_difference(scores, base["per_question_scores"]))
        self.records = [other for other in self.records if other["model"] != label] + [record]
        self._log(record, control)
        if self.trainer.is_world_process_zero():
            folder = Path(self.trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / f"{FILE}.part"
            unfinished.write_text(json.dumps(self.records, indent=1), encoding="utf-8")
            unfinished.rename(folder / FILE)

    def _evaluate(self, label: str) -> EvaluationResult:
        """The same result on every rank; answers are verified on the first."""
        samples = self._sample()
        result = []
        if self.trainer.accelerator.is_main_process:
            golds = [row["solution"] for row in self.rows]
            found = summarize(samples, golds, verifier=self.verifier)
            if self.keeps_samples:
                self._write_samples(found, label)
            result = [replace(found, completions=(), verdicts=())]
        return gather_object(result)[0]

    def _write_samples(self, found: EvaluationResult, label: str) -> None:
        folder = Path(self.trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        of = {"model": label, "dataset": self.name, "seed": self.seed}
        lines = sample_lines(self.rows, found.completions, found.verdicts, **of)
        write_samples(folder / f"samples-{label.replace(' ', '-')}.jsonl", lines)

    def _sample(self) -> list[list[Completion]]:
        """Completions of all questions, shared out to the ranks; each has as many, so a few come twice."""
        trainer, num_rows = self.trainer, len(self.rows)
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        own = [index % num_rows for index in range(rank, rank + num_rows + (-num_rows) % world, world)]
        render = trainer.render_kwargs() if hasattr(trainer, "render_kwargs") else {}
        with model_for_generation(trainer) as model:
            samples = generate_completions(
                model,
                getattr(trainer.processing_class, "tokenizer", trainer.processing_class),
                [self.rows[index]["prompt"] for index in own],
                num_samples=self.num_samples,
                batch_size=self.batch_size,
                chat_template_kwargs=render | self.chat_template_kwargs,
                seed=seed_of_rank(self.seed, rank),
                progress=trainer.is_world_process_zero() and not trainer.args.disable_tqdm,
                **self.sampling,
            )
        by_index: dict[int, list[Completion]] = {}
        for index, group in gather_object(list(zip(own, samples, strict=True))):
            by_index.setdefault(index, group)
        return [by_index[index] for index in range(num_rows)]

    def _log(self, record: Mapping[str, Any], control) -> None:
        numbers = {shown: record[name] for name, shown in _LOGGED.items()}
        numbers |= {"eval/k": record["num_samples"], "eval/step": record["step"]}
        numbers |= dict(zip(("eval/avg@k_low", "eval/avg@k_high"), record["interval"], strict=True))
        if record["difference"] is not None:
            numbers |= dict(zip(("eval/gain", "eval/gain_low", "eval/gain_high"), record["difference"], strict=True))
        should_log = control.should_log
        # TRL's own `log` would end the run's logging interval here, and HF's takes the step's log for written.
        Trainer.log(self.trainer, numbers)
        control.should_log = should_log

    # Settings and files

    def _settings(self) -> dict[str, Any]:
        """What two measurements must share to be compared."""
        thinking = {None: "default", True: "on", False: "off"}[self.chat_template_kwargs.get("enable_thinking")]
        settings = {**self.sampling, "thinking": thinking, "chat_template_kwargs": self.chat_template_kwargs}
        return {
            "dataset": self.name,
            "questions": hashlib.sha256(json.dumps(self.rows, sort_keys=True, default=str).encode()).hexdigest(),
            "num_questions": len(self.rows),
            "num_samples": self.num_samples,
            "seeds": [self.seed],
            "settings": settings
            | {"backend": "transformers", "checkpoint_rule": self.checkpoint_rule, "verifier": self.verifier},
        }

    def _base(self) -> dict[str, Any] | None:
        return next((record for record in self.records if record["model"] == "base"), None)

    def _read(self, step: int) -> list[dict[str, Any]]:
        """Measurements of this run up to `step`, as the first rank finds them; none that were made otherwise."""
        path, found = Path(self.trainer.args.output_dir) / FILE, []
        if self.trainer.accelerator.is_main_process and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(self._settings()))
        found = gather_object([found] if self.trainer.accelerator.is_main_process else [])[0]
        return [record for record in found if record["step"] <= step and all(record[key] == now[key] for key in now)]


# In `evaluation.json`, not in a card.
_OWN = {"step", "questions", "per_question_scores"}


def seed_of_rank(seed: int, rank: int) -> int:
    """The seed itself on the first rank; elsewhere one that other seeds and ranks do not share."""
    return seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
