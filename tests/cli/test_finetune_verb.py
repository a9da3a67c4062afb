"""The verbs on labelled text: flags, files that are left, and what is said where something does not fit."""

import json

import numpy as np
import pytest
from small import TOKENIZER, build

from minibert import BertForMaskedLM, BertForSequenceClassification, BertModel
from minibert.cli import main
from minibert.cli.common import print_result
from minibert.cli.sweeping import summarise
from minibert.tasks.pipelines import pipeline
from minibert.train import METRICS, latest, read_metrics


def texts(count, first=0):
    words = ("dogs", "birds", "the cat", "the mat")
    return [f"{words[i % 4]} at night {'and ' * (i % 5)}bark {i}" for i in range(first, first + count)]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    file.write_text("text,label\n" + "".join(f"{text},{'yn'[i % 2]}\n" for i, text in enumerate(texts(40))))
    return file


@pytest.fixture
def run(weights, tmp_path, capsys):
    """Runs the verb with these flags: its exit code and all that it said; and the directory it wrote to."""
    out = tmp_path / "run"

    def finetune(flags, *more):
        small = ["--batch-size", "8", "--steps", "2", "--lr", "1e-3", "--log-every", "1", "--device", "cpu"]
        code = main(["finetune", "--init", str(weights), "--out", str(out), *small, *flags.split(), *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    finetune.out = out
    return finetune


def test_what_the_best_checkpoint_reaches_is_kept_and_can_be_measured_again(run, reviews, capsys):
    code, said = run(f"--data {reviews} --test-fraction 0.2 --valid-fraction 0.25")
    assert code == 0 and "train: 24 examples, test: 8 examples, valid: 8 examples" in said.replace("\n", "")
    results = json.loads((run.out / "results.json").read_text())
    assert set(results) == {"valid", "test"} and results["valid"]["per_class"]["y"]["support"] == 4
    held_out = max(record["eval_accuracy"] for record in read_metrics(run.out / METRICS) if "eval_accuracy" in record)
    assert results["valid"]["accuracy"] == held_out
    assert main(["evaluate", "--model", str(run.out), "--data", str(reviews), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["per_class"]["y"]["support"] == 20


def test_a_run_with_several_seeds_keeps_their_mean_and_deviation(run, reviews):
    code, said = run(f"--data {reviews} --seeds 2 --seed 5 --test-fraction 0.2")
    assert code == 0 and "mean" in said and "sd" in said
    kept = json.loads((run.out / "runs.json").read_text())
    runs = [json.loads((run.out / f"seed-{seed}" / "results.json").read_text()) for seed in (5, 6)]
    numbers = kept["cells"][0]["numbers"]
    assert kept["cells"][0]["runs"] == ["seed-5", "seed-6"] and runs[0] != runs[1]
    for split in ("valid", "test"):
        values = [one[split]["accuracy"] for one in runs]
        assert numbers[f"{split} accuracy"] == {
            "mean": np.mean(values),
            "sd": np.std(values, ddof=1),
        }
    assert not any("per_class" in name for name in numbers)


def test_from_scratch_the_weights_are_new(run, reviews, weights):
    code, said = run(f"--data {reviews} --scratch --lr 1e-9")
    assert code == 0 and "new parameters: all" in said
    model, pretrained = BertModel.from_pretrained(latest(run.out)), BertModel.from_pretrained(weights)
    assert not model.embeddings.word.weight.isclose(pretrained.embeddings.word.weight).any(1).all()


def test_a_run_that_is_over_resumes_to_the_same_bytes(run, reviews):
    assert run(f"--data {reviews}")[0] == 0
    before = {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file() and path.name != "run.json"}
    assert run(f"--data {reviews} --resume")[0] == 0
    assert {path: path.read_bytes() for path in before} == before


def test_bad_records_end_the_command_or_are_counted_or_named(run, weights, tmp_path, capsys):
    file = tmp_path / "bad.csv"
    rows = [f"{text},{'yn'[i % 2]}" for i, text in enumerate(texts(24))]
    file.write_text("\n".join(["text,label", rows[0], "one,two,three", " ,y", *rows[1:], "birds,"]) + "\n")
    code, said = run(f"--data {file}")
    assert code == 2 and f"{file}:3: 3 fields, the header has 2" in said and not run.out.exists()
    code, said = run(f"--data {file} --on-bad-record skip")
    assert code == 0 and "3 records could not be used and were left out" in said and "bad.csv:" not in said
    for verb in ("evaluate", "predict"):
        assert main([verb, "--model", str(run.out), "--data", str(file), "--on-bad-record", "report"]) == 0
        said = capsys.readouterr().err
        assert f"{file}:3: 3 fields" in said and f"{file}:4: text=' ' is not a text" in said
        count = 3 if verb == "evaluate" else 2  # nothing is asked of labels where they are not read
        assert f"{count} records could not be used" in said
    code, said = run(f"--data {file} --on-bad-record pass")
    assert code == 2 and "on_bad_record='pass' is not one of fail, skip, report" in said


def test_a_text_that_is_too_long_is_no_bad_record_to_be_left_out(run, reviews, tmp_path, capsys):
    assert run(f"--data {reviews}")[0] == 0
    (tmp_path / "long.csv").write_text(f"text,label\nthe cat,y\n{'the cat ' * 30},n\n")
    for verb in ("evaluate", "predict"):
        given = [verb, "--model", str(run.out), "--data", str(tmp_path / "long.csv"), "--on-bad-record", "skip"]
        assert main(given) == 2
        assert "long.csv:3: the text has 62 tokens, the model takes 19: use --truncate" in capsys.readouterr().err
        assert main([*given, "--truncate"]) == 0


def test_several_files_are_learned_from_together(run, tmp_path):
    """As sentiment from three sites is published: a sentence, a tab, 0 or 1."""
    files = [tmp_path / f"{name}_labelled.txt" for name in ("amazon", "imdb", "yelp")]
    for number, file in enumerate(files):
        file.write_text("".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts(10, 10 * number))))
    code, said = run("--valid-fraction 0.2 --train", *map(str, files))
    assert code == 0 and "train: 24 examples, valid: 6 examples" in said
    assert BertForSequenceClassification.from_pretrained(latest(run.out)).config.id2label == ("0", "1")


def test_labels_are_printed_as_they_are(run, tmp_path):
    """They may look like marks of the terminal's or like smileys."""
    names = ("[red][/foo]", "[bold]", ":smile:")
    file = tmp_path / "marks.jsonl"
    write_jsonl(file, [{"text": text, "label": names[i % 3]} for i, text in enumerate(texts(36))])
    code, said = run(f"--data {file}")
    assert code == 0 and all(said.count(name) > 1 for name in names), said
    assert set(json.loads((run.out / "results.json").read_text())["valid"]["per_class"]) == set(names)


def test_answers_say_where_their_texts_stand(run, reviews, tmp_path):
    assert run(f"--data {reviews}")[0] == 0
    file, out = tmp_path / "some.csv", tmp_path / "answers.jsonl"
    file.write_text("id,text\n7,dogs\n8, \n9,birds\n")
    given = ["--data", str(file), "--on-bad-record", "skip", "--out", str(out)]
    assert main(["predict", "--model", str(run.out), *given]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["where"], one["text"]) for one in answers] == [(f"{file}:2", "dogs"), (f"{file}:4", "birds")]


def test_a_folder_whose_test_file_has_no_labels_is_measured_on_the_other(run, reviews, tmp_path, capsys):
    """As the sets of GLUE are published."""
    folder = tmp_path / "glue"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.csv").write_bytes(reviews.read_bytes())
    (folder / "test.csv").write_text("index,text\n0,dogs\n1,birds\n")
    code, said = run(f"--data {folder}")
    assert code == 0 and "test.csv: it has no labels: left out" in said.replace("\n", "")
    assert main(["evaluate", "--model", str(run.out), "--data", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.strip().endswith(f"{folder}: valid") and json.loads(said.out)["per_class"]["y"]["support"] == 20
    (folder / "test.csv").write_text("text,label\ndogs,\nbirds,y\nthe cat,n\n")  # one of three is missing
    given = ["evaluate", "--model", str(run.out), "--data", str(folder), "--json", "--on-bad-record", "skip"]
    assert main(given) == 0 and json.loads(capsys.readouterr().out)["per_class"]["y"]["support"] == 1
    (folder / "test.csv").write_text("review,label\ndogs,y\n")  # it has, under another name
    assert main(["evaluate", "--model", str(run.out), "--data", str(folder), "--json"]) == 2
    assert "test.csv:2: its columns are review, label: name the text with" in capsys.readouterr().err


def test_what_is_undefined_is_null_in_json(run, tmp_path, capsys):
    def strictly(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    file = tmp_path / "scores.csv"
    file.write_text("text,score\n" + "".join(f"{text},{i % 5}\n" for i, text in enumerate(texts(24))))
    same = tmp_path / "same.csv"
    same.write_text("text,score\n" + "".join(f"{text},2\n" for text in texts(4)))
    code, said = run(f"--train {file} --valid {file} --test {same} --task regression --seeds 2")
    assert code == 0, said
    assert strictly((run.out / "seed-0" / "results.json").read_text())["test"]["pearson"] is None
    assert strictly((run.out / "runs.json").read_text())["cells"][0]["numbers"]["test pearson"]["mean"] is None
    assert main(["evaluate", "--model", str(run.out / "seed-0"), "--data", str(same), "--json"]) == 0
    assert strictly(capsys.readouterr().out)["spearman"] is None
    before = (run.out / "runs.json").read_text()
    code, said = run(f"--train {file} --valid {file} --test {same} --task regression --seeds 2 --resume")
    assert code == 0 and (run.out / "runs.json").read_text() == before


def test_a_label_that_only_a_held_out_file_has_ends_the_command_or_is_left_out(run, reviews, tmp_path, capsys):
    held = tmp_path / "held.csv"
    held.write_text("text,label\nthe cat,y\nthe mat,maybe\nbirds,n\n")
    line, count = f"{held}:3: label='maybe' is not one of n, y", "1 records could not be used and were left out"
    for split in ("valid", "test"):
        code, said = run(f"--train {reviews} --{split} {held}")
        assert code == 2 and said.splitlines()[-1] == f"minibert: error: {line}" and not run.out.exists()
    code, said = run(f"--train {reviews} --valid {held} --test {held} --on-bad-record report")
    assert code == 0 and said.count(line) == 2 and count.replace("1", "2") in said
    for results in json.loads((run.out / "results.json").read_text()).values():
        assert {name: row["support"] for name, row in results["per_class"].items()} == {"n": 1, "y": 1}
    measure = ["evaluate", "--model", str(run.out), "--data", str(held), "--json", "--on-bad-record"]
    assert main([*measure, "fail"]) == 2 and line in capsys.readouterr().err
    assert main([*measure, "skip"]) == 0
    said = capsys.readouterr()
    assert count in said.err and json.loads(said.out)["per_class"]["y"]["support"] == 1


def test_a_tag_of_one_sentence_is_known_wherever_a_split_puts_that_sentence(run, tmp_path):
    file = tmp_path / "tags.jsonl"
    write_jsonl(file, [{"tokens": ["dogs", "bark"], "tags": [f"B-{number}", "O"]} for number in range(8)])
    code, said = run(f"--data {file} --task ner --valid-fraction 0.5")
    assert code == 0, said
    assert json.loads((latest(run.out) / "config.json").read_text())["id2label"]["7"] == "B-7"


def test_labels_beside_texts_do_not_matter_to_predictions(run, reviews, tmp_path, capsys):
    assert run(f"--data {reviews}")[0] == 0
    for name, label in (("plain", None), ("strange", "strange"), ("blank", "")):
        rows = [{"text": text} | ({} if label is None else {"label": label}) for text in texts(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    for name in ("plain", "strange", "blank"):
        assert main(["predict", "--model", str(run.out), "--data", str(tmp_path / f"{name}.jsonl"), "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["predictions"])
        assert [one.pop("where") for one in said[-1]] == [f"{tmp_path / name}.jsonl:{line}" for line in (1, 2, 3)]
    assert said[0] == said[1] == said[2] and len(said[0]) == 3


def test_lines_of_plain_text_are_predicted_as_if_they_were_typed_and_not_learned_from(run, tmp_path, capsys):
    file, plain = tmp_path / "pairs.csv", tmp_path / "plain.txt"
    file.write_text(
        "review,reply,label\n" + "".join(f"{text},why ?,{'yn'[i % 2]}\n" for i, text in enumerate(texts(24)))
    )
    assert run(f"--data {file} --text-column review --pair-column reply")[0] == 0
    typed = ["dogs bark at ||| birds sing", "the cat sat ||| on a mat"]
    plain.write_text("\n".join(typed) + "\n")
    said = []
    for given in (["--data", str(plain)], typed):
        assert main(["predict", "--model", str(run.out), *given, "--json", "--device", "cpu"]) == 0
        said.append(json.loads(capsys.readouterr().out)["predictions"])
    assert [one.pop("where") for one in said[0]] == [f"{plain}:1", f"{plain}:2"]
    assert said[0] == said[1] and [one["text_pair"] for one in said[0]] == ["birds sing", "on a mat"]
    for command in (["evaluate", "--model", str(run.out)], ["finetune", "--init", str(run.out), "--out", "x"]):
        assert main([*command, "--data", str(plain)]) == 2
        assert f"{plain}: no labelled text: expected sentence TAB 0/1" in capsys.readouterr().err


def test_an_intent_out_of_scope_is_said_by_the_threshold_that_was_learned(run, tmp_path, capsys):
    file = tmp_path / "intents.jsonl"
    rows = [{"text": text, "intent": ("ask", "tell", "oos")[i % 3]} for i, text in enumerate(texts(36))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = run(f"--data {file} --task intent --valid-fraction 0.4 --option.out_of_scope oos")
    assert code == 0, said
    results = json.loads((run.out / "results.json").read_text())["valid"]
    config = json.loads((latest(run.out) / "config.json").read_text())
    assert results["threshold"] == config["task_specific_params"]["threshold"] > 0
    assert main(["predict", "--model", str(run.out), "--json", "dogs at night", "why ?"]) == 0
    for answer in json.loads(capsys.readouterr().out)["predictions"]:
        assert (answer["label"] == "oos") == (answer["probability"] < results["threshold"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --data or --train, one of the two"),
        ("--data {reviews} --train {reviews}", "give --data or --train, one of the two"),
        ("--data {reviews} --test-fraction 1.5", "test_fraction=1.5 is not between 0 and 1"),
        ("--data {reviews} --seeds 0", "seeds=0 is not positive"),
        ("--data {reviews} --max-length 0", "max_length=0 is not a whole number from 3"),
        ("--data {reviews} --task intent --option.treshold 0.5", "did you mean 'threshold'?"),
        ("--data {reviews} --label-column text2", "no column 'text2' among text, label"),
        ("--train {one} --task regression", "too few examples to hold any out: name a file with --valid"),
        ("--train {bare}", "bare.csv:2: it has no label: name its column with --label-column"),
        ("--train {header}", "header.csv: it holds no records"),
        ("--train {bare} --task ner", "bare.csv:2: it has no tags"),
        ("--train {bare} --task joint", "bare.csv:2: it has no tags or label"),
        ("--train {bare} --task summary", "bare.csv:2: it has no summary or highlights"),
        ("--train {reviews} --valid {odd} --on-bad-record skip", "odd.csv: none of its records can be used"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(flags, message, run, reviews, tmp_path):
    for name, content in (("one", "text,label\nthe cat,3\n"), ("bare", "text\nthe cat\n"), ("header", "text,label\n")):
        (tmp_path / "odd.csv").write_text("text,label\nthe cat,maybe\n")
        (tmp_path / f"{name}.csv").write_text(content)
    files = {name: tmp_path / f"{name}.csv" for name in ("one", "bare", "header", "odd")}
    code, said = run(flags.format(reviews=reviews, **files))
    assert code == 2 and message in said.splitlines()[-1] and not run.out.exists()


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("predict --model {weights} the", "has no head of a task: fine-tune it first"),
        ("evaluate --model {encoder} --data {reviews}", "has neither a task's head nor a masked-language-model head"),
        ("predict the --model {weights} --data {reviews}", "give texts on the command line or --data, one of the two"),
    ],
)
def test_a_model_without_the_head_of_a_task_says_so(verb, message, weights, reviews, tmp_path, capsys):
    build(BertModel).save_pretrained(tmp_path / "encoder", TOKENIZER)
    assert main(verb.format(weights=weights, reviews=reviews, encoder=tmp_path / "encoder").split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_report_is_a_new_page_and_what_it_cannot_be_is_said_before_anything_is_computed(
    run, weights, reviews, tmp_path, capsys
):
    assert run(f"--data {reviews}")[0] == 0
    page, words = tmp_path / "page.html", ["evaluate", "--device", "cpu", "--model"]
    assert main([*words, str(run.out), "--data", str(reviews), "--json", "--report", str(page)]) == 0
    measured = json.loads(capsys.readouterr().out)
    text = page.read_text(encoding="utf-8")
    wrong = round(40 * (1 - measured["accuracy"]))
    assert f"<td>accuracy<td class=num>{measured['accuracy']:.4f}" in text and text.count("<section") == wrong > 0
    assert f"Not quite right: {wrong} of 40 examples" in text and f"{reviews}:" in text
    for model, report, message in (
        ("none", page, "page.html: expected a new file in a directory that exists"),
        ("none", tmp_path / "no/page.html", "page.html: expected a new file in a directory that exists"),
        (
            weights,
            tmp_path / "new.html",
            "has no head of a task, whose mistakes --report would show: fine-tune it first",
        ),
    ):
        assert main([*words, str(model), "--data", "nothing.csv", "--report", str(report)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert page.read_text(encoding="utf-8") == text and not (tmp_path / "new.html").exists()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_columns_a_model_was_trained_with_are_read_again_and_labels_are_not(run, tmp_path, capsys):
    rows = [{"review": t, "rating": "yn"[i % 2], "text": "the mat"} for i, t in enumerate(texts(20))]
    data = write_jsonl(tmp_path / "columns.jsonl", rows)
    assert run(f"--data {data} --text-column review --label-column rating")[0] == 0
    other = write_jsonl(tmp_path / "other.jsonl", [row | {"rating": "never seen"} for row in rows])
    assert main(["predict", "--model", str(run.out), "--data", str(other), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]
    assert [answer["text"] for answer in answers] == texts(20)
    assert pipeline(run.out)("birds at night")["label"] in ("y", "n")


def test_a_folder_gives_the_split_that_was_asked_for(run, reviews, tmp_path, capsys):
    folder = tmp_path / "splits"
    folder.mkdir()
    for name, first, count in (("train", 0, 12), ("dev", 100, 4), ("test", 200, 6)):
        rows = [{"text": t, "label": "yn"[i % 2]} for i, t in enumerate(texts(count, first))]
        write_jsonl(folder / f"{name}.jsonl", rows)
    code, said = run(f"--train {reviews} --valid {folder} --test {folder}")
    assert code == 0 and "valid: 4 examples, test: 6 examples" in said.replace("\n", "")
    assert main(["evaluate", "--model", str(run.out), "--data", str(folder), "--json"]) == 0
    assert sum(row["support"] for row in json.loads(capsys.readouterr().out)["per_class"].values()) == 6
    (folder / "dev.jsonl").unlink()
    assert run(f"--train {reviews} --valid {folder} --out {tmp_path}/no")[1].count("has train, test, and no valid") == 1


def test_a_head_that_was_pretrained_away_neither_predicts_nor_is_measured(run, reviews, tmp_path, capsys):
    assert run(f"--data {reviews}")[0] == 0
    bare = tmp_path / "bare"
    BertForMaskedLM.from_pretrained(latest(run.out)).save_pretrained(bare, TOKENIZER)
    for verb in (["predict", "the cat"], ["evaluate", "--data", str(reviews)]):
        assert main([*verb, "--model", str(bare)]) == 2
        assert "classifier.weight, classifier.bias: fine-tune it first" in capsys.readouterr().err


def test_a_number_that_one_seed_lacks_does_not_end_the_table():
    results = [
        {"train": {"examples": 3}, "valid": {"f1": 0.5, "odd": 1.0}},
        {"train": {"examples": 3}, "valid": {"f1": 0.7}},
    ]
    cells = summarise({f"seed-{i}": ({"seed": i}, result) for i, result in enumerate(results)})
    assert cells[0]["numbers"] == {"valid f1": {"mean": pytest.approx(0.6), "sd": pytest.approx(0.2 / 2**0.5)}}


def test_texts_and_pairs_in_one_file_are_named(run, tmp_path):
    rows = [{"text": "the cat", "label": "a"}, {"text": "dogs", "label": "b"}] * 6
    data = write_jsonl(tmp_path / "mixed.jsonl", [*rows, {"sentence1": "a", "sentence2": "b", "label": "a"}])
    code, said = run(f"--data {data}")
    assert code == 2 and "mixed.jsonl:13: a pair, the model reads single texts" in said


def test_a_table_without_rows_is_printed(capsys):
    print_result({"f1": 0.0, "per_class": {}}, as_json=False)  # as of held-out sentences without an entity
    assert "per_class" in capsys.readouterr().out
