"""Every published container of labelled text gives its records, and what is broken names file, line and field."""

import gzip
import json
from itertools import islice

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minibert.data.formats import READERS, format_of
from minibert.data.records import Record, as_records, label_of, text_of, texts_in
from minibert.data.sources import Source, find_splits


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call):
    """The message of the ValueError that `call` raises, which is one line."""
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def read(path, part=None):
    return [record.fields for record in Source((path,), part).records()]


def places(path):
    return [record.where.removeprefix(str(path)) for record in Source((path,)).records()]


def question(name="q1", **changed):
    answers = [{"text": "Paris", "answer_start": 4, "extra": 1}, {"text": "Paris is", "answer_start": 4}]
    return {"id": name, "question": "Where?", "answers": answers} | changed


def squad(*questions, **changed):
    paragraph = {"context": "In: Paris is it", "qas": list(questions)} | changed
    return json.dumps({"version": "1.1", "data": [{"title": "France", "paragraphs": [paragraph]}]})


ROWS = [("good, really", "1"), ('she said "no"', "0"), ("naïve café", "1")]
ANSWERS = [{"text": "Paris", "answer_start": 4}, {"text": "Paris is", "answer_start": 4}]
ASKED = {"title": "France", "context": "In: Paris is it", "question": "Where?", "is_impossible": False}
COLA = 'gj04\t1\t\tHe ran.\ngj04\t0\t*\tHim "ran.\ncl99\t1\t\tShe sat.\n'
UCI = "Good\x85 case.\t1\nIt\tfell  \t0\n\nOh \u2028 well\t1\n"
CONLL = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nn\u00a0o DT I-NP O\n\n\nIt PRP B-NP O\n"
SEMEVAL = (
    '1\t"The <e1>cat</e1> ate "the" <e2>rat</e2>."\nCause-Effect(e2,e1)\nComment: 8001\t"no\n\n'
    '22\t"A <e2>b</e2> in <e1>c</e1>"\nOther\nComment:\n\n'
)
CLINC = {"oos_train": [["why", "oos"]], "train": [["pay it", "pay"], ["call", "phone"]], "val": [["ring", "phone"]]}

