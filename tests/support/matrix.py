# SPDX-License-Identifier: Apache-2.0
"""The whole matrix of distributed training: method x full or LoRA x teacher x engine, and its table in the docs.

`python tests/support/matrix.py --write docs/distributed.md` runs every cell on this machine's CPU and writes the table between
the page's two markers. Without `--write` the table is printed. Ends with 1 if a cell neither passed nor was refused.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from engines import CELLS, ENGINES, RUNNING, flaws, launch, save_models

START, END = "<!-- made by tests/support/matrix.py -->", "<!-- end -->"
NAMES = {"opsd": "OPSD", "ogls-sd": "OGLS-SD", "purified-opsd": "Purified OPSD"}
TITLES = {"single": "one process", "ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def timed_launch(engine, folder, models):
    started = time.monotonic()
    return *launch(engine, folder, CELLS, models, timeout=3600), time.monotonic() - started


def judge(engine, folder, models, one, code, results, seconds):
    """The verdict on each cell: ("pass" | "refused" | "FAIL", the reasons)."""
    verdicts = []
    for number, (cell, result) in enumerate(zip(CELLS, results, strict=True)):
        if all(rank.get("error") == "ValueError" and rank.get("before_training") for rank in result):
            verdicts.append(("refused", [result[0]["message"]]))
            continue
        found = flaws(engine, cell, result, one[number], folder / str(number), models)
        verdicts.append(("FAIL", found) if found else ("pass", []))
    if code != 0:
        verdicts[-1] = ("FAIL", [f"the launch ended with {code}", *verdicts[-1][1]])
    counts = {word: sum(verdict == word for verdict, _ in verdicts) for word in ("pass", "refused", "FAIL")}
    print(f"{engine}: {counts}, exit code {code}, {seconds:.0f} s", flush=True)
    for cell, (verdict, reasons) in zip(CELLS, verdicts, strict=True):
        if verdict != "pass":
            print(f"  {cell}: {verdict}: {'; '.join(reasons)[:2000]}", flush=True)
    return verdicts


def table(verdicts):
    """The page's part between the markers."""
    flat = [verdict for engine in verdicts.values() for verdict, _ in engine]
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed", "transformers", "trl", "peft")
    )
    lines = [
        START,
        f"{len(flat)} cells: {flat.count('pass')} pass, {flat.count('refused')} refused, {flat.count('FAIL')} fail. "
        f"Two processes on a CPU (gloo), float32; {versions}.",
        "",
        "| method | trains | teacher | " + " | ".join(TITLES[engine] for engine in verdicts) + " |",
        "|" + "---|" * (3 + len(verdicts)),
    ]
    notes = []
    for number, cell in enumerate(CELLS):
        row = [NAMES[cell["method"]], "LoRA" if cell["lora"] else "full", cell["kind"]]
        for engine in verdicts:
            verdict, reasons = verdicts[engine][number]
            if verdict != "pass":
                notes.append(f"{len(notes) + 1}. {'; '.join(reasons)}")
                verdict += f" ({len(notes)})"
            row.append(verdict)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, *([""] if notes else []), *notes, END])


def end_launches(*_):
    for started in RUNNING:
        started.terminate()
    sys.exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page with the markers between which the table goes")
    parser.add_argument("--folder", type=Path, help="keep the runs here; a temporary folder otherwise")
    parser.add_argument("--jobs", type=int, default=1, help="engines run at once")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end_launches)
    folder = options.folder or Path(tempfile.mkdtemp())
    models = save_models(folder / "models")
    with ThreadPoolExecutor(options.jobs) as pool:
        launched = [pool.submit(timed_launch, engine, folder / engine, models) for engine in ENGINES]
        one = [result[0] for result in launched[0].result()[1]]
        verdicts = {
            engine: judge(engine, folder / engine, models, one, *job.result())
            for engine, job in zip(ENGINES, launched, strict=True)
        }
    text = table(verdicts)
    if options.write:
        page = options.write.read_text()
        before, after = page.split(START)[0], page.split(END)[1]
        options.write.write_text(before + text + after)
    else:
        print(text)
    sys.exit(any(verdict == "FAIL" for engine in verdicts.values() for verdict, _ in engine))


if __name__ == "__main__":
    main()
