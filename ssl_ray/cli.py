"""The command line: verbs that parse, call and print, and turn an error into an exit code. No logic lives here."""

import argparse
import contextlib
import difflib
import functools
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ssl_ray import __version__, config, console, storage
from ssl_ray.config import Config
from ssl_ray.errors import DataError, ResourceError, SslRayError, Stopped, UsageError, shown
from ssl_ray.model_card import FILES
from ssl_ray.train import trackers
from ssl_ray.train.trackers import Trackers, tracked

if TYPE_CHECKING:
    from ssl_ray.study.spec import Spec

RECIPES = Path(__file__).parent / "recipes"
STUDIES = Path(__file__).parent / "study" / "studies"
MEAN_BYTES, SHARD_BYTES = 110_000, 2**26
"""Of a data set that is planned: images as ImageNet's, shards as `data pack` makes them."""
MAX_RECIPE, MAX_DEPTH = 2**20, 20
"""Characters, and lists and sections within one another."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 ok, 2 usage, 3 data or storage, 4 resources, 1 other, 130 stopped."""
    options = _parse(arguments)
    try:
        with console.stdout_for_the_result():
            value, show = options.verb(options)
        if options.json:
            print(json.dumps(value, indent=1, default=str))
        else:
            show(value)
        sys.stdout.flush()
        if options.verb is _submit:
            return value["exit_code"] or 0
        if options.verb in (_study_run, _study_resume) and value["counts"].get("failed"):
            return SslRayError.exit_code
        if options.verb is _doctor and not all(finding["ok"] for finding in value):
            return ResourceError.exit_code
        return DataError.exit_code if options.verb is _data_check and not value["ok"] else 0
    except KeyboardInterrupt:
        console.error("stopped.")
        return Stopped.exit_code
    except Exception as error:
        if _interrupted.is_set() and not isinstance(error, Stopped):  # a library whose import is interrupted may raise anything
            console.error(f"stopped, which ended in {type(error).__name__}: {error}")
            return Stopped.exit_code
        if isinstance(error, SslRayError):
            console.error(str(error))
            return error.exit_code
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        raise


def run(arguments: list[str] | None = None) -> NoReturn:
    """`main` as a process. It ends at once: while the interpreter takes itself apart, threads of its libraries may abort it
    (one in eight packs on a busy machine), after all the work is done."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, _interrupt)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_interrupted = threading.Event()


def _interrupt(number: int, _frame: object) -> NoReturn:
    """Ends a verb, once: `timeout` sends the signal to the process and to its group. A second Ctrl-C waits for nothing."""
    _interrupted.set()
    signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else lambda *_: os._exit(Stopped.exit_code))
    raise KeyboardInterrupt


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Of the recipes that come with ssl_ray, or of the studies."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _read_yaml(text: str) -> Any:
    """What PyYAML's safe loader makes of it, but that a key that appears twice, of which the last would count, is refused."""
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value[:100]} again", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    loader = Once(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_recipe(name: str, *, folder: Path = RECIPES) -> dict[str, Any]:
    """The values of a recipe: the name of one that comes with ssl_ray, a YAML file, or a run (its configuration).

    folder: of those that come with ssl_ray; with STUDIES it is a study that is read.
    """
    known = recipe_names(folder)
    path = folder / f"{name}.yaml" if name in known else Path(name)
    try:
        is_run, there = "://" in name or path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # longer than a name can be, or with a zero byte
        raise UsageError(f"{name}: no such recipe, file or run ({storage.one_line(error)}).") from error
    if is_run:
        from ssl_ray.train.runs import load_run

        return load_run(name)["config"] | {"run": name}
    if not there:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
        raise UsageError(f"{name}: no such recipe, file or run. {hint}")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_RECIPE + 1)
        if len(text) > MAX_RECIPE:
            raise UsageError(f"{path}: no recipe, it has more than {MAX_RECIPE} characters.")
        _require_plain(text, path)
        values = _read_yaml(text)
    except SslRayError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except Exception as error:  # of PyYAML: YAMLError, ValueError, LookupError, AttributeError, RecursionError, ...
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or storage.one_line(error)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(f"{path}: not YAML ({where}{problem}).") from error
    if values is None:  # nothing but comments
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: got {type(values).__name__}, expected keys and values, as in views: {{count: 8}}.")
    return values


def _require_plain(text: str, path: Path) -> None:
    """Raises UsageError for YAML of a few lines that means gigabytes (aliases of aliases) or takes hours (nested deeply)."""
    import yaml

    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise UsageError(f"{path}: YAML's aliases (*name) are not read. Write the value where it is needed.")
        if depth > MAX_DEPTH:
            raise UsageError(f"{path}: no recipe, it is nested more than {MAX_DEPTH} deep.")


def read_config(recipe: str | None, overrides: list[str]) -> Config:
    """The configuration that a recipe and KEY=VALUE overrides give; the digits recipe where neither names data."""
    names_data = any(text.removeprefix("--").startswith("data.uri=") for text in overrides)
    if recipe is None and not names_data:
        recipe = "digits"
    values = {} if recipe is None else read_recipe(recipe)
    return config.build(values, overrides, source=recipe or "defaults")


