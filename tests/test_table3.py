"""Table 3 on scenes of digits: its rows, what they need, and how its claims are answered if more is better."""

from dataclasses import replace

import pytest

from lbsgd.commands.main import main
from lbsgd.errors import ConfigError, DataError
from lbsgd.experiments import launch, reproduce
from lbsgd.experiments.answers import answers
from lbsgd.experiments.catalogue import DATA_SETS, STUDIES
from lbsgd.experiments.checkout import NOTE, ROOT, Checkout
from lbsgd.experiments.grid import Job
from lbsgd.experiments.launch import Grid, Machine, plan_of
from lbsgd.experiments.reproduce import GridRequest, require_inputs, require_together
from lbsgd.report.measure import DETECTOR, as_data
from lbsgd.report.paper_tables import paper_tables
from lbsgd.report.run_log import DIVERGED, RunLog
from lbsgd.report.statistics import Difference
from lbsgd.report.write import families_at, rows_by_name, write_report

SCENES, A, B = DATA_SETS["scenes"], STUDIES["table3a"], STUDIES["table3b"]
ROWS_A, ROWS_B = A.rows(SCENES), B.rows(SCENES)


def test_the_rows_are_those_of_the_paper_s_table():
    assert [row.name for row in ROWS_A] == ["x4_from_x1", "x4_from_x8", "x4_from_x16", "x4_from_x24"]
    kn = [row.factor * SCENES.base_batch for row in ROWS_B]
    plans = [plan_of(Job(row, 0), SCENES, ROOT) for row in ROWS_B]
    assert kn == [2, 4, 8, 16, 16] == [plan.global_batch for plan in plans]
    assert [plan.schedule.reference_lr for plan in plans] == pytest.approx([0.0025, 0.005, 0.01, 0.02, 0.0025])
    assert {plan.num_iterations * plan.global_batch for plan in plans} == {4096}  # all rows see as many images
    assert {plan.schedule.warmup_iterations * plan.global_batch for plan in plans} == {400}
    assert {plan.per_worker_batch for plan in plans} == {2} == {plan.micro_batch for plan in plans}
    assert ROWS_B[2] == ROWS_A[0]  # the tables share a row, which runs once


def test_a_run_starts_from_the_backbone_of_its_seed(tmp_path):
    runs = tmp_path / "runs" / "reproduce" / "scenes"
    command = launch.command(Job(ROWS_A[1], 2), Grid(SCENES, tmp_path, runs, Machine(1, 1)))
    place = command.index("--backbone_weights") + 1
    assert command[place] == "../../digits18/x8/seed2/weights.pt"  # from the code's folder, so that logs can move
    assert command[command.index("--micro_batch") + 1] == "2"


def request(folder, *studies):
    return GridRequest(studies, SCENES, (0, 1), folder, folder / "results")


def test_a_backbone_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    lost = "digits18/x1/seed0/weights.pt is not there, and x4_from_x1/seed0 needs it; "
    with pytest.raises(DataError, match=lost + "make it with `lbsgd reproduce figure1 digits18 --results"):
        require_inputs(request(tmp_path, A).jobs, tmp_path)
    (tmp_path / "runs/reproduce/digits18/x1/seed0").mkdir(parents=True)  # for example only its published log
    with pytest.raises(DataError, match=lost + "delete .*x1/seed0, whose run ended elsewhere, and make it"):
        require_inputs(request(tmp_path, A).jobs, tmp_path)
    for job in request(tmp_path, A).jobs:
        for file in job.inputs(tmp_path).values():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    require_inputs(request(tmp_path, A).jobs, tmp_path)


def test_a_run_that_is_done_needs_its_backbone_no_more(tmp_path, monkeypatch):
    asked = request(tmp_path, A)
    *done, last = asked.jobs
    for job in done:
        job.folder(asked.grid).mkdir(parents=True)
        (job.folder(asked.grid) / DIVERGED).touch()
    (asked.grid / NOTE).touch()  # it is resumed
    monkeypatch.setattr(reproduce, "open_checkout", lambda *_: Checkout(tmp_path, "0123456789"))
    with pytest.raises(DataError, match=f"and {last.name} needs it"):
        reproduce.begin(asked)


def test_detectors_and_classifiers_have_experiments_of_their_own(capsys):
    with pytest.raises(ConfigError, match="table1 compares classifiers, and scenes"):
        require_together(STUDIES["table1"], SCENES)
    with pytest.raises(ConfigError, match="table3a compares detectors, and digits"):
        require_together(A, DATA_SETS["digits"])
    assert main("reproduce table3b scenes --list --seeds 2".split()) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def write_runs(folder, rows, ap):
    """Logs of some rows. ap[name] has a box AP per seed; mask AP is 9 less, and the AP before the last is higher."""
    for row in rows:
        for seed, box in enumerate(ap[row.name]):
            plan = plan_of(Job(row, seed), SCENES, ROOT)
            started = f"resnet18, kn = {32 * int(row.name.rpartition('x')[2].split('_')[0])}"
            header = {"model": "small", "judged_by": as_data(DETECTOR), "started_from": started, **plan.as_dict()}
            with RunLog(Job(row, seed).folder(folder), header) as log:
                for epoch, value in ((1, box + 10), (4, box)):
                    ap_of = {"val_box_ap": value, "val_mask_ap": value - 9}
                    log.epoch({"epoch": epoch, "train_loss": 1.0, "seconds": 1.0, **ap_of})
                log.result()


