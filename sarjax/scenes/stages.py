"""How long each stage of making a map was busy, and how far the stages overlapped."""

import contextlib
import threading
import time
from collections.abc import Iterator

# In the order in which a pixel passes them: decoding files and finding what is valid; batches, and moving them to the
# devices; the network; putting windows together, or fetching strips; masking, compressing and writing.
STAGES = ("read", "prepare", "compute", "blend", "write")


class Stages:
    """Seconds in which each stage was busy; a stage is one thread's at a time, and stages may overlap."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._one = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        with self._one:
            self.seconds[stage] += seconds

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts the block's time for `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)