# Verbs: each returns what it found, how to show it, and perhaps the error that it is ------------------------------------

Result = tuple[Any, Callable[[Any], None]]


def _pretrain(options: argparse.Namespace) -> Result:
    made = read_config(options.config, options.overrides)
    with console.progress(quiet=options.json) as show, tracked(show, _trackers(options)) as progress:
        from ssl_ray.train.pretrain import pretrain

        return pretrain(made, resume=options.resume, leased=not options.no_lease, progress=progress), console.summary


def _trackers(options: argparse.Namespace) -> Trackers:
    return Trackers(tensorboard=options.tensorboard, wandb=options.wandb, mlflow=options.mlflow)


def _evaluate(options: argparse.Namespace) -> Result:
    from ssl_ray.each import in_turn
    from ssl_ray.ray_map import over_cluster
    from ssl_ray.train.readouts import evaluate_checkpoint

    if options.protocols:
        return _evaluate_protocols(options), console.protocols
    _require_protocol(options)
    with over_cluster(in_turn, label=options.label) as each:
        return evaluate_checkpoint(options.run, step=options.step, untrained=options.untrained, each=each), console.evaluation


def _export(options: argparse.Namespace) -> Result:
    from ssl_ray.export import export

    formats = list(dict.fromkeys(options.format))
    how = {"step": options.step, "license": options.license, "overwrite": options.overwrite}
    return export(options.run, options.output, formats=formats, **how), console.exported


def _require_protocol(options: argparse.Namespace) -> None:
    given = {"--data": options.data, "--test": options.test, "--confusion": options.confusion, "--seeds": options.seeds}
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} is of a protocol. Name one, for example: ssl-ray evaluate {options.run} linear")


def _evaluate_protocols(options: argparse.Namespace) -> list[dict[str, Any]]:
    from ssl_ray.each import in_turn
    from ssl_ray.ray_map import over_cluster
    from ssl_ray.train.protocols import draw_confusion, evaluate_protocols

    if options.confusion is not None and len(options.protocols) != 1:
        raise UsageError(f"--confusion draws that of one protocol, got {len(options.protocols)}. Name one.")
    with over_cluster(in_turn, label=options.label) as each:
        results = evaluate_protocols(
            options.run,
            options.protocols,
            step=options.step,
            untrained=options.untrained,
            data_uri=options.data,
            test_uri=options.test,
            seeds=options.seeds or 1,
            each=each,
        )
    if options.confusion is not None:
        storage.write_atomic(options.confusion, draw_confusion(results[0]))
    return results


def _embed(options: argparse.Namespace) -> Result:
    from ssl_ray.each import in_turn
    from ssl_ray.ray_map import over_cluster
    from ssl_ray.train.embed import embed

    with console.counting("images", quiet=options.json) as progress, over_cluster(in_turn, label=options.label) as each:
        return embed(options.run, options.uri, options.output, each=each, progress=progress), console.record


def _neighbours(options: argparse.Namespace) -> Result:
    from ssl_ray.each import in_turn
    from ssl_ray.ray_map import over_cluster
    from ssl_ray.train.embed import draw_neighbours

    with over_cluster(in_turn, label=options.label) as each:
        picture, found = draw_neighbours(options.run, options.uri, num_images=options.images, k=options.k, each=each)
    storage.write_atomic(options.output, picture)
    return {"written": options.output} | found, console.record


