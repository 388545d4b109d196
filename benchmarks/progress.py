"""Tells on stderr how far a long run is: a bar where tqdm is installed and someone watches, else plain lines."""

import importlib.util
import sys
import time

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts steps of one stage."""

    def __init__(self, total: int, title: str):
        self.total, self.title, self.done = total, title, 0
        self.started = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, leave=False, file=sys.stderr)

    def step(self, what: str) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(what, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if now - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = now
            say(f"{self.title}: {self.done}/{self.total}, {now - self.started:.0f} s, {what}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
