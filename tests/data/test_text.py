import json
import sys
import time

import pytest

from minibert.data.sample import write_sample_corpus
from minibert.data.text import read_documents, split_sentences


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refuses(path, *words, **options):
    with pytest.raises(ValueError) as caught:
        list(read_documents(path, **options))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_blank_lines_separate_documents_and_lines_are_paragraphs(tmp_path):
    path = write(tmp_path / "a.txt", "\n\none \n two\r\n\n \nthree\n")
    assert list(read_documents(path)) == [["one", "two"], ["three"]]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\n")
    assert list(read_documents(path)) == [["one"]]


@pytest.mark.parametrize("name", ["wiki_00", "wiki.txt"])
def test_wikiextractor_documents_come_without_their_title_line(tmp_path, name):
    text = '<doc id="1" url="u" title="A "B"">\nA "B"\n\nFirst.\nSecond.\n</doc>\n'
    text += '<doc id="2" url="u" title="C">\nOther.\n</doc>'
    assert list(read_documents(write(tmp_path / name, text))) == [["First.", "Second."], ["Other."]]


def test_rows_of_every_table_format_are_documents(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    texts = ['a "quoted", text\nwith two lines', "tab-free é 中"]
    write(tmp_path / "a.jsonl", "".join(json.dumps({"body": text, "n": 1}) + "\n\n" for text in texts))
    write(tmp_path / "b.csv", 'n,body\n1,"a ""quoted"", text\nwith two lines"\n\n2,tab-free é 中\n')
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "body": texts}), tmp_path / "c.parquet")
    expected = [['a "quoted", text', "with two lines"], ["tab-free é 中"]]
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        assert list(read_documents(tmp_path / name, text_column="body")) == expected, name
    assert list(read_documents(tmp_path, text_column="body")) == expected * 3


def test_quotes_in_a_tsv_are_text(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"half a quote\t1\n')
    assert list(read_documents(path)) == [['"half a quote']]


def test_folders_are_read_in_sorted_order_without_hidden_files(tmp_path):
    (tmp_path / "sub" / ".cache").mkdir(parents=True)
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "sub" / "c.txt", "three")
    write(tmp_path / "sub" / ".cache" / "d.txt", "hidden")
    write(tmp_path / ".e.txt", "hidden")
    assert list(read_documents(tmp_path)) == [["one"], ["two"], ["three"]]
    assert list(read_documents([tmp_path / "sub", tmp_path / "a.txt"])) == [["three"], ["one"]]


def test_documents_are_read_as_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n\n\xff\n")
    documents = read_documents(path)
    assert [next(documents), next(documents)] == [["one"], ["two"]]
    with pytest.raises(ValueError, match="a.txt:5"):
        next(documents)


def test_a_file_without_blank_lines_is_cut_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.data.text.MAX_DOCUMENT", 20)
    path = write(tmp_path / "a.txt", "seven w\n" * 7)
    documents = list(read_documents(path))
    assert [len(document) for document in documents] == [3, 3, 1]


def test_paths_without_text_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    refuses(tmp_path / "none.txt", "none.txt", "does not exist")
    refuses(tmp_path / "folder", "folder", "without files")
    refuses(write(tmp_path / "empty.txt", ""), "empty.txt", "no text")
    refuses(write(tmp_path / "blank.txt", " \n\n"), "blank.txt", "no text")
    refuses(write(tmp_path / "empty.csv", ""), "empty.csv", "no text")
    refuses(write(tmp_path / "header.csv", "text\n"), "header.csv", "no text")
    refuses([], "no file")