def _plan(options: argparse.Namespace) -> Result:
    made = read_config(options.config, options.overrides)
    if options.images is None and (options.shards, options.mean_bytes) != (None, None):
        raise UsageError("--shards and --mean-bytes are of a data set that is not there yet. Say how many --images it has.")
    with console.progress(quiet=options.json) as progress:
        from ssl_ray.train.forecast import forecast, planned

        data = None
        if options.images is not None:
            size = options.mean_bytes or MEAN_BYTES
            shards = options.shards or max(1, options.images * size // SHARD_BYTES)
            data = planned(made, images=options.images, shards=shards, mean_bytes=size)
        steps, rate = 0 if options.no_probe else 3, options.images_per_s
        planned_run = forecast(made, data=data, probe_steps=steps, images_per_s=rate, gpu=options.gpu, progress=progress)
        return planned_run, console.plan


def _profile(options: argparse.Namespace) -> Result:
    made = read_config(options.config, options.overrides)
    with console.progress(quiet=options.json) as progress:
        from ssl_ray.train.profile import profile

        return profile(made, steps=options.steps, progress=progress), console.profile


def _config_show(options: argparse.Namespace) -> Result:
    made = read_config(options.config, options.overrides)
    return config.to_dict(made), console.yaml_text


def _config_schema(options: argparse.Namespace) -> Result:
    return config.describe(), console.schema


def _config_diff(options: argparse.Namespace) -> Result:
    a, b = (config.flatten(config.to_dict(read_config(name, []))) for name in (options.a, options.b))
    return [{"key": key, options.a: a[key], options.b: b[key]} for key in a if a[key] != b[key]], console.rows_or("no difference")


def _doctor(options: argparse.Namespace) -> Result:
    from ssl_ray.doctor import doctor

    made = read_config(options.config, options.overrides) if options.config is not None or options.overrides else None
    return doctor(options.uri, address=options.address, config=made), console.findings


def _submit(options: argparse.Namespace) -> Result:
    from ssl_ray import submit

    given = _parse(options.command)  # what is wrong with it is said here, before anything is uploaded
    if given.verb not in _JOBS:
        raise UsageError(f"submit: {options.command[0]} does not run as a job. There are: {', '.join(_JOBS.values())}.")
    where, run = options.working_dir, None
    file = getattr(given, "config", None) or getattr(given, "study", None)
    if where is not None and (not where or not Path(where).is_dir()):
        raise UsageError(f"--working-dir {where or repr(where)}: no folder.")
    if file is not None and where is None and Path(file).is_file():
        raise UsageError(f"{file} is a file of this machine.\nGive --working-dir with a folder that holds it, which is uploaded.")
    if file is not None and where is not None:
        _require_uploaded(file, where, folder=STUDIES if given.verb is _study_run else RECIPES)
    with contextlib.chdir(where or "."):  # in which the job runs
        if given.verb is _pretrain:
            run = read_config(given.config, given.overrides).run
        elif given.verb is _study_run and where is not None and not Path(given.study).is_absolute():
            read_recipe(given.study, folder=STUDIES)
    if where is not None and given.verb in (_pretrain, _study_run):
        _require_kept(*(("run=", run) if given.verb is _pretrain else ("-o ", given.output)))

    def say(text: str) -> None:
        print(shown(text), file=sys.stderr, flush=True)

    def write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    how = {"working_dir": where, "uv": options.uv, "follow": not options.no_follow}
    done = submit.submit(options.command, run=run, address=options.address, **how, show=say, write=write)
    return done, console.record


def _require_uploaded(file: str, where: str, *, folder: Path) -> None:
    """Raises UsageError for a file of this machine that the job, which runs in its copy of the folder `where`, would not find.

    folder: of what comes with ssl_ray.
    """
    at, here = Path(where).resolve(), Path(file).resolve()
    there = Path(os.path.normpath(at / file))
    if file in recipe_names(folder) or not (here.is_file() or there.is_file()):
        return
    if not Path(file).is_absolute() and there.is_file() and there.is_relative_to(at):
        return
    do = f"Write {here.relative_to(at)}" if here.is_relative_to(at) else f"Put it into {where} and write its path from there"
    raise UsageError(f"{file}: not where the job looks for it, which runs in its copy of --working-dir {where}.\n{do}.")


def _require_kept(key: str, place: str | None) -> None:
    """Raises UsageError for a place of results within the job's copy of its folder, which Ray removes."""
    if place is not None and (not storage.is_local(place) or os.path.isabs(os.path.expanduser(place.removeprefix("file://")))):
        return
    got = f"{key.strip()} is not given" if place is None else f"{key}{place} is a relative path"
    raise UsageError(
        f"{got}: results would lie in the job's copy of --working-dir, which Ray removes.\n"
        f"Give {key}s3://BUCKET/NAME, or {key}/FOLDER, a path that all machines see."
    )


def _debug(options: argparse.Namespace) -> Result:
    from ssl_ray.debug import debug, default_output

    output = options.output or default_output(options.run)
    return debug(options.run, output, address=options.address), console.bundle


def _runs_list(options: argparse.Namespace) -> Result:
    from ssl_ray.train.runs import list_runs

    return list_runs(options.uri), console.rows_or(f"no runs below {options.uri}")


def _study_run(options: argparse.Namespace) -> Result:
    from ssl_ray.study import paper, prepare, run

    values = read_recipe(options.study, folder=STUDIES)
    small = values.pop("small", None)
    if options.small and small is None:
        raise UsageError(f"--small: {options.study} has no part `small`, which says what is smaller.")
    values = {"name": Path(options.study).stem} | values | (small if options.small else {})
    parts = values.get("parts")
    if parts is not None and (not isinstance(parts, dict) or sorted(parts) != sorted(paper.PARTS) or len(values) != 2):
        raise UsageError(f"{options.study}: parts: expected {', '.join(paper.PARTS)}, a study each, and nothing beside them.")
    trackers.require(_trackers(options))
    uri = storage.absolute(options.output or f"studies/{values['name']}{'-small' if options.small else ''}")
    if parts is not None:
        made = {name: _read_study({"name": name} | part, options) for name, part in parts.items()}
        with console.progress(quiet=options.json) as progress:
            return paper.run_parts(uri, made, progress=progress, trackers=_trackers(options)), console.claims
    spec, base = _read_study(values, options)
    with console.progress(quiet=options.json) as progress:
        begin = functools.partial(prepare.prepare, uri, spec, base, progress=progress)
        study = run.run(uri, begin=begin, progress=progress, trackers=_trackers(options))
    return study.summary, console.study_summary


def _read_study(values: dict[str, Any], options: argparse.Namespace) -> "tuple[Spec, Config]":
    """A study as its text and the overrides say, and the configuration that its trials start from."""
    from ssl_ray.study import spec

    made = spec.parse(values, source=options.study)
    given = [text.removeprefix("--").partition("=")[0] for text in options.overrides]
    swept = {*made.sweep, *(key for cell in made.cells for key in cell)} & {*given, *made.keys}
    if swept:
        raise UsageError(f"{min(swept)} is swept by {options.study}, and cannot be set for all trials.")
    spec.require_free(made, given, options.study)
    return made, read_config(made.recipe, spec.overrides(made) + options.overrides)


def _study_resume(options: argparse.Namespace) -> Result:
    from ssl_ray.study import run

    trackers.require(_trackers(options))

    with console.progress(quiet=options.json) as progress:
        study = run.run(storage.absolute(options.uri), progress=progress, trackers=_trackers(options))
    return study.summary, console.study_summary


def _study_status(options: argparse.Namespace) -> Result:
    from ssl_ray.study import results

    return results.rows(results.read_study(storage.absolute(options.uri))), console.rows_or("no trials")


def _study_stop(options: argparse.Namespace) -> Result:
    from ssl_ray.study import run

    run.ask_to_stop(storage.absolute(options.uri), options.trial)
    return {"asked to stop": options.trial or options.uri}, console.record


def _study_list(options: argparse.Namespace) -> Result:
    from ssl_ray.study import results

    return results.list_studies(storage.absolute(options.uri)), console.rows_or(f"no studies below {options.uri}")


def _data_pack(options: argparse.Namespace) -> Result:
    from ssl_ray import shards
    from ssl_ray.each import in_threads
    from ssl_ray.ray_map import over_cluster

    with console.counting("images", quiet=options.json) as progress, over_cluster(in_threads, label=options.label) as each:
        where = {"split": options.split, "root": options.root, "download": options.download}
        source = shards.open_source(options.source, **where, each=each)
        if not 0 < options.shard_mb < 2**20:
            raise UsageError(f"--shard-mb: got {options.shard_mb:g}, expected 0.0625 or more, up to 1048576.")
        size = int(options.shard_mb * 2**20)
        each = in_threads if source.on_this_machine else each
        how = {"seed": options.seed, "shard_bytes": size, "overwrite": options.overwrite}
        manifest = shards.pack(source, options.uri, **how, each=each, progress=progress)
    return _manifest_record(manifest) | ({} if source.left_out is None else {"left_out": source.left_out}), console.record


def _data_index(options: argparse.Namespace) -> Result:
    from ssl_ray import shards
    from ssl_ray.each import in_threads
    from ssl_ray.ray_map import over_cluster

    with console.counting("shards", quiet=options.json) as progress, over_cluster(in_threads, label=options.label) as each:
        manifest = shards.index(options.uri, output=options.output, each=each, progress=progress)
    note = shards.order_note(manifest)
    return _manifest_record(manifest) | ({} if note is None else {"note": note}), console.record


def _manifest_record(manifest: Any) -> dict[str, Any]:
    return {
        "manifest": manifest.uri,
        "shards": len(manifest.counts),
        "samples": manifest.num_samples,
        "bytes": int(manifest.sizes.sum()),
        "classes": None if manifest.class_counts is None else len(manifest.class_counts),
    }


def _data_check(options: argparse.Namespace) -> Result:
    from ssl_ray import shards, views
    from ssl_ray.each import in_turn
    from ssl_ray.ray_map import over_cluster

    with console.counting("shards", quiet=options.json) as progress, over_cluster(in_turn, label=options.label) as each:
        # Three channels: what cannot be decoded for them cannot be for one either.
        decode = functools.partial(views.decode, channels=3)
        report = shards.check(options.uri, decode=decode, each=each, progress=progress)
    return report, console.check


def _data_stats(options: argparse.Namespace) -> Result:
    from ssl_ray import shards

    return shards.stats(options.uri), console.record


def _data_preview(options: argparse.Namespace) -> Result:
    from ssl_ray.stream import draw_preview

    made = read_config(options.config, [f"data.uri={options.uri}", *options.overrides])
    picture = draw_preview(made.data.uri, spec=made.views, seed=made.seed, num_images=options.images)
    storage.write_atomic(options.output, picture)
    return {"written": options.output}, console.record


def _dashboard(options: argparse.Namespace) -> Result:
    from ssl_ray.dashboard import demo, server

    if options.demo == (options.uri is not None):
        raise UsageError("give either the URI of studies or --demo.\nFor example: ssl-ray dashboard studies")
    token = None if options.token_file is None else _read_token(options.token_file)

    def ready(address: str) -> None:
        print(f"{address}{'' if token is None else '?token=TOKEN'}  (Ctrl-C ends it)", file=sys.stderr, flush=True)

    with demo.opened() if options.demo else contextlib.nullcontext(options.uri) as uri:
        server.serve(uri, host=options.host, port=options.port, token=token, ready=ready)
    return {"served": "the demo" if options.demo else uri}, console.record


def _read_token(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--token-file {file}: cannot be read ({storage.one_line(error)}).\nMake one: openssl rand -hex 32 > {file}"
        ) from error


def _require_outputs(files: list[str | None], *, below: str) -> None:
    """Raises UsageError for what cannot be written: no file, a folder that is not there, a file of the study, one for two."""
    given = [storage.absolute(file) for file in files if file]
    for file in given:
        inside = file.removeprefix(storage.absolute(below).rstrip("/") + "/")
        if inside != file and inside.partition("/")[0] in ("study.json", "summary.json", "trials", "stops", "lease"):
            raise UsageError(f"{file}: part of the study, which stays as it is. Give another place.")
        if given.count(file) > 1:
            raise UsageError(f"{file}: got for two texts, expected a file each.")
        path = Path(file.removeprefix("file://"))
        if storage.is_local(file) and ((path.exists() and not path.is_file()) or path.is_symlink() or not path.parent.is_dir()):
            raise UsageError(f"{file}: expected a file in a folder that is there.")


def _report(options: argparse.Namespace) -> Result:
    from ssl_ray.dashboard import report
    from ssl_ray.study.results import read_study

    if not any((options.output, options.markdown, options.latex, options.figures)):
        raise UsageError("nothing to write. Give -o study.html, --markdown FILE, --latex FILE or --figures FOLDER.")
    _require_outputs([options.output, options.markdown, options.latex], below=options.uri)
    if options.figures:
        report.browser()  # before the work, if it is not there
    study = read_study(storage.absolute(options.uri))
    written = []
    texts = [
        (options.output, lambda: report.html(study, now=time.time())),
        (options.markdown, lambda: report.markdown(study)),
        (options.latex, lambda: report.latex(study)),
    ]
    for file, make in texts:
        if file:
            storage.write_atomic(file, make().encode())
            written.append(file)
    if options.figures:
        written += report.write_figures(study, options.figures)
    return {"written": written}, lambda value: print(*value["written"], sep="\n")


# The parser ---------------------------------------------------------------------------------------------------------

_MOST_USED = {
    "run": "URI",
    "data.uri": "URI",
    "data.fraction": "0.1",
    "views.count": "8",
    "model.encoder": "resnet18",
    "model.projector_dim": "64",
    "loss.name": "vicreg",
    "loss.beta": "0.02",
    "optim.lr": "0.002",
    "train.batch": "256",
    "train.epochs": "100",
    "train.workers": "4",
    "seed": "1",
}
"""Keys that the help of a verb names, with a value each."""


def _keys_help() -> str:
    helps = {row["key"]: row["help"] for row in config.describe()}
    shown = [(f"{key}={value}", helps[key] or "") for key, value in _MOST_USED.items()]
    width = max(len(key) for key, _ in shown)
    lines = [f"  {key:<{width}}  {textwrap.shorten(help, 88, placeholder=' ...')}".rstrip() for key, help in shown]
    return "\n".join(["most used keys (all of them: ssl-ray config schema):", *lines])


_EXAMPLES = """examples:
  ssl-ray pretrain                                        the built-in digits, about two minutes on two CPU cores
  ssl-ray pretrain -c fashion-mnist views.count=8 seed=1  a recipe, with two keys changed
  ssl-ray pretrain data.uri=shards/mine run=runs/mine     shards made by `ssl-ray data pack`; the same line continues the run
"""


class _Parser(argparse.ArgumentParser):
    """Without its verb it shows the help; the text that `explain` makes stands below it."""

    def format_help(self) -> str:
        self.epilog = self._defaults["explain"]() if "explain" in self._defaults else self.epilog
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: VERB"):
            self.print_help(sys.stderr)
            self.exit(UsageError.exit_code)
        given, _, known = message.removeprefix("argument VERB: invalid choice: ").partition(" (choose from ")
        near = difflib.get_close_matches(given.strip("'"), re.findall(r"[\w-]+", known), n=1)
        if near:
            message = f"no verb {given}, did you mean {near[0]}?"
        self.exit(UsageError.exit_code, f"{self.prog}: {shown(message)}\nRun `{self.prog} --help` for what there is.\n")


_KEY = re.compile(r"[^/:=]+=")
"""The begin of KEY=VALUE; of a folder or URI with a = in it another part comes first."""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a verb. Keys may stand before, between and after them, which argparse does not take on its own."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.verb is _submit:
        if not rest:
            parser.error("submit: nothing to submit. For example: ssl-ray submit pretrain run=s3://BUCKET/runs/one")
        options.command, rest = rest, []
    if hasattr(options, "overrides"):
        keys = [text for text in rest if not text.startswith("-") or (text.startswith("--") and "=" in text)]
        options.overrides = options.overrides + keys
        rest = [text for text in rest if text not in keys]
    if options.verb is _doctor:  # whose storage may stand before, between and after the keys too
        words = [*([] if options.uri is None else [options.uri]), *options.overrides]
        places = [text for text in words if not _KEY.match(text)]
        options.uri, options.overrides = next(iter(places), None), [text for text in words if _KEY.match(text)]
        rest += places[1:]
    if hasattr(options, "protocols"):
        options.protocols += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        parser.error(f"not understood: {' '.join(rest)}")
    return options


def _add(verbs: Any, name: str, verb: Any, help: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(verb=verb)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")
    return parser


def _takes_label(parser: argparse.ArgumentParser) -> None:
    where = "nodes of the cluster that RAY_ADDRESS names to work on, as ssl-ray/role=data; default: any"
    parser.add_argument("--label", metavar="KEY=VALUE", help=where)


_RECIPE = "a recipe ({}), a YAML file or a run"


def _takes_config(parser: argparse.ArgumentParser, *, examples: str = "") -> None:
    recipe = f"{_RECIPE.format(', '.join(recipe_names()))}; default: digits, without data.uri="
    parser.add_argument("-c", "--config", metavar="RECIPE", help=recipe)
    _takes_keys(parser, examples=examples)


def _takes_keys(parser: argparse.ArgumentParser, *, examples: str = "") -> None:
    keys = "set any key of the configuration, e.g. views.count=8; see below"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=keys)
    parser.set_defaults(explain=lambda: f"{_keys_help()}\n\n{examples}".rstrip())


def _takes_trackers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's event files, to RUN/tensorboard")
    parser.add_argument("--wandb", metavar="PROJECT", help="also tell Weights & Biases (pip install wandb)")
    parser.add_argument("--mlflow", metavar="URI", help="also tell the MLflow server there (pip install mlflow-skinny)")


_POWER = re.compile(r"[0-9]{1,3}e[0-9]{1,2}")


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text) if text.isdecimal() and len(text) < 19 else int(float(text)) if _POWER.fullmatch(text) else -1
        if not low <= value < 2**62:
            raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of {low} or more, below 2**62")
        return value

    return number


