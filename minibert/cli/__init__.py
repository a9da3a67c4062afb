"""`minibert <verb>`: parse, build, run. Each verb is a function; its parameters are its flags."""

import difflib
import inspect
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import jsonargparse
import yaml

from ..train import Interrupted, NonFiniteError, PeerFailed, join, recipe_options, started
from . import explaining, finetuning, kernels, plotting, preparing, pretraining, profiling, weights
from .phases import typed_phases

VERBS: dict[str, Callable[..., int | None]] = {
    "demo": weights.demo,
    "tokenizer": preparing.tokenizer,
    "prepare": preparing.prepare,
    "pretrain": pretraining.pretrain,
    "finetune": finetuning.finetune,
    "evaluate": finetuning.evaluate,
    "predict": finetuning.predict,
    "fill-mask": pretraining.fill_mask,
    "generate": pretraining.generate,
    "explain": explaining.explain,
    "parity": weights.parity,
    "convert": weights.convert,
    "plot": plotting.plot,
    "profile": profiling.profile,
    "xray": kernels.xray,
    "info": weights.info,
}

TOGETHER = ("pretrain", "finetune")  # what several processes can do
SHARED = (Interrupted, NonFiniteError, PeerFailed)  # what happens to all processes of a run at once


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse, with every error in one line."""

    def error(self, message: str, ex: Exception | None = None):
        # of a union type the parser says what each member has against the value: the first sentence is enough
        text = " ".join(message.split(" Errors:")[0].split()).removeprefix("Parser key ")
        text = text if len(text) < 300 else text[:300] + " …"
        unknown = re.search(r"--([\w-]+)", text) if "unrecognized" in text else None
        raise ValueError(text + (_nearest(unknown[1], self.flags) if unknown else ""))


def build_parser(verb: str) -> Parser:
    """A parser whose flags are the parameters of the verb's function."""
    function = VERBS[verb]
    summary, _, example = inspect.getdoc(function).partition("\nExample:")
    parser = Parser(
        prog=f"minibert {verb}", description=summary.strip(), epilog="example: " + " ".join(example.split())
    )
    parser.add_argument("--config", action="config", help="a yaml file of these options; flags override it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.flags = ["config", "debug"]
    for name, parameter in inspect.signature(function).parameters.items():
        kind, help_text = get_args(parameter.annotation)
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            parser.add_argument(name, nargs="*", type=str, help=help_text)
            continue
        flag, options = f"--{name.replace('_', '-')}", {"help": help_text}
        parser.flags.append(flag[2:])
        if parameter.default is inspect.Parameter.empty:
            options["required"] = True
        else:
            options["default"] = parameter.default
        if kind is bool:
            options |= (
                {"action": jsonargparse.ActionYesNo(no_prefix="no-")} if parameter.default else {"action": "store_true"}
            )
        elif get_origin(kind) is list:
            options |= {"type": get_args(kind)[0], "nargs": "+"}
        else:
            options["type"] = kind
        parser.add_argument(flag, **options)
    return parser


def run(argv: list[str]) -> int:
    """Parse and run one verb; errors are raised."""
    verb, *rest = argv
    parser = build_parser(verb)
    _check_config_files(rest, parser)
    values = parse(parser, rest)
    for name in ("config", "debug"):
        values.pop(name)
    function = VERBS[verb]
    positional = [
        values.pop(name)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    ]
    if started().size > 1 and verb not in TOGETHER:
        raise ValueError(f"{verb} is for one process, not for {started().size}: start it without torchrun")
    with join():
        return function(*positional, **values) or 0


def parse(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """The options of a verb; those of a `--recipe` are defaults, which a `--config` file and flags override."""
    given = parser.parse_args(argv, defaults=False).as_dict()
    if given.get("recipe"):
        parser.set_defaults(recipe_options(given["recipe"], (name for name in given if given[name] is not None)))
    options = dict(parser.parse_args(argv).as_dict())
    if options.get("phases"):
        options["phases"] = typed_phases(options["phases"], parser)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run `minibert`; returns the exit code: 2 for what the user can mend, 1 for what went wrong while running."""
    argv = sys.argv[1:] if argv is None else argv
    rank = started().rank
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("minibert_kernels").setLevel(logging.WARNING)
    if not argv or argv[0] in ("-h", "--help"):
        _print_help()
        return 0
    try:
        if argv[0] not in VERBS:
            raise ValueError(f"unknown verb {argv[0]!r}: known are {', '.join(VERBS)}{_nearest(argv[0], VERBS)}")
        return run(argv)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            raise
        message, code = explain(error)
        if not rank or not isinstance(error, SHARED):
            print(f"minibert: error: {f'rank {rank}: ' * bool(rank)}{message}", file=sys.stderr)
        return code


def explain(error: BaseException) -> tuple[str, int]:
    """One line and an exit code for an error."""
    text = " ".join(str(error).split())
    if isinstance(error, Interrupted):
        return text, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ValueError | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return text, 2
    if isinstance(error, OSError | NonFiniteError | PeerFailed):
        return text, 1
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _check_config_files(argv: list[str], parser: Parser) -> None:
    """Refuse unknown keys of a `--config` file, offering the nearest name."""
    for flag, value in zip(argv, [*argv, ""][1:], strict=True):
        name, _, inline = flag.partition("=")
        path = Path(inline or value)
        if name != "--config":
            continue
        if not path.is_file():
            raise ValueError(f"--config {path}: no such file")
        try:
            content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: broken YAML ({' '.join(str(error).split())})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected options, one a line, as name: value")
        known = [flag.replace("-", "_") for flag in parser.flags]
        for key in content:
            if key not in known:
                raise ValueError(f"{path}: unknown option {key!r}{_nearest(str(key), known)}")


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {near[0]!r}?" if near else ""


def _print_help() -> None:
    print("minibert: BERT from scratch, with its own Triton kernels\n\nusage: minibert VERB [OPTIONS]\n")
    for name, function in VERBS.items():
        print(f"  {name:<10} {inspect.getdoc(function).splitlines()[0]}")
    print("\n`minibert VERB --help` shows its options and an example.")


def entry() -> None:
    """The console script."""
    sys.exit(main())
