"""The verb xray: the flags of the command in minibert_kernels, and its errors in one line."""

from minibert.cli import main


def test_the_interpreter_is_refused_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("minibert_kernels.xray.AVAILABLE", False)
    assert main(["xray", "--only", "attention"]) == 2
    error = capsys.readouterr().err
    assert error == "minibert: error: needs Triton's compiler: install triton (Linux only)\n"


def test_the_flags_are_handed_on(monkeypatch):
    seen = {}
    monkeypatch.setattr("minibert_kernels.xray.run", lambda **options: seen.update(options) or 0)
    assert (
        main(
            [
                "xray",
                "--arch",
                "80",
                "90",
                "--gpu",
                "h200",
                "--step",
                "bert-base",
                "--lengths",
                "64",
                "--json",
                "--launches",
                "--diff",
                "old.json",
            ]
        )
        == 0
    )
    assert seen["arch"] == [80, 90] and seen["gpu"] == "h200" and seen["step"] == ["bert-base"]
    assert (
        seen["launches"].__name__ == "bert_base"
        and seen["lengths"] == [64]
        and seen["as_json"]
        and seen["diff_with"] == "old.json"
    )


def test_the_verb_has_every_flag_of_the_command():
    import inspect

    from minibert.cli import VERBS
    from minibert_kernels.xray import run

    names = {"as_json": "json", "as_markdown": "markdown", "diff_with": "diff"}
    flags = {names.get(name, name): p.default for name, p in inspect.signature(run).parameters.items()}
    verb = {name: p.default for name, p in inspect.signature(VERBS["xray"]).parameters.items()}
    assert verb == flags | {"launches": False}, "which the command is not told, because it knows no model"
