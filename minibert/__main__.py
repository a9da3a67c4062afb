"""`python -m minibert VERB`, and `torchrun … -m minibert VERB`: the same as the console script."""

from .cli import entry

entry()
