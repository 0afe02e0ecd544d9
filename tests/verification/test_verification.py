# SPDX-License-Identifier: Apache-2.0
"""Answers are verified in processes that no text can hold up, and by another rule than mathematics where that is chosen."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from datasets import Dataset

from trl_opsd import OPSDTrainer, rewards
from trl_opsd.commands.train import make_baseline, parse
from trl_opsd.demo import model_path
from trl_opsd.evaluation.callback import EvaluationCallback
from trl_opsd.evaluation.measures import majority_is_correct, summarize
from trl_opsd.evaluation.sampling import Completion
from trl_opsd.rewards import accuracy_reward, make_accuracy_reward
from trl_opsd.trainers.scorer import Scorer
from trl_opsd.verification import (
    check_verifier,
    pool,
    start_verifying,
    verifies,
    verify,
    warn_of_golds,
    which_verify,
    worker,
)
from trl_opsd.verification.answers import choice_letter, exact_answer, last_box
from trl_opsd.verification.golds import why_no_mathematics

FIVE = "\\boxed{5}"
TOWER = "\\boxed{9^{9^{9^{9^{9}}}}}"


def tower(index):
    return f"\\boxed{{9^{{9^{{9^{{9^{{{index + 9}}}}}}}}}}}"


@pytest.fixture
def short_limits(monkeypatch):
    """Processor seconds of a text, of a batch, and of a text behind them."""
    for name, seconds in {"TEXT_SECONDS": 0.5, "BATCH_SECONDS": 1.0, "SHORT_SECONDS": 0.1}.items():
        monkeypatch.setattr(pool, name, seconds)


def in_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert results, "it does not end"
    return results[0]


# Limits


def test_a_tower_of_powers_ends_outside_the_main_thread_and_the_next_text_is_scored(short_limits):
    verdicts = in_thread(start_verifying([(TOWER, FIVE), (FIVE, FIVE), (FIVE, TOWER)]))
    assert [verdict.is_right for verdict in verdicts] == [None, True, None]
    assert [verdict.ran_out for verdict in verdicts] == [True, False, True]


def test_a_batch_loses_little_more_than_its_budget_and_still_scores_the_rest(short_limits):
    limits = []

    class Recording(pool.Pool):
        def verify(self, text, gold, seconds):
            limits.append((text, seconds))
            return super().verify(text, gold, seconds)

    own = Recording(1)
    try:
        pairs = [(tower(index), FIVE) for index in range(6)] + [(FIVE, FIVE)]
        verdicts = pool.Batch(own, pairs).results()
    finally:
        own.close()
    assert [verdict.is_right for verdict in verdicts] == [None] * 6 + [True]
    assert [seconds for _, seconds in limits] == [0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]


def test_unscored_rollouts_have_no_reward_are_told_and_logged(short_limits):
    metrics = []
    with pytest.warns(UserWarning, match="ran out of time .*rewards/unscored"):
        rewards = accuracy_reward(
            [FIVE, TOWER, "\\boxed{6}", FIVE],
            [FIVE, FIVE, FIVE, None],
            log_metric=lambda *logged: metrics.append(logged),
        )
    assert rewards == [1.0, None, 0.0, None] and metrics == [("rewards/unscored", 0.25)]


def test_unscored_samples_count_as_wrong_and_are_a_number_of_their_own(short_limits):
    samples = [[Completion(text, 5, False) for text in (FIVE, TOWER)], [Completion(FIVE, 5, False)] * 2]
    result = summarize(samples, [FIVE, FIVE])
    assert result.per_question_scores == (0.5, 1.0) and result.unscored_share == 0.25
    assert not majority_is_correct([TOWER, TOWER], FIVE) and majority_is_correct([TOWER, TOWER, FIVE], FIVE)


def test_a_text_that_takes_all_memory_or_the_stack_ends_nothing(short_limits):
    deep = "\\boxed{" + "(" * 100_000 + "5" + ")" * 100_000 + "}"
    assert start_verifying([(deep, FIVE), (FIVE, FIVE)])()[1].is_right is True


def test_a_worker_that_was_killed_between_two_texts_is_started_again():
    own = pool.Worker()
    try:
        assert own.verify(FIVE, FIVE, 5.0).is_right
        os.killpg(own._process.pid, signal.SIGKILL)
        own.verify(FIVE, FIVE, 5.0)  # finds that it is gone
        assert own.verify(FIVE, FIVE, 5.0).is_right
    finally:
        own.close()


def test_a_child_killed_while_idle_puts_no_answer_in_the_place_of_another():
    own = pool.Worker()
    try:
        assert own.verify(FIVE, FIVE, 5.0).is_right
        (child,) = children_of(own._process.pid)
        os.kill(child, signal.SIGKILL)
        expected = [("\\boxed{6}", False), (FIVE, True), ("\\boxed{7}", False), (FIVE, True)]
        verdicts = [own.verify(text, FIVE, 5.0) for text, _ in expected]
        assert all(v.is_right in (None, right) for v, (_, right) in zip(verdicts, expected, strict=True))
        assert verdicts[-1].is_right is True
    finally:
        own.close()


def children_of(pid):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = file.read().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == pid:
            found.append(int(name))
    return found


def test_what_cannot_be_started_says_why(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"did not start: .*a broken installation.*worker\.py"):
        pool.Worker().verify(FIVE, FIVE, 5.0)


# Processes

SCRIPT = """
import os, sys, threading
print("main runs", flush=True)
from trl_opsd.verification import pool, verify
assert verify("\\\\boxed{5}", "\\\\boxed{5}")
assert "math_verify" not in sys.modules and "torch" not in sys.modules
print(*[own._process.pid for own in pool._pools[os.getpid()]._workers if own._process], flush=True)
ENDING
"""


def run_script(tmp_path, ending):
    """Output of a script without a guard of its main part, and the processes it started."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("ENDING", ending))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.stdout.count("main runs") == 1 and done.stdout.count("\n") == 2, done.stderr
    first, pids = done.stdout.splitlines()
    assert first == "main runs"
    return done, [int(pid) for pid in pids.split()]


