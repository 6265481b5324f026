"""The trainer's loop on one process and a small network: evaluation, statistics, what stops it, what it saves."""

import math
import os
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from oracle import K, N, network
from processes import in_processes
from small_engine import recipe
from test_checkpoint import complete
from trainers import NUM_IMAGES, Records, trainer

import lbsgd
from lbsgd.algorithm.schedule import learning_rate
from lbsgd.errors import CheckpointError, ConfigError, DivergedError, Stopped, TrainingError
from lbsgd.processes.ending import from_rank_0
from lbsgd.train import checkpoint
from lbsgd.train.agreement import Decision
from lbsgd.train.clock import Clock
from lbsgd.train.engine import start_processes
from lbsgd.train.random_states import random_states
from lbsgd.train.reporter import Reporter
from lbsgd.train.returned import OF_THE_TRAINER
from lbsgd.train.totals import Means, Totals
from lbsgd.train.trainer import NEVER, Trainer


def test_an_evaluation_counts_every_image_once_in_whole_numbers(tmp_path):
    ours = trainer(tmp_path)
    record = ours.evaluate(epoch=0)
    with torch.no_grad():
        best = torch.cat([ours.engine.module(x).argmax(1) == y for x, y in ours.images.val])
    assert record["val_images"] == 50 == len(best)  # the last batch has 2 of 16
    assert record["val_correct_top1"] == int(best.sum()) and record["val_correct_top5"] == 50  # of five classes
    assert record["val_top1_error_pct"] == pytest.approx(100 * (1 - int(best.sum()) / 50))


@pytest.mark.parametrize("method", ["loss", "evaluate"])
def test_a_task_that_returns_something_else_ends_the_run_before_its_weights_move_or_it_logs(tmp_path, method):
    ours = trainer(tmp_path)
    setattr(ours.task, method, lambda *_: torch.ones(()))
    with pytest.raises(ConfigError, match=f"^{method} of the recipe's task ResNet50 returned a tensor of shape"):
        ours.train(last_iteration=2)
    assert not ours.reporter.log.epochs and ours.iteration == (0 if method == "loss" else 2)


def test_an_epoch_is_logged_and_saved_and_goes_on_from_there(tmp_path):
    ours, counted = trainer(tmp_path), []
    ours.reporter.progress.advance = lambda: counted.append(ours.iteration)
    ours.train(last_iteration=3), ours.saver.wait()
    assert counted == [1, 2, 3]  # on the screen
    [record] = ours.reporter.log.epochs
    assert record["epoch"] == 1
    of_training = {key for key in record if not key.startswith("val_") and not key.endswith("_pct")}
    assert of_training <= OF_THE_TRAINER  # an evaluation may not return them
    assert ours.reporter.log.iterations[0]["iteration"] == 0
    assert [path.name for path in complete(tmp_path)] == ["iteration_00000002", "iteration_00000003"]
    again = trainer(tmp_path, resume=True)
    assert again.iteration == 3
    again.train(last_iteration=4), ours.train(last_iteration=4)
    first, second = (t.reporter.log.epochs[-1] for t in (again, ours))
    assert first["train_loss"] == second["train_loss"]  # the images of iteration 2 are in both totals
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.engine.module.parameters(), ours.engine.module.parameters(), strict=True)
    )


def totals_of_a_process():
    """Passes of 4 and 12 images on each process, the second one on totals that continue those of the first."""
    start_processes()
    before, after = (Totals(torch.device("cpu"), num_counts=1) for _ in range(2))
    before.add(torch.tensor(2.0), [torch.tensor(1)], 4)
    after.go_on(before.of_all())
    after.add(torch.tensor(1.0), [torch.tensor(6)], 12)
    return after.read(), after.read(since_mark=True)


def test_totals_are_means_over_the_images_of_all_processes_also_where_they_go_on():
    # (2 · 4 + 1 · 12) / 16 and (1 + 6) / 16 on each process
    for found in in_processes(2, totals_of_a_process):
        assert found == (Means(1.25, (43.75,), 32), Means(1.0, (50.0,), 24))


def test_totals_count_more_images_than_float32_can():
    totals = Totals(torch.device("cpu"), num_counts=1)
    for images in (2**24, 1):
        totals.add(torch.tensor(1.0), [torch.tensor(images)], images)
    assert totals.sums.tolist() == 3 * [2**24 + 1]


