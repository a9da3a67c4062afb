"""WordPiece (Wu et al., 2016) as BERT uses it: the call people know, over the `tokenizers` package."""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..files import write_atomically

SPECIAL_TOKENS = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
MAX_LENGTH = 512  # BERT's number of positions, where the files name none
MAX_ALPHABET = 1000  # characters, where these cover the text
COVERAGE = 0.9995
TRUNCATION = {True: "longest_first", "longest_first": "longest_first", "only_first": "only_first"}
TRUNCATION |= {"only_second": "only_second", False: None, None: None, "do_not_truncate": None}
PADDING = {
    True: "longest",
    "longest": "longest",
    "max_length": "max_length",
    False: None,
    None: None,
    "do_not_pad": None,
}


class Encoding(dict):
    """What a tokenizer call returns: a dictionary whose keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device) -> "Encoding":
        return Encoding({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()})


class Tokenizer:
    """BERT's tokenizer: clean and lower-case, split at blanks and punctuation, longest-match pieces, [CLS] A [SEP] B
    [SEP].

    Built by `from_pretrained`, `from_vocab` or `train`. Attributes for each special token, e.g. `mask_token` and
    `mask_token_id`; `special_ids`, all five sorted; `vocab_size`, one more than the largest id; `model_max_length`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, special_tokens=None, model_max_length: int = MAX_LENGTH):
        self.special_tokens = SPECIAL_TOKENS | (special_tokens or {})
        self.model_max_length = model_max_length
        self._backend = backend
        self._lock = threading.Lock()  # truncation and padding are state of the backend
        backend.no_truncation()
        backend.no_padding()
        for name, token in self.special_tokens.items():
            token_id = backend.token_to_id(token)
            if token_id is None:
                raise ValueError(f"the vocabulary has no {name} token {token!r}: is it a BERT vocabulary?")
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", token_id)
        backend.add_special_tokens(list(self.special_tokens.values()))
        if backend.post_processor is None:
            self._frame()
        self.special_ids = tuple(sorted(getattr(self, f"{name}_token_id") for name in self.special_tokens))

    def _frame(self) -> None:
        sep, cls = (self.sep_token, self.sep_token_id), (self.cls_token, self.cls_token_id)
        self._backend.post_processor = processors.BertProcessing(sep, cls)

    def __reduce__(self):
        return _restore, (self._backend.to_str(), self.special_tokens, self.model_max_length)

    def __len__(self) -> int:
        return self.vocab_size

    @classmethod
    def from_vocab(
        cls, vocab: dict[str, int], *, lowercase: bool = True, normalizer=None, special_tokens=None, **options
    ) -> "Tokenizer":
        """A tokenizer from pieces and their ids; special tokens may stand anywhere.

        `normalizer` holds further options of `tokenizers.normalizers.BertNormalizer`.
        """
        unk = (SPECIAL_TOKENS | (special_tokens or {}))["unk"]
        backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(**{"lowercase": lowercase} | (normalizer or {}))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        return cls(backend, special_tokens=special_tokens, **options)

    @classmethod
    def from_pretrained(cls, path, *, lowercase: bool | None = None) -> "Tokenizer":
        """Read a folder with `tokenizer.json` or `vocab.txt`, or one such file.

        `tokenizer_config.json` beside it gives model_max_length, the special tokens and do_lower_case, which
        `lowercase` overrides. Truncation and padding stored in `tokenizer.json` are dropped: each call says what it
        wants.
        Raises:
            ValueError: nothing there, a broken file, or not a WordPiece vocabulary with BERT's special tokens.
        """
        path = Path(path)
        file = path
        if path.is_dir():
            file = next((path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()), None)
            if file is None:
                raise ValueError(f"{path} holds no tokenizer: expected tokenizer.json or vocab.txt")
        elif not path.is_file():
            raise ValueError(f"{path} does not exist: expected a folder with tokenizer.json or vocab.txt")
        settings = _settings(file.parent)
        normalizer = settings.pop("normalizer") | ({} if lowercase is None else {"lowercase": lowercase})
        try:
            if file.suffix == ".json":
                return cls(_read_backend(file, normalizer), **settings)
            return cls.from_vocab(_read_vocab(file), normalizer=normalizer, **settings)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True, min_frequency: int = 2
    ) -> "Tokenizer":
        """Learn pieces from text; the same text gives the same vocabulary, bit for bit.

        Args:
            texts: strings, read once; what stays in memory are the distinct words.
            vocab_size: at most so many pieces; small texts give fewer.
            min_frequency: a piece is made only of a pair seen so often.
        Raises:
            ValueError: no text, or a vocab_size that cannot hold the special tokens and the characters.
        """
        words = _count_words(texts, lowercase)
        if not words:
            raise ValueError("there is no text to train a tokenizer on")
        vocab = _train_pieces(words, vocab_size, min_frequency)
        return cls.from_vocab({piece: i for i, piece in enumerate(vocab)}, lowercase=lowercase)

    def save_pretrained(self, path) -> None:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt, as transformers and others read them."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "BertTokenizer", "model_max_length": self.model_max_length}
        normalizer = self._backend.normalizer
        settings |= {
            "do_lower_case": self.lowercase,
            "strip_accents": getattr(normalizer, "strip_accents", None),
            "tokenize_chinese_chars": getattr(normalizer, "handle_chinese_chars", True),
        }
        settings |= {f"{name}_token": token for name, token in self.special_tokens.items()}
        pieces = [f"[hole{i}]" for i in range(self.vocab_size)]  # an id without a piece still needs its line
        for piece, i in self.get_vocab().items():
            pieces[i] = piece
        write_atomically(
            path / "tokenizer.json", json.dumps(json.loads(self._backend.to_str()), ensure_ascii=False, indent=1)
        )
        write_atomically(path / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        write_atomically(path / "vocab.txt", "".join(f"{piece}\n" for piece in pieces))

    @cached_property
    def vocab_size(self) -> int:
        return max(self.get_vocab().values()) + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def lowercase(self) -> bool:
        return bool(getattr(self._backend.normalizer, "lowercase", False))

    def get_vocab(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def is_continuation(self) -> np.ndarray:
        """bool [vocab_size]: the pieces that go on with a word (`##ing`)."""
        table = np.zeros(self.vocab_size, dtype=bool)
        table[[i for piece, i in self.get_vocab().items() if piece.startswith("##") and len(piece) > 2]] = True
        return table

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        truncation: bool | str = False,
        padding: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
    ) -> Encoding:
        """Encode one text or a list, alone or with a second text each.

        Args:
            truncation: True or "longest_first", "only_first", "only_second": cut to max_length or model_max_length.
            padding: True or "longest", or "max_length".
            return_tensors: "pt", "np", or None for lists; a single text then gives flat lists.
        Returns:
            input_ids, token_type_ids, attention_mask, and on request offset_mapping and special_tokens_mask.
        Raises:
            ValueError: an unknown option, no string, lists of different lengths, or tensors of ragged rows.
        """
        inputs, single = _pair_up(text, text_pair)
        tensors = _option("return_tensors", return_tensors, {"pt": "pt", "np": "np", None: None})
        encodings = self._encode(inputs, truncation, padding, max_length, add_special_tokens)
        columns = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
        if return_offsets_mapping:
            columns["offset_mapping"] = "offsets"
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = "special_tokens_mask"
        result = Encoding({key: [getattr(e, name) for e in encodings] for key, name in columns.items()})
        if tensors is None:
            return Encoding({key: rows[0] for key, rows in result.items()}) if single else result
        if len({len(row) for row in result.input_ids}) > 1:
            raise ValueError(f"return_tensors={tensors!r} needs rows of one length: pass padding=True")
        arrays = {key: np.asarray(rows, dtype=np.int64) for key, rows in result.items()}
        return Encoding(arrays if tensors == "np" else {key: torch.from_numpy(a) for key, a in arrays.items()})

    def _encode(self, inputs, truncation, padding, max_length, add_special_tokens):
        strategy = _option("truncation", truncation, TRUNCATION)
        padding = _option("padding", padding, PADDING)
        length = self.model_max_length if max_length is None else max_length
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"max_length={max_length!r} is not a positive whole number")
        if strategy == "only_second" and any(isinstance(item, str) for item in inputs):
            raise ValueError("truncation='only_second' needs text_pair")
        with self._lock:
            try:
                if strategy:
                    self._backend.enable_truncation(length, strategy=strategy)
                if padding:
                    fixed = length if padding == "max_length" else None
                    self._backend.enable_padding(pad_id=self.pad_token_id, pad_token=self.pad_token, length=fixed)
                encodings = self._backend.encode_batch(inputs, add_special_tokens=add_special_tokens)
            except Exception as error:  # a bare one, e.g. where one text alone is longer than max_length
                raise ValueError(f"the text cannot be cut to max_length={length}: {error}") from None
            finally:
                self._backend.no_truncation()
                self._backend.no_padding()
        if strategy and any(len(encoding) > length for encoding in encodings):
            raise ValueError(f"max_length={length} has no room beside the special tokens")
        return encodings

    def encode(self, text: str, text_pair: str | None = None, **options) -> list[int]:
        """The ids alone; options as in a call."""
        return self(text, text_pair, **options)["input_ids"]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without [CLS] and [SEP]; where a text spells out "[MASK]", these are six characters, not the token."""
        return [e.ids for e in self._plain(texts, self._backend.encode_batch_fast)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """As `encode_plain`, and for each piece the characters of its text at which it begins and ends."""
        return [(e.ids, e.offsets) for e in self._plain(texts, self._backend.encode_batch)]

    def _plain(self, texts: Sequence[str], encode_batch) -> list[tokenizers.Encoding]:
        with self._lock:
            self._backend.encode_special_tokens = True
            try:
                return encode_batch([_without_surrogates(text) for text in texts], add_special_tokens=False)
            finally:
                self._backend.encode_special_tokens = False

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return self._backend.decode(_as_list(ids), skip_special_tokens=skip_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text, without special tokens."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=False))

    def convert_ids_to_tokens(self, ids):
        """The piece of an id, or the pieces of several; ids without a piece raise ValueError."""
        if isinstance(ids, int | np.integer):
            return self._token(int(ids))
        return [self._token(i) for i in _as_list(ids)]

    def _token(self, i: int) -> str:
        token = self._backend.id_to_token(i) if i >= 0 else None
        if token is None:
            raise ValueError(f"id {i} is not in the vocabulary of {self.vocab_size}")
        return token

    def convert_tokens_to_ids(self, tokens):
        """The id of a piece, or the ids of several; unknown pieces give unk_token_id."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self._backend.token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id


