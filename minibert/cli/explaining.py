"""The verb that looks into a model: explain."""

from pathlib import Path
from typing import Annotated

from ..data.tokenizer import Tokenizer
from ..explain import explain as explain_text
from ..explain import render
from ..files import write_atomically
from ..model import BertForMaskedLM, BertModel
from ..model.heads import MLMHead
from ..train import resolve_model
from .common import load, model_kind, print_json, refuse_taken, resolve_device, say
from .flags import Backend, Device, Json, Pickle


def explain(
    what: Annotated[list[str], "a run, a checkpoint or a Hugging Face directory, and after it the texts"],
    /,
    *,
    out: Annotated[str | None, "page to write, html"] = None,
    pair: Annotated[str | None, "second text, to each of them"] = None,
    label: Annotated[str | None, "class, or token behind [MASK], to explain; by default the likeliest"] = None,
    baseline: Annotated[str, "what stands for a word that is taken away: mask or pad"] = "mask",
    steps: Annotated[int, "points of the integral; more make its error smaller"] = 50,
    top: Annotated[int, "tokens to show of a guess"] = 5,
    mlm: Annotated[str | None, "a run or directory whose masked-language-model head guesses, layer by layer"] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Show which words a prediction comes from, where heads look, and what each layer guesses, on one page.

    A classifier has no head that guesses: --mlm names the model it was fine-tuned from, for its head.

    Example: minibert explain runs/reviews "I love this lamp!" --out page.html
    """
    if len(what) < 2:
        raise ValueError("give a directory and, after it, at least one text")
    if out is None and not json:
        raise ValueError("say where the page goes with --out page.html, or ask for --json")
    refuse_taken("out", out)
    source, device = resolve_model(what[0]), resolve_device(device)
    tokenizer, kind = Tokenizer.from_pretrained(source), model_kind(source, allow_pickle)
    if kind is BertModel:
        raise ValueError(f"{source} has no classifier and no masked-language-model head: nothing is predicted")
    network = load(kind, source, device, backend, allow_pickle)
    head = None if mlm is None else guessing_head(mlm, tokenizer, device, backend, allow_pickle)
    options = {"label": label, "baseline": baseline, "steps": steps, "top": top, "mlm": head}
    explanations = [explain_text(network, tokenizer, text, pair, **options) for text in what[1:]]
    if out is not None:
        write_atomically(Path(out), render(explanations, f"Inside {what[0]}"))
        say(f"{len(explanations)} {'text' if len(explanations) == 1 else 'texts'} explained in {out}")
    if json:
        print_json({"explanations": [one.to_dict() for one in explanations]})


def guessing_head(directory: str, tokenizer: Tokenizer, device: str, backend: str, allow_pickle: bool) -> MLMHead:
    """The masked-language-model head of a directory with the same vocabulary."""
    source = resolve_model(directory)
    if Tokenizer.from_pretrained(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--mlm {source} has another vocabulary than the model")
    model = load(BertForMaskedLM, source, device, backend, allow_pickle)
    if model.new_parameters:
        raise ValueError(f"--mlm {source} has no masked-language-model head")
    return model.mlm