# name, content, records
CONTAINERS = {
    "csv": ("a.csv", 'text,label\n"good, really",1\n"she said ""no""",0\nnaïve café,1\n', ROWS),
    "tsv": ("a.tsv", "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *ROWS]), ROWS),
    "jsonl": ("a.jsonl", "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS), ROWS),
    "cola": (
        "a.tsv",
        COLA,
        [
            {"source": "gj04", "label": "1", "mark": "", "text": "He ran."},
            {"source": "gj04", "label": "0", "mark": "*", "text": 'Him "ran.'},
            {"source": "cl99", "label": "1", "mark": "", "text": "She sat."},
        ],
    ),
    "uci": ("a.txt", UCI, [("Good\x85 case.", "1"), ("It\tfell  ", "0"), ("Oh \u2028 well", "1")]),
    "conll": (
        "a.txt",
        CONLL,
        [{"tokens": ["EU", "n\u00a0o"], "tags": ["B-ORG", "O"]}, {"tokens": ["It"], "tags": ["O"]}],
    ),
    "semeval": (
        "a.txt",
        SEMEVAL,
        [
            {"id": "1", "text": 'The <e1>cat</e1> ate "the" <e2>rat</e2>.', "label": "Cause-Effect(e2,e1)"},
            {"id": "22", "text": "A <e2>b</e2> in <e1>c</e1>", "label": "Other"},
        ],
    ),
    "squad": (
        "a.json",
        squad(question(), question("q2", is_impossible=True, answers=[])),
        [
            {"id": "q1", **ASKED, "answers": ANSWERS},
            {"id": "q2", **ASKED, "answers": [], "is_impossible": True},
        ],
    ),
    "clinc150": (
        "a.json",
        json.dumps(CLINC, indent=4),
        [("why", "oos"), ("pay it", "pay"), ("call", "phone"), ("ring", "phone")],
    ),
}


def fields(rows):
    return [row if isinstance(row, dict) else {"text": row[0], "label": row[1]} for row in rows]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_container_gives_its_records_with_a_byte_order_mark_and_windows_line_ends_too(
    tmp_path, container, start, end
):
    name, content, expected = CONTAINERS[container]
    path = put(tmp_path / name, start + content.replace("\n", end))
    assert format_of(path) == container
    assert read(path) == fields(expected)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_may_be_compressed_and_may_lack_its_last_line_end(tmp_path, container):
    pyarrow = pytest.importorskip("pyarrow")
    name, content, expected = CONTAINERS[container]
    content = content.rstrip("\n").encode()
    with pyarrow.output_stream(str(tmp_path / f"{name}.zst"), compression="zstd") as stream:
        stream.write(content)
    for path in (put(tmp_path / f"{name}.GZ", gzip.compress(content)), tmp_path / f"{name}.zst"):
        assert read(path) == fields(expected)


def test_plain_lines_are_records_where_somebody_says_what_they_hold(tmp_path):
    def shout(line):
        if "?" in line:
            raise ValueError("a question")
        return {"text": line.strip().upper()}

    # lines of as many words each are no columns of tokens and tags
    path, seen = put(tmp_path / "a.txt", "I love it\nIt broke now\n\n a\tb \nwhy ?\n"), []
    records = list(Source((path,)).records(seen.append, shout))
    assert [record.fields["text"] for record in records] == ["I LOVE IT", "IT BROKE NOW", "A\tB"]
    assert records[2].where == f"{path}:4" and [str(error) for error in seen] == [f"{path}:5: a question"]
    for texts in (["Send me an E-mail"], ["I flew a B-52", "Not an A or an O"]):  # that end as tags do
        file = put(tmp_path / "b.txt", "\n".join(texts))
        assert [record.fields["text"] for record in Source((file,)).records(fields_of=shout)] == [
            text.upper() for text in texts
        ]
    for name, content, expected in (CONTAINERS[kind] for kind in ("uci", "conll", "semeval")):
        source = Source((put(tmp_path / "x" / name, content),))
        assert [record.fields for record in source.records(fields_of=shout)] == fields(expected)


def test_rows_of_parquet_are_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"text": [f"t {i}" for i in range(131)], "label": [i % 3 for i in range(131)], "tags": [["O"] * 2] * 131}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    records = list(Source((tmp_path / "a.parquet",)).records())
    assert [r.fields for r in records] == [{"text": f"t {i}", "label": i % 3, "tags": ["O", "O"]} for i in range(131)]
    assert records[130].where == f"{tmp_path}/a.parquet: row 131"


def snips(folder, tokens="play a song\nbook it\n", tags="O O B-song \nO O\n", label="Play\nBook\n"):
    for name, content in (("seq.in", tokens), ("seq.out", tags), ("label", label)):
        put(folder / name, content)
    return folder


def test_a_snips_folder_is_read_line_by_line(tmp_path):
    folder = snips(
        tmp_path, tokens="play a\u00a0b song\n\nbook it", tags="O O B-song \n\nO O\n\n", label="Play\n\nBook\n"
    )
    assert read(folder) == [
        {"tokens": ["play", "a\u00a0b", "song"], "tags": ["O", "O", "B-song"], "label": "Play"},
        {"tokens": ["book", "it"], "tags": ["O", "O"], "label": "Book"},
    ]
    assert places(folder) == ["/seq.in:1", "/seq.in:3"]


def test_a_record_says_where_it_stands(tmp_path):
    expected = {
        "csv": [":2", ":3", ":4"],
        "jsonl": [":1", ":2", ":3"],
        "cola": [":1", ":2", ":3"],
        "uci": [":1", ":2", ":4"],
        "conll": [":3", ":7"],
        "semeval": [":1", ":5"],
        "squad": [": question 'q1'", ": question 'q2'"],
        "clinc150": [": oos_train 1", ": train 1", ": train 2", ": val 1"],
    }
    for container, where in expected.items():
        name, content, _ = CONTAINERS[container]
        assert places(put(tmp_path / name, content)) == where


def test_a_quoted_field_may_hold_lines_and_a_later_error_still_has_its_line(tmp_path):
    path = put(tmp_path / "x.csv", 'text,label\n"two\nlines",1\nfine,0\n')
    assert read(path) == fields([("two\nlines", "1"), ("fine", "0")])
    path = put(tmp_path / "x.csv", 'text,label\n"two\nlines",1\nfine,0,9\n')
    assert refused(lambda: read(path)) == f"{path}:4: 3 fields, the header has 2"


def test_only_four_columns_with_a_class_and_a_mark_are_cola(tmp_path):
    for content in (
        "index\tsentence\n0\tBill\n",
        "a\tb\tc\td\n1\t2\t\t3\n",
        "x\t1\tno\ttext\nx\t1\t\ty\n",
        "x\t\t\ty\nx",
    ):
        assert format_of(put(tmp_path / "test.tsv", content)) == "tsv"
    assert read(put(tmp_path / "test.tsv", "index\tsentence\n0\tBill\n")) == [{"index": "0", "sentence": "Bill"}]


def test_json_is_told_apart_by_its_first_key(tmp_path):
    forms = {
        '{"data": "words", "label": 1}\n': "jsonl",
        '{"text": "words", "data": [1]}\n': "squad",
        '{"version": "2.0", "n": 1.5,\n "data": [\n]}': "squad",
        '{"tokens": ["a"], "data": [1]}\n': "jsonl",
        '{\n"oos_test" : [\n[': "clinc150",
        "": "jsonl",
    }
    for content, container in forms.items():
        assert format_of(put(tmp_path / "a.json", content)) == container, content
        assert format_of(put(tmp_path / "a.jsonl", content)) == "jsonl"


def test_semeval_without_relations_has_records_without_labels(tmp_path):
    content = "".join(line + "\n" for line in SEMEVAL.split("\n") if "<e1>" in line)
    assert read(put(tmp_path / "TEST_FILE_CLEAN.TXT", content)) == [
        {"id": "1", "text": 'The <e1>cat</e1> ate "the" <e2>rat</e2>.'},
        {"id": "22", "text": "A <e2>b</e2> in <e1>c</e1>"},
    ]


def test_an_article_may_lack_its_title_and_an_impossible_question_its_answers(tmp_path):
    entry = {"id": "7", "question": "Why?", "is_impossible": True, "plausible_answers": [{}]}
    document = {"data": [{"paragraphs": [{"context": "c", "qas": [entry]}]}], "version": "v2.0"}
    (found,) = read(put(tmp_path / "a.json", json.dumps(document)))
    assert (found["title"], found["answers"], found["is_impossible"]) == ("", [], True)


def test_lines_are_read_as_they_are_asked_for(tmp_path):
    for name, line in (
        ("a.csv", "text,label\nfine,1\n"),
        ("a.jsonl", '{"text": "fine"}\n'),
        ("a.conll", "a O\n\nb O\n\n"),
    ):
        records = Source((put(tmp_path / name, line.encode() + b"\xff\n"),)).records()
        assert isinstance(next(records), Record)
        with pytest.raises(ValueError, match="UTF-8"):
            list(records)


def test_several_files_are_one_source_that_is_read_again(tmp_path):
    files = [put(tmp_path / f"{i}.csv", f"text,label\nt{i},1\n") for i in range(3)]
    source = find_splits(files)["train"]
    for _ in range(2):
        assert [record.fields["text"] for record in source.records()] == ["t0", "t1", "t2"]


LATIN = "caf\xe9 was good\t1\n".encode("latin-1")
LONE = '{"text": "half \\ud83d pair", "label": 1}\n'
MALFORMED = [
    ("x.csv", "", ": it holds no records"),
    ("x.csv", "text,label\n", ": it holds no records"),
    ("x.txt", "\n \n", ": it holds no records"),
    ("x.jsonl", "\n\n", ": it holds no records"),
    ("x.xml", "<a/>", ": file type='.xml' is not one of .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .txt, .conll, "),
    ("x.csv", "text,label\na,1\nb\n", ":3: 1 fields, the header has 2"),
    ("x.csv", 'text,"te\nxt","te\nxt"\na,1,2\n', ":1: two columns are called 'te\\nxt'"),
    ("x.csv", 'label,text\n1,"a\n0,b\n', ":2: unexpected end of data, 2 lines were read as one row: is there a"),
    ("x.csv", 'label,text\n1,a\n0,"b\n1,c\n0,d "e" f\n', ":3: ',' expected after '\"', 3 lines were read as one row"),
    ("x.csv", 'label,text\n1,"a\n0",b\n', ":2: 3 fields, the header has 2, 2 lines were read as one row"),
    ("x.csv", 'label,text\n1,"a"b\n', ":2: ',' expected after '\"'"),
    ("x.csv", b"text,label\na,1\n\xe9,0\n", ":3: byte 0xe9 is not UTF-8: convert the file"),
    ("x.tsv", "text\tlabel\na\t1\n".encode("utf-16"), ":1: byte 0xff is not UTF-8: convert the file"),
    ("x.tsv", "text\tlabel\na\t1\nb\tc\t1\n", ":3: 3 fields, the header has 2"),
    ("x.tsv", "gj04\t1\t\tFine.\ngj04\t1\tNo mark.\n", ":2: 3 fields, expected source, label, mark and sentence"),
    ("x.jsonl", '{"text": "a"}\n{"text": \n', ":2: broken JSON, expected one object a line: Expecting value"),
    ("x.jsonl", '{"text": "a"}\n[1]\n', ":2: expected a JSON object, got list"),
    ("x.jsonl", "[" * 100_000, ":1: broken JSON, expected one object a line: nested too deeply"),
    ("x.jsonl", '{"n": ' + "9" * 5000 + "}", ":1: broken JSON, expected one object a line: Exceeds the limit"),
    ("x.json", '["a", "b"]', ":1: expected a JSON object, got list"),
    ("x.txt", "Fine.\t1\nBad.\t2\n", ":2: expected a sentence, a tab and 0 or 1, got 'Bad.\\t2\\n'"),
    ("x.txt", b"Fine.\t1\n" + LATIN, ":2: byte 0xe9 is not UTF-8: convert the file"),
    ("x.txt", "This is about\nthe set\n", ": no labelled text: expected sentence TAB 0/1, token and tag columns, or"),
    ("x.txt", "I love it\nIt broke now\n", ": no labelled text: expected sentence TAB 0/1, token and tag columns, or"),
    ("x.conll", "a NN O\nb O\n", ":2: columns=2, the lines before have 3"),
    ("x.conll", "a NN O\n\nb NN B I\n", ":3: columns=4, the lines before have 3"),
    ("x.bio", "a\nb O\n", ":2: columns=2, the lines before have 1"),
    ("x.txt", '1\t"a <e1>b</e1> <e2>c"\nOther\n', ":1: text='\"a <e1>b</e1> <e2>c\"' needs one <e1>…</e1> and one"),
    ("x.txt", '1\t"<e1>b <e2>c</e1> d</e2>"\n', ":1: text='\"<e1>b <e2>c</e1> d</e2>\"' needs one <e1>…</e1> and one"),
    ("x.txt", '1\t"<e1>b</e1> <e2>c</e2>\n', ":1: text='\"<e1>b</e1> <e2>c</e2>' is not in quotation marks"),
    ("x.txt", '1\t"<e1>b</e1> <e2>c</e2>"\nOther\nOther\n', ":1: 2 relations, expected one below the sentence"),
    ("x.json", '{"version": "1.1", "data": [\n{"title":\n', ":3: broken JSON: Expecting value"),
    ("x.json", '{"data": [\n' + "9" * 5000 + "]}", ":1: broken JSON: Exceeds the limit"),
    ("x.json", '{"data": [1, 2]}', ": article 1: expected a JSON object, got int"),
    ("x.json", '{"data": [{"title": "t"}]}', ": article 1: no column 'paragraphs' among title"),
    ("x.json", squad(question(), question()), ": article 1, paragraphs 1, qas 2: id='q1' is the id of an earlier"),
    ("x.json", squad(question(id=5)), ": article 1, paragraphs 1, qas 1: id=5 is not of type str"),
    ("x.json", squad({"id": "q"}), ": question 'q': no column 'question' among id"),
    ("x.json", squad(question(question=["W"])), ": question 'q1': question=['W'] is not of type str"),
    (
        "x.json",
        squad(question(answers=[{"text": "a"}])),
        ": question 'q1', answer 1: no column 'answer_start' among text",
    ),
    (
        "x.json",
        squad(question(answers=[{"text": "a", "answer_start": True}])),
        ": question 'q1', answer 1: answer_start=True is not of type int",
    ),
    ("x.json", squad(question(), context=None), ": question 'q1': context=None is not of type str"),
    ("x.json", squad(question(is_impossible="no")), ": question 'q1': is_impossible='no' is not of type bool"),
    ("x.json", '{"train": [["a", "b"], ["c"]]}', ": train 2: expected [text, intent], got ['c']"),
    ("x.json", '{"train": [["a", "b"]], "val": [["c", 1]]}', ": val 1: expected [text, intent], got ['c', 1]"),
    ("x.json", '{"train": [["a", "b"]], "val": "c"}', ": val='c' is not of type list"),
    ("x.parquet", b"PAR1 or not", " is not a readable parquet file: "),
    ("x.parquet.gz", b"", ": parquet is compressed inside: unpack the file"),
    ("x.csv.gz", gzip.compress(b"text,label\na,1\n" * 99)[:-9], " cannot be read: "),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED, ids=[f"{m[0]}{m[2][:30]}" for m in MALFORMED])
def test_what_cannot_be_read_names_file_line_and_field(tmp_path, name, content, message):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    path = put(tmp_path / name, content)
    assert refused(lambda: read(path)).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tags": "O O B-song\nO\n"}, "seq.out:2: 1 tags, seq.in has 2 tokens"),
        ({"tags": "O O B-song\n"}, "seq.out:2: no such line, which seq.in, seq.out, label need for each sentence"),
        (
            {"label": "Play\nBook\nBook\n"},
            "seq.in:3: no such line, which seq.in, seq.out, label need for each sentence",
        ),
        ({"tokens": b"play a song\nb\xf6ok it\n"}, "seq.in:2: byte 0xf6 is not UTF-8: convert the file"),
        ({"tokens": "\n", "tags": "", "label": ""}, ": it holds no records"),
    ],
)
def test_lines_of_a_snips_folder_that_do_not_match_are_named(tmp_path, changed, message):
    folder = snips(tmp_path, **changed)
    assert refused(lambda: read(folder)).removeprefix(f"{folder}").lstrip("/") == message


