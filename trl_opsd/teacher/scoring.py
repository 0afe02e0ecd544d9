# SPDX-License-Identifier: Apache-2.0
"""Teacher hidden states of every context over its rollout, added up to targets: no logits of a batch, no gradients.

Each view adds its hidden states, with its weights, to the rollout's anchor and direction (see `states`), which is all
that a target `W a + shape(W d)` needs: H numbers a position instead of V. A view that is read leaves two.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from .forwards import Run, TeacherForward, score_plain, score_shared
from .jobs import ScoringJob, SharedBatch, group_by_context, plan_forwards, plan_shared
from .states import TargetStates

# Of the norm: bfloat16 in other batch shapes differs by about 0.01, a context unread by far more.
_TOLERANCE = 0.05
_SECONDS_TO_BAR = 5


class ContextSharing:
    """Whether the model's contexts can be scored once for all their rollouts: found out at the first that are shared.

    Attributes:
        supported: None until it is known.
    """

    def __init__(self):
        self.supported: bool | None = None

    def check(
        self,
        run: TeacherForward,
        jobs: Sequence[ScoringJob],
        pad_id: int,
        device: torch.device,
        max_over_ranks: Callable[[int], int],
    ) -> bool:
        """Whether to share; compares both ways once, in the same number of forwards on every rank, and warns."""
        if self.supported is None:
            pair = next((group for group in group_by_context(jobs) if len(group) > 1), None)
            if not max_over_ranks(int(pair is not None)):
                return False
            pair = [pair[0], pair[-1]] if pair else [_empty_job(pad_id)] * 2
            reason = _difference(run, pair, pad_id, device)
            self.supported = not max_over_ranks(int(reason is not None))
            if not self.supported:
                warnings.warn(
                    f"{type(run.model).__name__} cannot score a context once for all its rollouts "
                    f"({reason or 'found on another rank'}): it is read again for each. Targets are the same, scoring "
                    "takes longer.",
                    stacklevel=3,
                )
        return self.supported


@torch.no_grad()
def score_contexts(
    run: Run,
    jobs: Sequence[ScoringJob],
    target: TargetStates,
    *,
    device: torch.device,
    pad_id: int,
    tokens_per_forward: int,
    max_over_ranks: Callable[[int], int] = lambda count: count,
    sharing: ContextSharing | None = None,
    progress: bool = False,
) -> TargetStates:
    """Run the teacher over all jobs and add what it says to a target.

    Args:
        run: a `TeacherForward`; without `sharing`, any function from ids (b, S), mask (b, S) and a length to the
            hidden states (b, length, H) that predict the last `length` ids.
        jobs: what to score.
        target: added to; positions behind a rollout's end and rows without a context stay as they are.
        device: of the inputs.
        pad_id: padding token.
        tokens_per_forward: tokens, padding and cached ones included, that one forward holds.
        max_over_ranks: makes every rank run the same number of forwards, which sharded engines need; a rank that
            has fewer runs empty ones.
        sharing: whether contexts that jobs share can be run once; None runs every job on its own.
        progress: show a bar, once it has taken some seconds.

    Returns:
        The target.
    """
    share = sharing is not None and sharing.check(run, jobs, pad_id, device, max_over_ranks)
    shared, alone = plan_shared(jobs, tokens_per_forward) if share else ([], jobs)
    plain = plan_forwards(alone, tokens_per_forward)
    num_forwards = sum(batch.num_forwards for batch in shared) + len(plain)
    plain += [[_empty_job(pad_id)]] * (max_over_ranks(num_forwards) - num_forwards)
    batches = sorted([*shared, *plain], key=_longest, reverse=True)
    for batch in tqdm(batches, "scoring", unit="batch", leave=False, delay=_SECONDS_TO_BAR, disable=not progress):
        score = score_shared if isinstance(batch, SharedBatch) else score_plain
        for job, hidden in score(run, batch, pad_id, device):
            target.add(job, hidden)
    target.num_tokens += sum(batch.num_tokens for batch in shared) + sum(map(len, alone))
    return target


def _empty_job(pad_id: int) -> ScoringJob:
    return ScoringJob([pad_id], [pad_id], 0, 0.0, 0.0)


def _longest(batch: SharedBatch | list[ScoringJob]) -> int:
    return len(batch.chunks[0][0] if isinstance(batch, SharedBatch) else batch[0])


def _difference(run: TeacherForward, pair: list[ScoringJob], pad_id: int, device: torch.device) -> str | None:
    """What keeps two jobs with one context from being scored by one pass over it, or None. Four forwards."""
    plain = [states for job in pair for _, states in score_plain(run, [job], pad_id, device)]
    try:
        shared = [states for _, states in score_shared(run, SharedBatch([pair[0].context], [pair]), pad_id, device)]
    except NotImplementedError as error:
        return str(error)
    plain, shared = torch.cat(plain).float(), torch.cat(shared).float()
    error = ((shared - plain).norm() / plain.norm()).item()
    return None if error <= _TOLERANCE else f"hidden states differ by {error:.2g} of their norm"
