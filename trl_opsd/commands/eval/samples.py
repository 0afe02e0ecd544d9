# SPDX-License-Identifier: Apache-2.0
"""What `trl-opsd eval` writes of its samples for people to look at: JSON lines, logs of inspect-ai."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..arguments import check_writable


def leaves_samples(options: argparse.Namespace) -> bool:
    """Whether samples are asked for, so that the result files have to hold them."""
    return options.samples is not None or options.inspect_logs is not None


def check_sample_files(options: argparse.Namespace) -> None:
    """Check before anything is sampled that it can be written.

    Raises:
        UsageError: inspect-ai is asked for and not installed.
        OSError: names the folder.
    """
    if options.inspect_logs is not None:
        from ...evaluation.inspect_log import check_inspect_ai

        check_inspect_ai("--inspect_logs")
        check_writable(options.inspect_logs)
    if options.samples is not None:
        check_writable(Path(options.samples).parent)


def write_all_samples(
    records: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    options: argparse.Namespace,
) -> None:
    """Write what the options ask for.

    Args:
        records: results of all seeds by model and set.
        sets: questions by set.
        options: of the command.
    """
    if not leaves_samples(options):
        return
    from ...evaluation.inspect_log import write_inspect_log
    from ...evaluation.samples import sample_lines, write_samples

    lines = {
        (model, dataset): [
            line
            for record in results
            for line in sample_lines(
                sets[dataset],
                record["completions"],
                record["verdicts"],
                model=model,
                dataset=dataset,
                seed=record["seed"],
            )
        ]
        for (model, dataset), results in records.items()
    }
    if options.samples is not None:
        write_samples(options.samples, chain.from_iterable(lines.values()))
        print(f"{options.samples}: {sum(map(len, lines.values()))} samples")
    for (model, dataset), own in lines.items() if options.inspect_logs is not None else ():
        name = "--".join(part.strip("/").replace("/", "--") for part in (model, dataset))
        write_inspect_log(Path(options.inspect_logs, f"{name}.eval"), own, records[model, dataset][0]["settings"])
    if options.inspect_logs is not None:
        print(f"{options.inspect_logs}: {len(lines)} logs; `inspect view --log-dir {options.inspect_logs}` shows them")