def test_what_is_to_be_predicted_may_lack_its_answers(tmp_path):
    tokens = {"tokens": ["play", "a", "song"]}, {"tokens": ["book", "it"]}
    folder = snips(tmp_path)
    (folder / "seq.out").unlink()
    assert read(folder) == [tokens[0] | {"label": "Play"}, tokens[1] | {"label": "Book"}]
    (folder / "label").unlink()
    assert read(folder) == list(tokens)
    assert read(put(tmp_path / "x.conll", "play\na\nsong\n\nbook\nit\n")) == list(tokens)
    asked = {"id": "q1", "question": "Where?"}
    assert read(put(tmp_path / "x.json", squad(asked))) == [ASKED | asked]


@pytest.mark.parametrize("suffix", ["train", "testa", "testb"])
def test_columns_are_found_under_the_names_of_conll_2003(tmp_path, suffix):
    records = CONTAINERS["conll"][2]
    assert read(put(tmp_path / f"eng.{suffix}", CONLL)) == records


def test_text_that_looks_like_a_set_is_text_where_that_is_said(tmp_path):
    lines = ["Take vitamin B-12", "Fly the B-52", "I like O"]
    source = Source((put(tmp_path / "a.txt", "\n".join(lines)),))
    as_text = lambda line: {"text": line.strip()}  # noqa: E731
    assert [list(record.fields) for record in source.records(fields_of=as_text)] == [["tokens", "tags"]]
    assert [record.fields["text"] for record in source.records(fields_of=as_text, plain=True)] == lines


