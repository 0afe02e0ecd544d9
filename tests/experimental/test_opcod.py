# SPDX-License-Identifier: Apache-2.0
"""A peer's feedback: a shut gate is SDPO bit for bit, told answers are dropped, a server's faults fall back, one call a text."""

import contextlib
import importlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from trl_opsd import SDPOTrainer
from trl_opsd.commands.train import parse
from trl_opsd.experimental.opcod import feedback
from trl_opsd.experimental.opcod.feedback import PeerFeedback, tells_answer
from trl_opsd.experimental.opcod.server import PeerServer, PeerUnavailable
from trl_opsd.experimental.opcod.settings import VARIABLE, PeerSettings
from trl_opsd.teacher.contexts import Rollout
from trl_opsd.user_functions import call_for_each, load_function

pytestmark = pytest.mark.filterwarnings("ignore:Feedback of a peer is experimental")
NAME = "trl_opsd.experimental.opcod.feedback:peer_feedback"
OPEN = {"own_accuracy": {"all": 0.4}, "peer_accuracy": {"all": 0.5}}
SHUT = {"own_accuracy": {"all": 0.5}, "peer_accuracy": {"all": 0.5}}
SOLUTION = "1+2 is \\boxed{3}"


@pytest.fixture
def served(tmp_path):
    """A stand-in for an OpenAI-compatible server: what it got, and a function that makes settings of it."""

    class Handler(BaseHTTPRequestHandler):
        got, faults, text, wait = [], [], "Look at the carry.", 0.0

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.got.append((self.path, request))
            fault = Handler.faults.pop(0) if Handler.faults else None
            time.sleep(Handler.wait)
            body = json.dumps({"choices": [{"message": {"content": Handler.text}}]}).encode()
            if fault == "late":
                time.sleep(0.5)
            elif isinstance(fault, bytes):
                body = fault
            self.send_response(fault if isinstance(fault, int) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the asker may have left
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()

    def settings(**changed):
        values = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "peer", "num_tries": 2}
        return PeerSettings(**{**values, "cache_folder": str(tmp_path / "cache"), **OPEN, **changed})

    yield Handler, settings
    server.shutdown()
    server.server_close()
    thread.join()


def rollout(attempt="it is 4", solution=SOLUTION, **columns):
    return Rollout([{"role": "user", "content": "What is 1+2, with a carry?"}], solution, attempt, 0.0, columns=columns)


def peer_of(settings, naps=None):
    peer = PeerFeedback(settings)
    peer.server = PeerServer(settings, peer._count, sleep=([] if naps is None else naps).append)
    return peer


def test_the_peer_reads_question_and_attempt_and_its_answer_comes_back(served):
    handler, settings = served
    peer = peer_of(settings(concepts={"carrying": ["carry"], "primes": ["prime"]}))
    assert peer(rollout()) == "Look at the carry."
    ((path, request),) = handler.got
    assert path == "/v1/chat/completions" and (request["model"], request["temperature"]) == ("peer", 0)
    asked = request["messages"][0]["content"]
    assert "What is 1+2" in asked and "it is 4" in asked and "carrying" in asked and "primes" not in asked
    assert "boxed" not in asked
    assert peer.counts == {"calls": 1, "given": 1}


def test_a_text_is_asked_once_by_threads_and_by_later_processes(served):
    handler, settings = served
    handler.wait = 0.1
    with ThreadPoolExecutor(4) as threads:
        peer = peer_of(settings())
        assert set(threads.map(peer, [rollout()] * 4)) == {"Look at the carry."}
    assert len(handler.got) == 1 and peer.counts == {"calls": 1, "cached": 3, "given": 4}
    assert peer_of(settings())(rollout()) == "Look at the carry." and len(handler.got) == 1
    peer_of(settings(model="round 2"))(rollout())
    peer_of(settings())(rollout("it is 5"))
    assert len(handler.got) == 3


def test_calls_run_at_a_time(served):
    handler, settings = served
    handler.wait = 0.3
    peer, start = peer_of(settings(calls_at_once=8)), time.monotonic()
    assert call_for_each(peer, [rollout(f"it is {n}") for n in range(8)]) == ["Look at the carry."] * 8
    assert time.monotonic() - start < 8 * 0.3 and len(handler.got) == 8