def test_a_run_goes_on_from_an_epoch_s_end_whose_checkpoint_lacks_the_epoch_s_totals(tmp_path):
    """For example one saved in the first iteration of the next epoch. The validation images are counted anyway."""
    ours = trainer(tmp_path)
    ours.train(last_iteration=2), ours.start_epoch(), ours.save(), ours.saver.wait()
    again = trainer(tmp_path, resume=True)
    again.train(last_iteration=4), ours.train(last_iteration=4)
    lost, last = again.reporter.log.epochs
    assert math.isnan(lost["train_loss"]) and math.isnan(lost["train_top1_error_pct"])
    assert lost["val_loss"] == ours.reporter.log.epochs[0]["val_loss"]
    assert last["train_loss"] == ours.reporter.log.epochs[-1]["train_loss"]


def test_a_run_that_goes_on_evaluates_no_epoch_that_is_not_due(tmp_path):
    ours = trainer(tmp_path)
    ours.train(last_iteration=2, evaluate_every=3), ours.saver.wait()
    again = trainer(tmp_path, resume=True)
    again.train(last_iteration=16, evaluate_every=3)
    evaluated = [record["epoch"] for record in again.reporter.log.epochs if "val_loss" in record]
    assert evaluated == [3, 4, 5, 6, 7, 8]  # the run is judged by its last five; it was resumed after epoch 1


def test_a_record_says_how_many_iterations_it_is_the_mean_of_also_after_a_resume(tmp_path):
    each = trainer(tmp_path / "each", iterations=8, steps_per_print=1)
    ours = trainer(tmp_path / "ours", iterations=8, steps_per_print=3)
    each.train(last_iteration=8), ours.train(last_iteration=5), ours.saver.wait()
    again = trainer(tmp_path / "ours", iterations=8, steps_per_print=3, resume=True)
    again.train(last_iteration=8)
    records = ours.reporter.log.iterations + again.reporter.log.iterations
    assert [(record["iteration"], record["num_iterations"]) for record in records] == [(0, 1), (3, 3), (6, 2)]
    seconds = [K * N / record["images_per_second"] for record in each.reporter.log.iterations]
    assert len(seconds) == 8 and sum(seconds) < each.reporter.log.epochs[0]["seconds"]  # each of its own iteration
    losses = [record["train_loss"] for record in each.reporter.log.iterations]
    for record in records:
        first, last = record["iteration"] - record["num_iterations"] + 1, record["iteration"]
        assert record["train_loss"] == pytest.approx(sum(losses[first : last + 1]) / record["num_iterations"], rel=1e-5)


def test_the_time_of_an_epoch_leaves_out_what_a_restart_took_and_goes_on_from_what_was_saved(tmp_path):
    ours = trainer(tmp_path)
    ours.train(last_iteration=1)
    ours.clock.epoch_began -= 200.0  # as if it had begun that many seconds ago
    ours.save(), ours.saver.wait()
    again = trainer(tmp_path)
    again.clock.epoch_began -= 1000.0
    again.go_on(again.saver.restore())
    again.train(last_iteration=4)
    first, second = (epoch["seconds"] for epoch in again.reporter.log.epochs)
    assert 200 < first < 500 and second < 200


def test_a_process_alone_is_stopped_after_the_iteration_in_which_it_was_asked(tmp_path, monkeypatch):
    """However fast its passes were: it has no other process to agree with."""
    ours = trainer(tmp_path, iterations=8)
    step = ours.engine.step

    def asked_in_iteration_3():
        if ours.iteration == 3:
            ours.guard.stop_requested = "SIGTERM"
        step()

    monkeypatch.setattr(ours.engine, "step", asked_in_iteration_3)
    with pytest.raises(Stopped, match="SIGTERM: saved after 4 iterations"):
        ours.train(last_iteration=8)


def test_an_evaluation_begins_once_the_epoch_is_on_the_disk_and_a_signal_ends_it_at_once(tmp_path, monkeypatch):
    ours, save, found = trainer(tmp_path), checkpoint.save, []

    def slowly(*given):
        time.sleep(0.1)
        found.append(("written", ours.guard.nothing_to_save))
        return save(*given)

    monkeypatch.setattr(checkpoint, "save", slowly)
    look = lambda *_: found.append(("evaluated", ours.guard.nothing_to_save)) or {}  # noqa: E731
    monkeypatch.setattr("lbsgd.train.trainer.evaluate", look)
    ours.train(last_iteration=3), ours.saver.wait()
    assert found == [("written", False), ("evaluated", True), ("written", False)]


