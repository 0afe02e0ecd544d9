# SPDX-License-Identifier: Apache-2.0
"""Settings of a peer's feedback (OPCoD, arXiv 2606.14368), read from one environment variable, which a recipe's `env` can set."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ...rows.texts import check_template
from ...settings.fields import option, require

VARIABLE = "TRL_OPSD_PEER"

QUESTION_TEMPLATE = """A student answered the problem below. Say in a few sentences which idea or step of the answer holds, which does not, and what \
to look at again. Do not solve the problem, and do not give its result.{concepts}

=== Problem ===
{prompt}

=== Answer of the student ===
{attempt}"""


@dataclass(frozen=True)
class PeerSettings:
    """Where the peer is served, when it may speak, and how long it is waited for; all values are ours."""

    url: str = option("", "Base address of an OpenAI-compatible server, such as `http://127.0.0.1:8000/v1`.")
    model: str = option("", "Name of the peer's model on that server; name each round's weights otherwise.")
    cache_folder: str = option("", "Folder that keeps every answer, so that no question is asked twice.")
    own_accuracy: Mapping[str, float] = option(
        {}, "Accuracy of the trained model by domain, on a held-out slice, in [0, 1]."
    )
    peer_accuracy: Mapping[str, float] = option(
        {}, "Accuracy of the peer on the same slices; it speaks where it is above one's own."
    )
    concepts: Mapping[str, list] = option(
        {}, "Concept -> words; concepts whose words a problem holds are named to the peer."
    )
    question_template: str = option(
        QUESTION_TEMPLATE,
        "What the peer reads; holds `{prompt}` and `{attempt}`, and `{concepts}` where there are some.",
    )
    max_tokens: int = option(256, "Longest feedback in tokens, 1 or more.")
    timeout_seconds: float = option(60.0, "How long one try may take, above 0.")
    num_tries: int = option(3, "Tries of a call, 1 or more.")
    pause_seconds: float = option(60.0, "After a call whose tries all failed no other is made for so long, 0 or more.")
    calls_at_once: int = option(8, "Calls at a time of each process, 1 or more.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(
            str(self.url).startswith(("http://", "https://")),
            self,
            "url",
            "an address that begins with http:// or https://",
        )
        for name in ("model", "cache_folder"):
            value = getattr(self, name)
            require(isinstance(value, str) and value.strip(), self, name, "a text")
        for name in ("max_tokens", "num_tries", "calls_at_once"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, self, name, "a whole number, 1 or more")
        require(self.timeout_seconds > 0, self, "timeout_seconds", "a number above 0")
        require(self.pause_seconds >= 0, self, "pause_seconds", "a number, 0 or more")
        for name in ("own_accuracy", "peer_accuracy"):
            shares = getattr(self, name)
            is_valid = isinstance(shares, Mapping) and all(0 <= share <= 1 for share in shares.values())
            require(is_valid, self, name, "a mapping from domains to numbers in [0, 1]")
        check_template("question_template", self.question_template, "{prompt}", "{attempt}")

    @classmethod
    def from_environment(cls) -> "PeerSettings":
        """What the environment variable `TRL_OPSD_PEER` says, a JSON object of these fields.

        Raises:
            ValueError: it is not set, no JSON object, names an unknown field, or a field is outside its range.
        """
        text = os.environ.get(VARIABLE)
        try:
            values = json.loads(text or "null")
        except ValueError as error:
            raise ValueError(
                f"{VARIABLE}={text!r} is no JSON ({error}). Write an object of the peer's settings."
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{VARIABLE}={text!r} is no JSON object. Set it, for instance under `env` of the recipe.")
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{VARIABLE} names {unknown[0]!r}, which is no setting of a peer. Leave it out.")
        settings = cls(**values)
        settings.check()
        return settings