def test_nan_is_no_label():
    for value in (float("nan"), float("inf"), -float("inf")):
        message = f"a.jsonl:1: label={value!r} is not a label"
        assert refused(lambda value=value: label_of(Record("a.jsonl:1", {"label": value}), "label")) == message
    assert label_of(Record("a.jsonl:1", {"label": 10**400}), "label") == "1" + "0" * 400


def test_labels_of_rows_in_memory_are_of_one_type_too():
    records = list(as_records([{"label": 1}, {"label": 1.0}], "rows"))
    assert label_of(records[0], "label") == "1"
    message = "rows:2: label=1.0 is a decimal, those before are whole numbers"
    assert refused(lambda: label_of(records[1], "label")) == message


def test_a_long_line_is_read_and_one_without_end_is_refused(tmp_path, monkeypatch):
    path = put(tmp_path / "a.txt", "Fine.\t1\n" + "word " * 2_000_000 + "\t0\n")
    assert [len(record["text"]) for record in read(path)] == [5, 10_000_000]
    monkeypatch.setattr("minibert.data.text.MAX_LINE", 1 << 20)
    assert refused(lambda: read(path)) == f"{path}:2: a line of more than 1 MB: is it text?"


@pytest.mark.parametrize(
    ("name", "content", "good", "errors"),
    [
        ("a.csv", b'text,label\na,1\nb\n\xff,1\nc,"d"e\nd,0\n"e\nf,"g\n', 2, [":3: ", ":4: ", ":5: ", ":7: "]),
        ("a.jsonl", b'{"a": 1}\n{\n\xff\n[]\n\n{"b": 2}\n3', 2, [":2: ", ":3: ", ":4: ", ":7: "]),
        ("a.tsv", b"a\t1\t\tx\n\xff\na\t1\na\t0\t*\ty\n", 2, [":2: ", ":3: "]),
        ("a.txt", b"a\t1\n\xff\nb\nc\t0\n", 2, [":2: ", ":3: "]),
        ("a.conll", b"a O\nb O\n\na O\n\xff O\n\n\xff\n\nc\n\nd O\n", 2, [":5: ", ":7: ", ":9: "]),
        (
            "b.txt",
            b'1\t"<e1>a</e1> <e2>b</e2>"\nOther\n2\t"<e1>a</e1>"\nOther\n'
            b'3\t"<e1>a</e1> <e2>b</e2>"\n\xff\n4\t"<e1>c</e1> <e2>d</e2>"\n',
            2,
            [":3: ", ":6: "],
        ),
        ("a.json", squad(question("a"), question("a"), 5, question("b")), 2, [": article 1, paragraphs 1, qas "] * 2),
        ("b.json", '{"train": [["a", "b"], [], ["c", "d"], null]}', 2, [": train 2: ", ": train 4: "]),
    ],
)
def test_broken_records_may_be_left_out_one_by_one(tmp_path, name, content, good, errors):
    path, seen = put(tmp_path / name, content), []
    records = list(Source((path,)).records(seen.append))
    assert len(records) == good
    assert len(seen) == len(errors)
    for error, where in zip(seen, errors, strict=True):
        assert str(error).startswith(f"{path}{where}")


