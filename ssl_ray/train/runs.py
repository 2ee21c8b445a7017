"""A run at rest: what its folder (or object-store prefix) holds, and where the run stands.

    RUN/run.json             format_version, identity (flat keys) and its hash, the whole configuration, versions
    RUN/latest.json          the commit marker: step, checkpoint folder, newest start of the workers. Only this says where
                             the run is.
    RUN/lease                which driver trains the run
    RUN/checkpoints/STEP-ID/ encoder and projector weights, optimiser (safetensors), state.json
    RUN/metrics/*.jsonl      one object a step, in segments named by their first step and the start that wrote them
    RUN/evaluations/*.json   untrained.json and one file for each evaluated step
    RUN/evaluations/protocols/*.json  results of named protocols, see train/protocols.py
    RUN/quarantine.jsonl     bad samples met so far
    RUN/failures/*.json      why workers died, a file for each start of theirs that ended so
    RUN/summary.json         written when the run is complete

A checkpoint counts once latest.json names it. Steps after the marker are undone by a resume: their segments go. A new start of
the workers changes the marker first, so that workers of earlier ones, which may live on for some seconds, commit no more.
"""

import dataclasses
import json
import re
import uuid
from types import NoneType
from typing import Any

from ssl_ray import __version__, storage
from ssl_ray.config import Config, build, canonical_hash, identity, to_dict
from ssl_ray.errors import DataError, ResourceError, RunMismatchError, UsageError

FORMAT_VERSION = 3
EVERY_STEP = ("step", "epoch", "loss", "images", "views", "seconds", "data_wait_s")
"""What every record of a step has."""
NO_TERMS = frozenset((*EVERY_STEP, "lr", "embedding_std", "effective_rank", "bad_samples", "digest"))
"""Of a record of a step; whatever number is beside these is a term of the loss."""
MOVES = 5
"""So often a new start tries to change the marker, while workers of earlier ones commit."""


@dataclasses.dataclass(frozen=True)
class Marker:
    """Where a run stands."""

    step: int = 0
    """So many steps are done."""
    checkpoint: str | None = None
    """Where their results are, below checkpoints/."""
    attempt: str = ""
    """The newest start of the workers."""
    number: int = 0
    """So many starts there were."""
    idle: int = 0
    """Of these, in a row since the last commit."""
    lease: int | None = None
    """That of the driver of the newest start; None: it had none."""
    version: str | None = None
    """Of the file."""


def read_json(uri: str) -> dict[str, Any]:
    """The object in the JSON file `uri`; DataError if it is absent or no JSON."""
    try:
        value = json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError) as error:
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
        if there["identity"] | {"data.excluded": run_id["data.excluded"]} == run_id:
            raise RunMismatchError(
                f"{uri} holds another run: the samples that `ssl-ray data check` found bad (data.excluded) are others now.\n"
                "Continue it with bad.parquet, beside the manifest, as it was, none if there was none, and a larger "
                "data.max_bad_samples; or use another run=URI."
            )
        raise RunMismatchError(f"{uri} holds another run: {_differences(there['identity'], run_id)}.\n"
                               "Use another run=URI, or the same values to continue it.")  # fmt: skip
    if resume == "never":
        raise UsageError(f"{uri} exists already. Use another run=URI, or --resume auto to continue it.")
    return True


def name_of(uri: str) -> str:
    """The last part of a run's URI."""
    return uri.rstrip("/").rpartition("/")[2]


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
    config = record.get("config")
    whole = isinstance(config, dict) and isinstance(config.get("data"), dict) and isinstance(record.get("identity"), dict)
    if not whole or not isinstance(record.get("hash"), str):
        raise DataError(f"{at}: damaged, it does not say what the run is. Restore it, or use another run=URI.")
    return record


def config_of(record: dict[str, Any], uri: str) -> Config:
    """The configuration in `record`, the run.json of the run at `uri`."""
    return build(record["config"], source=storage.join(uri, "run.json"))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    shown = [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys]
    return "; ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def read_marker(uri: str) -> Marker:
    """The committed position of the run at `uri`: step 0 without a checkpoint where nothing was committed yet."""
    at = storage.join(uri, "latest.json")
    data, version = storage.read_versioned(at)
    if data is None:
        return Marker()
    try:
        value = json.loads(data)
        marker = Marker(**value, version=version)
        kinds: dict[str, Any] = {
            "step": int,
            "checkpoint": (str, NoneType),
            "attempt": str,
            "number": int,
            "idle": int,
            "lease": (int, NoneType),
        }
        if not all(isinstance(getattr(marker, name), kind) for name, kind in kinds.items()) or "step" not in value:
            raise TypeError("a value of another type")
        if marker.step < 0 or (marker.checkpoint is None) != (marker.step == 0):
            raise ValueError("a step without a checkpoint")
        if marker.checkpoint is not None and not re.fullmatch(r"\d+-[\w-]+", marker.checkpoint):
            raise ValueError("no name of a checkpoint")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{at}: damaged, it does not name a checkpoint. {_remedy(uri)}") from error
    return marker


