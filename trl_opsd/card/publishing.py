# SPDX-License-Identifier: Apache-2.0
"""What leaves the machine: the model card and uploads, whose failures never harm what is saved."""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from huggingface_hub import CommitInfo
from transformers import TrainerCallback

from . import write_card
from .facts import redact

_SECONDS_BEFORE_RETRIES = (2, 10)
_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)


class Publisher(TrainerCallback):
    """Keeps what a card says beside the settings, waits for uploads, and warns of those that failed behind.

    Args:
        trainer: whose model is published.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.dataset_name: str | None = None
        self.evaluation: tuple[int, Any] | None = None  # the step it was made at, and its numbers

    def keep_evaluation(self, evaluation: Any) -> None:
        """Keep numbers of the weights as they are now, for the cards written of them."""
        self.evaluation = self.trainer.state.global_step, evaluation

    def write_card(self) -> None:
        """Write README.md and its picture; numbers of other weights are left out."""
        measured_at, numbers = self.evaluation or (None, None)
        if self.trainer.is_world_process_zero():
            write_card(
                self.trainer, self.dataset_name, numbers if measured_at == self.trainer.state.global_step else None
            )

    def finish(self, upload: Future[CommitInfo], again: Callable[[], Future[CommitInfo]]) -> CommitInfo:
        """Wait for an upload, and begin it again where a line broke or the server stumbled.

        huggingface_hub tries again to send files, but not to commit them.

        Args:
            upload: that has begun.
            again: begins it anew.

        Raises:
            RuntimeError: it failed; says where the model is and how to upload it.
        """
        for seconds in (*_SECONDS_BEFORE_RETRIES, None):
            try:
                return upload.result()
            except Exception as error:
                if seconds is None or not _is_transient(error):
                    raise self._failed_upload(error) from error
            time.sleep(seconds)
            upload = again()

    def _failed_upload(self, error: Exception) -> RuntimeError:
        name, folder = self.trainer.hub_model_id, self.trainer.args.output_dir
        return RuntimeError(
            f"The upload to {name} failed: {self._without_token(error)}\nThe model and its card are whole in {folder}. "
            f"Upload them with `hf upload {name} {folder} .` or call push_to_hub() again."
        )

    def on_push_begin(self, args, state, control, **kwargs):
        """Look at the pushes behind when the next one begins."""
        self.warn_of_failed_pushes()

    def on_train_end(self, args, state, control, **kwargs):
        """Look at them once more."""
        self.warn_of_failed_pushes()

    def warn_of_failed_pushes(self) -> None:
        """Warn of uploads of checkpoints that failed in the background, where HF Trainer is silent."""
        trainer = self.trainer
        push = getattr(trainer, "push_in_progress", None)
        if push is None:
            return
        failed = [job for job in push.jobs if job.done() and job.exception() is not None]
        push.jobs = [job for job in push.jobs if job not in failed]
        for job in failed:
            warnings.warn(
                f"Uploading a checkpoint to {trainer.hub_model_id} failed: {self._without_token(job.exception())} It is "
                f"whole in {trainer.args.output_dir}; the next save or push_to_hub() uploads the model again.",
                stacklevel=2,
            )

    def _without_token(self, error: BaseException) -> str:
        return redact(f"{type(error).__name__}: {error}", self.trainer.args.hub_token).strip().rstrip(".") + "."


def _is_transient(error: BaseException | None) -> bool:
    """Whether another try can help: the server's fault, or a line that broke (no answer at all)."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code in _TRANSIENT_STATUSES
        if isinstance(error, ValueError):
            return False
        error = error.__cause__
    return True
