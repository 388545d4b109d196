"""Text for the language model: the Python standard library, or any file, as bytes."""

import dataclasses
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

VOCABULARY = 256
# What some distributions leave out, and tables of characters, which are no text.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_VALIDATION_EVERY = 16


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, both uint8 [length], and where they came from."""

    name: str
    train: np.ndarray
    validation: np.ndarray


def load_standard_library() -> Corpus:
    """The sources of the running interpreter's standard library; every 16th file is held out."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    files = sorted(path for path in files if not _SKIPPED_FOLDERS & set(path.parts))
    # Neighbours in this order are of one package, so that both splits hold some of everything.
    held_out = [index % _VALIDATION_EVERY == _VALIDATION_EVERY // 2 for index in range(len(files))]
    train = _read([root / path for path, is_held in zip(files, held_out) if not is_held])
    validation = _read([root / path for path, is_held in zip(files, held_out) if is_held])
    return Corpus(f"Python standard library, {len(files)} files", train, validation)


def load_file(path: str) -> Corpus:
    """One file of any kind; its last 16th is held out."""
    data = _read([pathlib.Path(path)])
    split = len(data) - len(data) // _VALIDATION_EVERY
    return Corpus(pathlib.Path(path).name, data[:split], data[split:])


def _read(paths: list[pathlib.Path]) -> np.ndarray:
    return np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8)


def check_length(corpus: Corpus, sequence_length: int) -> None:
    """Raises `ValueError` if a split is shorter than one sequence and its last target."""
    for name, data in (("training", corpus.train), ("validation", corpus.validation)):
        if len(data) <= sequence_length:
            raise ValueError(f"The {name} text has {len(data)} bytes; it must have more than {sequence_length=}.")


def training_batches(corpus: Corpus, *, batch_size: int, sequence_length: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Random windows of the training bytes, the same for the same seed: int32 [batch_size, sequence_length + 1]."""
    generator = np.random.default_rng(seed)
    offsets = np.arange(sequence_length + 1)
    for _ in range(steps):
        starts = generator.integers(0, len(corpus.train) - sequence_length, size=batch_size)
        yield corpus.train[starts[:, None] + offsets].astype(np.int32)


def validation_batches(corpus: Corpus, *, batch_size: int, sequence_length: int, num_batches: int) -> Iterator[np.ndarray]:
    """Evenly spaced windows of the held-out bytes: int32 [batch_size, sequence_length + 1]."""
    last_start = len(corpus.validation) - sequence_length - 1
    starts = np.linspace(0, last_start, batch_size * num_batches).astype(int).reshape(num_batches, batch_size)
    offsets = np.arange(sequence_length + 1)
    for batch_starts in starts:
        yield corpus.validation[batch_starts[:, None] + offsets].astype(np.int32)
