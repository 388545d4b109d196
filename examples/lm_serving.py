"""Requests of different lengths that take turns in a batch: they join when there are pages for them, and leave when done."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from lm_paged import PagedModel, admit, decode, release

from sparse_attn_jax.paged_cache import PageAllocator

# Prompts are padded to a multiple of this, so that a few programs serve them all.
PROMPT_STEP = 512


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how many bytes to continue it by."""

    prompt: bytes
    num_bytes: int

    @property
    def length(self) -> int:
        return len(self.prompt) + self.num_bytes


@dataclasses.dataclass(frozen=True)
class Stay:
    """A request in a slot."""

    request: int
    slot: int
    pages: list[int]
    first_step: int
    last_step: int | None = None


class Server:
    """Serves requests, first come, first served. `run` once; the results are in the attributes.

    Args:
      model: with its sizes.
      params: of the model.
      requests: none longer, with its continuation, than `model.max_length`.
      follow: continuations to go along, whatever the model predicts, uint8 arrays; `None` goes along with the model. Up to the
        first byte in which both differ, the predictions are the same.
      on_tokens: told how many bytes were made.

    Attributes:
      outputs: of each request the bytes that the model predicts.
      stays: which request was in which slot, in the order in which they left.
      decode_seconds: in steps, without prompts.
      decoded_tokens: bytes made in steps.
      keys_read: in steps, summed over them; per layer and KV head, a block's extrema counting as one key.
      keys_held: what dense attention reads.
      peak_pages: most pages in use at a time.
    """

    def __init__(
        self,
        model: PagedModel,
        params: Any,
        requests: Sequence[Request],
        *,
        follow: Sequence[np.ndarray] | None = None,
        on_tokens: Callable[[int], object] | None = None,
    ):
        for request in requests:
            if not request.prompt or request.num_bytes < 1 or request.length > model.max_length:
                raise ValueError(f"A request needs a prompt and at most {model.max_length} bytes in all; it has {request}.")
            if -(-request.length // model.page_size) > model.num_pages:
                raise ValueError(f"A request of {request.length} bytes does not fit into {model.num_pages} pages.")
        self.model, self.params, self.requests = model, params, requests
        self.follow, self.on_tokens = follow, on_tokens or (lambda count: None)
        self.outputs: list[list[int]] = [[] for _ in requests]
        self.stays: list[Stay] = []
        self.decode_seconds, self.decoded_tokens, self.keys_read, self.keys_held, self.peak_pages = 0.0, 0, 0.0, 0.0, 0
        self._waiting = collections.deque(range(len(requests)))
        self._running: dict[int, Stay] = {}
        self._allocator = PageAllocator(model.num_pages)
        self._state = model.empty_state()
        self._step = 0
        # Prompts do not select, and their programs serve every selector.
        self._prompt_model = dataclasses.replace(model, quest=None)
        # A step of nobody, so that compiling is no part of the time of the others.
        nobody = np.zeros(model.num_slots, bool)
        self._state, *_ = decode(model, params, self._state, nobody.astype(np.int32), nobody)

    @property
    def tokens_per_second(self) -> float:
        return self.decoded_tokens / self.decode_seconds

    @property
    def fraction_read(self) -> float:
        return self.keys_read / self.keys_held

    def run(self) -> "Server":
        while self._waiting or self._running:
            self._admit_waiting()
            self._release_done()
            if self._running:
                self._decode()
        return self

    def _admit_waiting(self) -> None:
        """Lets requests join, in order, as long as there are a slot and pages for the next."""
        for slot in range(self.model.num_slots):
            if slot in self._running or not self._waiting:
                continue
            request = self.requests[self._waiting[0]]
            num_pages = -(-request.length // self.model.page_size)
            if num_pages > self._allocator.num_free:
                return
            stay = Stay(self._waiting.popleft(), slot, self._allocator.allocate(num_pages), self._step)
            self._running[slot] = stay
            row = np.full(self.model.max_pages, -1, np.int32)
            row[:num_pages] = stay.pages
            prompt = np.frombuffer(request.prompt, np.uint8).astype(np.int32)
            padded = np.pad(prompt, (0, -len(prompt) % PROMPT_STEP))[None]
            arguments = self._state, jnp.int32(slot), jnp.asarray(row), padded, jnp.int32(len(prompt))
            self._state, token = admit(self._prompt_model, self.params, *arguments)
            self._keep({slot: int(token)})
        self.peak_pages = max(self.peak_pages, self.model.num_pages - self._allocator.num_free)

    def _release_done(self) -> None:
        for slot, stay in list(self._running.items()):
            if len(self.outputs[stay.request]) >= self.requests[stay.request].num_bytes:
                self._state = release(self._state, jnp.int32(slot))
                self._allocator.free(stay.pages)
                self.stays.append(dataclasses.replace(stay, last_step=self._step))
                del self._running[slot]

    def _decode(self) -> None:
        """One byte of every request that is in a slot."""
        active, tokens = np.zeros(self.model.num_slots, bool), np.zeros(self.model.num_slots, np.int32)
        for slot, stay in self._running.items():
            outputs = self.outputs[stay.request]
            active[slot] = True
            tokens[slot] = outputs[-1] if self.follow is None else self.follow[stay.request][len(outputs) - 1]
        start = time.perf_counter()
        self._state, predicted, read = decode(self.model, self.params, self._state, tokens, active)
        predicted = np.asarray(predicted)
        self.decode_seconds += time.perf_counter() - start
        self.decoded_tokens += len(self._running)
        self.keys_read += float(np.asarray(read)[active].sum())
        self.keys_held += float(np.asarray(self._state.caches[0].lengths)[active].sum())
        self._step += 1
        self._keep({slot: int(predicted[slot]) for slot in self._running})

    def _keep(self, predicted: dict[int, int]) -> None:
        for slot, token in predicted.items():
            self.outputs[self._running[slot].request].append(token)
        self.on_tokens(len(predicted))