def _restore(serialised: str, special_tokens, model_max_length: int) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(serialised)
    return Tokenizer(backend, special_tokens=special_tokens, model_max_length=model_max_length)


def _pair_up(text, text_pair) -> tuple[list, bool]:
    """Inputs for the backend, strings or pairs of strings, and whether a single text was given."""
    single = isinstance(text, str)
    columns = [[text] if single else list(text)]
    if text_pair is not None:
        if isinstance(text_pair, str) != single:
            raise ValueError("text and text_pair must both be one string, or both lists")
        columns.append([text_pair] if single else list(text_pair))
        if len(columns[0]) != len(columns[1]):
            raise ValueError(f"text has {len(columns[0])} rows, text_pair has {len(columns[1])}")
    for name, column in zip(("text", "text_pair"), columns, strict=False):
        for i, value in enumerate(column):
            if not isinstance(value, str):
                raise ValueError(f"{name}[{i}] is {type(value).__name__}: expected a string")
    columns = [[_without_surrogates(value) for value in column] for column in columns]
    return (list(zip(*columns, strict=True)) if len(columns) == 2 else columns[0]), single


def _without_surrogates(text: str) -> str:
    """Half a surrogate pair is no character; as U+FFFD it is cleaned away like any other garbage."""
    return text if text.isascii() else re.sub(r"[\ud800-\udfff]", "\ufffd", text)


