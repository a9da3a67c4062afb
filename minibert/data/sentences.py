"""Where sentences end: Latin punctuation with its abbreviations, and Chinese and Japanese full stops."""

import re

# a full stop, then blanks and something that may open a sentence; or a Chinese or Japanese full stop, or ! ? between
# their characters. Possessive, and only at the first of several stops: a line of a million dots takes linear time
_END = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+\s++(?=["'“‘«(\[]*+[^\sa-zß-öø-ÿα-ωа-яё.,;:!?)\]])"""
    r"""|(?<![。！？｡])[。！？｡]++["'”’」』）)】》]*+\s*+(?=\S)"""
    r"""|(?<=[\u3040-\u30ff\u3400-\u9fff])[!?]++["'”’」』）)】》]*+(?=["'“‘「『（(【《]*+[\u3040-\u30ff\u3400-\u9fff])"""
)
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TITLES = _words(
    """mr mrs ms dr prof rev hon st sen rep gov gen col maj capt lt sgt cmdr adm pres messrs mt ft vs cf viz
    approx ca esp al e.g i.e"""
)
_BEFORE_NUMBERS = _words("no nos p pp fig figs vol ch sec art eq ed jan feb mar apr jun jul aug sep sept oct nov dec c")
_ENDINGS = _words("jr sr inc ltd co corp bros etc ave blvd")
_STARTERS = _words(
    """the a an this that these those he she it they we you i in on at by for from as after before when while
    if since although however but and its his her their our there here no not some many most all both one two such
    with"""
)


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, without surrounding blanks.

    Splits after . ! ? … and their quotes and brackets where a capital, digit or opening mark follows, but not after
    titles, initials, abbreviations and list numbers; and after 。！？, also without a blank. Decimals and inner dots
    (3.14, minibert.data) never split.
    """
    sentences, start = [], 0
    for match in _END.finditer(paragraph):
        if paragraph[match.start()] == "." and not _ends_sentence(paragraph, start, match):
            continue
        sentences.append(paragraph[start : match.end()].strip())
        start = match.end()
    sentences.append(paragraph[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _ends_sentence(text: str, start: int, match: re.Match) -> bool:
    """Whether the full stop of `match` ends the sentence that begins at `start`, judged by its two neighbours."""
    if text[match.start() : match.end()].rstrip() != ".":
        return True  # an ellipsis, or a quote or bracket after the full stop
    before = text[max(start, match.start() - 24) : match.start()].rsplit(None, 1)
    word = before[-1].lstrip("\"'“‘«([") if before else ""
    lower = word.lower()
    if lower in _TITLES:
        return False
    after = text[match.end() : match.end() + 16].lstrip("\"'“‘«([").split(None, 1)
    following = after[0].rstrip(",.;:").lower() if after else ""
    if lower in _BEFORE_NUMBERS:
        return not following[:1].isdigit()
    if lower in _ENDINGS or _DOTTED.fullmatch(word):
        return following in _STARTERS
    if len(word) == 1 and word.isupper() and word != "I":
        return following in _STARTERS
    return not (word.isdigit() and len(word) < 3 and text[start : match.start()].strip() == word)
