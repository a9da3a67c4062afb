"""Verbs of pretraining: pretrain, fill-mask, generate."""

import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from ..config import PRESETS, BertConfig, check_fractions
from ..data import OBJECTIVES, Mixture, PretrainingData, TokenStore, split_documents
from ..data.masking import UNITS, check_masking
from ..data.objectives import check_objectives
from ..data.tokenizer import Tokenizer
from ..hub import load_config
from ..model import BertForMaskedLM, BertForPreTraining
from ..tasks import pretraining as task
from ..train import (
    FREE,
    OPTIMIZERS,
    RECIPES,
    SCHEDULES,
    WRITERS,
    Interrupted,
    Result,
    Run,
    TrainConfig,
    World,
    claim,
    latest,
    package_of,
    resolve_model,
    train,
)
from .common import (
    check_backend,
    check_causal,
    describe,
    find_store,
    language_model,
    load,
    open_store,
    pick,
    print_json,
    print_result,
    resolve_device,
    save_options,
    say,
)
from .flags import (
    Accumulate,
    Arch,
    Backend,
    Cased,
    CheckpointActivations,
    Clip,
    CudaGraph,
    DataColumn,
    Decay,
    Device,
    Directory,
    Dtype,
    EvalEvery,
    Json,
    KeepLast,
    LogEvery,
    Lr,
    Out,
    Parallel,
    Pickle,
    Resume,
    SaveEvery,
    Seed,
    SplitOnOom,
    VocabSize,
    Warmup,
    WeightsDtype,
)
from .phases import plan_phases, refuse_other_form

SHORTEST = 8  # [CLS] A [SEP] B [SEP], with a few tokens to mask
STEPS = 1000  # where neither steps nor minutes are given
TRAINING = """steps minutes optimizer lr warmup schedule final_lr decay power weight_decay beta1 beta2 eps clip
accumulate ramp split_on_oom checkpoint_activations cuda_graph ema spike skip patience seed dtype eval_every
eval_batches save_every keep_last log_every writer parallel"""
SAMPLING = "seed batch_tokens max_length mask_rate mask_unit whole_word max_span mask_count all_mask objectives"
PHASED = [name for name in f"{TRAINING} {SAMPLING}".split() if name not in ("seed", "objectives")]  # may differ


