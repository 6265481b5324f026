"""A run of the code before the rebuilt house: its log can be read, and its checkpoint resumes with the same losses.

fixtures/earlier_run holds three iterations of tests/cluster/small.py. The old code, resumed, had the losses below.
"""

import shutil
from pathlib import Path

import pytest
from commands import script

from lbsgd.report.run_log import read_run

TESTS = Path(__file__).parent
LOSSES = [6.84785532951355, 6.903319835662842, 6.899576544761658]
LOSSES_AFTER_RESUMING = [6.9385682344436646, 6.856706142425537]


def test_an_earlier_log_is_read():
    run = read_run(TESTS / "fixtures/earlier_run")
    assert run.header["model"] == "small"
    assert [record["train_loss"] for record in run.iterations] == LOSSES


def test_an_earlier_checkpoint_goes_on(tmp_path):
    folder = shutil.copytree(TESTS / "fixtures/earlier_run", tmp_path / "run")
    recipe = (TESTS / "cluster/small.py", "--deepspeed_config", TESTS / "cluster/small.json", "--fake_data")
    done = script(*recipe, "--max_iterations", 5, "--resume", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    losses = [record["train_loss"] for record in read_run(folder).iterations]
    assert losses == pytest.approx(LOSSES + LOSSES_AFTER_RESUMING, rel=1e-5)