def test_broken_lines_of_a_snips_folder_leave_the_others_beside_their_tags(tmp_path):
    folder = snips(tmp_path, b"a b\n\xff\nc\nd e\n", b"X Y\nO\n\xff\nO Z\n", "one\ntwo\nthree\nfour\n")
    seen = []
    records = list(Source((folder,)).records(seen.append))
    assert [(r.fields["tokens"], r.fields["tags"], r.fields["label"]) for r in records] == [
        (["a", "b"], ["X", "Y"], "one"),
        (["d", "e"], ["O", "Z"], "four"),
    ]
    assert [str(error).split(" ")[0] for error in seen] == [f"{folder}/seq.in:2:", f"{folder}/seq.out:3:"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"te\xffxt,label\na,1\n"),
        ("a.csv", "text,text\na,1\n"),
        ("a.csv", 'text,label\na,1\n"b,0\n' + "c,1\n" * 98),
        ("a.csv", 'text,label\na,1\n"'),
        ("a.json", '{"data": []}'),
        ("a.json", '{"train": ['),
        ("a.json", b'{"train": [["\xff", "a"], ["b", "a"]]}'),
        ("a.parquet", b""),
        ("a.jsonl", "[]\n"),
    ],
)
def test_what_is_broken_as_a_whole_is_never_let_pass(tmp_path, name, content):
    path = put(tmp_path / name, content)
    refused(lambda: list(Source((path,)).records(lambda error: None)))


