"""Downloads what the next batches will read, while the present ones are trained on."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Iterable, Sequence

from train.data.images import Images
from train.data.order import Key
from train.jobs.errors import RunError

THREADS = 4  # a connection to object storage is slower than the network


class Ahead:
    """Fetches sources of samples in the order in which one rank's batches need them.

    Args:
        batches: the keys of all batches to come; iterated over once more, at its own pace.
        batch_size: of all ranks' samples to one batch of this rank.
    """

    def __init__(self, images: Images, batches: Iterable[Sequence[Key]], batch_size: int):
        self.images, self.batches = images, iter(batches)
        self.most = math.ceil(images.ahead / batch_size)  # batches ahead
        self.wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.recent: dict[int, int] = {}  # the last batch that asked for a source
        self.seen = 0

    def start(self) -> None:
        # Daemons: a run that was told to stop does not wait for a download.
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def advance(self, used: int) -> None:
        """Ask for what the batches after `used` of them need."""
        while self.seen < used + self.most and (batch := next(self.batches, None)) is not None:
            self.seen += 1
            for source in {self.images.source(key.index) for key in batch}:
                if self.seen - self.recent.get(source, -self.most) >= self.most:
                    self.wanted.put(source)
                self.recent[source] = self.seen

    def close(self) -> None:
        for _ in range(THREADS):
            self.wanted.put(None)

    def _work(self) -> None:
        while (source := self.wanted.get()) is not None:
            with contextlib.suppress(RunError):  # the worker that needs it tries again, and says so
                self.images.fetch(source)
