# SPDX-License-Identifier: Apache-2.0
"""Writes example-card.md: the model card of `trl-opsd demo`, with its metadata, as a page.

python docs/example_card.py [--output_dir outputs/demo] [words of trl-opsd demo]
"""

import argparse
import shlex
from pathlib import Path

from trl_opsd.demo.cli import run

PAGE = Path(__file__).with_name("example-card.md")
_PAGE = """# An example of a model card

Every run writes this file, README.md, into its output folder. The one below is of `{command}`, which trains the embedded model on a
CPU; `python docs/example_card.py` made this page of it. The lines between the first two rules are the metadata that a model hub
reads, with the numbers as `model-index`. The picture is [the demo's](demo.png).

````markdown
{card}````
"""


def page_of(folder: Path, command: str) -> str:
    """The page of a card.

    Args:
        folder: output folder of one seed of the demo.
        command: that made it.
    """
    card = (folder / "README.md").read_text(encoding="utf-8").replace("](run.png)", "](demo.png)")
    lines = (line.rstrip() for line in card.splitlines())
    return _PAGE.format(command=command, card="".join(f"{line}\n" for line in lines))


def main() -> None:
    """Run the demo and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="outputs/demo")
    options, words = parser.parse_known_args()
    run(["--output_dir", options.output_dir, *words])
    PAGE.write_text(
        page_of(Path(options.output_dir) / "seed-0", shlex.join(["trl-opsd", "demo", *words])), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