def test_a_snips_file_that_ends_early_is_never_let_pass(tmp_path):
    folder = snips(tmp_path, label="Play\n")
    refused(lambda: list(Source((folder,)).records(lambda error: None)))


def record(**fields):
    return Record("x.csv:3", fields)


def test_texts_and_labels_are_taken_from_a_record():
    entry = record(text=" a\x85b ", label=" yes ", number=3, score=0.5)
    assert text_of(entry, "text") == " a\x85b "
    assert [label_of(entry, name) for name in ("label", "number", "score")] == ["yes", "3", "0.5"]


@pytest.mark.parametrize(
    "value",
    [None, 3, "", " \n", "nul \0", "half \ud83d pair", ["a"], "word\0 " * 99],
    ids=lambda value: repr(value)[:9],
)
def test_what_is_no_text_is_shown(value):
    message = refused(lambda: text_of(record(text=value), "text"))
    assert message.startswith("x.csv:3: text=") and message.endswith(" is not a text")
    assert message.encode() and len(message) < 120


@pytest.mark.parametrize("value", [None, True, "", "  ", [1], {"a": 1}, "\0", "\ud83d"], ids=repr)
def test_what_is_no_label_is_shown(value):
    assert refused(lambda: label_of(record(label=value), "label")) == f"x.csv:3: label={value!r} is not a label"


def test_labels_of_one_file_are_all_texts_or_all_numbers(tmp_path):
    for labels, message in (
        (["a", "b", 3, "c"], ":3: label=3 is a number, those before are texts"),
        ([1, 2.5, "3"], ":3: label='3' is a text, those before are numbers"),
        ([1, 2.5, 2.0], ":3: label=2.0 is a decimal, those before are whole numbers"),
        ([2.5, 2.0, 1], ":3: label=1 is a whole number, those before are decimals"),
    ):
        path = put(tmp_path / "a.jsonl", "".join(json.dumps({"label": label, "n": 1}) + "\n" for label in labels))
        entries, errors = list(Source((path,)).records()), []
        for entry in entries:
            try:
                label_of(entry, "label")
            except ValueError as error:
                errors.append(str(error))
        assert errors == [f"{path}{message}"] and [label_of(entry, "n") for entry in entries] == ["1"] * len(labels)
    other = put(tmp_path / "b.jsonl", '{"label": 1}\n')
    both = Source((put(tmp_path / "a.jsonl", '{"label": "a"}\n'), other)).records()
    assert [label_of(entry, "label") for entry in both] == ["a", "1"], "of one file, not of all"


def test_a_column_that_is_missing_offers_the_nearest():
    for of in (text_of, label_of):
        message = refused(lambda of=of: of(Record("x.csv:3", {"txt": "a", "la\nbel": 1}), "text"))
        assert message == "x.csv:3: no column 'text' among txt, 'la\\nbel': did you mean 'txt'?"


def test_a_lone_surrogate_is_read_from_json_and_refused_as_text(tmp_path):
    (entry,) = Source((put(tmp_path / "a.jsonl", LONE),)).records()
    assert refused(lambda: text_of(entry, "text")) == f"{tmp_path}/a.jsonl:1: text='half \\ud83d pair' is not a text"


