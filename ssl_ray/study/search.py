"""Settings that Optuna proposes, from what earlier trials reached.

Its state is what study.json and the trials' files say: a study that goes on tells a new sampler of all that there was.
"""

import json
import math
from typing import Any

from ssl_ray.errors import UsageError
from ssl_ray.study.schema import ENDED, Head, Planned, State

ATTEMPTS = 100
"""To find settings that were not tried yet."""

Reached = dict[str, list[tuple[float, float]]]
"""Of each trial, by name: views seen and score, larger is better, of each of its read-outs."""


class Proposals:
    """Cells of a study one after another, by Optuna's TPE with its start of random ones. Raises UsageError without Optuna."""

    def __init__(self, head: Head) -> None:
        assert head.search is not None
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise UsageError("search: optuna needs a package that is absent.\nRun: pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._pruned = optuna.trial.TrialState.PRUNED
        self._failed = optuna.trial.TrialState.FAIL
        self._space = {key: _distribution(key, how) for key, how in head.search["sweep"].items()}
        sampler = optuna.samplers.TPESampler(seed=int(head.hash[:8], 16), constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._open: dict[str, Any] = {}
        """Optuna's trials that were not told of yet, by the settings."""
        self._known: set[str] = set()

    def cell(self, trials: tuple[Planned, ...], states: dict[str, State], reached: Reached) -> dict[str, Any] | None:
        """What to try next, given the trials that are planned and how far they are; None: nothing new is found."""
        cells: dict[str, list[Planned]] = {}
        for trial in trials:
            cells.setdefault(self._key(trial.settings), []).append(trial)
        for key in cells:
            if key not in self._known:  # of an earlier go
                self._study.enqueue_trial(json.loads(key))
                self._asked(key, self._study.ask(self._space))
        for key in [key for key in self._open if all(states[trial.name].status in ENDED for trial in cells[key])]:
            self._tell(key, [(states[trial.name].status, reached.get(trial.name, [])) for trial in cells[key]])
        for _ in range(ATTEMPTS):
            asked = self._study.ask(self._space)
            settings = {key: _short(asked.params[key], self._space[key]) for key in self._space}
            if (key := self._key(settings)) not in self._known:
                self._asked(key, asked)
                return settings
            self._study.tell(asked, state=self._failed)  # it is there already, with all its seeds
        return None

    def _key(self, settings: dict[str, Any]) -> str:
        return json.dumps({key: settings[key] for key in self._space})

    def _asked(self, key: str, trial: Any) -> None:
        self._open[key] = trial
        self._known.add(key)

    def _tell(self, key: str, seeds: list[tuple[str, list[tuple[float, float]]]]) -> None:
        """The mean over the seeds; of those that the scheduler ended, as far as the one that saw least came."""
        trial = self._open.pop(key)
        came = [points for status, points in seeds if status != "failed" and points and math.isfinite(points[-1][1])]
        if not came:
            self._study.tell(trial, state=self._failed)
        elif all(status != "stopped" for status, _ in seeds):
            self._study.tell(trial, sum(points[-1][1] for points in came) / len(came))
        else:
            trial.report(sum(points[-1][1] for points in came) / len(came), int(min(points[-1][0] for points in came)))
            self._study.tell(trial, state=self._pruned)


def _distribution(key: str, how: dict[str, list[Any]]) -> Any:
    from optuna import distributions

    ((kind, of),) = how.items()
    match kind:
        case "uniform" | "log_uniform":
            return distributions.FloatDistribution(float(of[0]), float(of[1]), log=kind == "log_uniform")
        case "int":
            return distributions.IntDistribution(int(of[0]), int(of[1]))
    if not all(value is None or isinstance(value, bool | int | float | str) for value in of):
        raise UsageError(f"sweep.{key}: got lists or keys as values, expected numbers and words, which Optuna can choose from.")
    return distributions.CategoricalDistribution(of)


def _short(value: Any, distribution: Any) -> Any:
    """Four digits of a float, within its bounds: it stands in names and tables."""
    if not isinstance(value, float) or not hasattr(distribution, "low"):
        return value
    return min(max(float(f"{value:.4g}"), distribution.low), distribution.high)