def _ending(suffix: str) -> Callable[[str], str]:
    def name(text: str) -> str:
        if not text.lower().endswith(suffix):
            raise argparse.ArgumentTypeError(f"got {text}, expected a name that ends in {suffix}")
        return text

    return name


_png = _ending(".png")


_GPUS = "l4, a10g, l40s, a100, h100 or h200"
_PROTOCOLS = "linear, linear-plain, knn, logreg, fewshot, finetune, spectrum"


def _group(verbs: Any, name: str, help: str) -> Any:
    return verbs.add_parser(name, help=help, description=help).add_subparsers(required=True, metavar="VERB")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ssl-ray",
        description="Self-supervised vision pretraining with many views and small projectors, on Ray.",
        epilog="Exit codes: 0 ok, 1 other (NaN, collapse), 2 usage, 3 data or storage, 4 resources, 130 stopped.",
    )
    parser.add_argument("--version", action="version", version=f"ssl-ray {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    pretrain = _add(verbs, "pretrain", _pretrain, "Train an encoder, from wherever the run stands, and read it out.")
    pretrain.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="auto continues the run that is there; never refuses to"
    )
    pretrain.add_argument(
        "--no-lease", action="store_true", help="do not refuse a run that another driver trains; for storage without locks"
    )
    _takes_trackers(pretrain)
    _takes_config(pretrain, examples=_EXAMPLES)
    evaluate = _add(
        verbs, "evaluate", _evaluate, "Read out a checkpoint of a run: linear, kNN, alpha, RankMe; or by named protocols."
    )
    evaluate.add_argument("run", metavar="RUN", help="folder or URI of the run, or of one of its checkpoints")
    evaluate.add_argument("protocols", nargs="*", default=[], metavar="PROTOCOL", help=f"{_PROTOCOLS}; see docs/evaluation.md")
    evaluate.add_argument("--data", metavar="URI", help="train protocols on this data set; default: that of the run")
    evaluate.add_argument("--test", metavar="URI", help="judge protocols on this one; default: what is held out")
    evaluate.add_argument("--seeds", type=_at_least(1), metavar="N", help="repeat what is random in a protocol; default: 1")
    evaluate.add_argument("--confusion", type=_png, metavar="FILE.png", help="draw the confusion matrix of the protocol")
    evaluate.add_argument("--step", type=_at_least(0), help="the checkpoint of this step; default: the newest")
    evaluate.add_argument("--untrained", action="store_true", help="the network before training, batch norm calibrated")
    _takes_label(evaluate)
    _add_export(verbs)
    _add_features(verbs)
    _takes_config(_add(verbs, "plan", _plan, "What a run would take: steps, samples, bytes, memory, time."))
    plan = verbs.choices["plan"]
    plan.add_argument("--no-probe", action="store_true", help="do not train a few steps to estimate time")
    plan.add_argument("--images-per-s", type=_at_least(1), metavar="N", help="of all workers together: estimate time from that")
    plan.add_argument("--gpu", metavar="NAME", help=f"of each worker, {_GPUS}: estimate time and memory from its data sheet")
    plan.add_argument("--images", type=_at_least(1), metavar="N", help="plan for a data set that is not there yet, as 1e9")
    plan.add_argument("--shards", type=_at_least(1), metavar="N", help="of that; default: shards of 64 MiB")
    plan.add_argument("--mean-bytes", type=_at_least(1), metavar="N", help=f"of an image of that; default: {MEAN_BYTES}")
    profile = _add(verbs, "profile", _profile, "Where the time of a step goes, from a short run that is not kept.")
    profile.add_argument("config", metavar="RUN_OR_RECIPE", help=_RECIPE.format(", ".join(recipe_names())))
    _takes_keys(profile)
    profile.add_argument("--steps", type=_at_least(1), default=20, help="how many are traced; default: 20")
    _add_data(_group(verbs, "data", "Shards: pack, index, check, look at."))
    configs = _group(verbs, "config", "Configurations: show, explain, compare.")
    _takes_config(_add(configs, "show", _config_show, "Print the whole configuration that a command would use."))
    _add(configs, "schema", _config_schema, "List all keys: type, default, meaning.")
    diff = _add(configs, "diff", _config_diff, "The keys in which two recipes or runs differ.")
    diff.add_argument("a", help="a recipe's name, a YAML file or a run")
    diff.add_argument("b", help="likewise")
    _add_study(_group(verbs, "study", "Studies: many runs that differ in a few keys, compared."))
    doctor = _add(
        verbs, "doctor", _doctor, "Check this machine, a storage, a cluster; exits with 4 where something is to be done."
    )
    doctor.add_argument("uri", nargs="?", help="folder or URI where runs shall be: objects are written there, read and removed")
    doctor.add_argument("--address", metavar="URL", help="of a cluster's dashboard, as http://127.0.0.1:8265")
    doctor.add_argument(
        "-c",
        "--config",
        metavar="RECIPE",
        help="what shall run on that cluster, else on this machine: is there room for its workers?",
    )
    _takes_keys(doctor)
    _add_submit(verbs)
    debug = _add(verbs, "debug", _debug, "Collect what tells why a run failed into one zip, without secrets.")
    debug.add_argument("run", help="folder or URI of the run")
    debug.add_argument("--address", metavar="URL", help="of a cluster's dashboard, as http://127.0.0.1:8265: add its logs")
    debug.add_argument("-o", "--output", metavar="FILE.zip", help="the zip to write; default: ssl-ray-debug-NAME.zip")
    runs = _group(verbs, "runs", "Runs: list.")
    listing = _add(runs, "list", _runs_list, "The runs below a folder or URI.")
    listing.add_argument("uri", nargs="?", default="runs", help="default: runs")
    _add_pages(verbs)
    return parser


