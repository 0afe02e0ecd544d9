# SPDX-License-Identifier: Apache-2.0
"""The tools of examples/tools.py: what they answer, and that a program's limits hold."""

import re
import time

import pytest
from agents import load_example

EXAMPLE = load_example()


def test_the_calculator_takes_arithmetic_and_nothing_else():
    assert [EXAMPLE.calculate(text) for text in ("(1+2)*3", "7/2", "-4-1")] == ["9", "3.5", "-5"]
    for text in ("__import__('os')", "'a'*9", "2**9", "a", "[1]"):
        with pytest.raises(ValueError, match="is no arithmetic"):
            EXAMPLE.calculate(text)


def test_a_program_answers_with_what_it_prints_and_reports_how_it_failed():
    box = EXAMPLE.Sandbox()
    assert box.run_python("print(3 * 4)") == "12\n" and box.feedback is None
    assert box.run_python("1 / 0") == "ZeroDivisionError: division by zero"
    assert "1 / 0\nfailed: ZeroDivisionError" in box.feedback
    box.reset(prompt="p")
    assert box.feedback is None
    box.run_python("x = 1")
    assert box.feedback.endswith("printed nothing.")
    assert len(box.run_python("print('a' * 5000)")) == EXAMPLE.CHARACTERS


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("while True: pass", "stopped by signal|did not end within"),  # a busy machine may not give it 2 seconds of 4
        ("import time; time.sleep(60)", "did not end within"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("with open('x', 'w') as file: file.write('a' * 10)", "File too large"),
        ("import os; print(os.environ.get('PATH'), os.listdir('.'))", ""),
    ],
)
def test_limits_of_a_program_hold(code, says):
    start = time.monotonic()
    printed, error = EXAMPLE.run_program(code)
    assert re.search(says, error) and time.monotonic() - start < 30
    if not says:
        assert (printed, error) == ("None []\n", "")