def test_the_guard_knows_that_a_save_may_wait_for_the_disk(tmp_path):
    ours = trainer(tmp_path, iterations=8)
    told = []
    ours.guard.alive = told.append
    ours.train(last_iteration=1)
    assert "the save of iteration 1" in told


def test_recomputed_statistics_are_the_exact_ones_of_the_training_images(tmp_path):
    ours = trainer(tmp_path, statistics="recomputed", statistics_images=NUM_IMAGES)
    told = []
    ours.guard.alive = told.append
    ours.evaluate(epoch=1), ours.evaluate(epoch=0)  # the second follows no training
    recomputing = ["recomputing statistics"] * (NUM_IMAGES // N)  # the guard ends a process that is silent for long
    assert told == 2 * [*recomputing, *(f"evaluation, batch {number}" for number in range(4))]
    images = torch.cat(list(ours.images.train.statistics_batches(0, NUM_IMAGES, N)))
    with torch.no_grad():
        values = ours.engine.module.conv(images).double()
    norm = ours.engine.module.bn
    assert len(images) == NUM_IMAGES
    torch.testing.assert_close(norm.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), values.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert norm.num_batches_tracked == 0


def test_each_epoch_recomputes_statistics_from_images_of_its_own(tmp_path, monkeypatch):
    ours, asked = trainer(tmp_path, statistics="recomputed", statistics_images=N), []
    batches = ours.images.train.statistics_batches
    noting = lambda epoch, *given: asked.append(epoch) or batches(epoch, *given)  # noqa: E731
    monkeypatch.setattr(ours.images.train, "statistics_batches", noting)
    ours.train(last_iteration=4)
    assert asked == [1, 2]


def test_first_worker_statistics_are_those_of_the_first_n_images_of_an_iteration(tmp_path):
    ours = trainer(tmp_path, statistics="first_worker")
    first, _ = next(ours.images.train.epoch(0))
    with torch.no_grad():
        expected = 0.1 * ours.engine.module.conv(first).mean((0, 2, 3))
    ours.train(last_iteration=1)
    torch.testing.assert_close(ours.engine.module.bn.running_mean, expected)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    ours = trainer(tmp_path)
    ours.train(last_iteration=1)
    with torch.no_grad():
        ours.engine.module.fc.weight[0, 0] = float("nan")
    words = r"the weights fc.weight are not numbers; the newest checkpoint is .*_00000001"
    with pytest.raises(TrainingError, match=words):
        ours.save()
    assert len(complete(tmp_path)) == 1
    resumed = trainer(tmp_path)
    resumed.saver.restore()
    with torch.no_grad():
        resumed.engine.module.fc.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=words):  # before its own first save
        resumed.save()


def test_complex_weights_that_are_no_numbers_are_not_saved(tmp_path):
    ours = trainer(tmp_path)
    ours.engine.module.rotation = torch.nn.Parameter(torch.full((2,), complex(1, float("inf"))), requires_grad=False)
    with pytest.raises(TrainingError, match="the weights rotation are not numbers"):
        ours.save()


def test_a_result_that_is_no_number_ends_the_run_and_names_the_checkpoint(tmp_path, monkeypatch):
    ours = trainer(tmp_path)
    monkeypatch.setattr(ours, "evaluate", lambda epoch: {"val_top1_error_pct": math.nan})
    words = "after iteration 1 the top-1 error is not a number; the newest checkpoint is .*_00000002"
    with pytest.raises(DivergedError, match=words):
        ours.train(last_iteration=4)
    assert not ours.reporter.log.epochs


def test_a_loss_scale_that_cannot_fall_ends_training_and_names_the_iteration(tmp_path, monkeypatch):
    ours = trainer(tmp_path)

    def at_minimum():
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    ours.train(last_iteration=1)
    monkeypatch.setattr(ours.engine, "step", at_minimum)
    words = "the gradients of iteration 1 overflow fp16 at the smallest loss scale; look at .*, or use bf16$"
    with pytest.raises(DivergedError, match=words):
        ours.train(last_iteration=2)


def test_what_else_fails_in_an_update_is_not_taken_for_a_loss_scale_that_cannot_fall(tmp_path, monkeypatch):
    ours = trainer(tmp_path)

    def fails():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ours.engine, "step", fails)
    with pytest.raises(RuntimeError, match="^Connection closed by peer$"):
        ours.train(last_iteration=1)