def _add_features(verbs: Any) -> None:
    embed = _add(verbs, "embed", _embed, "Write the features of a data set to a Parquet file.")
    neighbours = _add(verbs, "neighbours", _neighbours, "Draw some images of a data set with their nearest neighbours.")
    for verb in (embed, neighbours):
        verb.add_argument("run", metavar="RUN", help="folder or URI of the run, or of one of its checkpoints")
        verb.add_argument("uri", help="folder or URI of the images, with a manifest")
        _takes_label(verb)
    embed.add_argument("-o", "--output", required=True, type=_ending(".parquet"), metavar="FILE.parquet", help="file to write")
    neighbours.add_argument("-o", "--output", required=True, type=_png, metavar="FILE.png", help="the picture to write")
    neighbours.add_argument("--images", type=_at_least(1), default=8, metavar="N", help="how many images; default: 8")
    neighbours.add_argument("-k", type=_at_least(1), default=8, metavar="K", help="neighbours of each; default: 8")


_JOBS = {
    _pretrain: "pretrain",
    _evaluate: "evaluate",
    _embed: "embed",
    _study_run: "study run",
    _study_resume: "study resume",
    _data_pack: "data pack",
    _data_index: "data index",
    _data_check: "data check",
}


def _add_export(verbs: Any) -> None:
    export = _add(verbs, "export", _export, "Write the encoder of a run as files for other programs, with a model card.")
    export.add_argument("run", help="folder or URI of the run")
    export.add_argument("-o", "--output", required=True, metavar="DIR", help="folder or URI to write to, empty or not there")
    export.add_argument(
        "--format", nargs="+", choices=list(FILES), default=["safetensors"], help="one or several; default: safetensors"
    )
    export.add_argument("--step", type=_at_least(0), help="the checkpoint of this step; default: the newest")
    export.add_argument("--license", metavar="NAME", help="of the model card, as apache-2.0; default: to be filled in")
    export.add_argument("--overwrite", action="store_true", help="replace the export that is there")