def names(folder):
    return {
        split: [path.relative_to(folder).as_posix() for path in source.paths]
        for split, source in find_splits(folder).items()
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.csv", "test.tsv", "notes.md"], {"train": ["train.csv"], "test": ["test.tsv"]}),
        (["train.jsonl.gz", "dev.conll"], {"train": ["train.jsonl.gz"], "valid": ["dev.conll"]}),
        (["Train.txt", "val.txt", ".test.txt"], {"train": ["Train.txt"], "valid": ["val.txt"]}),
        (["train.bio", "validation.bio"], {"train": ["train.bio"], "valid": ["validation.bio"]}),
        (["a/train.csv", ".b/train.csv"], {"train": ["a/train.csv"]}),
        (["train/seq.in", "valid/seq.in", "test/x"], {"train": ["train"], "valid": ["valid"]}),
        (["train.csv", "old/train.csv", "old/dev.csv", ".x/test.csv"], {"train": ["train.csv"]}),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "test": ["data/test-00000-of-00001.parquet"],
            },
        ),
        (
            ["a_training/TRAIN_FILE.TXT", "a_testing/TEST_FILE.txt", "a_keys/TEST_FILE_FULL.TXT", "a_keys/README.txt"],
            {"train": ["a_training/TRAIN_FILE.TXT"], "test": ["a_keys/TEST_FILE_FULL.TXT"]},
        ),
    ],
)
def test_the_files_of_a_folder_are_its_splits(tmp_path, files, expected):
    for name in files:
        put(tmp_path / name, "")
    assert names(tmp_path) == expected


def test_the_parts_of_a_clinc_file_are_its_splits(tmp_path):
    splits = find_splits(put(tmp_path / "data.json", json.dumps(CLINC)))
    assert {split: source.part for split, source in splits.items()} == {
        "train": ("train", "oos_train"),
        "valid": ("val",),
    }
    texts = {split: [text_of(r, "text") for r in source.records()] for split, source in splits.items()}
    assert texts == {"train": ["pay it", "call", "why"], "valid": ["ring"]}


def test_one_file_or_snips_folder_is_the_train_split(tmp_path):
    path = put(tmp_path / "dev.csv", "text,label\na,1\n")
    assert find_splits(path) == find_splits(str(path)) == find_splits([path]) == {"train": Source((path,))}
    assert find_splits(snips(tmp_path / "x")) == {"train": Source((tmp_path / "x",))}


def test_a_folder_without_a_train_file_says_what_it_holds(tmp_path):
    assert refused(lambda: find_splits(tmp_path)) == f"{tmp_path}: it has no train file"
    for name, content in {
        "b.txt": "x\t1\n",
        "a.txt": "x\t1\n",
        "sub/dev.csv": "",
        "readme.txt": "A set\nof words it is",
    }.items():
        put(tmp_path / name, content)
    expected = f"{tmp_path}: it has no train file; name one with --train: a.txt, b.txt, sub/dev.csv"
    assert refused(lambda: find_splits(tmp_path)) == expected


def test_two_files_of_one_split_are_not_guessed_between(tmp_path):
    for name in ("train.csv", "valid.tsv", "dev.tsv"):
        put(tmp_path / name, "")
    expected = f"{tmp_path}: several files are called valid, name one with --valid: dev.tsv, valid.tsv"
    assert refused(lambda: find_splits(tmp_path)) == expected


def test_a_missing_path_is_named(tmp_path):
    assert refused(lambda: find_splits(tmp_path / "x")) == f"{tmp_path}/x: no such file or folder"
    assert refused(lambda: read(tmp_path / "x.csv")) == f"{tmp_path}/x.csv cannot be read: No such file or directory"
    assert refused(lambda: find_splits([])) == "no file or folder of text was named"
    assert refused(lambda: read(tmp_path)) == f"{tmp_path}: a folder without seq.in, expected a file"


