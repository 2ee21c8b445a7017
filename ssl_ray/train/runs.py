"""A run at rest: what its folder (or object-store prefix) holds, and where the run stands.

    RUN/run.json             format_version, identity (flat keys) and its hash, the whole configuration, versions
    RUN/attempt.json         how often the run was started, and the id of the newest start
    RUN/latest.json          the commit marker: step, checkpoint folder. Only this says where the run is.
    RUN/checkpoints/STEP-ID/ encoder and projector weights, optimiser (safetensors), state.json
    RUN/metrics/STEP.jsonl   one object a step, in segments named by their first step
    RUN/evaluations/*.json   untrained.json and one file for each evaluated step
    RUN/quarantine.json      bad samples met so far
    RUN/failures/*.json      why workers died, a file for each start of theirs that ended so
    RUN/summary.json         written when the run is complete

A checkpoint counts once latest.json names it. Steps after the marker are undone by a resume: their segments go.
"""

import dataclasses
import json
import uuid
from typing import Any

from ssl_ray import __version__, storage
from ssl_ray.config import Config, canonical_hash, identity, to_dict
from ssl_ray.errors import DataError, RunMismatchError, UsageError

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Marker:
    """Where a run stands: `step` steps are done and their results are in `checkpoint` (a name below checkpoints/)."""

    step: int = 0
    checkpoint: str | None = None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of the workers: `number` starts so far, `idle` of them in a row without a new checkpoint."""

    id: str = ""
    number: int = 0
    step: int = 0
    idle: int = 0


def read_json(uri: str) -> dict[str, Any]:
    """The object in the JSON file `uri`; DataError if it is absent or no JSON."""
    try:
        value = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri}: not a JSON file ({error}). Restore it, or start a new run.") from error
    if not isinstance(value, dict):
        raise DataError(f"{uri}: holds {type(value).__name__}, expected an object. Restore it, or start a new run.")
    return value


def write_json(uri: str, value: dict[str, Any]) -> None:
    storage.write_atomic(uri, (json.dumps(value, indent=1) + "\n").encode())


def run_identity(config: Config, *, data_digests: dict[str, str]) -> dict[str, Any]:
    """What decides the results: the configuration's identity and the content of the data, wherever it lies."""
    return identity(config) | data_digests


def default_uri(data_uri: str, run_id: dict[str, Any]) -> str:
    """runs/NAME-HASH, after the last part of the data's URI and the identity."""
    name = data_uri.rstrip("/").rsplit("/", 1)[-1]
    return f"runs/{name}-{canonical_hash(run_id)[:8]}"


def open_run(uri: str, config: Config, run_id: dict[str, Any], *, resume: str) -> bool:
    """Creates the run at `uri`, or accepts the one that is there; returns whether it was there.

    resume: `auto` continues a run of the same identity, `never` refuses to.  Raises RunMismatchError with the
    differing keys if the run is another one, UsageError if it exists and `resume` is `never`.
    """
    at = storage.join(uri, "run.json")
    if not storage.exists(at):
        if storage.exists(storage.join(uri, "latest.json")):
            raise DataError(f"{uri}: has checkpoints but no run.json. Restore it, or use another run=URI.")
        record = {
            "format_version": FORMAT_VERSION,
            "hash": canonical_hash(run_id),
            "identity": run_id,
            "config": to_dict(config),
            "ssl_ray": __version__,
        }
        write_json(at, record)
        return False
    there = load_run(uri)
    if there["hash"] != canonical_hash(run_id):
        raise RunMismatchError(f"{uri} holds another run: {_differences(there['identity'], run_id)}.\n"
                               "Use another run=URI, or the same values to continue it.")  # fmt: skip
    if resume == "never":
        raise UsageError(f"{uri} exists already. Use another run=URI, or --resume auto to continue it.")
    return True


def load_run(uri: str) -> dict[str, Any]:
    """run.json of the run at `uri`; DataError if there is none or it is of another format."""
    at = storage.join(uri, "run.json")
    if not storage.exists(at):
        raise DataError(f"{uri}: no run here (no run.json). `ssl-ray runs list` shows the runs below a folder.")
    record = read_json(at)
    if record.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{at}: format_version is {record.get('format_version')}, this ssl_ray {__version__} reads {FORMAT_VERSION}."
        )
    return record


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    shown = [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys]
    return "; ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def read_marker(uri: str) -> Marker:
    """The committed position of the run at `uri`: step 0 without a checkpoint where nothing was committed yet."""
    at = storage.join(uri, "latest.json")
    if not storage.exists(at):
        return Marker()
    data = storage.read_bytes(at)
    try:
        value = json.loads(data)
        step, name = value["step"], value["checkpoint"]
        if not (isinstance(step, int) and isinstance(name, str)):
            raise TypeError("step or checkpoint of another type")
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{at}: damaged, it does not name a checkpoint. {_remedy(uri)}") from error
    return Marker(step, name)


def _remedy(uri: str) -> str:
    """What to do about a damaged marker: the newest checkpoint that is whole, with the metrics up to it, is what it named."""
    steps = {record["step"] for record in read_metrics(uri)}
    for name in reversed(storage.list_names(storage.join(uri, "checkpoints"))):
        step, at = checkpoint_step(name), storage.join(uri, "checkpoints", name)
        if step - 1 in steps and storage.exists(storage.join(at, "state.json")):  # which is written last
            return f"Put this into it, the newest whole checkpoint: {json.dumps({'step': step, 'checkpoint': name})}"
    return "Remove it, and the run begins again."