def _add_submit(verbs: Any) -> None:
    submit = _add(verbs, "submit", _submit, "Run a verb as a job of a Ray cluster, and follow it; Ctrl-C leaves it running.")
    submit.usage = "ssl-ray submit VERB ... [--address URL] [--working-dir DIR] [--uv] [--no-follow] [--json]"
    submit.epilog = f"VERB is one of {', '.join(_JOBS.values())}, followed by what it takes.\n\n{_SUBMIT_EXAMPLES}"
    standard = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    submit.add_argument(
        "--address",
        metavar="URL",
        default=standard,
        help="of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or port 8265 here",
    )
    submit.add_argument(
        "--working-dir", metavar="DIR", help="a folder to upload, with recipes that are files, or with ssl_ray itself"
    )
    submit.add_argument(
        "--uv", action="store_true", help="have uv make the environment from that folder's pyproject.toml and uv.lock"
    )
    submit.add_argument("--no-follow", action="store_true", help="do not wait for the job")


_SUBMIT_EXAMPLES = """examples:
  ssl-ray submit pretrain -c cifar10 data.uri=s3://BUCKET/cifar run=s3://BUCKET/runs/one --address http://127.0.0.1:8265
  ssl-ray submit study run my.yaml -o s3://BUCKET/studies/mine --working-dir .
"""


