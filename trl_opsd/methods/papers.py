# SPDX-License-Identifier: Apache-2.0
"""A method's paper as the model card cites it."""


def arxiv_paper(title: str, number: str, key: str, authors: str | None = None) -> dict[str, str]:
    """What `Method.paper` holds of a paper on arXiv.

    Args:
        title: of the paper.
        number: its arXiv id, whose first two digits are the year.
        key: of the BibTeX entry.
        authors: as BibTeX writes them; None where the sources at hand name none.
    """
    fields = {"title ": f"{{{{{title}}}}}", "author": authors and f"{{{authors}}}", "year  ": f"20{number[:2]}"}
    fields |= {"eprint": f"{{{number}}}", "archivePrefix": "{arXiv}"}
    lines = [f"    {name} = {value}," for name, value in fields.items() if value]
    return {"title": title, "id": number, "citation": "\n".join([f"@misc{{{key},", *lines, "}"])}