PUBLISHED = {
    "glue/SST-2": {"train": 67_349, "valid": 872, "test": 1_821},
    "glue/CoLA": {"train": 8_551, "valid": 1_043, "test": 1_063},
    "glue/RTE": {"train": 2_490, "valid": 277, "test": 3_000},
    "glue/STS-B": {"train": 5_749, "valid": 1_500, "test": 1_379},
    "uci_sentiment/amazon_cells_labelled.txt": {"train": 1_000},
    "uci_sentiment/imdb_labelled.txt": {"train": 1_000},
    "uci_sentiment/yelp_labelled.txt": {"train": 1_000},
    "snips": {"train": 13_084, "valid": 700, "test": 700},
    "banking77": {"train": 10_003, "test": 3_080},
    "clinc150/data_full.json": {"train": 15_000 + 100, "valid": 3_000 + 100, "test": 4_500 + 1_000},
    "semeval2010_task8": {"train": 8_000, "test": 2_717},
    "squad/dev-v1.1.rebuilt.json": {"train": 10_570},
    "squad/xquad.en.json": {"train": 1_190},
}
CLASSES = {"snips": 7, "banking77": 77, "clinc150/data_full.json": 151, "semeval2010_task8": 19, "glue/CoLA": 2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_has_its_published_number_of_records(shared, name):
    path = shared / "data" / "labelled" / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data/labelled")
    splits = {split: list(source.records()) for split, source in find_splits(path).items()}
    assert {split: len(records) for split, records in splits.items()} == PUBLISHED[name]
    if name in CLASSES:
        label = "category" if name == "banking77" else "label"
        assert len({label_of(entry, label) for entry in splits["train"]}) == CLASSES[name]
    if name.startswith("squad"):
        for found in (entry.fields for entry in splits["train"]):
            assert all(found["context"].startswith(a["text"], a["answer_start"]) for a in found["answers"])


def test_the_72_tags_of_snips_are_read(shared):
    path = shared / "data" / "labelled" / "snips"
    if not path.exists():
        pytest.skip("needs snips in ../shared/data/labelled")
    assert len({tag for entry in find_splits(path)["train"].records() for tag in entry.fields["tags"]}) == 72


SAMPLES = {container: (name, content.encode()) for container, (name, content, _) in CONTAINERS.items()}


@st.composite
def damaged(draw):
    """A file of some container: random bytes, or a good one with a stretch of bytes replaced."""
    name, content = draw(
        st.sampled_from([*SAMPLES.values(), ("a.parquet", b""), ("a.csv.gz", b""), ("a.csv.zst", b"")])
    )
    start = draw(st.integers(0, len(content)))
    middle = draw(st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")))
    return name, content[:start] + middle + content[start + draw(st.integers(0, 20)) :]


@given(damaged())
@example(("a.json", b'{"data": [{"paragraphs": [{"qas": [{"id": "\\ud800", "is_impossible": true}], "a\\nb": 1}]}]}'))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_records_or_errors_of_one_line(tmp_path, file):
    pytest.importorskip("pyarrow")
    path, errors = put(tmp_path / file[0], file[1]), []
    for bad in (errors.append, None):
        try:
            source = next(iter(find_splits(path).values()))
            for entry in islice(source.records(bad) if bad else source.records(), 50):
                assert isinstance(entry, Record)
                for name in ("text", "label", "context"):
                    try:
                        text_of(entry, name), label_of(entry, name)
                    except ValueError as error:
                        errors.append(error)
        except ValueError as error:
            errors.append(error)
    for error in errors:
        assert str(error).splitlines() == [str(error)]
        assert str(error).startswith(str(path)) and str(error).encode()


@given(st.lists(st.binary(max_size=12), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_three_files_are_a_snips_folder_or_an_error_of_one_line(tmp_path, contents):
    folder, errors = snips(tmp_path, *contents), []
    try:
        for entry in Source((folder,)).records(errors.append):
            assert len(entry.fields["tokens"]) == len(entry.fields["tags"])
    except ValueError as error:
        errors.append(error)
    assert all(str(error).startswith(str(folder)) and "\n" not in str(error) for error in errors)


def test_every_container_is_tried_here():
    assert set(READERS) == {*CONTAINERS, "parquet", "snips"}


def test_records_made_in_memory_are_numbered():
    rows = [{"text": "a"}, {"text": " "}]
    first, second = as_records(rows)
    assert first == Record("records:1", {"text": "a"}) and first.fields is not rows[0]
    assert refused(lambda: text_of(second, "text")) == "records:2: text=' ' is not a text"


@pytest.mark.parametrize(("row", "kind"), [("text", "str"), (7, "int"), (None, "NoneType"), ([("text", "a")], "list")])
def test_what_is_no_record_is_refused_by_its_number(row, kind):
    rows = iter([{"text": "a"}, row])
    assert refused(lambda: list(as_records(rows, "mine"))) == f"mine:2: expected a dictionary, got {kind}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "b"], None),
        (("a", "b"), None),
        (["a"], "texts=['a'] is not a list of 2 or more texts"),
        ("ab", "texts='ab' is not a list of 2 or more texts"),
        (["a", None], "texts[1]=None is not a text"),
        (["a\0", "b"], "texts[0]='a\\x00' is not a text"),
    ],
)
def test_a_list_of_texts_has_texts_alone(value, message):
    record = Record("f:3", {"texts": value})
    if message is None:
        assert texts_in(record, "texts", least=2) == ("a", "b")
    else:
        assert refused(lambda: texts_in(record, "texts", least=2)) == f"f:3: {message}"
