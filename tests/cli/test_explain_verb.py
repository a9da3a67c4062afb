"""`minibert explain` from the command line: a page, one JSON object, and which heads serve."""

import json
import sys

import pytest
from small import build

from minibert import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel, Tokenizer
from minibert.cli import main
from minibert.model import MODELS, BertForSentenceEmbedding

SERVE = (BertForMaskedLM, BertForPreTraining, BertForSequenceClassification)
BARE = (BertModel, BertForSentenceEmbedding)  # the second is saved as an encoder
OTHERS = [kind for kind in MODELS.values() if kind not in (*BARE, *SERVE)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lamp", "broke", "##n", "good"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of models with one vocabulary, and one that has another."""
    folder, size = tmp_path_factory.mktemp("models"), {"vocab_size": len(PIECES)}
    tokenizer = Tokenizer.from_vocab({piece: i for i, piece in enumerate(PIECES)})
    for kind in MODELS.values():
        build(kind, **size).save_pretrained(folder / kind.__name__, tokenizer)
    other = Tokenizer.from_vocab({piece: i for i, piece in enumerate([*PIECES[:-1], "bad"])})
    build(BertForMaskedLM, **size).save_pretrained(folder / "other", other)
    return folder


def explained(capsys, *command):
    assert main(["explain", *map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["explanations"]


def test_a_page_holds_every_text(saved, tmp_path, capsys):
    pytest.importorskip("captum")
    page = tmp_path / "page.html"
    command = ["explain", str(saved / "BertForSequenceClassification"), "the lamp", "<b>broken</b>", "--out", str(page)]
    assert main(command) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == 2 and "&lt;b&gt;broken&lt;/b&gt;" in text and "<b>" not in text
    assert "no masked-language-model head" in text
    assert capsys.readouterr().err == f"2 texts explained in {page}\n"
    assert main(command) == 2 and page.read_text(encoding="utf-8") == text
    assert f"--out {page}: expected a new file in a directory that exists" in capsys.readouterr().err


def test_json_has_pairs_labels_and_the_guesses_of_another_head(saved, capsys):
    pytest.importorskip("captum")
    options = ("--pair", "good", "--label", "LABEL_0", "--mlm", saved / "BertForPreTraining", "--top", 2)
    first, second = explained(capsys, saved / "BertForSequenceClassification", "broken lamp", "good", *options)
    assert first["tokens"] == ["[CLS]", "broke", "##n", "lamp", "[SEP]", "good", "[SEP]"]
    assert first["label"] == second["label"] == "LABEL_0" and first["pair"] == "good"
    assert [len(cell) for row in first["guesses"] for cell in row] == [2] * 7 * 3


@pytest.mark.parametrize("kind", ("BertForMaskedLM", "BertForPreTraining"))
def test_a_masked_language_model_is_explained_by_its_guess(kind, saved, capsys):
    pytest.importorskip("captum")
    [said] = explained(capsys, saved / kind, "the [MASK] broke", "--steps", 9, "--baseline", "pad")
    assert said["position"] == 2 and said["label"] == said["predictions"][0][0] and said["baseline"] == "[PAD]"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((f"{kind.__name__} the --json", "no classifier and no masked-language-model head") for kind in BARE),
        ("BertForSequenceClassification the --json --mlm {saved}/other", "other has another vocabulary than the model"),
        ("BertForMaskedLM the --json", "has no [MASK], and the model has no classifier"),
        *(
            (f"{kind.__name__} the --json", f"{kind.__name__}: only classifiers and models that fill")
            for kind in OTHERS
        ),
    ],
)
def test_models_that_do_not_serve_are_named(command, message, saved, capsys):
    assert main(["explain", *f"{{saved}}/{command}".format(saved=saved).split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_captum_the_command_says_what_to_install(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert main(["explain", str(saved / "BertForSequenceClassification"), "the", "--json"]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'minibert[explain]'")
