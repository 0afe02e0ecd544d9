# SPDX-License-Identifier: Apache-2.0
"""What libraries print while a command works: no more than concerns its user. From Python they print as ever."""

import logging
import os
import warnings

VERBOSE = "TRL_OPSD_VERBOSE"  # an environment variable, so that launched processes have it too
_SECONDS_BEFORE_A_BAR = "2"
# Of libraries, about what a user's settings did not choose.
_IDLE = ("'pin_memory' argument is set as true but no accelerator is found",)


def calm_libraries() -> None:
    """For commands: warnings on one line, none that a user can do nothing about, no bar of an instant; `--verbose` shows all."""
    if os.environ.get(VERBOSE):
        return
    os.environ.setdefault("TQDM_DELAY", _SECONDS_BEFORE_A_BAR)  # read when tqdm is imported
    warnings.formatwarning = _as_line
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for message in _IDLE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # a broken file is told with its line
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _as_line(message, category, filename, lineno, line=None) -> str:
    return f"warning: {message}\n"
