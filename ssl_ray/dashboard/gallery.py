"""A picture of what the views of a trial are like: some of its images, m views of each, from the trial's own seed."""

from typing import Any

from ssl_ray import config
from ssl_ray.study.results import Study, Trial
from ssl_ray.study.schema import trial_config

IMAGES = 6


def looks(study: Study, trial: Trial) -> dict[str, Any]:
    """What decides how the picture of a trial looks: its data, views and seed."""
    flat = trial_config(study.head.base, trial.settings, seed=trial.seed)
    keys = [key for key in flat if key.startswith("views.")]
    return {key: flat[key] for key in sorted(keys)} | {"data.uri": flat.get("data.uri"), "seed": flat["seed"]}


def gallery(study: Study, trial: Trial) -> bytes:
    """A PNG: a row an image, first its plain view. Raises an SslRayError where the data cannot be reached."""
    from ssl_ray.stream import draw_preview  # the views' kernel, which only this needs

    sections: dict[str, Any] = {}
    for key, value in looks(study, trial).items():
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[name] = value
    made = config.build(sections, source=f"trial {trial.name}")
    return draw_preview(made.data.uri, spec=made.views, seed=made.seed, num_images=IMAGES)