def _remedy(uri: str) -> str:
    """What to do about a damaged marker: the newest checkpoint that is whole, with the metrics up to it, is what it named."""
    steps = {record["step"] for record in read_metrics(uri)}
    for name in reversed(storage.list_names(storage.join(uri, "checkpoints"))):
        step, at = checkpoint_step(name), storage.join(uri, "checkpoints", name)
        if step - 1 in steps and storage.exists(storage.join(at, "state.json")):  # which is written last
            return f"Put this into it, the newest whole checkpoint: {json.dumps({'step': step, 'checkpoint': name})}"
    return "Remove it, and the run begins again."


def begin_attempt(uri: str, *, lease: int | None) -> Marker:
    """Counts one more start of the workers from the committed position, shuts out those of earlier ones, and undoes what lies
    behind the position.

    lease: the number of the driver's.  Raises ResourceError if a later driver has taken over the run.
    """
    for _ in range(MOVES):
        marker = read_marker(uri)
        undone = _uncommitted(uri, marker)
        if lease is not None and marker.lease is not None and marker.lease > lease:
            raise ResourceError(f"{uri}: another driver has taken over this run; this one has stopped.")
        # A marker that was mended by hand may know of fewer starts than there were.
        number = max([marker.number, *(segment_number(name) for name in segment_names(uri))]) + 1
        try:
            started = _move(uri, marker, attempt=uuid.uuid4().hex[:8], number=number, idle=marker.idle + 1, lease=lease)
        except storage.Changed:  # by workers that were about to commit
            continue
        for at in undone:
            storage.remove(at)
        return started
    raise ResourceError(f"{uri}: its latest.json changes all the time. Stop whatever else trains this run.")


def _move(uri: str, marker: Marker, **changes: Any) -> Marker:
    """Writes the marker with `changes`, if it is the one that was read; raises storage.Changed if not.

    Without a lease, for storage that knows no conditional writes, a moment is left in which another could write.
    """
    moved, at = dataclasses.replace(marker, **changes), storage.join(uri, "latest.json")
    record = dataclasses.asdict(moved)
    del record["version"]
    data = (json.dumps(record, indent=1) + "\n").encode()
    if moved.lease is not None:
        return dataclasses.replace(moved, version=storage.swap(at, data, version=marker.version))
    if read_marker(uri) != marker:
        raise storage.Changed(at)
    storage.write_atomic(at, data)
    return read_marker(uri)


def committed(uri: str, *, step: int | None) -> str:
    """The name, below RUN/checkpoints, of the newest committed checkpoint or of that of `step`; DataError if there is none."""
    marker = read_marker(uri)
    names = {checkpoint_step(name): name for name in storage.list_names(storage.join(uri, "checkpoints"))}
    names = {at: name for at, name in names.items() if at < marker.step or name == marker.checkpoint}
    if not names:
        raise DataError(f"{uri}: no checkpoint was committed yet. Continue the run first: ssl-ray pretrain -c {uri}")
    wanted = marker.step if step is None else step
    if wanted not in names:
        raise DataError(f"{uri}: no checkpoint of step {wanted}. There are: {', '.join(map(str, sorted(names)))}.")
    return names[wanted]


def ask_to_stop(uri: str, marker: Marker | None = None) -> None:
    """Has the workers stop with a checkpoint: those of the start that `marker` names, or whichever there are."""
    storage.write_atomic(storage.join(uri, "stop"), b"" if marker is None else str(marker.number).encode())


def stop_asked(uri: str, marker: Marker) -> bool:
    """Whether the workers of this start are to stop."""
    return storage.read_versioned(storage.join(uri, "stop"))[0] in (b"", str(marker.number).encode())


def write_failure(uri: str, reasons: dict[int, str]) -> None:
    """Keeps why workers died, by rank, in RUN/failures/, named by the start that they belonged to."""
    marker = read_marker(uri)
    record = {"attempt": marker.number, "step": marker.step, "reasons": reasons}
    write_json(storage.join(uri, "failures", f"{marker.number:06d}.json"), record)


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


def commit(uri: str, marker: Marker, *, step: int, checkpoint: str) -> Marker:
    """Moves the marker; raises storage.Changed if a newer start of the workers has taken over."""
    return _move(uri, marker, step=step, checkpoint=checkpoint, idle=0)