def pretrain(
    *,
    data: Annotated[list[str], "a token store, several with --mix, or text to make one from (in --out/data)"],
    out: Out,
    recipe: Annotated[str | None, f"defaults for the options below: {', '.join(RECIPES)}"] = None,
    mix: Annotated[list[float], "the share of the samples from each of several stores in --data, as 0.7 0.3"] = (),
    model: Annotated[str, f"architecture: {', '.join(PRESETS)}"] = "bert-tiny",
    arch: Arch = {},  # noqa: B006
    init: Annotated[str | None, "directory whose weights to start from, instead of --model"] = None,
    tokenizer: Annotated[
        str | None, "directory or file of a tokenizer; by default that of --init, or a new one"
    ] = None,
    vocab_size: VocabSize = 8192,
    cased: Cased = False,
    text_column: DataColumn = "text",
    steps: Annotated[int | None, f"optimizer steps, {STEPS:,} where --minutes is not given either"] = None,
    minutes: Annotated[float | None, "train for so long instead; the schedule runs by the clock"] = None,
    phases: Annotated[
        list[dict[str, Any]], "runs one after the other, as '{max_length: 512, steps: 100}': what differs"
    ] = (),
    batch_tokens: Annotated[int, "tokens of a batch"] = 4096,
    max_length: Annotated[int, "tokens of a sample, at most"] = 128,
    objectives: Annotated[list[str], f"what is learned: {', '.join(OBJECTIVES)}"] = ["mlm", "nsp"],  # noqa: B006
    weights: Annotated[dict[str, float], "of their losses in the sum, as --weights.nsp 0.5"] = {},  # noqa: B006
    nsp: Annotated[bool, "nsp is among the objectives; --no-nsp leaves it out"] = True,
    mask_rate: Annotated[float, "share of the tokens to predict"] = 0.15,
    mask_unit: Annotated[str, f"what is masked as a whole: {', '.join(UNITS)}"] = "token",
    whole_word: Annotated[bool, "short for --mask-unit word"] = False,
    max_span: Annotated[int, "tokens of a span, at most"] = 10,
    mask_count: Annotated[int | None, "predict exactly so many tokens of a batch, instead of a share"] = None,
    all_mask: Annotated[bool, "replace every one by [MASK], instead of 80, 10, 10 %"] = False,
    valid_fraction: Annotated[float, "share of the documents held out, unless `prepare --valid` did that"] = 0.05,
    optimizer: Annotated[str, ", ".join(OPTIMIZERS)] = "adamw",
    lr: Lr = 1e-3,
    warmup: Warmup = 0.1,
    schedule: Annotated[str, f"of the learning rate: {', '.join(SCHEDULES)}"] = "linear",
    final_lr: Annotated[float, "learning rate at the end, as a share of the peak"] = 0.0,
    decay: Annotated[float, "share of the run in which a trapezoid falls"] = 0.1,
    power: Annotated[float, "of the polynomial"] = 1.0,
    weight_decay: Decay = 0.01,
    beta1: Annotated[float, "of the first moment; sgd's momentum"] = 0.9,
    beta2: Annotated[float, "of the second moment"] = 0.999,
    eps: Annotated[float, "beside the root of the second moment"] = 1e-6,
    clip: Clip = 1.0,
    accumulate: Accumulate = 1,
    ramp: Annotated[float, "share of the run in which a step grows from 1 micro-batch to --accumulate"] = 0.0,
    split_on_oom: SplitOnOom = False,
    checkpoint_activations: CheckpointActivations = False,
    cuda_graph: CudaGraph = False,
    ema: Annotated[float | None, "average the weights, with this decay; evaluate and save the average"] = None,
    spike: Annotated[float | None, "a step is bad whose loss is so many times its mean of late"] = None,
    skip: Annotated[int, "bad steps in a row to leave out; a spike or what is not finite stops the run otherwise"] = 0,
    patience: Annotated[int | None, "stop after so many evaluations without a lower loss"] = None,
    eval_every: EvalEvery = None,
    eval_batches: Annotated[int | None, "batches of an evaluation; None for all"] = 32,
    save_every: SaveEvery = 100,
    keep_last: KeepLast = 2,
    log_every: LogEvery = 10,
    writer: Annotated[str | None, f"where the numbers go too: {', '.join(WRITERS)}"] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    parallel: Parallel = "ddp",
    backend: Backend = "auto",
    resume: Resume = False,
    allow_pickle: Pickle = False,
) -> None:
    """Pretrain: masked language model and next-sentence prediction, or other objectives.

    Example: minibert pretrain --data corpus/ --model bert-tiny --steps 300 --out runs/tiny --objectives mlm sop
    """
    options, world = dict(locals()), World.current()
    with world.main_first():
        options["objectives"] = [name for name in objectives if nsp or name != "nsp"]
        check_objectives(options["objectives"], weights)
        check_fractions(valid_fraction=valid_fraction)
        start = resolve_model(init) if init else None
        if phases:
            options |= {"phases": plan_phases(phases, options, PHASED), "steps": None, "minutes": None}
        elif steps is None and minutes is None:
            options["steps"] = STEPS
        plans = [plan(options, start, number) for number in range(1, len(phases) + 1)] or [plan(options, start)]
    with claim(out, resume) as run:
        with world.main_first():
            refuse_other_form(run.path, bool(phases))
            sides = open_sides(options, run.path / "data", tokenizer or (start and str(start)))
        begin = partial(save_options, run, "pretrain", options)
        if phases:
            learn_in_phases(plans, run, sides, start, begin)
        else:
            learn(plans[0], run, sides, start, begin)


class Plan(NamedTuple):
    """A run whose options are found good."""

    options: dict[str, Any]
    config: TrainConfig
    planned: BertConfig


def plan(options: dict[str, Any], start: Path | None, phase: int | None = None) -> Plan:
    """The run that the options ask for, or one of its phases, counted from 1; refused where it cannot be.

    Each phase draws under a seed of its own: none sees the samples and masks of another again.
    """
    if phase is not None:
        own = options["phases"][phase - 1]
        try:
            return plan(options | {"seed": options["seed"] + phase - 1} | own, start)
        except ValueError as error:
            raise ValueError(f"phase {phase}: {error}") from None
    config = TrainConfig(**pick(options, TRAINING), device=resolve_device(options["device"]), best_metric="loss")
    World.current().check(config.accumulate, **config.alone)
    check_fractions(mask_rate=options["mask_rate"])
    if options["whole_word"] and options["mask_unit"] == "span":
        raise ValueError("whole_word=True and mask_unit='span' contradict each other: choose one")
    check_masking(*pick(options, "mask_rate mask_unit max_span mask_count").values())
    check_backend(options["backend"], config.device)
    if config.writer:
        package_of(config.writer)
    return Plan(options, config, planned_config(options, start))


