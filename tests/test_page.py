"""The page in a real browser, Debian's headless Chromium, which tests/browser/setup.sh installs."""

import itertools
import json
import math
import re
import shutil
import subprocess
import time

import pytest
from grid_logs import DIGITS, write_log, write_rows
from PIL import Image

from lbsgd.errors import ConfigError
from lbsgd.experiments.catalogue import DATA_SETS, STUDIES
from lbsgd.experiments.checkout import ROOT
from lbsgd.experiments.reproduce import GridRequest, report
from lbsgd.report.page import Chart, Page, Section, Series, asset
from lbsgd.report.run_log import DIVERGED, read_run
from lbsgd.report.run_page import configuration, run_page
from lbsgd.report.write import families_at, write_report

ROWS = STUDIES["table1"].rows(DIGITS)
PROBE = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script></body>"


def chromium(page, *flags, width=1000, height=1400):
    """Return Chromium's standard output for a page. Its messages about the machine go to stderr."""
    browser = shutil.which("chromium-headless-shell")
    assert browser, "tests/browser/setup.sh installs chromium-headless-shell; `make test` runs it"
    sandbox = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
    size = f"--window-size={width},{height}"
    command = [browser, *sandbox, size, "--virtual-time-budget=2000", *flags, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    errors = {row.name: [10.0 * number + seed for seed in range(3)] for number, row in enumerate(ROWS)}
    write_rows(folder / "runs", ROWS, errors)
    write_report(families_at([folder / "runs"]), folder, "digits", ["table1"])
    return folder / "index.html"


def test_a_group_s_page_draws_every_row_with_its_values(group):
    dom = chromium(group, "--dump-dom")
    assert re.findall(r"<td>(\d+\.\d+ ± \d+\.\d+)</td>", dom)[1::2] == [
        f"{number}1.00 ± 1.00"[number == 0 :] for number in range(4)
    ]
    legend = re.findall(r"</svg>([a-z ]+, kn \d+ )<b>([^<]*)</b>", dom)[:4]
    assert legend == [
        ("baseline, kn 32 ", "1 ± 1 %"),
        ("no warmup, kn 256 ", "11 ± 1 %"),
        ("constant warmup, kn 256 ", "21 ± 1 %"),
        ("gradual warmup, kn 256 ", "31 ± 1 %"),
    ]
    assert dom.count("<path") >= 4 * 2 * 2 + 4  # lines and bands of two charts, and the learning rates


def test_a_band_of_percents_ends_at_0_and_100(tmp_path):
    errors = {row.name: [20.0, 50.0, 95.0] for row in ROWS}  # ± 2 std is -20 to 130
    write_rows(tmp_path / "runs", ROWS, errors)
    write_report(families_at([tmp_path / "runs"]), tmp_path, "digits", ["table1"])
    chart = re.search(r"<svg.*?</svg>", chromium(tmp_path / "index.html", "--dump-dom"), re.DOTALL)[0]
    ticks = re.findall(r'text-anchor="end">([\d.]+)<', chart)
    assert ticks[:6] == ["0", "20", "40", "60", "80", "100"]
    [band, *_] = re.findall(r'd="M([^"]*)Z"', chart)
    heights = [float(point.split()[1]) for point in band.split("L")]
    grid = [float(y) for y in re.findall(r'y1="([\d.]+)"', chart)]
    assert min(heights) == pytest.approx(min(grid), abs=0.1) and max(heights) == pytest.approx(max(grid), abs=0.1)


def test_a_figure_whose_rows_have_all_diverged_draws_their_crosses(tmp_path):
    for row in STUDIES["figure1"].rows(DIGITS):
        for seed in range(2):
            folder = write_log(tmp_path / "runs", row, seed, [90.0], planned=6)
            (folder / DIVERGED).write_text("error: the loss of iteration 5 is not a number")
    write_report(families_at([tmp_path / "runs"]), tmp_path, "digits", ["figure1"])
    dom = chromium(tmp_path / "index.html", "--dump-dom")
    charts = re.findall(r"<svg.*?</svg>", dom, re.DOTALL)
    [chart] = [svg for svg in charts if svg.count("l8 8m0 -8l-8 8") == 6]  # the legend's have one
    assert ">100</text>" in chart and "no number yet" not in chart


def test_the_arrow_keys_choose_the_epoch_in_a_chart_that_has_the_focus(group, tmp_path):
    keys = "ArrowLeft", "ArrowLeft", "ArrowRight", "Home", "ArrowLeft", "End", "ArrowRight", "ArrowLeft"
    presses = f"""<script>const svg = document.querySelector("figure svg"); svg.focus();
      document.title = {json.dumps(keys)}.map(key => {{
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {{key}}));
        return svg.parentElement.querySelector("li").textContent; }}).join(" ");</script></body>"""
    (tmp_path / "pressed.html").write_text(group.read_text().replace("</body>", presses))
    last = read_run(next(group.parent.rglob("log.jsonl"))).epochs[-1]["epoch"]
    chosen = last - 1, last - 2, last - 1, 1, 1, last, last, last - 1
    title = re.search("<title>(.*?)</title>", chromium(tmp_path / "pressed.html", "--dump-dom"))[1]
    assert title.split(": ") == " ".join(f"epoch {epoch}:" for epoch in chosen).split(": ")


def test_percents_have_the_digits_of_the_tables(tmp_path):
    line = Series("error", [1, 2], [50.0, 12.3456], [40.0, 10.0], [60.0, 14.6912])
    page = Page(
        "", "", [Section(charts=[Chart("error", [line], "%"), Chart("share", [Series("", [1], [0.01234])], "%")])]
    )
    dom = chromium(page.write(tmp_path), "--dump-dom")
    assert re.findall("<b>(.*?)</b>", dom) == ["12.35 ± 1.17 %", "0.01234 %"]


def test_the_page_fetches_nothing_and_is_small(group):
    html = group.read_text()
    assert len(html) < 1_000_000
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:,)\w+:", html)