def _option(name: str, value, known: dict):
    if isinstance(value, bool | str | None) and value in known:
        return known[value]
    raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")


def _as_list(ids) -> list[int]:
    return ids.tolist() if isinstance(ids, torch.Tensor | np.ndarray) else [int(i) for i in ids]


def _settings(folder: Path) -> dict:
    """What tokenizer_config.json says about special tokens, length and case."""
    file = folder / "tokenizer_config.json"
    given = _read_json(file) if file.is_file() else {}
    tokens = {name: given[f"{name}_token"] for name in SPECIAL_TOKENS if given.get(f"{name}_token")}
    tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    length = given.get("model_max_length")
    # transformers writes 1e30 for "no limit"
    length = length if isinstance(length, int) and 0 < length < 1 << 31 else MAX_LENGTH
    names = {
        "lowercase": "do_lower_case",
        "strip_accents": "strip_accents",
        "handle_chinese_chars": "tokenize_chinese_chars",
    }
    normalizer = {ours: given[theirs] for ours, theirs in names.items() if given.get(theirs) is not None}
    return {"special_tokens": tokens, "model_max_length": length, "normalizer": normalizer}


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_backend(file: Path, options: dict) -> tokenizers.Tokenizer:
    content = _read_json(file)
    model = content.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise ValueError("no tokenizer: it has no model with a vocabulary")
    if model.get("type", "WordPiece") != "WordPiece":
        raise ValueError(f"a {model['type']} tokenizer: minibert reads WordPiece")
    normalizer = content.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        normalizer |= options
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))
    except Exception as error:  # the backend raises bare exceptions
        raise ValueError(f"no tokenizer that can be read: {error}") from None