def learn_in_phases(plans: list[Plan], run: Run, sides: list, start: Path | None, begin: Callable) -> None:
    """Train the phases one after the other, each as a run `phase-N` from the last checkpoint of the one before.

    A phase was finished where the next one has a checkpoint; any other is gone through, which changes none that was.
    """
    on_main, last = World.current().on_main, len(plans) - 1
    folders = [run.path / f"phase-{number}" for number in range(1, len(plans) + 1)]
    decisive = [name for name in PHASED if name not in FREE]
    said = {str(number): pick(each.options, " ".join(decisive)) for number, each in enumerate(plans, 1)}
    same = {"phases": said, "preset": plans[0].options["model"]}
    backwards = reversed(range(len(plans)))  # what lies before the newest phase is not needed, nor read
    reached = on_main(lambda: next((index for index in backwards if latest(folders[index])), 0))
    for index in range(reached, len(plans)):
        moments = None
        if index:
            start = on_main(partial(newest, folders[: index + 1]))
            moments = start if plans[index].config.optimizer == plans[index - 1].config.optimizer else None
        say(f"phase {index + 1} of {len(plans)}")
        with claim(folders[index], run.resume) as part:
            result = learn(plans[index], part, sides, start, begin, moments, same)
        begin = lambda: None  # noqa: E731  (said and kept once)
        if result.signal and index < last:
            name = signal.Signals(result.signal).name
            raise Interrupted(f"{name} at the end of phase {index + 1}: continue with --resume", result.signal)


def newest(folders: list[Path]) -> Path:
    """The newest checkpoint of the last of these runs that has one."""
    return next(found for folder in reversed(folders) if (found := latest(folder)))


def learn(
    plan: Plan, run: Run, sides: list, start: Path | None, begin: Callable[[], Any], moments: Path | None = None,
    settings: Mapping[str, Any] = {},
) -> Result:  # fmt: skip
    """Train one run; `begin` is called when everything it needs is there."""
    (options, config, planned), world = plan, World.current()
    stores, mix, weights = [store for store, _ in sides[0]], options["mix"], options["weights"]
    tokenizer, samples = stores[0].tokenizer, pick(options, SAMPLING)
    learned, held_out = (
        mix_samples([PretrainingData(each, tokenizer, documents=ids, **samples) for each, ids in side], mix)
        for side in sides
    )
    arch = {"causal": planned.causal} | options["arch"]
    network = new_network(options | {"arch": arch}, start, tokenizer, language_model(planned))
    commonest = commonest_token(sides[0]) if world.is_main else None
    begin()
    for each in stores:
        say(describe(each))
    say(f"{len(learned):,} samples an epoch; {network.num_parameters():,} parameters")
    result = train(
        network,
        learned,
        lambda network, limit: task.evaluate(
            network, held_out.evaluation_batches(limit), config.device, commonest, weights
        ),
        config,
        run,
        tokenizer,
        parts=learned.parts,
        weights={f"{name}_loss": weight for name, weight in weights.items()},
        settings=samples | pick(options, "valid_fraction backend") | {"data": source_of(stores, mix)} | settings,
        moments=moments,
    )
    if world.is_main:
        print_result(result.metrics | {"checkpoint": str(result.checkpoint)}, as_json=False)
    return result


def planned_config(options: Mapping, start: Path | None) -> BertConfig:
    """The architecture that the options ask for, refused before anything is read or written where it cannot be."""
    objectives, max_length = options["objectives"], options["max_length"]
    arch = {"causal": any(OBJECTIVES[name].causal for name in objectives)} | options["arch"]
    planned = load_config(start).replace(**arch) if start else BertConfig.preset(options["model"], **arch)
    check_causal(planned, objectives)
    with torch.device("meta"):
        language_model(planned)(planned)  # unknown parts, too
    if options["batch_tokens"] < 1:
        raise ValueError(f"batch_tokens={options['batch_tokens']} is not positive")
    if max_length < SHORTEST:
        raise ValueError(f"max_length={max_length} leaves no room for a pair: at least {SHORTEST}")
    if max_length > planned.max_position_embeddings:
        raise ValueError(f"max_length={max_length} exceeds max_position_embeddings={planned.max_position_embeddings}")
    return planned


def open_sides(options: Mapping, out: Path, tokenizer: str | None) -> list[list[tuple[TokenStore, np.ndarray]]]:
    """The stores, each with the documents to use, that are learned from; and those that are held out.

    Held out is the store that `prepare --valid` put beside the training text, otherwise a share of the documents.
    """
    data, mix = options["data"], options["mix"]
    if mix and len(mix) != len(data):
        raise ValueError(f"--mix gives {len(mix)} weights for {len(data)} stores in --data")
    if mix and (text := [path for path in data if not find_store(path)]):
        raise ValueError(f"--mix weighs token stores: prepare {text[0]} first")
    learned, held_out = [], []
    for paths in [[path] for path in data] if mix else [data]:
        store = open_store(paths, out, tokenizer, options)
        if learned and store.meta["tokenizer_hash"] != learned[0][0].meta["tokenizer_hash"]:
            raise ValueError(f"{paths[0]} was built with another tokenizer than {data[0]}: prepare it again with that")
        beside = store.path.parent / "valid"
        if store.meta.get("side") == "train" and (beside / "meta.json").is_file():
            valid = TokenStore(beside)
            learned.append((store, np.arange(store.num_documents)))
            held_out.append((valid, np.arange(valid.num_documents)))
        else:
            least = 2 if "nsp" in options["objectives"] else 1
            parts = split_documents(store.num_documents, options["valid_fraction"], options["seed"], at_least=least)
            learned.append((store, parts[0]))
            held_out.append((store, parts[1]))
    return [learned, held_out]