def test_a_full_disk_is_said_and_training_goes_on(tmp_path, monkeypatch):
    ours = trainer(tmp_path)

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", disk_full)
    ours.train(last_iteration=3)
    assert ours.iteration == 3 and not ours.saver.wait() and "No space left on device" in ours.reporter.progress.said[0]


def test_a_run_that_stops_on_a_full_disk_does_not_say_that_it_was_saved(tmp_path, monkeypatch):
    ours = trainer(tmp_path)
    monkeypatch.setattr(checkpoint, "save", lambda *_: os.stat(tmp_path / "nothing"))  # raises OSError
    ours.guard.stop_requested = "SIGTERM"
    with pytest.raises(Stopped, match="^SIGTERM: the checkpoint of iteration 1 could not be written; --resume goes on"):
        ours.train(last_iteration=2)
    assert ours.guard.saved is False


def test_a_key_that_deepspeed_itself_refuses_is_one_line():
    config = recipe()
    config["zero_optimization"]["stge"] = 1
    with pytest.raises(
        ConfigError, match="zero_optimization.stge is an unknown key, which DeepSpeed refuses"
    ) as caught:
        lbsgd.initialize(network(), config)
    assert "\n" not in str(caught.value)


def fail_on_rank_0():
    torch.distributed.init_process_group("gloo")
    assert from_rank_0(lambda: torch.distributed.get_rank()) == 0

    def refuse():
        raise CheckpointError("no complete checkpoint")

    try:
        from_rank_0(refuse)
    except CheckpointError as error:
        return str(error)


def test_what_rank_0_finds_wrong_ends_every_process():
    assert in_processes(2, fail_on_rank_0) == ["no complete checkpoint"] * 2


def test_the_first_iteration_whose_loss_is_no_number_is_remembered():
    ours = SimpleNamespace(first_bad=torch.tensor(NEVER), totals=Totals("cpu", 0), plan=SimpleNamespace(micro_batch=1))
    for ours.iteration, loss in enumerate([1.0, math.inf, 1.0, math.nan, 1.0]):
        Trainer.note(ours, torch.tensor(loss), [])
    assert ours.first_bad == 1


def test_a_loss_that_is_no_number_is_found_before_anything_is_saved_or_reported_or_an_epoch_begins(tmp_path):
    ours = trainer(tmp_path)
    ours.first_bad.fill_(0)
    for act in (
        ours.save,
        lambda: ours.report_iteration(0),
        lambda: ours.report_epoch(2, evaluate_every=1),
        lambda: ours.next_batch(iter(["a batch"]), 0),
    ):
        with pytest.raises(DivergedError, match="the loss of iteration 0 is not a number; no checkpoint was written"):
            act()
    assert not complete(tmp_path) and ours.guard.nothing_to_save


def stopped_by_a_loss():
    """Return the error that stops this process if only rank 1's loss of iteration 3 is not a number."""
    start_processes()
    said, first_bad = [], torch.tensor(3 if torch.distributed.get_rank() else NEVER)
    Trainer.require_numbers(SimpleNamespace(first_bad=first_bad, saver=SimpleNamespace(stop=said.append)))
    return said


def test_a_loss_that_is_no_number_on_one_process_stops_every_process():
    assert in_processes(2, stopped_by_a_loss) == [["the loss of iteration 3 is not a number"]] * 2


def test_an_epoch_that_waited_for_its_data_says_once_what_to_change():
    records = Records()
    reporter = Reporter(Records(), records, None, "4 loader threads a process")
    for waited_pct in (4.9, 31.2, 50.0):
        reporter.advise_on_waiting(waited_pct)
    [said] = records.said
    assert "31 % of the epoch" in said and "4 loader threads a process" in said


def test_above_20_percent_of_an_epoch_one_line_says_once_what_to_change_for_aggregation():
    records = Records()
    reporter = Reporter(Records(), records, None)
    for waited_pct in (19.0, 32.4, 90.0):
        reporter.advise_on_aggregation(waited_pct)
    [said] = records.said
    assert said.startswith("warning: 32 %") and "\n" not in said
    assert all(word in said for word in ("reduce_bucket_size", "hierarchy", "micro batch"))