def _add_study(verbs: Any) -> None:
    run = _add(verbs, "run", _study_run, "Run a study, from wherever it stands.")
    run.add_argument("study", metavar="STUDY", help=f"{', '.join(recipe_names(STUDIES))}, or a YAML file")
    run.add_argument("-o", "--output", metavar="URI", help="folder or URI of the study; default: studies/NAME")
    run.add_argument("--small", action="store_true", help="the small variant: the digits, minutes on two CPU cores")
    _takes_trackers(run)
    _takes_keys(run)
    resume = _add(verbs, "resume", _study_resume, "Run what a study lacks: trials that were stopped with it, lost or failed.")
    resume.add_argument("uri", help="folder or URI of the study")
    _takes_trackers(resume)
    status = _add(verbs, "status", _study_status, "Where each trial of a study stands.")
    status.add_argument("uri", help="folder or URI of the study")
    stop = _add(verbs, "stop", _study_stop, "Have a study that runs elsewhere stop, with checkpoints; or end one trial for good.")
    stop.add_argument("uri", help="folder or URI of the study")
    stop.add_argument("trial", nargs="?", metavar="TRIAL", help="its name, as `study status` shows it; default: the whole study")
    listing = _add(verbs, "list", _study_list, "The studies below a folder or URI.")
    listing.add_argument("uri", nargs="?", default="studies", help="default: studies")


