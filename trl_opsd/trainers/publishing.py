# SPDX-License-Identifier: Apache-2.0
"""What leaves the machine: the model card, and uploads that are tried again or fail by name."""

import time
import warnings
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..card import redact, write_card
from .targets import TargetTrainer

_SECONDS_BEFORE_RETRIES = (2, 10)
_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)


class PublishingTrainer(TargetTrainer):
    """Writes the card and pushes to the Hub; a failed upload never harms what is saved."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._card_facts: dict[str, Any] = {"dataset_name": None, "evaluation": None}
        self.add_callback(_PushWatch(self))

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, evaluation=None) -> None:
        """Write README.md and run.png into the output directory: method, settings, results, data, hardware, limits.

        Args:
            model_name: title of the card; the output directory's name if None.
            dataset_name: of the Hub; a later card keeps it.
            tags: added to the metadata.
            evaluation: numbers of base and model, see `trl_opsd.card.results_section`; a later card of the same weights
                keeps them.
        """
        facts = self._card_facts
        facts["dataset_name"] = dataset_name = dataset_name or facts["dataset_name"]
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if evaluation is not None:
            self.keep_evaluation(evaluation)
        measured_at, numbers = facts["evaluation"] or (None, None)
        if self.is_world_process_zero():
            write_card(self, dataset_name, numbers if measured_at == self.state.global_step else None)

    def keep_evaluation(self, evaluation) -> None:
        """Keep numbers of the weights as they are for the cards written of them; see `create_model_card`."""
        self._card_facts["evaluation"] = (self.state.global_step, evaluation)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Upload model, tokenizer and card; tried again after a fault of server or network.

        Args:
            commit_message: of the commit.
            blocking: False returns a future at once, without another try.
            token: other than the one of `hf auth login`.
            revision: branch; the default one if None.
            kwargs: for `create_model_card`.

        Returns:
            `CommitInfo` or a future of it; None on other processes than the first.

        Raises:
            RuntimeError: the upload failed; says where the model is and how to upload it.
        """
        upload = super().push_to_hub(commit_message, blocking=False, token=token, revision=revision, **kwargs)
        if not blocking or upload is None:
            return upload

        def again() -> CommitInfo:
            return HfApi().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
                revision=revision or self.args.hub_revision,
            )

        attempts = [upload.result, *[again] * len(_SECONDS_BEFORE_RETRIES)]
        for seconds, attempt in zip((0, *_SECONDS_BEFORE_RETRIES), attempts, strict=True):
            time.sleep(seconds)
            try:
                return attempt()
            except Exception as error:
                last = error
            if not _is_transient(last):
                break
        raise RuntimeError(
            f"The upload to {self.hub_model_id} failed: {self._without_token(last)}\nThe model and its card are whole in "
            f"{self.args.output_dir}. Upload them with `hf upload {self.hub_model_id} {self.args.output_dir} .` or "
            "call push_to_hub() again."
        ) from last

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.warn_of_failed_pushes()
        return output

    def warn_of_failed_pushes(self) -> None:
        """Warn of uploads of checkpoints that failed in the background, where HF Trainer is silent."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        failed = [job for job in push.jobs if job.done() and job.exception() is not None]
        push.jobs = [job for job in push.jobs if job not in failed]
        for job in failed:
            warnings.warn(
                f"Uploading a checkpoint to {self.hub_model_id} failed: {self._without_token(job.exception())} It is "
                f"whole in {self.args.output_dir}; the next save or push_to_hub() uploads the model again.",
                stacklevel=2,
            )

    def _without_token(self, error: BaseException) -> str:
        return redact(f"{type(error).__name__}: {error}", self.args.hub_token).strip().rstrip(".") + "."


class _PushWatch(TrainerCallback):
    """Looks at the pushes behind when the next one begins."""

    def __init__(self, trainer: PublishingTrainer):
        self.trainer = trainer

    def on_push_begin(self, args, state, control, **kwargs):
        self.trainer.warn_of_failed_pushes()


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