NAMES = [row.name for row in {*ROWS_A, *ROWS_B}]
LEVEL = {name: [50.0, 50.5, 51.0] for name in NAMES}
FALLEN = {"x4_from_x24": [40.0, 41.0, 42.0], "x8_from_x1_lr_not_scaled": [30.0, 31.0, 33.0]}


def answered(study, folder, ap):
    rows = study.rows(SCENES)
    write_runs(folder, rows, ap)
    families = families_at([folder])
    assert len(families) == 1
    return answers(study, SCENES, rows_by_name(families), 3), families


def test_rows_that_differ_in_their_backbone_alone_stay_apart(tmp_path):
    found, [family] = answered(A, tmp_path, LEVEL | FALLEN)
    assert [answer.holds for answer in found] == [True, True, False]
    assert found[2].apart.value == pytest.approx(41 - 50.5)
    assert sorted(family.label(row) for row in family.rows)[0] == "from resnet18, kn = 256"


def test_worse_is_lower_where_more_is_better(tmp_path):
    found, _ = answered(B, tmp_path / "fallen", LEVEL | FALLEN)
    assert [answer.holds for answer in found] == [True, True, True, True]
    assert found[-1].test == "the interval lies below 0"
    found, _ = answered(B, tmp_path / "level", LEVEL)
    assert [answer.holds for answer in found] == [True, True, True, False]
    assert Difference(-2.0, -3.0, -1.0).opposite() == Difference(2.0, 1.0, 3.0)


def test_no_row_of_table_3_differs_in_more_than_the_table_says(tmp_path):
    of_x8 = ROWS_A[1]
    changed = replace(of_x8, name="a_x4_from_x8", settings=(*of_x8.settings, "optimizer.params.momentum=0.8"))
    larger = replace(of_x8, name="x8_from_x8", factor=8)
    write_runs(tmp_path, (*ROWS_A, changed, larger), LEVEL | {changed.name: [50.0], larger.name: [50.0]})
    [family] = families_at([tmp_path])
    labels = {table.name: [row[0] for row in table.rows] for table in paper_tables(family)}
    assert labels["table3a"] == ["x1", "x8", "x16", "x24"]
    assert labels["table3b"] == ["x1", "x1, momentum 0.8", "x2"]  # of the commonest backbone, and the plain row first


def test_table_3_has_the_papers_numbers_beside_ours(tmp_path):
    write_runs(tmp_path / "runs", {*ROWS_A, *ROWS_B}, LEVEL | FALLEN)
    families = families_at([tmp_path / "runs"])
    write_report(families, tmp_path / "report", "Table 3")
    a, b = paper_tables(families[0])
    rows = {row[0]: row[1:] for row in a.rows}
    assert list(rows) == ["x1", "x8", "x16", "x24"]
    assert rows["x8"] == ("2,048", "35.9", "33.9", "256", "0.01", "50.50 ± 0.50", "41.50 ± 0.50", "3", rows["x8"][-1])
    assert rows["x24"][:4] == ("-", "-", "-", "768")  # the paper has no 24 times its baseline
    assert rows["x24"][-1].startswith("-9.50 [")
    rows = {row[0]: row[1:] for row in b.rows}
    assert list(rows) == ["x1", "x2", "x4", "x8", "x8, lr not scaled"]
    assert rows["x1"] == ("2", "35.7", "33.6", "2", "0.0025", "50.50 ± 0.50", "41.50 ± 0.50", "3", "")
    assert rows["x8, lr not scaled"][:6] == ("-", "-", "-", "16", "0.0025", "31.33 ± 1.53")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "validation box AP" in page and "top-1" not in page
    assert '"name":"x8, kn 256"' in page  # the pre-training's kn, as in the table; all detectors have 8
    assert "x8, kn 16" in page
    assert "Paper: Mask R-CNN with ResNet-50 on COCO, ours: small on 1,024 images" in page
    tables = (tmp_path / "report" / "tables.md").read_text()
    assert "|  | paper: kn | paper: box AP | paper: mask AP | ours: kn | η | box AP |" in tables
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"table3a", "table3b"}


def test_runs_that_make_no_table_are_listed_by_what_they_are_judged_by(tmp_path):
    write_runs(tmp_path / "runs", ROWS_A[:1], LEVEL)
    write_report(families_at([tmp_path / "runs"]), tmp_path / "report", "one row")
    assert (tmp_path / "report" / "tables.csv").read_text().startswith("row,kn,η,box AP,seeds\n")


def test_a_row_of_which_two_seeds_of_three_diverge_is_not_known_to_be_worse(tmp_path):
    rows = B.rows(SCENES)
    write_runs(tmp_path, rows, {**LEVEL, "x8_from_x1": [50.0]})
    header = (Job(rows[3], 0).folder(tmp_path) / "log.jsonl").read_text().splitlines(keepends=True)[0]
    for seed in (1, 2):
        folder = Job(rows[3], seed).folder(tmp_path)
        folder.mkdir()
        (folder / "log.jsonl").write_text(header.replace('"seed": 0', f'"seed": {seed}'))
        (folder / "diverged.txt").write_text("error: the loss of iteration 25 is not a number\n")
    found = answers(B, SCENES, rows_by_name(families_at([tmp_path])), 3)
    assert [answer.holds for answer in found] == [True, True, None, None]  # two of three against none of three: p = 0.2
    assert found[2].cells[2] == "2 of 3 seeds of x8_from_x1 diverged"


def test_a_row_with_fewer_seeds_answers_nothing(tmp_path):
    two = {name: values[:2] for name, values in LEVEL.items()}
    found, _ = answered(replace(B), tmp_path, two)
    assert {answer.holds for answer in found} == {None}