def segment_name(first_step: int, number: int = 0) -> str:
    """Of a segment of the metrics that the start `number` of the workers wrote; without, a name before all of that step."""
    return f"{first_step:010d}-{number:06d}.jsonl"


def segment_number(name: str) -> int:
    return int(name.removesuffix(".jsonl").partition("-")[2])


def segment_step(name: str) -> int:
    return int(name.partition("-")[0])


def segment_names(uri: str) -> list[str]:
    names = storage.list_names(storage.join(uri, "metrics"))
    return [name for name in names if re.fullmatch(r"\d{10}-\d{6}\.jsonl", name)]


def _uncommitted(uri: str, marker: Marker) -> list[str]:
    """Metrics and checkpoints that the marker does not cover: their steps will be made again.

    They are listed before the marker is changed, so that whatever a later start writes is not among them, however long this
    driver sleeps before it removes them.
    """
    metrics = [storage.join(uri, "metrics", name) for name in segment_names(uri) if name >= segment_name(marker.step)]
    names = storage.list_names(storage.join(uri, "checkpoints"))
    behind = [name for name in names if checkpoint_step(name) >= marker.step and name != marker.checkpoint]
    return [*metrics, *(storage.join(uri, "checkpoints", name) for name in behind)]


def read_metrics(uri: str, *, first_segment: str = "") -> list[dict[str, Any]]:
    """The records of all steps in order, or of the segments from the one named `first_segment` on.

    Where a start of the workers began, what earlier ones wrote ends: a worker that lived on may have written more.
    """
    names = segment_names(uri)
    records: list[dict[str, Any]] = []
    for name in names:
        if name >= first_segment:
            later = [segment_step(other) for other in names if segment_number(other) > segment_number(name)]
            stop = min(later, default=None)
            read = _read_segment(storage.join(uri, "metrics", name))
            records += [record for record in read if stop is None or record["step"] < stop]
    return records


def _read_segment(at: str) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in storage.read_bytes(at).splitlines()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: not lines of JSON ({error}). Restore it, or start a new run.") from error
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise DataError(f"{at}: a line is no record of a step. Restore it, or start a new run.")
    return records


def checkpoint_step(name: str) -> int:
    return int(name.partition("-")[0])


def evaluation_uri(uri: str, step: int | None) -> str:
    """Where the read-outs after `step` steps are; None: those of the untrained network."""
    return storage.join(uri, "evaluations", "untrained.json" if step is None else f"{step:010d}.json")


def protocol_uri(uri: str, step: int | None, name: str) -> str:
    """Where the result of a named protocol after `step` steps is."""
    at = "untrained" if step is None else f"{step:010d}"
    return storage.join(uri, "evaluations", "protocols", f"{at}-{name}.json")


def evaluations(uri: str) -> list[dict[str, Any]]:
    """All read-outs of trained weights, by step."""
    names = [name for name in storage.list_names(storage.join(uri, "evaluations")) if name[0].isdigit()]
    return [read_json(storage.join(uri, "evaluations", name)) for name in names]


def best_step(uri: str) -> int | None:
    """The evaluated step with the highest linear (else kNN) accuracy; None without any."""
    scored = [(e.get("linear_accuracy") or e.get("knn_accuracy"), e["step"]) for e in evaluations(uri)]
    return max(((score, step) for score, step in scored if score is not None), default=(None, None))[1]


def superseded(uri: str, *, newest: str, keep: int, pending: int) -> list[str]:
    """Checkpoints that may go: not among the `keep` newest, not the best, not awaiting their read-out (`pending` may).

    None that is newer than `newest`: it is of workers that have taken over.
    """
    older = [name for name in storage.list_names(storage.join(uri, "checkpoints")) if name < newest]
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
    return [_row_or_damage(at) for at in found]


def _row_or_damage(uri: str) -> dict[str, Any]:
    """That a run cannot be read hides no other one."""
    try:
        return _row(uri)
    except DataError as error:
        names = ("steps", "data", "seed", "linear_accuracy", "knn_accuracy", "seconds")
        return {"run": uri, "status": f"not readable: {str(error).splitlines()[0]}"} | dict.fromkeys(names)


def _row(uri: str) -> dict[str, Any]:
    record, marker = load_run(uri), read_marker(uri)
    done = storage.join(uri, "summary.json")
    summary = read_json(done) if storage.exists(done) else {}
    row = {"run": uri, "status": "complete" if summary else "incomplete", "steps": marker.step}
    row |= {"data": record["config"]["data"].get("uri"), "seed": record["config"].get("seed")}
    return row | {key: summary.get(key) for key in ("linear_accuracy", "knn_accuracy", "seconds")}