@pytest.mark.parametrize(
    "fault",
    [500, "late", b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'],
    ids=str,
)
def test_one_fault_is_tried_again_and_two_are_no_feedback_and_counted(served, fault):
    handler, settings = served
    handler.faults, naps = [fault], []
    peer = peer_of(settings(timeout_seconds=0.25), naps)
    assert peer(rollout()) == "Look at the carry." and naps == [1.0]
    handler.faults = [fault, fault]
    with pytest.raises(PeerUnavailable, match="2 tries"):
        peer(rollout("it is 5"))
    assert (peer.counts["failed"], peer.counts["calls"]) == (1, 4)
    with pytest.raises(PeerUnavailable, match="a moment ago"):
        peer(rollout("it is 6"))
    assert (peer.counts["failed"], peer.counts["calls"]) == (2, 4)
    again = peer_of(settings(pause_seconds=0.0))  # a fault is not kept
    assert again(rollout("it is 5")) == "Look at the carry."


def test_the_gate_is_open_where_the_peer_is_better_and_nowhere_else(served):
    handler, settings = served
    peer = peer_of(settings(own_accuracy={"sums": 0.4, "sets": 0.5}, peer_accuracy={"sums": 0.5, "sets": 0.5, "x": 1}))
    assert peer(rollout(domain="sums")) == "Look at the carry."
    assert [peer(rollout("so 7", domain=domain)) for domain in ("sets", "x", None)] == [None] * 3
    assert len(handler.got) == 1 and peer.counts["shut"] == 3


def test_a_told_answer_is_dropped_and_counted_and_a_box_is_cut_out_first(served):
    handler, settings = served
    handler.text = "You forgot the carry, it is 3."
    peer = peer_of(settings())
    assert peer(rollout()) is None and peer.counts["leaked"] == 1
    handler.text = "You forgot the carry. \\boxed{\\frac{3}{1}}"
    assert peer(rollout("so 5")) == "You forgot the carry."
    handler.text = "\\boxed{3}"
    assert peer(rollout("so 6")) is None and peer.counts["blank"] == 1
    calls = len(handler.got)
    assert peer(rollout(solution=None)) is None and peer.counts["no_solution"] == 1 and len(handler.got) == calls
    assert json.loads((peer.server.folder / "counts-0.json").read_text()) == peer.counts


@pytest.mark.parametrize(
    ("text", "solution", "told"),
    [
        ("it is 3", SOLUTION, True),
        ("it is 3.", SOLUTION, True),
        ("it is 13 or 3.5 or x3", SOLUTION, False),
        ("so $x=\\frac{1}{2}$", "\\boxed{\\frac{1}{2}}", True),
        ("so x + y  + z", "\\boxed{x+y+z}", True),
        ("choose B", "\\boxed{B}", True),
        ("Be careful", "\\boxed{B}", False),
        ("the sum is 12", "first 7, then 12", True),
        ("the sum starts at 7", "first 7, then 12", False),
        ("it is paris", "Paris", True),
    ],
)
def test_an_answer_is_told_where_it_stands_as_a_word(text, solution, told):
    assert tells_answer(text, solution) is told


@pytest.fixture
def run_of(build_group, monkeypatch):
    """A function that gives losses and weights of two steps of SDPO, with a peer's settings in the environment or without."""

    def run(settings=None):
        vars(feedback).pop("peer_feedback", None)
        own = {}
        if settings is not None:
            monkeypatch.setenv(VARIABLE, json.dumps({name: getattr(settings, name) for name in vars(settings)}))
            own = {"feedback_function": NAME}
        trainer = build_group(
            SDPOTrainer,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=40,
            max_steps=2,
            feedback_beside_peer=True,
            **own,
        )
        trainer.train()
        losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        peer = vars(feedback).pop("peer_feedback", None)
        return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), peer

    return run


def test_a_shut_gate_is_sdpo_bit_for_bit_without_a_call_and_an_open_one_is_not(served, run_of):
    handler, settings = served
    want, weights, _ = run_of()
    got, own, peer = run_of(settings(**SHUT))
    assert got == want and torch.equal(own, weights) and len(got) == 2
    assert handler.got == [] and peer.counts == {"shut": 16}
    _, told, peer = run_of(settings())
    assert peer.counts["given"] > 0 and not torch.equal(told, weights)


def test_where_the_server_is_down_a_run_goes_on_as_sdpo_and_counts_it(served, run_of):
    _, settings = served
    _, weights, _ = run_of()
    with pytest.warns(UserWarning, match="which have no feedback"):
        _, own, peer = run_of(settings(url="http://127.0.0.1:9/v1", num_tries=1, calls_at_once=1))
    assert torch.equal(own, weights) and peer.counts["failed"] + peer.counts["no_solution"] == 16
    assert peer.counts["calls"] == 1  # several at a time would have begun before the first failed


@pytest.mark.parametrize(
    "bad",
    [
        {"url": "localhost"},
        {"model": " "},
        {"cache_folder": ""},
        {"max_tokens": 0},
        {"num_tries": 0},
        {"calls_at_once": 0},
        {"timeout_seconds": 0},
        {"pause_seconds": -1},
        {"own_accuracy": {"all": 70}},
        {"question_template": "{prompt}"},
        {"speed": 1},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name_before_a_run(monkeypatch, tmp_path, bad):
    importlib.import_module("trl_opsd.experimental.opcod.feedback")
    values = {"url": "http://h/v1", "model": "peer", "cache_folder": str(tmp_path), **bad}
    monkeypatch.setenv(VARIABLE, json.dumps(values))
    with pytest.raises(ValueError, match=next(iter(bad))):
        load_function(NAME, "feedback_function", takes="a rollout")


@pytest.mark.parametrize("name", ["math", "science"])
def test_the_recipes_are_sdpo_with_a_peer_that_does_not_speak_until_it_was_measured(monkeypatch, tmp_path, name):
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    vars(feedback).pop("peer_feedback", None)
    recipe = Path(__file__).parents[2] / "recipes" / "opcod" / f"{name}.yaml"
    _, args, _ = parse("sdpo", ["--config", str(recipe), "--use_cpu", "--bf16", "False"])
    peer = vars(feedback).pop("peer_feedback")
    assert args.feedback_function == NAME and args.feedback_beside_peer
    assert not peer.is_open("all") and peer.settings.model == {"math": "science-0", "science": "math-0"}[name]


@pytest.mark.parametrize("text", [None, "x", "[]"])
def test_an_environment_without_settings_is_refused_by_name(monkeypatch, text):
    monkeypatch.delenv(VARIABLE, raising=False) if text is None else monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=VARIABLE):
        load_function(NAME, "feedback_function", takes="a rollout")