def wait_until_gone(pids):
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_a_script_without_a_guard_runs_once_and_leaves_no_process(tmp_path):
    done, pids = run_script(tmp_path, "")
    assert done.returncode == 0 and not done.stderr and len(pids) == 1
    wait_until_gone(pids)


def test_workers_end_with_a_parent_that_is_killed_and_with_a_text_in_hand(tmp_path):
    ending = f"""
from trl_opsd.verification import start_verifying
pool.TEXT_SECONDS = 0.5
start_verifying([({TOWER!r}, "5")])
import time; time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    done, pids = run_script(tmp_path, ending)
    assert done.returncode == -9
    wait_until_gone(pids)


def test_a_forked_process_verifies_with_workers_of_its_own():
    assert verify(FIVE, FIVE)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"right" if verify(FIVE, FIVE) and not verify("6", FIVE) else b"wrong")
        pool._close()
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"right"
    assert verify(FIVE, FIVE)


def test_no_rollout_is_kept():
    class Text(str):  # a plain one takes no weak reference
        __slots__ = ("__weakref__",)

    text = Text("so \\boxed{5}, or " * 1000)
    gone = weakref.ref(text)
    assert accuracy_reward([text], [FIVE]) == [1.0]
    del text
    assert gone() is None
    worker.read_gold.cache_clear()
    worker.judge("\\boxed{6}", FIVE), worker.judge("\\boxed{7}", FIVE)
    assert worker.read_gold.cache_info()[:2] == (1, 1)  # a reference is read once


def test_a_batch_may_be_started_long_before_it_is_awaited():
    results = start_verifying([(FIVE, FIVE), ("\\boxed{6}", FIVE), (FIVE, FIVE)])
    assert verify("\\boxed{7}", "\\boxed{7}")
    assert [verdict.is_right for verdict in results()] == [True, False, True]
    assert results() == results()


def test_a_parser_that_raises_found_no_answer(monkeypatch):
    import math_verify

    def fail(*args, **kwargs):
        raise RecursionError

    with monkeypatch.context() as patch:
        patch.setattr(math_verify, "verify", fail)
        assert worker.judge(FIVE, FIVE) == (False, "5")
    monkeypatch.setattr(math_verify, "parse", fail)
    assert worker.judge("\\boxed{8}", "\\boxed{8}") == (None, None)


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(1, 1, 1), (2, 1, 2), (64, 8, 4), (8, 8, 1), (2, 8, 1)])
def test_ranks_share_the_cores(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert pool.num_workers() == workers


# Verifiers

# gold, answer, and whether math, exact and choice call the answer right.
JUDGED = [
    ("olleh", "hello", True, False, None),
    ("tac", "cat", True, False, None),
    ("2024-03-01", "2025-04-01", True, False, None),
    ("05088", "5088", True, False, None),
    ("abcd", "dcba", False, False, None),
    ("olleh", "olleh", True, True, None),
    ("05088", "05088", True, True, None),
    ("Paris", "\\text{paris}", True, True, None),
    ("New  York", "new york", True, True, None),
    ("\\frac{1}{2}", "0.5", True, False, None),
    ("\\frac{10}{2}", "5", True, False, None),
    ("(x+1)^2", "x^2+2x+1", True, False, None),
    ("5", "6", False, False, None),
    ("B", "(B)", True, False, True),
    ("B", "\\text{B}", True, True, True),
    ("(C) 12 cm", "C", False, False, True),
    ("A", "B", False, False, False),
    ("B", "5", False, False, False),
]


@pytest.mark.parametrize(("gold", "answer", "by_math", "by_text", "by_letter"), JUDGED)
def test_each_verifier_judges_by_its_own_rule(gold, answer, by_math, by_text, by_letter):
    for verifier, expected in {"math": by_math, "exact": by_text, "choice": by_letter}.items():
        pair = f"So it is \\boxed{{{answer}}}", f"Steps.\n\\boxed{{{gold}}}"
        (verdict,) = start_verifying([pair], verifier)()
        assert verdict.is_right is expected, verifier


def test_without_a_box_the_whole_text_is_the_answer():
    assert verify(" olleh\n", "olleh", "exact") and not verify("the answer is olleh", "olleh", "exact")
    assert which_verify(["olleh", "", None, "\\boxed{}"], "exact") == [True, False, False, False]
    assert not verifies("olleh") and verifies("\\boxed{olleh}")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("(A) is tempting, but \\boxed{\\text{(C)}}", "C"),
        ("The answer is (d).", "D"),
        ("**Answer: B**", "B"),
        ("Answer: $C$ because (A) fails", "C"),
        ("(A) and (B) fail, so (E)", "E"),
        ("b", "B"),
        ("B) 12 cm", "B"),
        ("\\boxed{A. Paris}", "A"),
        ("the answer is a number", None),
        ("\\boxed{12}, so not (A)", None),
        ("\\boxed{A, C}", None),
        ("Apples", None),
        ("", None),
    ],
)
def test_a_choice_is_read_from_what_models_write(text, letter):
    assert choice_letter(text) == letter


def test_boxes_nest_break_off_and_hold_escaped_braces():
    assert last_box("\\boxed{1} and \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert last_box("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert last_box("\\boxed{\\boxed{7}}") == "7"
    assert last_box("\\boxed{1}, then \\boxed{2") == "1" and last_box("}{") is None
    assert exact_answer("$\\text{Two  words}.$") == "two words"


def test_reading_an_answer_takes_time_in_proportion_to_its_text():
    for text in (
        "\\boxed{" * 30_000,
        "{" * 100_000,
        "$" * 100_000 + "x",
        "answer " * 30_000,
        "(A" * 50_000,
        "\\text{" * 30_000,
    ):
        begin = time.process_time()
        exact_answer(text), choice_letter(text), why_no_mathematics(f"\\boxed{{{text}}}")
        assert time.process_time() - begin < 2


def has_digits(text, solution):
    return None if solution == "?" else any(map(str.isdigit, text))


def returns_a_number(text, solution):
    return 0.3


def test_a_function_of_ones_own_decides():
    name = f"{__name__}:has_digits"
    assert make_accuracy_reward(name)(["a1", "a", "a1"], ["x", "x", "?"]) == [1.0, 0.0, None]
    assert verifies("x", name) and not verifies("", name)
    with pytest.raises(ValueError, match=r"returned 0\.3; it must return True, False"):
        verify("a", "b", f"{__name__}:returns_a_number")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("maths", "one of math, exact, choice"),
        ("no_such_module:f", "No module named"),
        ("json:no", "no attribute 'no'"),
        ("json:__name__", "is a str"),
    ],
)
def test_a_verifier_that_is_none_is_refused_with_what_it_may_be(name, told):
    with pytest.raises(ValueError, match=rf"--verifier='{name}'.*{told}"):
        check_verifier(name, "--verifier")
    with pytest.raises(ValueError, match="verifier="):
        make_accuracy_reward(name)


def test_a_module_of_the_working_directory_is_found(monkeypatch, tmp_path):
    (tmp_path / "own_verifier_of_a_test.py").write_text("def same(text, solution):\n    return text == solution\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert verify("a", "a", "own_verifier_of_a_test:same")


# Gold answers

NO_MATHEMATICS = [
    "olleh",
    "tac",
    "2024-03-01",
    "01/02/2024",
    "05088",
    "007",
    "abcd",
    "Paris",
    "no solution",
    "Yes",
    "555-12-99",
]
MATHEMATICS = [
    "5", "-3", "0", "0.5", "1,000", "50\\%", "\\frac{1}{2}", "x", "A", "2x+1", "(1,2)", "[0,\\infty)", "\\{1, 2\\}", "10^{-3}",
    "pi", "2\\pi", "sin x", "x = 3", "5 \\text{ cm}", "12:30", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\text{Paris}", "3-1",
]  # fmt: skip


@pytest.mark.parametrize("answer", NO_MATHEMATICS)
def test_words_dates_and_leading_zeros_are_no_mathematics(answer):
    assert why_no_mathematics(answer) and why_no_mathematics(f"So \\boxed{{{answer}}}.")


@pytest.mark.parametrize("answer", MATHEMATICS)
def test_numbers_and_formulas_are(answer):
    assert why_no_mathematics(f"So \\boxed{{{answer}}}.") is None


def test_a_warning_names_the_first_such_answer_and_what_to_set():
    told = warn_of_golds(["\\boxed{5}", None, "so \\boxed{tac}", "\\boxed{007}"], "math", "own.jsonl")
    for text in ("own.jsonl: 2 of 4", "'tac' in row 2, a word", "number with leading zeros", "'exact'", "'choice'"):
        assert text in told
    assert warn_of_golds(["\\boxed{tac}"], "exact", "own.jsonl") is None
    assert warn_of_golds(["tac", "Paris"], "math", "own.jsonl") is None  # read as no answer, which is told apart
    assert warn_of_golds(["\\boxed{5}", "A proof in many words. " * 9], "math", "own.jsonl") is None


# In a run


WORDS = Dataset.from_list([{"prompt": f"{n}+1", "solution": "So \\boxed{tac}."} for n in range(8)])


def test_a_run_warns_of_gold_answers_that_are_no_mathematics_and_its_verifier_serves_the_callback(
    make_model, make_args, tokenizer
):
    given = {"train_dataset": WORDS, "processing_class": tokenizer}
    with pytest.warns(UserWarning, match=r"train_dataset: 8 of 8 gold answers .*'tac' in row 0, a word"):
        OPSDTrainer(make_model(), args=make_args(), **given)
    trainer = OPSDTrainer(make_model(), args=make_args(verifier="exact"), **given)  # a warning would be an error
    assert EvaluationCallback(trainer, [dict(WORDS[0])]).verifier == "exact"
    assert trainer.reward_func_names == ["accuracy_reward"]
    assert trainer.reward_funcs[0](completions=["\\boxed{cat}", "\\boxed{tac}"], solution=["\\boxed{tac}"] * 2) == [
        0.0,
        1.0,
    ]
    with pytest.warns(UserWarning, match="rows of EvaluationCallback: 1 of 1 gold answers"):
        EvaluationCallback(trainer, [dict(WORDS[0])], verifier="math")


def test_words_without_a_box_are_rewarded_by_text_where_mathematics_reads_nothing(make_model, make_args, tokenizer):
    rows = WORDS.map(lambda row: {"solution": "tac"})
    for verifier, name in {"math": "no_reward", "exact": "accuracy_reward"}.items():
        args = make_args(verifier=verifier)
        trainer = OPSDTrainer(make_model(), args=args, train_dataset=rows, processing_class=tokenizer)
        assert trainer.reward_func_names == [name]


def test_the_log_has_the_share_of_rollouts_that_were_not_scored(
    make_model, make_args, tokenizer, dataset, short_limits, monkeypatch
):
    asked = pool.Worker.verify

    def every_other(self, text, gold, seconds):
        return pool.Verdict(None, ran_out=True) if gold.endswith("{1}") else asked(self, text, gold, seconds)

    monkeypatch.setattr(pool.Worker, "verify", every_other)
    rows = dataset.select([0])
    args = make_args(max_steps=1, logging_steps=1, num_generations=4, per_device_train_batch_size=4)
    trainer = OPSDTrainer(make_model(), args=args, train_dataset=rows, processing_class=tokenizer)
    with pytest.warns(UserWarning, match="ran out of time"):
        trainer.train()
    assert trainer.state.log_history[0]["rewards/unscored"] == 1.0


def test_the_baseline_verifies_by_the_same_rule(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in WORDS))
    words = f"--model_name_or_path {model_path()} --dataset_name {rows} --output_dir {tmp_path} --use_cpu --bf16 false"
    words = [*words.split(), "--report_to", "none", "--per_device_train_batch_size", "8", "--verifier"]
    trainer = make_baseline("grpo", *parse("grpo", [*words, "exact"]))
    assert trainer.reward_funcs[0](completions=["\\boxed{cat}"], solution=["\\boxed{tac}"]) == [0.0]
    with pytest.warns(UserWarning, match="8 of 8 gold answers are no number"):
        make_baseline("grpo", *parse("grpo", [*words, "math"]))


def test_the_teacher_scores_while_answers_are_verified(make_model, make_args, dataset, tokenizer, monkeypatch):
    """And takes the step that it takes where it scores behind the rewards."""

    order, begin, run_teacher = [], rewards.start_verifying, Scorer.score

    def watched(pairs, verifier="math"):
        order.append("begun")
        wait = begin(pairs, verifier)
        return lambda: order.append("awaited") or wait()

    def scored(*args, **kwargs):
        order.append("scored")
        return run_teacher(*args, **kwargs)

    monkeypatch.setattr(rewards, "start_verifying", watched)
    monkeypatch.setattr(Scorer, "score", scored)
    logs = []
    for reward in (None, lambda completions, solution, **kwargs: rewards.accuracy_reward(completions, solution)):
        trainer = OPSDTrainer(
            model=copy.deepcopy(make_model(torch.float64)),
            reward_funcs=reward,
            args=make_args(max_steps=2, seed=3),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert order == ["begun", "scored", "awaited"] * 2 + ["begun", "awaited", "scored"] * 2
    assert logs[0] == logs[1] and len(logs[0]) == 2