def test_broken_files_are_refused_with_file_and_line(tmp_path):
    refuses(write(tmp_path / "a.txt", b"fine\nbad \xe9\n"), "a.txt:2", "0xe9", "UTF-8")
    refuses(write(tmp_path / "utf16.txt", "text".encode("utf-16")), "utf16.txt:1", "UTF-8")
    refuses(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": \n'), "a.jsonl:2", "JSON")
    refuses(write(tmp_path / "deep.jsonl", '{"text": ' + "[" * 100_000), "deep.jsonl:1", "JSON")
    refuses(write(tmp_path / "list.jsonl", '["text"]\n'), "list.jsonl:1", "object", "list")
    refuses(write(tmp_path / "n.jsonl", '{"text": "a"}\n{"text": 7}\n'), "n.jsonl:2", "int", "text")
    refuses(write(tmp_path / "null.jsonl", '{"text": null}\n'), "null.jsonl:1", "NoneType")
    refuses(write(tmp_path / "short.csv", "text,label\na,1\nb\n"), "short.csv:3", "1 columns", "2")
    refuses(write(tmp_path / "quote.csv", 'text\n"open\n'), "quote.csv:2")
    refuses(write(tmp_path / "wiki", "<doc id=1>\ntext\n"), "wiki:1", "closed")
    refuses(write(tmp_path / "wiki2", "<doc id=1>\ntext\n</doc>\nstray\n"), "wiki2:4", "outside")


def test_an_unknown_column_names_the_known_ones_and_the_nearest(tmp_path):
    refuses(write(tmp_path / "a.csv", "id,sentence\n1,a\n"), "'sentense'", "id, sentence", text_column="sentense")
    refuses(write(tmp_path / "a.jsonl", '{"texts": "a"}\n'), "a.jsonl:1", "did you mean 'texts'?")


def test_broken_and_unreadable_parquet_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    refuses(write(tmp_path / "a.parquet", "no parquet at all"), "a.parquet", "parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [7]}), tmp_path / "b.parquet")
    refuses(tmp_path / "b.parquet", "'text'", "body, n")
    refuses(tmp_path / "b.parquet", "row 1", "int", text_column="n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuses(tmp_path / "b.parquet", "minibert[data]", text_column="body")


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained.", "We stayed in!", "Why?", "Because."],
        ["Dr. Smith met J. R. Jones at 3 p.m. on Jan. 5, 1999.", "They talked."],
        ["It costs 3.50 dollars, i.e. 3.14 euros, see Fig. 2 and p. 7.", "2 more came."],
        ["He said “No.”", "She left.", "(It was late.)", '"Why?"', "Nobody knew."],
        ["The U.S. Army moved.", "It left the U.S.", "The rest stayed."],
        ["Wait... what?", "Elizabeth I.", "The queen."],
        ["1. Open the box.", "2. Close it."],
        ["The answer is no.", "Some disagree."],
        ["minibert.data reads text, e.g. Wikipedia.", "Also v2.0 of it."],
        ["Visit example.com now.", "Über allem.", "Élan."],
        ["lower case. after a full stop stays"],
        ["no full stop at all"],
    ],
)
def test_sentences_end_where_a_reader_ends_them(sentences):
    assert split_sentences("  " + " ".join(sentences) + " ") == sentences


def test_chinese_and_japanese_sentences_need_no_blank():
    assert split_sentences("你好。「很好！」再见？好") == ["你好。", "「很好！」", "再见？", "好"]


def test_sentences_keep_every_character_but_blanks():
    text = "A b.  C?! “D.” e.g. F.. G… H 3. 4.\t5! 中。文"
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert split_sentences(" \n ") == []


def test_long_lines_without_a_sentence_are_split_in_linear_time():
    start = time.perf_counter()
    assert len(split_sentences("A. " * 300_000)) >= 1
    assert split_sentences("." * 3_000_000) == ["." * 3_000_000]
    assert split_sentences("!)" * 500_000 + "a")
    assert time.perf_counter() - start < 10


def test_the_sample_corpus_has_every_topic_as_a_document_and_unwraps_its_lines(tmp_path):
    from pydoc_data.topics import topics

    documents = list(read_documents(write_sample_corpus(tmp_path / "new" / "topics.jsonl")))
    assert len(documents) == len(topics) > 40
    for document, text in zip(documents, topics.values(), strict=True):
        assert " ".join(document).split() == text.split()
    assert max(len(paragraph) for document in documents for paragraph in document) > 500


def test_wikipedia_is_read_whole(shared):
    documents = list(read_documents(shared / "data/corpora/enwiki-2015/wiki_00"))
    assert len(documents) == 38
    assert documents[0][0].startswith("Anarchism is a political philosophy")
    assert not any(paragraph.startswith(("<doc", "</doc")) for document in documents for paragraph in document)