@pytest.mark.parametrize("width", [320, 1000])
def test_the_page_fits_a_narrow_screen(group, tmp_path, width):
    probed = tmp_path / "index.html"
    probed.write_text(group.read_text().replace("</body>", PROBE))
    title = re.search(r"<title>(\d+) of (\d+)</title>", chromium(probed, "--dump-dom", width=width))
    assert int(title[1]) <= int(title[2])  # the tables scroll separately


@pytest.mark.parametrize("width", [390, 1400])
def test_claims_can_be_read_beside_their_answers(tmp_path, width):
    """Long words wrap, a claim is no column of single words, and its answer is visible."""
    request = GridRequest((STUDIES["table3a"],), DATA_SETS["scenes"], (0, 1, 2), ROOT, tmp_path)
    shutil.copytree(ROOT / "results" / "scenes" / "runs", request.logs)
    report(request, "0123456789")
    page = tmp_path / "scenes" / "table3a" / "index.html"
    probe = """<script>document.title = JSON.stringify([...document.querySelectorAll(".words tbody tr")].map(row =>
      [row.cells[0].clientWidth, row.cells[1].textContent, row.cells[1].getBoundingClientRect().right,
       row.cells[4].getBoundingClientRect().right]))</script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    rows = json.loads(re.search("<title>(.*?)</title>", chromium(page, "--dump-dom", width=width))[1])
    assert [answer for _, answer, *_ in rows] == ["no", "no", "could not be answered"]
    assert all(claim > 120 and answered <= width for claim, _, answered, _ in rows)
    assert width < 1000 or all(end <= width for *_, end in rows)


def test_a_learning_rate_that_stays_is_a_line_in_the_middle(tmp_path):
    run = read_run(write_log(tmp_path, ROWS[0], 0, [50.0, 40.0, 30.0]))
    run.header["schedule"] |= {"reference_lr": 0.025, "decay_iterations": []}
    dom = chromium(run_page(run).write(tmp_path), "--dump-dom")
    chart = re.findall(r"<figure.*?</figure>", dom, re.DOTALL)[-1]
    assert re.findall(r'text-anchor="end">([\d.]+)<', chart) == ["0.02", "0.03", "0.04", "0.05"]
    top, *_, bottom = sorted({float(y) for y in re.findall(r' y2="([\d.]+)"', chart)})
    [height] = {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'<path d="([^"]*)"', chart)[1])}
    assert top + 50 < height < bottom


def test_a_curve_that_has_ended_before_the_others_says_at_which_epoch(tmp_path):
    write_log(tmp_path / "runs", ROWS[0], 0, [50.0, 40.0, 30.0, 20.0])
    write_log(tmp_path / "runs", ROWS[3], 0, [80.0, 70.0], planned=4)
    page = write_report(families_at([tmp_path / "runs"]), tmp_path, "digits", ["figure1"])[-1]
    _, validation, training, lr = re.findall("<figure.*?</figure>", chromium(page, "--dump-dom"), re.DOTALL)
    for chart in (validation, training):
        assert "baseline, kn 32 <b>20 %</b>" in chart
        assert "gradual warmup, kn 256, 1 not finished <b>70 % (epoch 2)</b>" in chart
    assert "<li>epoch 4:</li>" in lr and "baseline, kn 32 <b>0.2</b>" in lr  # the last iteration lasts to the end
    assert "1 not finished <b>1.483 (epoch 2)</b>" in lr


def test_the_charts_of_rows_have_one_axis_of_epochs_also_where_the_runs_ended_early(tmp_path):
    for row in ROWS[::3]:
        write_log(tmp_path / "runs", row, 0, [80.0, 70.0], planned=90)
    page = write_report(families_at([tmp_path / "runs"]), tmp_path, "digits", ["figure1"])[-1]
    _, *charts = re.findall("<figure.*?</figure>", chromium(page, "--dump-dom"), re.DOTALL)
    assert [re.findall(r'text-anchor="middle">(\d+)<', chart) for chart in charts] == [["0", "1", "2"]] * 3


@pytest.mark.parametrize("dark", [False, True])
def test_no_two_curves_have_colours_that_look_alike(dark):
    css = asset("page.css")
    light, *dim = css.split("@media (prefers-color-scheme: dark)")
    styles = "".join([light, *(dim if dark else [block.split("}\n", 1)[-1] for block in dim])])
    colours = dict(re.findall(r"\.s(\d) \{ color: #(\w{6})", styles))
    assert len(colours) == 6
    seen = [tuple(int(colour[at : at + 2], 16) for at in (0, 2, 4)) for colour in colours.values()]
    assert min(math.dist(one, other) for one, other in itertools.combinations(seen, 2)) > 60


def test_the_page_is_dark_in_dark_mode(group, tmp_path):
    corners = []
    for number, scheme in enumerate((1, 0)):  # Chromium's light and dark
        picture = tmp_path / f"{number}.png"
        chromium(group, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}")
        with Image.open(picture) as image:
            corners.append(sum(image.convert("RGB").getpixel((2, 2))))
    assert corners[0] == 3 * 255 and corners[1] < 150


def test_an_unfinished_run_s_page_reloads_itself_and_a_finished_one_does_not(tmp_path):
    going = read_run(write_log(tmp_path / "going", ROWS[0], 0, [50.0, 40.0], planned=4))
    done = read_run(write_log(tmp_path / "done", ROWS[0], 0, [50.0, 40.0]))
    pages = [run_page(run).write(run.path.parent) for run in (going, done)]
    assert 'data-reload-seconds="15"' in pages[0].read_text() and 'data-reload-seconds=""' in pages[1].read_text()
    assert "epoch 2 of 4, about 2 min left: top-1 error 45.00 %" in pages[0].read_text()  # 60 s per epoch
    # made to reload at once, a single time, it comes back to where it was scrolled to
    quick = pages[0].read_text().replace('data-reload-seconds="15"', 'data-reload-seconds="0.05"')
    once = "<header><script>if (sessionStorage.n) document.body.dataset.reloadSeconds = '';</script>"
    scroll = "<script>if (sessionStorage.n) document.title = scrollY; else { sessionStorage.n = 1; scrollTo(0, 123); }"
    quick = quick.replace("<header>", once).replace("</body>", f"{scroll}</script></body>")
    (tmp_path / "quick.html").write_text(quick)
    assert "<title>123</title>" in chromium(tmp_path / "quick.html", "--dump-dom", height=400)


def test_a_run_without_an_evaluation_says_so_beside_its_epochs(tmp_path):
    run = read_run(write_log(tmp_path, ROWS[0], 0, [50.0, 40.0], planned=4))
    for record in run.epochs:
        del record["val_top1_error_pct"]
    assert "epoch 2 of 4, about 2 min left: no evaluation yet" in run_page(run).html()
    run.epochs.clear()
    page = run_page(run).write(tmp_path)
    assert "epoch 0 of 4: no epoch is finished yet" in page.read_text()
    assert ">no number yet<" in chromium(page, "--dump-dom")


def test_a_global_batch_is_told_in_full(tmp_path):
    line = Series("rule", [256, 12_288, 131_072], [23.6, 23.7, 40.0])
    page = Page("", "", [Section(charts=[Chart("error over the global batch", [line], logx=True)])])
    dom = chromium(page.write(tmp_path), "--dump-dom")
    assert re.findall(r'text-anchor="middle">([\d,]+)<', dom) == ["256", "12,288", "131,072"]


def test_configuration_that_is_not_the_paper_s_is_marked(tmp_path):
    html = run_page(read_run(write_log(tmp_path, ROWS[1], 0, [50.0]))).html()
    marked = re.findall(r'<tr class="other"><th>([^<]*)</th>\s*<td>(.*?)</td>', html, re.DOTALL)
    assert ("warmup.kind", 'none <span class="paper">paper: gradual</span>') in marked
    assert "batch_norm.per_worker_batch" not in dict(marked)
    baseline = run_page(read_run(write_log(tmp_path / "x1", ROWS[0], 0, [50.0]))).html()
    assert "paper: gradual" not in baseline  # up to base_batch the paper has no warmup


def test_configuration_is_what_the_run_obeyed(tmp_path):
    """Decay points in iterations replace those in epochs, and a detector has its own image sizes."""
    run = read_run(ROOT / "results" / "scenes" / "runs" / "x4_from_x1" / "seed0")
    facts = {fact.name: fact.value for fact in configuration(run.header)}
    assert facts["decay.iterations"] == "[1536]" and facts["detection.shorter_side"] == "112"
    assert not {"decay.epochs", "augmentation.resolution", "augmentation.crop_scale", "epochs"} & facts.keys()
    facts = {fact.name for fact in configuration(read_run(write_log(tmp_path, ROWS[0], 0, [50.0])).header)}
    assert {"decay.epochs", "augmentation.resolution", "augmentation.crop_scale", "epochs"} <= facts


def test_training_waits_less_than_50_ms_for_the_page(tmp_path):
    run = read_run(write_log(tmp_path, ROWS[0], 0, [50.0] * 90))
    run.header["iterations_per_epoch"] = 5004  # ImageNet at 256 images: 450,000 iterations
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        run_page(run).write(tmp_path)
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.05


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match="cannot write .*index.html: No space left on device; choose another folder"):
        Page("a", "b").write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_are_text_and_no_markup(tmp_path):
    html = Page("<script>alert(1)</script>", "a & b").html()
    assert "<script>alert" not in html and "a &amp; b" in html


def test_the_share_of_skipped_updates_is_drawn_where_there_are_any(tmp_path):
    run = read_run(write_log(tmp_path, ROWS[0], 0, [50.0, 40.0]))
    assert "skipped" not in run_page(run).html()
    for record, skipped in zip(run.epochs, (12, 12), strict=True):
        record["skipped_iterations"] = skipped
    (section,) = [found for found in run_page(run).sections if found.title == "Updates skipped for overflow"]
    assert section.charts[0].series[0].y == [25.0, 12.5]  # 48 iterations per epoch
