"""The published results: tables, pictures and pages come from the logs next to them, and docs say what the logs say."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lbsgd.experiments.catalogue import DATA_SETS, STUDIES
from lbsgd.experiments.checkout import NOTE, ROOT, noted_commit
from lbsgd.experiments.collect import MOST_BYTES
from lbsgd.experiments.reproduce import GridRequest, report
from lbsgd.report.regions import BEGIN, updated

RESULTS = ROOT / "results"
PUBLISHED = sorted((claims.parent.parent.name, claims.parent.name) for claims in RESULTS.glob("*/*/claims.md"))
PAGES = [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BEGIN.search(file.read_text())]


def test_something_is_published():
    """Otherwise the tests below would check nothing."""
    assert ("digits", "table1") in PUBLISHED and ROOT / "README.md" in PAGES


@pytest.mark.parametrize(("data", "study"), PUBLISHED)
def test_tables_pictures_and_page_are_those_of_the_logs(data, study, tmp_path, capsys):
    request = GridRequest((STUDIES[study],), DATA_SETS[data], (), work_dir=ROOT, results=RESULTS)
    fewest = min(len(list((request.logs / row.name).glob("seed*"))) for row in request.rows)
    again = replace(request, results=tmp_path, seeds=tuple(range(fewest)))  # other studies share rows, with more seeds
    shutil.copytree(request.logs, again.logs)
    report(again, noted_commit(request.published))
    assert contents(tmp_path / data / study) == contents(RESULTS / data / study)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: content(file) for file in folder.iterdir() if file.is_file() and file.name != NOTE}


def content(file: Path) -> bytes:
    """A file's bytes. Matplotlib names a clipping path by a digest of its corners, whose last bits vary."""
    digest = rb"(?<=clip-path=\"url\(#)p\w{10}|(?<=<clipPath id=\")p\w{10}"
    found = file.read_bytes()
    return re.sub(digest, b"p", found) if file.suffix == ".svg" else found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_numbers_of_a_page_are_those_of_the_logs(page):
    assert updated(page.read_text(), page) == page.read_text()


def test_published_logs_are_small():
    sizes = {log: log.stat().st_size for log in RESULTS.rglob("log.jsonl")}
    assert sizes and max(sizes.values()) <= MOST_BYTES
