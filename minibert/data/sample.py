"""A small English corpus that every Python carries: the reference texts behind `help()`."""

import json
import re
from pathlib import Path


def write_sample_corpus(path) -> Path:
    """Write the corpus as json lines, a topic a document with title and text, a paragraph a line; returns the path.

    Nothing else is changed. It is technical English with code, tables and ruled headings, and some topics repeat
    paragraphs of others, so that what is measured on held-out topics flatters a model.
    """
    from pydoc_data.topics import topics

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for title, text in topics.items():
            paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
            document = {"title": title, "text": "\n".join(filter(None, paragraphs))}
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return path
