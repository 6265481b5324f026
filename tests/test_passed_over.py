"""A run that resumes from an older checkpoint, because newer ones are damaged, keeps and names what it writes."""

import shutil

import pytest
from test_checkpoint import saved
from trainers import trainer

from lbsgd.errors import DivergedError
from lbsgd.train import checkpoint
from lbsgd.train.run import Every

DAMAGE = {
    "cut": lambda path: (path / "weights.safetensors").write_bytes(b""),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
}


def numbers(folder):
    return [int(path.stem[-8:]) for path in checkpoint.named(folder)]


def going_on(folder, last_iteration):
    """Train up to an iteration, with a checkpoint after each one, in an epoch of 20."""
    ours = trainer(folder, iterations=20, resume=folder.is_dir())
    ours.saver.every = Every(iterations=1)
    ours.train(last_iteration), ours.saver.wait()
    return ours


@pytest.fixture(params=DAMAGE.values(), ids=DAMAGE)
def behind_damage(tmp_path, request):
    """A folder with an undamaged checkpoint 1, put back from a copy, and damaged ones 4, 5 and 6."""
    folder = tmp_path / "checkpoints"
    going_on(folder, 1)
    shutil.copytree(folder, tmp_path / "copy")
    going_on(folder, 6)
    for path in checkpoint.named(folder):
        request.param(path)
    shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
    assert numbers(folder) == [1, 4, 5, 6]
    return folder


@pytest.mark.parametrize(
    "last, kept",
    [
        (2, [1, 2, 4, 5, 6]),
        (3, [1, 2, 3, 4, 5, 6]),  # the one that it continued from stays until there are three newer ones
        (4, [2, 3, 4]),  # and so do the damaged ones, which a user might repair
        (8, [6, 7, 8]),
    ],
)
def test_what_a_run_wrote_stays_and_not_what_it_passed_over(behind_damage, last, kept):
    ours = going_on(behind_damage, last)
    assert numbers(behind_damage) == kept
    newest = ours.saver.newest_written()
    assert newest.stem == f"iteration_{last:08d}" and checkpoint.load(newest)[1]["counters"]["iteration"] == last
    assert going_on(behind_damage, last).iteration == last  # the newest undamaged one


def test_a_checkpoint_that_was_passed_over_and_is_made_again_is_kept(behind_damage):
    going_on(behind_damage, 3)
    going_on(behind_damage, 6)
    again = checkpoint.named(behind_damage)
    assert [path.name[-3:] for path in again] == ["4.1", "5.1", "6.1"] and all(map(checkpoint.load, again))


def test_a_run_that_diverges_names_the_checkpoint_that_it_went_on_from(behind_damage):
    ours = trainer(behind_damage, iterations=20, resume=True)
    shutil.rmtree(behind_damage)  # as on a disk that fails by then; the message must still name it
    with pytest.raises(DivergedError, match=f"reason; the newest checkpoint is {behind_damage}/iteration_0+1; "):
        ours.saver.stop("reason")


def test_a_damaged_second_save_of_an_iteration_does_not_take_the_place_of_the_first(tmp_path):
    """Both exist after a kill between the second save and the deletion of the first."""
    folder = tmp_path / "checkpoints"
    going_on(folder, 1)
    shutil.copytree(folder / "iteration_00000001", folder / "iteration_00000001.1")
    DAMAGE["cut"](folder / "iteration_00000001.1")
    going_on(folder, 2)
    whole = [folder / "iteration_00000001", folder / "iteration_00000002"]
    assert set(whole) <= set(checkpoint.named(folder)) and all(map(checkpoint.load, whole))


def test_what_is_newer_than_the_saved_one_takes_no_place_and_is_left(tmp_path):
    """Whoever put it there while the run was going on."""
    for iteration in (7, 8, 9, 1, 2, 3, 4):
        saved(tmp_path, iteration)
    assert numbers(tmp_path) == [2, 3, 4, 7, 8, 9]


def test_a_folder_without_manifest_goes_when_three_newer_whole_ones_stand(tmp_path):
    saved(tmp_path, 1)
    (saved(tmp_path, 2) / "manifest.json").unlink()
    kept = []
    for iteration in (3, 4, 5):
        saved(tmp_path, iteration)
        kept.append(numbers(tmp_path))
    assert kept == [[1, 2, 3], [1, 2, 3, 4], [3, 4, 5]]
