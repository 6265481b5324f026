"""The cost of one rank of a large job: memory, start, and the work around each update."""

import pytest
from one_rank import cost


@pytest.mark.slow
def test_a_rank_of_256_takes_what_a_process_alone_takes():
    """Its collective calls do nothing, so only the rank's own work is left (Sec. 4: 32 images per GPU)."""
    alone, of_256 = cost(0, 1), cost(137, 256)
    print(f"\nalone  {alone}\nof 256 {of_256}")
    assert of_256["private"] < 1.2 * alone["private"] + 50
    assert of_256["update"] < 1.5 * alone["update"]  # gradients are copied into buckets
    assert of_256["imports"] + of_256["engine"] + of_256["first"] < 1.2 * sum(alone[part] for part in START) + 1


START = "imports", "engine", "first"
