"""Figures of a study: pure functions from what was read of it to plotly figures, as plain values.

Each takes a study, or one with fewer trials (`select`), and returns a figure with all its axes labelled; where there is nothing
to show yet it says so. Nothing here reads, and the same study gives the same figure. `plotly.graph_objects.Figure(figure)` makes
it one of plotly's, which checks every value: with 2,000 trials that takes longer than all the rest. A colour means the same in
the figures of a study and of any selection of it.

What a page needs to filter without asking again: a trace of results has `meta["trials"]`, the names of its trials, and
`customdata`, for each point the positions in that list of the trials that it shows: a number, or a list where a point is a mean
over several. Guide lines have neither. What is not the mean of its trials alone says so in `meta["derived"]`: a band, the best of
several, a front. Points are plain lists, and None separates the curves of a trace.

Texts from results are escaped; names in `meta` and values in `customdata` are data and not. Final results are those of complete
trials only, since others have not had the same budget. Curves have at most 200 points (least and largest of equal parts).
"""

from ssl_ray.dashboard.figures.projector import accuracy_over_dim, best_beta_over_dim
from ssl_ray.dashboard.figures.settings import importance_bars, parallel_coordinates
from ssl_ray.dashboard.figures.shared import accuracy_name, select
from ssl_ray.dashboard.figures.tradeoffs import fraction_map, pareto
from ssl_ray.dashboard.figures.training import accuracy_over_training, alpha_over_epochs, loss_terms, throughput

__all__ = [
    "accuracy_name",
    "accuracy_over_dim",
    "accuracy_over_training",
    "alpha_over_epochs",
    "best_beta_over_dim",
    "fraction_map",
    "importance_bars",
    "loss_terms",
    "parallel_coordinates",
    "pareto",
    "select",
    "throughput",
]
