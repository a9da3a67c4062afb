"""A small English corpus that every Python carries: the reference texts behind `help()`, reduced to their prose."""

import json
import re
from pathlib import Path

_MARKER = re.compile(r"^(?:[-*•]|\d+\.|\[\d+\])\s+")  # of a list entry or a footnote
_MARKUP = re.compile(r"\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|`+|\s*\[\d+\]")
_QUOTED_NAME = re.compile(r'"_*([A-Za-z][\w.]*?)_*(?:\(\))?"')
_WRAPPED = re.compile(r"(?<=\w)- (?=[a-z])")  # a hyphen at the end of a line
_PROSE = re.compile(r"""["'(“]?[A-Z].*[.:!?)"'”]""")
_CODE = ("::=", ">>>", "->", "==", "__(", "|", "{", "\\", " = ", "[, ")
MIN_WORDS, MIN_LETTERS = 5, 0.85


def write_sample_corpus(path) -> Path:
    """Write the corpus as json lines, a topic a document with title and text, a paragraph a line; returns the path.

    Headings, grammar, tables and code are left out, and so is a paragraph that an earlier topic has already: documents
    held out for evaluation share no text with those trained on.
    """
    from pydoc_data.topics import topics

    path, seen, lines = Path(path), set(), []
    for title, text in topics.items():
        paragraphs = [paragraph for paragraph in _prose(text) if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            lines.append(json.dumps({"title": title, "text": "\n".join(paragraphs)}, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _prose(text: str) -> list[str]:
    """The paragraphs that are sentences: they begin with a capital, end with a mark and are made of words."""
    paragraphs = (_plain(" ".join(block.split())) for block in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _plain(paragraph: str) -> str:
    paragraph = _MARKUP.sub("", _MARKER.sub("", paragraph))
    return _WRAPPED.sub("-", _QUOTED_NAME.sub(r"\1", paragraph))


def _is_prose(paragraph: str) -> bool:
    if not _PROSE.fullmatch(paragraph) or any(mark in paragraph for mark in _CODE):
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return len(paragraph.split()) >= MIN_WORDS and letters >= MIN_LETTERS * len(paragraph)
