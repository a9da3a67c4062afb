"""Cleaning of documents, and the marks by which equal and similar ones are known.

Equal documents have the same normal form: Unicode's NFKC, without case, one blank between words. Similar ones share
most of their runs of five words; the share (Jaccard's) is estimated from minima of hashes (Broder, 1997).
"""

import hashlib
import html
import re
import unicodedata

import numpy as np

SIGNATURE = 128  # minima of a document
SHINGLE = 5  # words

_TAG = re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]*>")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")  # an ideograph is a word
_NO_LETTERS = re.compile(r"[\W\d_]+")


def clean_paragraph(text: str) -> str:
    """Text without tags and comments of HTML, its entities resolved, in Unicode's NFC, with single blanks."""
    text = html.unescape(_TAG.sub(" ", text)) if "<" in text or "&" in text else text
    return " ".join(unicodedata.normalize("NFC", text).split())


def count_words(document: list[str]) -> int:
    return sum(len(_WORD.findall(paragraph)) for paragraph in document)


def share_of_letters(document: list[str]) -> float:
    """Letters of any script over all characters but blanks."""
    characters = sum(len("".join(paragraph.split())) for paragraph in document)
    return sum(len(_NO_LETTERS.sub("", paragraph)) for paragraph in document) / max(characters, 1)


def normal_form(document: list[str]) -> str:
    return " ".join(unicodedata.normalize("NFKC", "\n".join(document)).casefold().split())


def document_key(normal: str) -> int:
    """64 bits that two documents share if they have the same normal form, and by accident hardly ever."""
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def signature(normal: str) -> np.ndarray:
    """uint32 [SIGNATURE]: two documents agree in about as many places as the share of their runs of words."""
    words = _WORD.findall(normal)
    minima, count = minhash()(num_perm=SIGNATURE, seed=1), max(len(words) - SHINGLE + 1, 1)
    for start in range(0, count, 1 << 16):
        minima.update([" ".join(words[i : i + SHINGLE]) for i in range(start, min(start + (1 << 16), count))])
    return np.array(minima.digest(), dtype=np.uint32)


def minhash() -> type:
    """The class of the library; without it a ValueError says what to install."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise ValueError("near duplicates need one more package: pip install 'minibert[data]'") from None
    return RMinHash


def rows_of_a_band(threshold: float) -> int:
    """The most minima that are compared at once without missing a pair at the threshold more than once in a hundred."""
    fitting = [r for r in (1, 2, 4, 8, 16) if (1 - threshold**r) ** (SIGNATURE // r) <= 0.01]
    return max(fitting, default=1)


def find_similar(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """bool [n]: which documents are as similar as the threshold to an earlier one, itself left out or not.

    Signatures [n, SIGNATURE] are cut into bands; of the documents that agree in a whole band each is compared with the
    first.
    """
    similar = np.zeros(len(signatures), dtype=bool)
    rows = rows_of_a_band(threshold)
    for start in range(0, SIGNATURE, rows):
        band = np.zeros(len(signatures), dtype=np.uint64)
        for minima in np.ascontiguousarray(signatures[:, start : start + rows].T):
            band = (band ^ minima) * np.uint64(0x9E3779B97F4A7C15)
            band ^= band >> np.uint64(29)
        _, first, group = np.unique(band, return_index=True, return_inverse=True)
        first = first[group]
        later = np.flatnonzero((first < np.arange(len(first))) & ~similar)
        for some in np.array_split(later, len(later) // 4096 + 1):
            similar[some] = (signatures[some] == signatures[first[some]]).mean(1) >= threshold
    return similar
