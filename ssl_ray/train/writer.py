"""What worker 0 writes while it trains: metrics segments and checkpoints, by one thread, in the order given.

The training thread only copies tensors. A checkpoint is committed after its files and the metrics of its steps are
stored; only then are older ones removed. A segment ends at each checkpoint, so that a resume drops whole segments.
"""

import json
import logging
import threading
import time
from typing import Any

from ssl_ray import storage
from ssl_ray.errors import SslRayError
from ssl_ray.train import runs
from ssl_ray.train.checkpoint import Snapshot, write_checkpoint

SEGMENT_STEPS = 1000
PENDING_EVALUATIONS = 10

log = logging.getLogger(__name__)


class Writer:
    """Writes into the run at `uri`, from where `marker` says that the run stands, as the newest start of its workers.

    flush_s: seconds between two writes of the unfinished segment, and between two looks for a request to stop.
    `error` is the first failure; after it nothing more is written.
    """

    def __init__(self, uri: str, *, marker: runs.Marker, keep: int, flush_s: float):
        self.uri, self.marker, self.keep, self.flush_s = uri, marker, keep, flush_s
        self.error: Exception | None = None
        self.stop_requested = False
        self._segment_start, self._lines = marker.step, []  # type: tuple[int, list[str]]
        self._finished: list[tuple[int, list[str]]] = []
        self._snapshot: tuple[Snapshot, bool] | None = None
        self._condition = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="run-writer", daemon=True)
        self._thread.start()

    def record(self, record: dict[str, Any]) -> None:
        """Adds the record of one step."""
        with self._condition:
            self._lines.append(json.dumps(record) + "\n")
            if len(self._lines) >= SEGMENT_STEPS:
                self._end_segment(record["step"] + 1)

    def checkpoint(self, shot: Snapshot, *, evaluate: bool) -> None:
        """Hands over a snapshot; waits while the one before is still being written."""
        with self._condition:
            self._condition.wait_for(lambda: self._snapshot is None or self.error is not None)
            self._end_segment(shot.step)
            self._snapshot = (shot, evaluate)
            self._condition.notify_all()

    def close(self) -> None:
        """Writes all that was handed over."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()

    def _end_segment(self, next_step: int) -> None:
        if self._lines:
            self._finished.append((self._segment_start, self._lines))
        self._segment_start, self._lines = next_step, []

    def _run(self) -> None:
        try:
            while not self._work():
                pass
        except SslRayError as error:
            self.error = error
        except Exception as error:  # the loop asks for it at every step and ends the run with it
            log.exception("writing to %s failed", self.uri)
            self.error = error
        with self._condition:
            self._condition.notify_all()

    def _work(self) -> bool:
        """One turn: waits for work or for the time to flush, does it; True when closing and all is written."""
        with self._condition:
            self._condition.wait_for(lambda: self._snapshot is not None or self._closing, timeout=self.flush_s)
            finished, self._finished = self._finished, []
            open_segment = (self._segment_start, list(self._lines))
            taken, closing = self._snapshot, self._closing
        for start, lines in [*finished, open_segment]:
            if lines:
                at = storage.join(self.uri, "metrics", runs.segment_name(start, self.marker.number))
                storage.write_atomic(at, "".join(lines).encode())
        # Before a commit: where a checkpoint is always waiting, a request to stop would never be seen after it.
        self.stop_requested = self.stop_requested or runs.stop_asked(self.uri, self.marker)
        if taken is not None:
            self._commit(*taken)
            with self._condition:
                self._snapshot = None
                self._condition.notify_all()
            return False
        return closing

    def _commit(self, shot: Snapshot, evaluate: bool) -> None:
        name = f"{shot.step:010d}-{self.marker.attempt}"
        started = time.monotonic()
        write_checkpoint(storage.join(self.uri, "checkpoints", name), shot)
        if shot.state["bad_samples"]:
            lines = "".join(json.dumps(sample) + "\n" for sample in shot.state["bad_samples"])
            storage.write_atomic(storage.join(self.uri, "quarantine.jsonl"), lines.encode())
        if evaluate:
            storage.write_atomic(storage.join(self.uri, "checkpoints", name, "evaluate"), b"")
        try:
            self.marker = runs.commit(self.uri, self.marker, step=shot.step, checkpoint=name)
        except storage.Changed as error:
            raise SslRayError(f"{self.uri}: other workers have taken over this run; these have stopped.") from error
        log.info("step %d committed in %.1f s", shot.step, time.monotonic() - started)
        self._purge(name)

    def _purge(self, newest: str) -> None:
        for name in runs.superseded(self.uri, newest=newest, keep=self.keep, pending=PENDING_EVALUATIONS):
            try:
                storage.remove(storage.join(self.uri, "checkpoints", name))
            except SslRayError as error:  # an old checkpoint left behind must not end the run
                log.warning("could not remove checkpoint %s: %s", name, error)
