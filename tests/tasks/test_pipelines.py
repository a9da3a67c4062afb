"""A fine-tuned model as a function: of a text, a pair, a record, a list and a stream; and which model it refuses."""

import itertools
import json
import sys

import pytest
import torch
from toy_start import SMALL, toy_start, toy_tokenizer

import minibert
from minibert import BertConfig, BertModel, Tokenizer, pipeline
from minibert.batch import pack
from minibert.cli import main
from minibert.tasks import TASKS, make_task
from minibert.tasks.pipelines import Pipeline

WORDS = "ada lives in london . who where the cat sees a moon yes no"
TAGS = ("O", "B-PER", "B-LOC", "I-LOC")
# for each task: names of labels, options, one input, and what its prediction has
CASES = {
    "classification": (("no", "yes"), {}, "the cat sees a moon", {"text", "label", "probability"}),
    "intent": (("no", "yes"), {}, "the cat sees a moon", {"text", "label", "probability"}),
    "multilabel": (("no", "yes"), {}, "the cat sees a moon", {"text", "labels", "probabilities"}),
    "regression": (("value",), {}, ("the cat", "a moon"), {"text", "text_pair", "value"}),
    "ner": (TAGS, {}, "Ada lives in London.", {"text", "tokens", "tags", "entities"}),
    "joint": (TAGS, {"intents": ["ask", "tell"]}, "Ada lives in London.", {"text", "label", "probability", "entities"}),
    "relation": (("in", "Other"), {}, "<e1>Ada</e1> lives in <e2>London</e2>", {"text", "label", "probability"}),
    "qa": (("start", "end"), {"stride": 4}, ("where ada lives", "Ada lives in London."), {"question", "answer"}),
    "choice": (("score",), {"num_choices": 2}, ("who sees", "the cat", "the moon"), {"question", "label", "choice"}),
    "summary": (("leave", "keep"), {"sentences": 1}, "The cat sees. Ada lives. A moon!", {"summary", "kept"}),
    "embedding": (("vector",), {}, ("the cat", "a moon"), {"text", "text_pair", "similarity"}),
}


def test_every_task_is_tried():
    assert set(CASES) == set(TASKS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory a task, with random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), toy_tokenizer(WORDS)
    for name, (labels, options, *_) in CASES.items():
        torch.manual_seed(1)
        task = make_task(name, **options)
        more = {"problem_type": task.problem} if hasattr(task, "problem") else {}
        config = BertConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=32, id2label=labels,
                            initializer_range=0.3, **SMALL, **task.kept(), **more)  # fmt: skip
        task.head(config).save_pretrained(folder / name, tokenizer)
    toy_start(folder / "start", WORDS)
    BertModel(BertConfig(vocab_size=tokenizer.vocab_size, **SMALL)).save_pretrained(folder / "encoder", tokenizer)
    return folder


