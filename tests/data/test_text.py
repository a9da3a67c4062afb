import gzip
import json
import sys

import pytest

from minibert.data.sample import write_sample_corpus
from minibert.data.text import read_documents, read_file


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


def test_gz_and_zst_are_read_like_what_is_inside(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    wiki = '<doc id="1" url="u" title="A">\nA\nFirst é.\n</doc>\n'
    inner = {"a.txt": "one\n\ntwo", "b.jsonl": '{"text": "three"}\n', "c.csv": "text\nfour\n", "wiki_00": wiki}
    for name, text in inner.items():
        write(tmp_path / f"{name}.gz", gzip.compress(text.encode()))
        with pyarrow.output_stream(str(tmp_path / f"{name}.zst"), compression="zstd") as stream:
            stream.write(text.encode())
    expected = [["one"], ["two"]] * 2 + [["three"]] * 2 + [["four"]] * 2 + [["First é."]] * 2
    assert list(read_documents(tmp_path)) == expected


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_or_none_is_refused(tmp_path, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(tmp_path / "a"), compression={"gz": "gzip", "zst": "zstd"}[suffix]) as stream:
        stream.write("".join(f"line {i}\n\n" for i in range(10_000)).encode())
    whole = (tmp_path / "a").read_bytes()
    path = tmp_path / f"a.txt.{suffix}"
    for raw in (whole[: len(whole) // 2], whole[:-1], b"no archive at all"):
        refuses(write(path, raw), path.name, "cannot be read")


def test_a_compressed_parquet_file_and_a_line_without_end_are_refused(tmp_path, monkeypatch):
    refuses(write(tmp_path / "a.parquet.gz", gzip.compress(b"")), "a.parquet.gz", "unpack")
    monkeypatch.setattr("minibert.data.text.MAX_LINE", 1 << 20)
    refuses(write(tmp_path / "a.txt", b"short\n" + b"x" * (1 << 20)), "a.txt:2", "1 MB")


def test_broken_records_may_be_left_out_one_by_one(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    write(tmp_path / "a.txt", b"a\n\xff\n\nb\n")
    write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": \n[]\n{"txt": ""}\n{"text": 3}\n\xff\n{"text": "b"}\n')
    write(tmp_path / "a.csv", b'n,text\n1,a\n2\n3,b,c\n4,\xff\n5,b\n6,"\n7"c,\n')
    write(tmp_path / "wiki", b"<doc id=1>\na\n</doc>\nstray\n<doc id=2>\nb\n</doc>\n<doc id=3>\nc\n")
    for name, count in {"a.parquet": 1, "a.txt": 1, "a.jsonl": 5, "a.csv": 4, "wiki": 2}.items():
        errors = []
        assert list(read_file(tmp_path / name, "text", errors.append)) == [["a"], ["b"]], name
        assert len(errors) == count and all(str(tmp_path / name) in str(error) for error in errors)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        with pytest.raises(ValueError, match="body"):  # the column is not in the file at all
            list(read_file(tmp_path / name, "body"))


def test_an_error_behind_a_line_that_was_left_out_still_has_its_own_line(tmp_path):
    errors = []
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n\xff\n{"text": 3}\n')
    assert list(read_file(path, "text", errors.append)) == [["a"]]
    assert [str(error).split(": ")[0] for error in errors] == [f"{path}:2", f"{path}:3"]


def test_a_quotation_mark_that_is_never_closed_is_an_error_of_the_whole_file(tmp_path):
    path = write(tmp_path / "a.csv", 'text,n\na,1\n"b,2\n' + "c,3\n" * 98)
    for policy in ({}, {"bad": lambda error: None}):
        refuses(path, "a.csv:3: unexpected end of data, 99 lines were read as one row", **policy)


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
    refuses(write(tmp_path / "short.csv", "text,label\na,1\nb\n"), "short.csv:3", "1 fields", "2")
    refuses(write(tmp_path / "big.jsonl", '{"text": "a"}\n{"n": ' + "9" * 5000 + "}\n"), "big.jsonl:2", "Exceeds")
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