def _read_vocab(file: Path) -> dict[str, int]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    # not splitlines: some pieces are themselves line separators
    return {line.rstrip("\r"): i for i, line in enumerate(text.removesuffix("\n").split("\n"))}


def _count_words(texts: Iterable[str], lowercase: bool) -> Counter:
    """How often each word occurs, after cleaning and splitting at punctuation."""
    chunks = Counter()
    for text in texts:
        chunks.update(text.split())
    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    words = Counter()
    for chunk, count in chunks.items():
        normalized = normalizer.normalize_str(_without_surrogates(chunk))
        for word, _ in splitter.pre_tokenize_str(normalized):
            words[word] += count
    return words


def _train_pieces(words: Counter, vocab_size: int, min_frequency: int) -> list[str]:
    """Special tokens, characters, inner characters, then pieces in the order they were merged.

    The trainer numbers inner characters (`##a`) in the order of a hash table, which breaks ties between equally
    frequent pairs differently each time. Naming them up front, as if they were special tokens, fixes the numbers and
    so the ties.
    """
    characters = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    common = sorted(characters, key=lambda c: (-characters[c], c))
    # many are needed where a character is a word, as in Chinese: as many as cover the text
    covered = np.cumsum([characters[c] for c in common]) < COVERAGE * characters.total()
    limit = max(100, min(MAX_ALPHABET, vocab_size // 8), min(int(covered.sum()) + 1, vocab_size // 2))
    common = common[:limit]
    known = set(common)
    words = {word: count for word, count in sorted(words.items()) if known.issuperset(word)}
    inner = sorted({f"##{character}" for word in words for character in word[1:]})
    first = [*SPECIAL_TOKENS.values(), *sorted(common), *inner]
    if vocab_size < len(first):
        raise ValueError(f"vocab_size={vocab_size} is too small: special tokens and characters alone are {len(first)}")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=first, show_progress=False
    )
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(_repeat(words), trainer)
    vocab = backend.get_vocab()
    return sorted(vocab, key=vocab.get)


def _repeat(words: dict[str, int], limit: int = 10_000) -> Iterable[str]:
    """Each word as often as it was counted, a few thousand a string."""
    for word, count in words.items():
        for done in range(0, count, limit):
            yield " ".join([word] * min(limit, count - done))


def _stay_quiet_across_fork() -> None:
    """A child must not use the parent's threads: say so before the fork, instead of being warned after it."""
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _forking.append(True)


def _after_fork() -> None:
    if _forking:
        _forking.clear()
        os.environ.pop("TOKENIZERS_PARALLELISM", None)


_forking: list[bool] = []
os.register_at_fork(before=_stay_quiet_across_fork, after_in_parent=_after_fork)