def like(a, b) -> bool:
    """Whether two answers are the same but for the digits that depend on what a text is batched with."""
    if isinstance(a, dict | list):
        keys = a if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(like(a[key], b[key]) for key in keys)
    return a == (pytest.approx(b, abs=1e-5) if isinstance(b, float) else b)


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_a_function_of_its_texts(name, models):
    *_, text, keys = CASES[name]
    pipe = pipeline(name, models / name)
    answer = pipe(text)
    assert keys <= set(answer) and json.loads(json.dumps(answer)) == answer
    assert pipeline(models / name)(text) == answer and type(pipe.task) is TASKS[name]
    assert pipe([]) == [] and [like(one, answer) for one in pipe([text, text])] == [True, True]
    stream = pipe(iter([text, text, text]), chunk=2)
    assert like(next(stream), answer) and [like(one, answer) for one in stream] == [True, True]
    record = pipe.task.fields(*([text] if isinstance(text, str) else text))
    assert pipe(record) == answer and pipe([record | {"id": 7}])[0].get("id") in (None, 7)


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_says_what_the_command_line_says(name, models, capsys):
    text = CASES[name][2]
    typed = text if isinstance(text, str) else " ||| ".join(text)
    assert main(["predict", "--model", str(models / name), typed, "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == [pipeline(name, models / name, device="cpu")(text)]


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_weights_give_nearly_the_same_scores(name, models):
    text = CASES[name][2]
    wide, narrow = (pipeline(name, models / name, device="cpu", dtype=dtype) for dtype in ("float32", torch.bfloat16))
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    assert set(narrow(text)) == set(wide(text))
    batch = pack([[2, 7, 9, 3], [2, 8, 3]], token_rows=torch.tensor([0, 1, 4, 5]))
    with torch.inference_mode():
        ours, theirs = (model(batch).to_tuple()[0].float() for model in (narrow.model, wide.model))
    assert 0 < (ours - theirs).abs().max() < 0.03 * theirs.abs().max() + 0.03


def test_weights_are_of_no_other_dtype(models):
    with pytest.raises(ValueError, match="dtype='float16' is not one of float32, bfloat16"):
        pipeline(models / "classification", dtype="float16")
    assert main(["predict", "--model", str(models / "classification"), "a cat", "--dtype", "half"]) == 2


def test_a_stream_is_read_as_it_comes(models):
    seen = []
    texts = (seen.append(n) or f"the cat sees {n}" for n in itertools.count())
    answers = pipeline(models / "classification")(texts, chunk=3)
    assert seen == [] and next(answers)["text"] == "the cat sees 0" and seen == [0, 1, 2]
    assert [next(answers)["text"] for _ in range(3)][-1] == "the cat sees 3" and len(seen) == 6


def test_entities_stand_where_their_offsets_say(models):
    text, found = "Ada  lives in London , Ada.", 0
    for entity in pipeline("ner", models / "ner")(text)["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"] and 0 < entity["probability"] <= 1
        found += entity["label"] in ("PER", "LOC")
    assert found


def test_a_label_that_a_record_has_is_not_looked_at(models):
    pipe = pipeline(models / "classification")
    assert pipe({"text": "the cat", "label": "maybe"}) == pipe("the cat")


def test_options_are_the_models_own_unless_others_are_given(models):
    text = CASES["summary"][2]
    assert len(pipeline("summary", models / "summary")(text)["kept"]) == 1
    assert len(pipeline("summary", models / "summary", sentences=2)(text)["kept"]) == 2
    with pytest.raises(ValueError, match="truncate"):
        pipeline(models / "classification")("the " * 40)
    assert pipeline(models / "classification", truncate=True)("the " * 40)["label"] in ("yes", "no")


def test_an_encoder_gives_vectors_without_being_fine_tuned(models):
    answer = pipeline("embedding", models / "encoder")("the cat")
    assert answer["text"] == "the cat" and len(answer["embedding"]) == SMALL["hidden_size"]


def test_a_classifier_that_names_no_task_is_known_by_its_head(models, tmp_path):
    model = TASKS["regression"].head.from_pretrained(models / "regression")
    model.config = model.config.replace(finetuning_task=None, task_specific_params=None)
    model.save_pretrained(tmp_path / "bare", Tokenizer.from_pretrained(models / "regression"))
    assert pipeline(tmp_path / "bare")(("the cat", "a moon")) == pipeline(models / "regression")(("the cat", "a moon"))
    with pytest.raises(ValueError, match="is a model for regression, not for classification"):
        pipeline("classification", tmp_path / "bare")


def test_a_classifier_of_tokens_summarises_only_where_it_knows_two_classes(models, tmp_path):
    for name in ("ner", "summary"):
        model = TASKS[name].head.from_pretrained(models / name)
        model.config = model.config.replace(finetuning_task="pos", task_specific_params=None)
        model.save_pretrained(tmp_path / name, Tokenizer.from_pretrained(models / name))
    with pytest.raises(ValueError, match=f"^{tmp_path / 'ner'} is a model for ner, not for summary$"):
        pipeline("summary", tmp_path / "ner")
    text = CASES["summary"][2]
    assert pipeline("summary", tmp_path / "summary", sentences=1)(text) == pipeline(models / "summary")(text)


@pytest.mark.parametrize(
    ("task", "directory", "options", "message"),
    [
        ("qa", "classification", {}, "classification is a model for classification, not for qa"),
        ("classification", "intent", {}, "intent is a model for intent, not for classification"),
        ("summary", "ner", {}, "ner is a model for ner, not for summary"),
        ("embedding", "qa", {}, "qa is a model for qa, not for embedding"),
        ("ner", "start", {}, "start has no classifier.weight, classifier.bias, which ner needs: fine-tune it first"),
        ("nerr", "ner", {}, "task='nerr' is not one of .*: did you mean 'ner'?"),
        (None, "start", {}, "start has no head of a task: fine-tune it first"),
        (None, "nowhere", {}, "nowhere is not a checkpoint"),
        ("ner", "ner", {"scema": "iob2"}, "scema.* did you mean 'scheme'"),
        ("ner", "ner", {"device": "tpu"}, "device='tpu'"),
    ],
)
def test_a_model_that_is_not_for_the_task_is_refused_in_one_line(task, directory, options, message, models):
    given = [str(models / directory)] if task is None else [task, models / directory]
    with pytest.raises(ValueError, match=message) as error:
        pipeline(*given, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ner", ("ada", "london"), "ner reads one text, got 2"),
        ("qa", "where", "'where': expected a question .* the context"),
        ("classification", ("a", "b", "c"), "the model reads a text or a pair, got 3 texts"),
        ("classification", ["ada", " "], "input:2: text=' ' is not a text"),
        ("classification", {"txt": "ada"}, "input:1: its columns are txt: name the text with --text-column"),
        ("choice", ("who", "ada"), r"input:1: choices=\('ada',\) is not a list of 2 or more texts"),
        ("choice", ("who", "a", "b", "c"), "input:1: choices has 3 texts, expected 2"),
        ("relation", "ada lives", "input:1: text='ada lives' does not mark"),
        ("classification", 5, "input:1: text=5 is not a text"),
        ("ner", None, "input:1: text=None is not a text"),
        ("classification", ["ada", 5], "input:2: text=5 is not a text"),
        ("qa", None, "None: expected a question .* the context"),
        ("choice", 5, r"input:1: question=5 is not a text"),
    ],
)
def test_an_input_that_is_not_the_tasks_is_refused_in_one_line(name, wrong, message, models):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(name, models / name)(wrong)
    assert "\n" not in str(error.value)


def test_the_package_knows_it_by_name():
    assert isinstance(Pipeline, type) and "pipeline" in minibert.__all__ and minibert.pipeline is pipeline
    with pytest.raises(AttributeError, match="has no attribute 'pipelines'"):
        _ = minibert.pipelines
    assert sys.modules["minibert.tasks.pipelines"].pipeline is pipeline
