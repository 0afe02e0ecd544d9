# SPDX-License-Identifier: Apache-2.0
"""When self-distillation costs what it does not train: rich and poor contexts, narrow and wide coverage, a still and a moving teacher.

    python benchmarks/coverage.py --output_dir outputs/coverage [--workers 2]

The study of "Why Does Self-Distillation (Sometimes) Degrade the Reasoning Capability of LLMs?" (arXiv 2603.24472) on the embedded model: OPSD with the
whole solution or the bare answer in the teacher's prompt, on so many distinct questions, with the first weights or a moving average as teacher. Measured
are problems of the kind that is trained on (chains of two to four operations), longer ones (five and six, which the model has never seen), and
expressions of doubt, by whole words as the log counts them and as substrings as that study does. Runs already in the folder are not repeated.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import miniature

QUESTIONS = (1, 8, 64, 512, 4096)
CONTEXTS = {"rich": "the worked solution", "poor": "the answer alone"}
TEACHERS: dict[str, dict[str, Any]] = {
    "still": {"teacher_model_kind": "base"},
    "moving": {"teacher_model_kind": "ema", "teacher_update_rate": 0.05},
}
LONGER = (5, 6)  # operations
MEASURED = {"num_samples": 8, "temperature": 1.0, "max_new_tokens": 128, "batch_size": 512}


@dataclass(frozen=True)
class Cell:
    """One run: a key of `CONTEXTS`, how many distinct questions it trains on, a key of `TEACHERS`; the base without questions."""

    context: str = ""
    questions: int = 0
    teacher: str = ""

    @property
    def name(self) -> str:
        """Of its folder, and of its row."""
        return f"{self.context}-{self.questions}-{self.teacher}" if self.questions else "base"


def training_rows(cell: Cell, rows: int) -> list[dict[str, Any]]:
    """As many rows as asked for, of the cell's questions again and again."""
    from trl_opsd.demo import build_rows

    distinct = build_rows("train", cell.questions)
    if cell.context == "poor":
        distinct = [{**row, "solution": row["solution"].split("\n")[-1]} for row in distinct]
    return [distinct[index % len(distinct)] for index in range(rows)]


def run_one(cell: Cell, output: Path, seed: int, overrides: dict[str, Any], problems: int) -> dict[str, Any]:
    """Train and measure; a result in the folder is read."""
    from trl_opsd.demo import model_path

    folder = output / f"{cell.name}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    path = model_path()
    if cell.questions:
        run = miniature.Run("opsd", {**miniature.TEACHER, **TEACHERS[cell.teacher]})
        rows = training_rows(cell, miniature.ROLLOUTS * overrides["max_steps"])
        trainer = miniature.make_trainer(run, folder, seed, overrides, rows=rows)
        trainer.train()
        trainer.save_model(str(folder))
        path = str(folder)
    record = {"cell": cell.name, "seed": seed, **measure(path, problems, seed)}
    result.write_text(json.dumps(record))
    print(json.dumps({key: value for key, value in record.items() if not key.endswith("scores")}), flush=True)
    return record


def measure(path: str, problems: int, seed: int) -> dict[str, Any]:
    """Accuracy of each problem within and beyond the kind that is trained on, and markers per 1,000 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_opsd.demo.task import NUM_OPERATIONS, build_rows
    from trl_opsd.evaluation.measures import evaluate
    from trl_opsd.monitoring.markers import EPISTEMIC_MARKERS, count_markers

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    record: dict[str, Any] = {}
    for place, operations in (("within", NUM_OPERATIONS), ("beyond", LONGER)):
        rows = build_rows("test", problems, num_operations=operations)
        found = evaluate(
            model,
            tokenizer,
            rows,
            chat_template_kwargs=miniature.SAMPLING["chat_template_kwargs"],
            seed=1234 + seed,
            **MEASURED,
        )
        texts = [sample.text for samples in found.completions for sample in samples]
        tokens = found.mean_completion_length * len(texts)
        record[f"{place}_scores"] = list(found.per_question_scores)
        record[f"{place}_words"] = 1000 * sum(map(count_markers, texts)) / tokens
        parts = sum(count_markers(text, EPISTEMIC_MARKERS, whole_words=False) for text in texts)
        record[f"{place}_substrings"] = 1000 * parts / tokens
    return record


def table(records: dict[str, list[dict]]) -> str:
    """A row a cell, in Markdown: gains over the base with intervals over problems, markers by words and by substrings."""
    import numpy as np

    from trl_opsd.evaluation.measures import paired_difference

    columns = ("run", "within, gain in points [95 %]", "beyond, gain [95 %]", "markers, words", "markers, substrings")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    base = records["base"]
    for name, seeds in records.items():
        cells = [name]
        for place in ("within", "beyond"):
            own, before = (np.mean([seed[f"{place}_scores"] for seed in runs], axis=0) for runs in (seeds, base))
            gain = ", {:+.1f} [{:+.1f}, {:+.1f}]".format(
                *(100 * value for value in paired_difference(own.tolist(), before.tolist()))
            )
            cells.append(f"{own.mean():.3f}{gain * (name != 'base')}")
        for kind in ("words", "substrings"):
            means = [np.mean([seed[f"{place}_{kind}"] for seed in seeds]) for place in ("within", "beyond")]
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/coverage"))
    parser.add_argument("--questions", type=int, nargs="+", default=list(QUESTIONS))
    parser.add_argument("--contexts", nargs="+", choices=list(CONTEXTS), default=list(CONTEXTS))
    parser.add_argument("--teachers", nargs="+", choices=list(TEACHERS), default=list(TEACHERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--problems", type=int, default=100, help="measured, of each kind")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each with one thread")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cells = [Cell(), *(Cell(*own) for own in product(options.contexts, options.questions, options.teachers))]
    overrides = {"max_steps": options.steps, "learning_rate": options.learning_rate}
    records: dict[str, list[dict]] = {}
    with ProcessPoolExecutor(options.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [
            (cell, pool.submit(run_one, cell, options.output_dir, seed, overrides, options.problems))
            for cell in cells
            for seed in options.seeds
        ]
        for cell, future in futures:
            records.setdefault(cell.name, []).append(future.result())
    print(table(records))


if __name__ == "__main__":
    main()