def mix_samples(parts: list[PretrainingData], weights: list[float]) -> PretrainingData:
    return Mixture(parts, weights) if weights else parts[0]


def source_of(stores: list[TokenStore], weights: list[float]) -> dict:
    """What a resumed run must find again: the same text under the same tokenizer."""
    known = [{name: store.meta[name] for name in ("counts", "tokenizer_hash", "sources")} for store in stores]
    return {"mix": weights, "stores": known} if weights else known[0]


def commonest_token(side: list[tuple[TokenStore, np.ndarray]]) -> int:
    """The id that occurs most often in these documents."""
    counts = np.zeros(side[0][0].meta["vocab_size"], dtype=np.int64)
    for store, documents in side:
        for first, last in map(store.document, documents):
            ids = store.tokens[store.sentences[first] : store.sentences[last]]
            counts += np.bincount(ids, minlength=len(counts))
    return int(counts.argmax())


def new_network(options: dict, start: Path | None, tokenizer: Tokenizer, kind: type) -> torch.nn.Module:
    """The network of `pretrain`: a preset that fits the tokenizer, or the weights of `start`."""
    torch.manual_seed(options["seed"])
    backend = options["backend"]
    if start is None:
        vocabulary = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_token_id}
        config = BertConfig.preset(options["model"], **vocabulary | options["arch"])
        network = kind(config, backend=backend)
    else:
        allow_pickle = options["allow_pickle"]
        again = {"finetuning_task": None, "task_specific_params": None} | options["arch"]  # a language model once more
        network = kind.from_pretrained(start, backend=backend, allow_pickle=allow_pickle, **again)
        say(f"new parameters: {', '.join(network.new_parameters) or 'none'}")
    if tokenizer.vocab_size > network.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces, vocab_size={network.config.vocab_size}")
    return network


def fill_mask(
    text: Annotated[list[str], "texts with [MASK]"],
    /,
    *,
    model: Directory,
    top: Annotated[int, "tokens to show"] = 5,
    device: Device = "auto",
    dtype: WeightsDtype = "float32",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Say what stands behind each [MASK].

    Example: minibert fill-mask --model runs/tiny "The statement returns a [MASK] of values."
    """
    if not text:
        raise ValueError("give at least one text with [MASK]")
    if top < 1:
        raise ValueError(f"top={top} is not positive")
    source = resolve_model(model)
    if load_config(source).causal:
        raise ValueError(f"{source} is causal: continue a text with it, by minibert generate")
    network = load(BertForPreTraining, source, resolve_device(device), backend, allow_pickle, dtype)
    if any(name.startswith("mlm.") for name in network.new_parameters):
        raise ValueError(f"{source} has no masked-language-model head: pretrain it first")
    answers = task.fill_mask(network, Tokenizer.from_pretrained(source), text, top)
    if json:
        print_json({"masks": answers})
        return
    for answer in answers:
        print("  ".join(f"{entry['token']} {entry['probability']:.3f}" for entry in answer))


def generate(
    text: Annotated[list[str], "texts to continue"],
    /,
    *,
    model: Directory,
    max_new_tokens: Annotated[int, "tokens to add, at most"] = 32,
    temperature: Annotated[float, "below 1 the likely gets likelier; 0 takes the likeliest"] = 1.0,
    top_k: Annotated[int | None, "draw among so many likeliest tokens; None for all"] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: WeightsDtype = "float32",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Continue a text with a causal model, one that was pretrained with --objectives clm.

    Example: minibert generate --model runs/causal "The statement returns" --max-new-tokens 20 --top-k 10
    """
    if not text:
        raise ValueError("give at least one text to continue")
    source = resolve_model(model)
    if not load_config(source).causal:
        raise ValueError(f"{source} is not causal: pretrain it with --objectives clm")
    network = load(BertForMaskedLM, source, resolve_device(device), backend, allow_pickle, dtype)
    if network.new_parameters:
        raise ValueError(f"{source} has no language-model head: pretrain it first")
    tokenizer = Tokenizer.from_pretrained(source)
    drawn = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    answers = [task.generate(network, tokenizer, one, **drawn) for one in text]
    if json:
        print_json({"texts": answers})
        return
    for answer in answers:
        print(answer)
