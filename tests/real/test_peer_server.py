# SPDX-License-Identifier: Apache-2.0
"""A peer behind `transformers serve`, the embedded model in a process of its own: its answers, their cache, and its end."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from trl_opsd.demo import model_path
from trl_opsd.experimental.opcod.feedback import PeerFeedback
from trl_opsd.experimental.opcod.server import PeerServer, PeerUnavailable
from trl_opsd.experimental.opcod.settings import PeerSettings
from trl_opsd.teacher.contexts import Rollout

pytestmark = pytest.mark.filterwarnings("ignore:Feedback of a peer is experimental")
COMMAND = shutil.which("transformers", path=str(Path(sys.executable).parent))


@pytest.fixture
def served():
    """The server's process and its address."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is not installed: `pip install {package}`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [COMMAND, "serve", model_path(), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
    while True:
        assert process.poll() is None and time.monotonic() < end, "the server did not come up"
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                break
        except OSError:
            time.sleep(0.5)
    yield process, f"{address}/v1"
    process.kill()
    process.wait()


def test_a_served_model_comments_once_on_a_text_and_is_missed_when_it_is_gone(served, tmp_path):
    process, url = served
    settings = PeerSettings(
        url=url,
        model=model_path(),
        cache_folder=str(tmp_path),
        own_accuracy={"all": 0.4},
        peer_accuracy={"all": 0.5},
        question_template="{prompt}{attempt}",
        max_tokens=40,
        num_tries=2,
        timeout_seconds=120.0,
    )
    settings.check()
    naps = []
    peer = PeerFeedback(settings)
    peer.server = PeerServer(settings, peer._count, sleep=naps.append)
    asked = Rollout([{"role": "user", "content": "(3+4)-2=?"}], "the sum is \\boxed{99}", "")
    # The embedded model answers whatever it is asked, and a boxed answer is cut out of a peer's text.
    assert peer(asked) is None and peer.counts == {"calls": 1, "blank": 1}
    assert peer.server.ask(peer.question(asked)).startswith("\\boxed{") and peer.counts["cached"] == 1
    process.kill()
    process.wait()
    assert peer(asked) is None and peer.counts["cached"] == 2 and peer.counts["calls"] == 1
    with pytest.raises(PeerUnavailable, match="2 tries"):
        peer(Rollout([{"role": "user", "content": "(3+5)-2=?"}], "the sum is \\boxed{99}", ""))
    assert naps == [1.0] and peer.counts["failed"] == 1
