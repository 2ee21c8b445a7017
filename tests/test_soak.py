"""A round of the soak (tests/soak.py): four faults of the store and a kill, and no sample lost."""

import pytest
from soak import soak


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_round_of_faults_changes_no_sample_and_no_loss(tmp_path):
    summary = soak(tmp_path, minutes=0.1, seed=1)
    print(f"\n{summary}")
    assert (summary["faults"], summary["kills"]) == (5, 1)
    assert summary["steps_each_once"]
    assert (summary["samples_lost"], summary["losses_that_differ"], summary["unexpected_ends"]) == (0, 0, [])
