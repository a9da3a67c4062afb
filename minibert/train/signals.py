"""A signal is noted while a step is under way, and acted on after it."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def listen() -> Iterator[list[int]]:
    """The SIGINT or SIGTERM that came meanwhile; a second one acts as it would without us."""
    came: list[int] = []

    def restore():
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def note(signum, frame):
        came.append(signum)
        restore()

    # python lets only the main thread listen
    listening = threading.current_thread() is threading.main_thread()
    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM) if listening}
    try:
        yield came
    finally:
        restore()