def _add_pages(verbs: Any) -> None:
    pages = _add(verbs, "dashboard", _dashboard, "Serve the results of studies as a page that follows them, until Ctrl-C.")
    pages.add_argument("uri", nargs="?", help="folder or URI of a study, or of a folder of studies")
    pages.add_argument("--port", type=_at_least(0), default=8270, help="default: 8270; 0 takes a free one")
    pages.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine only")
    pages.add_argument("--token-file", metavar="FILE", help="holds the secret that requests need; other machines need one")
    pages.add_argument("--demo", action="store_true", help="show a small study that comes with ssl_ray")
    report = _add(verbs, "report", _report, "Write the results of a study: a page in one file, tables, pictures.")
    report.add_argument("uri", help="folder or URI of the study")
    report.add_argument("-o", "--output", metavar="FILE.html", help="the page, which needs neither server nor network")
    report.add_argument("--markdown", metavar="FILE", help="a table with a row for each setting, and what it was made with")
    report.add_argument("--latex", metavar="FILE", help="likewise, for the booktabs package")
    report.add_argument("--figures", metavar="FOLDER", help="each figure as SVG and PNG; needs Chromium")


def _add_data(verbs: Any) -> None:
    pack = _add(verbs, "pack", _data_pack, "Write shuffled WebDataset shards with manifest and index.")
    pack.add_argument("source", help="digits, fashion-mnist, cifar10, cifar100, stl10, a folder of images or of shards")
    pack.add_argument("uri", help="folder or URI to write to")
    pack.add_argument("--split", default="train", help="train, test or (stl10) unlabeled; default: train")
    pack.add_argument("--root", help="where the files of fashion-mnist, cifar or stl10 are")
    pack.add_argument("--download", action="store_true", help="let torchvision download what is not there")
    pack.add_argument("--seed", type=_at_least(0), default=0, help="of the order; default: 0")
    pack.add_argument("--shard-mb", type=float, default=64, help="size of a shard in MiB; default: 64")
    pack.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    index = _add(verbs, "index", _data_index, "Make manifest and index for WebDataset shards that others wrote.")
    index.add_argument("uri", help="folder or URI of the shards")
    index.add_argument("-o", "--output", metavar="URI", help="where to write them; default: beside the shards")
    check = _add(verbs, "check", _data_check, "Read everything again, decode it, and name each bad shard and sample.")
    check.add_argument("uri", help="folder or URI with a manifest")
    for verb in (pack, index, check):
        _takes_label(verb)
    stats = _add(verbs, "stats", _data_stats, "Count shards, samples, bytes and classes.")
    stats.add_argument("uri", help="folder or URI with a manifest")
    preview = _add(verbs, "preview", _data_preview, "Draw the views of some images.")
    preview.add_argument("uri", help="folder or URI with a manifest")
    preview.add_argument("-o", "--output", required=True, type=_png, metavar="FILE.png", help="the picture to write")
    preview.add_argument("--images", type=_at_least(1), default=8, help="how many images; default: 8")
    _takes_config(preview)
