"""Memory and time of a process do not grow with the number of images: what is per image is mapped, once per host."""

import os
import shutil
import time

import pytest
from many_images import costs, write_many

FEW, MANY, VERY_MANY = 10_000, 1_000_000, 14_000_000


def settled(path):
    """Wait until the file is old enough for its survey to be kept (`beton_survey.SETTLED_SECONDS`)."""
    time.sleep(max(0.0, path.stat().st_mtime + 2.1 - time.time()))
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    path = settled(write_many(folder / "few.beton", FEW))
    costs(path, folder)  # compiles
    return costs(path, folder)[0]


def test_memory_and_time_of_a_process_do_not_grow_with_the_images(few, tmp_path):
    path = settled(write_many(tmp_path / "many.beton", MANY))
    [first], [many] = costs(path, tmp_path), costs(path, tmp_path)
    # 7 bytes per image are 100 MB at 14 million. 4 of them are the order, which other processes share.
    assert 1024 * (many["private"] - few["private"]) / (MANY - FEW) < 7
    assert sum(many["cpu"]) - sum(few["cpu"]) < 3 * MANY / VERY_MANY
    assert sum(first["cpu"]) - sum(few["cpu"]) < 12 * MANY / VERY_MANY + 2  # surveys the tables, once; compiles
    shared = {path.name.split("-")[0] for path in (tmp_path / f"lbsgd-{os.getuid()}").iterdir()}
    assert {"order", "tables", "code"} <= shared


@pytest.mark.slow
def test_fourteen_million_images_cost_a_process_100_mb_and_eight_of_them_1500_mb(few, tmp_path):
    path = write_many(tmp_path / "very_many.beton", VERY_MANY)
    try:
        settled(path)
        [first], [one], eight = costs(path, tmp_path), costs(path, tmp_path), costs(path, tmp_path, processes=8)
        few_eight = [few["pss"]] * 8
        print(f"\nfew {few}\nfirst {first}\none {one}\neight {eight}")
        assert one["private"] - few["private"] < 100_000
        assert sum(one["cpu"]) - sum(few["cpu"]) < 3
        assert sum(each["pss"] for each in eight) - sum(few_eight) < 1_500_000
    finally:
        shutil.rmtree(tmp_path)