def begin_attempt(uri: str) -> Attempt:
    """Counts one more start of the workers from the committed position, and undoes what lies behind it."""
    marker, at = read_marker(uri), storage.join(uri, "attempt.json")
    before = Attempt(**read_json(at)) if storage.exists(at) else Attempt()
    idle = before.idle + 1 if before.number and before.step == marker.step else 0
    attempt = Attempt(id=uuid.uuid4().hex[:8], number=before.number + 1, step=marker.step, idle=idle)
    write_json(at, dataclasses.asdict(attempt))
    _discard_uncommitted(uri, marker)
    return attempt


def write_failure(uri: str, reasons: dict[int, str]) -> None:
    """Keeps why workers died, by rank, in RUN/failures/, named by the start that they belonged to."""
    attempt = newest_attempt(uri)
    record = {"attempt": attempt.number, "step": attempt.step, "reasons": reasons}
    write_json(storage.join(uri, "failures", f"{attempt.number:06d}.json"), record)


def failure_names(uri: str) -> list[str]:
    return storage.list_names(storage.join(uri, "failures"))


def newest_failure(uri: str) -> str:
    """One line of why a worker died last, or nothing."""
    names = failure_names(uri)
    if not names:
        return ""
    rank, reason = next(iter(read_json(storage.join(uri, "failures", names[-1]))["reasons"].items()))
    lines = reason.strip().splitlines() or ["no reason given"]
    # A Python traceback ends with its error, a report of Ray's begins with it.
    return f"Worker {rank}: {lines[-1 if 'Traceback' in reason else 0][:300]}"


def newest_attempt(uri: str) -> Attempt:
    return Attempt(**read_json(storage.join(uri, "attempt.json")))


def commit(uri: str, *, step: int, checkpoint: str, attempt: str) -> bool:
    """Moves the marker; refuses (False) if a newer start of the workers has taken over."""
    if newest_attempt(uri).id != attempt:
        return False
    write_json(storage.join(uri, "latest.json"), {"step": step, "checkpoint": checkpoint, "attempt": attempt})
    return True


def segment_name(first_step: int) -> str:
    return f"{first_step:010d}.jsonl"


def segment_names(uri: str) -> list[str]:
    return [name for name in storage.list_names(storage.join(uri, "metrics")) if name.endswith(".jsonl")]


def _discard_uncommitted(uri: str, marker: Marker) -> None:
    """Removes metrics and checkpoints that the marker does not cover: their steps will be made again."""
    for name in segment_names(uri):
        if name >= segment_name(marker.step):
            storage.remove(storage.join(uri, "metrics", name))
    for name in storage.list_names(storage.join(uri, "checkpoints")):
        if checkpoint_step(name) >= marker.step and name != marker.checkpoint:
            storage.remove(storage.join(uri, "checkpoints", name))


def read_metrics(uri: str, *, first_segment: str = "") -> list[dict[str, Any]]:
    """The records of all steps in order, or of the segments from the one named `first_segment` on."""
    names = [name for name in segment_names(uri) if name >= first_segment]
    lines = [line for name in names for line in storage.read_bytes(storage.join(uri, "metrics", name)).splitlines()]
    return [json.loads(line) for line in lines]


def checkpoint_step(name: str) -> int:
    return int(name.partition("-")[0])


def evaluation_uri(uri: str, step: int | None) -> str:
    """Where the read-outs after `step` steps are; None: those of the untrained network."""
    return storage.join(uri, "evaluations", "untrained.json" if step is None else f"{step:010d}.json")


def evaluations(uri: str) -> list[dict[str, Any]]:
    """All read-outs of trained weights, by step."""
    names = [name for name in storage.list_names(storage.join(uri, "evaluations")) if name[0].isdigit()]
    return [read_json(storage.join(uri, "evaluations", name)) for name in names]


def best_step(uri: str) -> int | None:
    """The evaluated step with the highest linear (else kNN) accuracy; None without any."""
    scored = [(e.get("linear_accuracy") or e.get("knn_accuracy"), e["step"]) for e in evaluations(uri)]
    return max(((score, step) for score, step in scored if score is not None), default=(None, None))[1]


def superseded(uri: str, *, newest: str, keep: int, pending: int) -> list[str]:
    """Checkpoints that may go: not among the `keep` newest, not the best, not awaiting their read-out (`pending` may)."""
    older = [name for name in storage.list_names(storage.join(uri, "checkpoints")) if name != newest]
    kept, best = set(older[len(older) - (keep - 1) :]), best_step(uri)
    kept |= {name for name in older if checkpoint_step(name) == best}
    kept |= set([name for name in older if awaits_evaluation(uri, name)][-pending:])
    return [name for name in older if name not in kept]


def awaits_evaluation(uri: str, name: str) -> bool:
    asked = storage.exists(storage.join(uri, "checkpoints", name, "evaluate"))
    return asked and not storage.exists(evaluation_uri(uri, checkpoint_step(name)))


def list_runs(uri: str) -> list[dict[str, Any]]:
    """A row for each run directly below `uri`, or for `uri` itself: name, status, steps, accuracy."""
    below = [storage.join(uri, name) for name in storage.list_names(uri)]
    found = [at for at in [uri, *below] if storage.exists(storage.join(at, "run.json"))]
    return [_row(at) for at in found]


def _row(uri: str) -> dict[str, Any]:
    record, marker = load_run(uri), read_marker(uri)
    done = storage.join(uri, "summary.json")
    summary = read_json(done) if storage.exists(done) else {}
    row = {"run": uri, "status": "complete" if summary else "incomplete", "steps": marker.step}
    row |= {"data": record["config"]["data"]["uri"], "seed": record["config"]["seed"]}
    return row | {key: summary.get(key) for key in ("linear_accuracy", "knn_accuracy", "seconds")}
