"""Memory and time of a process do not grow with the number of images: data per image are mapped, once per host."""

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


def test_memory_and_time_of_a_process_do_not_grow_with_the_images(tmp_path):
    path = settled(write_many(tmp_path / "many.beton", MANY))
    [first] = costs(path, tmp_path)  # surveys the tables, draws the order, and compiles
    [few], [many] = costs(write_many(tmp_path / "few.beton", FEW), tmp_path), costs(path, tmp_path)
    print(f"\nfirst {first}\nfew {few}\nmany {many}")
    # 7 bytes per image are 100 MB at 14 million. 4 of them are the order, which other processes share.
    assert 1024 * (many["anonymous"] - few["anonymous"]) / (MANY - FEW) < 7
    assert sum(many["cpu"]) - sum(few["cpu"]) < 3 * MANY / VERY_MANY + 0.5
    shared = {path.name.split("-")[0] for path in (tmp_path / f"lbsgd-{os.getuid()}").iterdir()}
    assert {"order", "tables", "code"} <= shared


@pytest.mark.slow
def test_fourteen_million_images_cost_a_process_100_mb_and_eight_of_them_1500_mb(tmp_path):
    costs(few_path := write_many(tmp_path / "few.beton", FEW), tmp_path)
    [few] = costs(few_path, tmp_path)
    path = write_many(tmp_path / "very_many.beton", VERY_MANY)
    try:
        settled(path)
        [first], [one], eight = costs(path, tmp_path), costs(path, tmp_path), costs(path, tmp_path, processes=8)
        few_eight = [few["pss"]] * 8
        print(f"\nfew {few}\nfirst {first}\none {one}\neight {eight}")
        assert one["anonymous"] - few["anonymous"] < 100_000
        assert sum(one["cpu"]) - sum(few["cpu"]) < 3
        assert sum(each["pss"] for each in eight) - sum(few_eight) < 1_500_000
    finally:
        shutil.rmtree(tmp_path)