@pytest.mark.parametrize("seconds_before", [0.0, 1e6])
def test_the_shares_of_an_epoch_that_were_waited_are_those_of_its_iterations_since_a_resume(
    tmp_path, monkeypatch, seconds_before
):
    ours, told = trainer(tmp_path, steps_per_print=1), []
    if seconds_before:
        ours.train(last_iteration=1), ours.saver.wait()
        ours = trainer(tmp_path, steps_per_print=1, resume=True)
        ours.clock.start_epoch(seconds_before)
    ours.plan = replace(ours.plan, world_size=2)  # a record then has its aggregation, too
    next_of, passes = ours.clock.next_of, (2 - ours.iteration) * ours.plan.accumulation_steps

    def slowly(batches):
        batch = next_of(batches)
        ours.clock.data.seconds += 1000.0  # seconds, far more than the epoch's own
        ours.clock.aggregation.seconds += 3000.0
        return batch

    monkeypatch.setattr(ours.clock, "next_of", slowly)
    monkeypatch.setattr(ours.reporter, "advise_on_waiting", told.append)
    monkeypatch.setattr(ours.reporter, "advise_on_aggregation", told.append)
    ours.train(last_iteration=2)
    seconds = ours.reporter.log.epochs[0]["seconds"] - seconds_before
    assert 0 < seconds < 1000
    assert [pct * seconds / 100 for pct in told] == pytest.approx([1000.0 * passes, 3000.0 * passes], rel=1e-3)
    for record in ours.reporter.log.iterations:
        window, passes = K * N / record["images_per_second"], ours.plan.accumulation_steps
        assert record["data_wait_pct"] * window / 100 == pytest.approx(1000.0 * passes, rel=1e-3)
        assert record["aggregation_wait_pct"] * window / 100 == pytest.approx(3000.0 * passes, rel=1e-3)


def test_a_record_counts_no_aggregation_from_before_its_time(tmp_path, monkeypatch):
    ours, shares = trainer(tmp_path, iterations=2, steps_per_print=4), []
    backward = ours.engine.backward
    slow = ours.clock.aggregation.timed(lambda loss: (backward(loss), time.sleep(0.1)))
    monkeypatch.setattr(ours.engine, "backward", slow)
    clock, report = ours.clock, ours.report_iteration
    monkeypatch.setattr(
        ours,
        "report_iteration",
        lambda t: (shares.append(clock.aggregation.of_window / clock.window_seconds), report(t)),
    )
    ours.train(6)  # the second record covers one iteration, three after the first
    assert [record["num_iterations"] for record in ours.reporter.log.iterations] == [1, 1]
    assert len(shares) == 2 and 0 < min(shares) and max(shares) <= 1


def test_the_wait_for_the_first_batch_of_a_run_is_no_advice():
    """The loader starts and compiles meanwhile. More threads or a faster disk would not shorten that."""
    clock = Clock()

    def slow_batches():
        while True:
            time.sleep(0.02)
            yield "a batch"

    batches = slow_batches()
    assert clock.next_of(batches) == "a batch" and clock.data.of_epoch == clock.data.of_window == 0.0
    clock.start_window(), clock.next_of(batches)
    assert 0.02 <= clock.data.of_window == clock.data.of_epoch <= clock.epoch_seconds
    clock.start_epoch(), clock.next_of(batches)
    assert clock.data.of_epoch >= 0.02  # a later epoch's first batch counts, because nothing is compiled for it


def test_what_was_saved_is_asked_for_no_longer_and_a_stop_still_is(tmp_path):
    """With several processes the next decision may be many iterations away, and each iteration would save."""
    ours = trainer(tmp_path)
    ours.decision = Decision(stop=True, save=True)
    ours.save(), ours.saver.wait()
    assert ours.decision == Decision(stop=True)


def test_a_given_up_iteration_leaves_the_random_states_and_the_totals_from_before_it(tmp_path, monkeypatch):
    ours = trainer(tmp_path)
    ours.engine.train(), ours.start_epoch()
    batches, loss_of = ours.images.train.epoch(0), ours.task.loss

    def drawing(engine, batch):
        torch.rand(3)  # as dropout does
        return loss_of(engine, batch)

    ours.task = SimpleNamespace(counts=ours.task.counts, loss=drawing)
    ours.update(batches)
    before, totals = random_states(0), ours.totals.of_all()
    monkeypatch.setattr(ours.agreement, "after_pass", lambda stop, save: Decision(stop=True, pass_seconds=1000.0))
    with pytest.raises(Stopped, match="saved after 1 iterations"):
        ours.update(batches)
    assert not torch.equal(random_states(0)["torch.0"], before["torch.0"])
    tensors, state = checkpoint.load(checkpoint.newest(tmp_path))
    assert state["counters"]["iteration"] == 1 and state["epoch_totals"] == totals.tolist()
    assert all(torch.equal(tensors["random"][name], kept) for name, kept in before.items())


