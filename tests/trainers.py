"""The trainer on the small network, with stand-ins for log, screen and guard."""

from oracle import K, N, network
from resnet50 import ResNet50
from small_engine import recipe

import lbsgd
from lbsgd.data.fake import FakeEval, FakeImages
from lbsgd.data.share import Cut, Pixels, Share
from lbsgd.train.images import Images
from lbsgd.train.reporter import Reporter
from lbsgd.train.saver import Saver
from lbsgd.train.trainer import Trainer

ITERATIONS = 2  # of an epoch
NUM_IMAGES = ITERATIONS * K * N


class Records:
    """Replaces log and screen, and keeps their records."""

    def __init__(self):
        self.epochs, self.iterations, self.said = [], [], []
        self.epoch, self.iteration = self.epochs.append, self.iterations.append
        self.say, self.advance, self.put_back = self.said.append, lambda: None, lambda: False


class NobodyAsks:
    """Replaces the guard."""

    stop_requested, nothing_to_save = None, True

    def alive(self, position):
        self.position = position


def trainer(folder, val_images=50, iterations=ITERATIONS, steps_per_print=10, resume=False, **batch_norm):
    config = recipe(**batch_norm)
    config["steps_per_print"], config["lbsgd"]["num_images"] = steps_per_print, iterations * K * N
    config["scheduler"]["params"]["warmup_num_steps"] = 5 * iterations
    engine, plan = lbsgd.initialize(network(), config)
    pixels = Pixels(resolution=6, device=engine.device)
    data = FakeImages(plan.num_images, 5, Cut(seed=0, global_batch=K * N, micro_batch=N), pixels)
    images = Images(data, FakeEval(val_images, 5, seed=0, batch=16, share=Share(), pixels=pixels))
    reporter = Reporter(Records(), Records(), engine)
    saver = Saver(engine, folder, {"recipe": "small"}, {}, say=reporter.progress.say)
    reached = saver.restore() if resume else None
    return Trainer(engine, plan, ResNet50(), images, saver, NobodyAsks(), reporter, reached)
