"""Training: the loop, its checkpoints and its log, and what they are made of."""

from .checkpoint import FREE, CheckpointError, Run, best, latest, phases, read_trainer, resolve_model, verify
from .config import TrainConfig, check_device
from .distributed import PeerFailed, World, claim, join, started
from .log import METRICS, TIMING_FIELDS, read_metrics
from .loop import Interrupted, NonFiniteError, Result, mean_over_sequences, train
from .optim import OPTIMIZERS, Lamb, adamw, lamb, param_groups
from .recipes import RECIPES, recipe_options
from .schedule import SCHEDULES
from .writers import WRITERS, package_of

__all__ = [
    "FREE",
    "METRICS",
    "OPTIMIZERS",
    "RECIPES",
    "SCHEDULES",
    "TIMING_FIELDS",
    "WRITERS",
    "CheckpointError",
    "Interrupted",
    "Lamb",
    "NonFiniteError",
    "PeerFailed",
    "Result",
    "Run",
    "TrainConfig",
    "World",
    "adamw",
    "best",
    "check_device",
    "claim",
    "join",
    "lamb",
    "latest",
    "mean_over_sequences",
    "package_of",
    "param_groups",
    "phases",
    "read_metrics",
    "read_trainer",
    "recipe_options",
    "resolve_model",
    "started",
    "train",
    "verify",
]