def test_what_runs_between_two_epochs_counts_for_no_pass(tmp_path):
    ours = trainer(tmp_path)
    ours.agreement.began -= 1000.0  # as if an evaluation had taken that many seconds
    ours.start_epoch()
    assert ours.agreement.after_pass(stop=False, save=False).pass_seconds < 500


@pytest.mark.parametrize(
    "at, pass_seconds, done",  # K passes an iteration, and two iterations an epoch, whose totals stay
    [(0, 10.0 / (K - 1) + 0.01, 0), (0, 10.0 / (K - 1), 1), (K - 1, 1000.0, 1), (2 * K, 1000.0, 2)],
)
def test_an_iteration_is_given_up_if_the_rest_of_it_would_take_more_than_10_seconds(
    tmp_path, monkeypatch, at, pass_seconds, done
):
    ours, number = trainer(tmp_path), count()
    decision = Decision(stop=True, pass_seconds=pass_seconds)
    monkeypatch.setattr(ours.agreement, "after_pass", lambda stop, save: decision if next(number) == at else None)
    with pytest.raises(Stopped, match=f"another process was told to: saved after {done} iterations"):
        ours.train(last_iteration=4)
    _, state = checkpoint.load(checkpoint.newest(tmp_path))
    assert state["counters"]["iteration"] == done and state["epoch_totals"][-1] == done * K * N  # images


def test_records_have_the_learning_rate_of_their_last_update_and_an_epoch_s_its_skipped_ones(tmp_path):
    ours = trainer(tmp_path, steps_per_print=1)  # in the ramp, where each update has another learning rate
    ours.engine.skipped_steps = 1
    ours.train(last_iteration=4), ours.saver.wait()
    lr = [learning_rate(t, ours.plan.schedule) for t in range(4)]
    assert lr[1] != pytest.approx(lr[2], rel=1e-3)
    iterations, epochs = ours.reporter.log.iterations, ours.reporter.log.epochs
    assert [record["lr"] for record in iterations] == pytest.approx(lr, rel=1e-12)
    assert [record["epoch"] for record in iterations] == [0, 0.5, 1, 1.5]
    assert [record["lr"] for record in epochs] == pytest.approx([lr[1], lr[3]], rel=1e-12)
    for record in epochs:
        assert record["images_per_second"] * record["seconds"] == pytest.approx(NUM_IMAGES)
        assert record["skipped_iterations"] == 1


def test_the_noise_is_in_the_record_of_each_iteration_that_measured_it(tmp_path):
    ours = trainer(tmp_path, steps_per_print=1)
    ours.noise.every = 2
    ours.train(last_iteration=4), ours.saver.wait()
    assert ["noise_scale" in record for record in ours.reporter.log.iterations] == [True, False, True, False]


@pytest.mark.parametrize("rank_0", [True, False])
def test_all_processes_report_in_the_same_iterations_also_those_that_measure_the_noise(tmp_path, rank_0):
    """A report is a collective call. Only rank 0 has a reporter."""
    ours, reported = trainer(tmp_path, iterations=8, steps_per_print=5), []
    ours.noise.every, ours.report_iteration = 3, reported.append
    if not rank_0:
        ours.reporter = None
    ours.train(last_iteration=8)
    assert reported == [0, 3, 5, 6]


def test_a_measurement_of_the_noise_is_logged_at_its_own_iteration_however_rarely_records_are_written(tmp_path):
    ours = trainer(tmp_path, iterations=8, steps_per_print=5)
    ours.noise.every = 3
    ours.train(last_iteration=8)
    records = ours.reporter.log.iterations
    assert [(record["iteration"], "noise_scale" in record) for record in records] == [
        (0, True),
        (3, True),
        (5, False),
        (6, True),
    ]


def test_only_on_several_processes_is_there_a_wait_for_aggregation(tmp_path):
    ours = trainer(tmp_path)
    for world_size in (1, 2):
        plan = replace(ours.plan, world_size=world_size)
        again = Trainer(ours.engine, plan, ours.task, ours.images, ours.saver, ours.guard)
        assert (again.clock.aggregation is ours.engine.waiting) == (world_size > 1)
