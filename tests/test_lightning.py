"""Lightning with plain DDP and loader workers, uninterrupted and resumed, trains like lbsgd.initialize."""

from oracle import BOUND, distance, network
from processes import in_processes
from test_libraries import Recorder, config_of, floats, reference
from test_reuse import images_and_labels, run_block, with_json

from lbsgd.train.engine import start_processes

EPOCH = 2  # updates
CALL = "logger=False, **needs.arguments"
DDP = [  # as the page says
    ("DeepSpeedStrategy(config=needs.config)", "DDPStrategy(broadcast_buffers=False)"),
    (" * plan.accumulation_steps", ""),
]
HERE = [
    (CALL, f"{CALL}, callbacks=[saving], accelerator='cpu', enable_progress_bar=False, enable_model_summary=False"),
    ("batch_sampler=self.parts.sampler", "batch_sampler=self.parts.sampler, **workers"),
]
RESUMED = ("trainer.fit(Classifier())", "trainer.fit(Classifier(), ckpt_path=checkpoint, weights_only=False)")
EARLY = ("self.parts.sampler.set_epoch(", "int(")  # Lightning alone sets the epoch only when the workers have begun it


def of_a_run(folder, *changes):
    """Return a run's weights and statistics, and its learning rates."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy

    names = dict(model=network(), world_size=2, dataset=images_and_labels(), DDPStrategy=DDPStrategy)
    names["saving"] = ModelCheckpoint(f"{folder}/saved", "{step}", save_top_k=-1, every_n_epochs=1)
    names["workers"] = dict(num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    names["checkpoint"] = f"{folder}/saved/step={EPOCH}.ckpt"
    with Recorder() as recorder:
        names = run_block("lightning", folder, [*DDP, *HERE, *changes], **names)
    return floats(names["model"].state_dict()), recorder.lrs


def in_lightning(folder):
    start_processes()
    return [reference(folder), of_a_run(folder), of_a_run(folder, RESUMED), of_a_run(folder, RESUMED, EARLY)]


def test_under_ddp_a_run_and_what_goes_on_at_an_epoch_train_the_same(tmp_path):
    folder = str(with_json(tmp_path, config_of()))
    for (ours, lrs), whole, resumed, early in in_processes(2, in_lightning, folder, imports="lightning.pytorch"):
        assert distance(whole[0], floats(ours)) < BOUND and whole[1] == lrs
        assert distance(resumed[0], floats(ours)) < BOUND and resumed[1] == lrs[EPOCH:]
        assert distance(early[0], floats(ours)) > 100 * BOUND
