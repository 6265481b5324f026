"""Asynchronous against synchronous updates, simulated on one process (the paper's Sec. 6 on related work).

    python recipes/asynchronous.py --updates async --deepspeed_config ds_configs/digits/256.json --data_dir ... \
        --output_dir runs/async

k workers take n images at a time. Asynchronous: as soon as a worker is ready, the server moves the weights by its
gradient, computed at weights τ updates old, and hands it the new ones. Synchronous: one update per k gradients, when
the slowest is ready. Each gradient moves the weights by η/k in both, and the images are the same. How long a worker
takes is drawn per gradient, log-normal with mean 1 and the given spread.
"""

import heapq
from contextlib import ExitStack
from dataclasses import replace

from digits import DigitsResNet

from lbsgd.commands.flag_types import at_least_zero
from lbsgd.commands.train import Request, parser
from lbsgd.errors import ConfigError, LbsgdError, TrainingError
from lbsgd.processes.ending import end_with_error


def main():
    flags = parser(__doc__)
    flags.add_argument(
        "--updates", choices=("sync", "async"), required=True, help="how the workers' gradients are used"
    )
    flags.add_argument(
        "--spread", type=at_least_zero, default=0.3, metavar="S", help="of the workers' times (default: 0.3)"
    )
    try:
        request = Request(flags.parse_args())
        simulate(request)
    except LbsgdError as error:
        end_with_error(error)


def simulate(request):
    """Train one network and log an epoch's errors, simulated time and mean staleness."""
    with ExitStack() as stack:
        simulated = {"updates": request.flags.updates, "spread": request.flags.spread}
        server, images, log = opened(request, f"resnet8, {request.flags.updates}", {"simulated": simulated}, stack)
        for epoch in range(request.flags.epochs or int(request.plan.num_epochs)):
            training = server.train(images.train.epoch(epoch))
            log.epoch({"epoch": epoch + 1, **training, **server.evaluate(images.val)})
        log.result()


def opened(request, name, described, stack):
    """Return server, images and log; `stack` closes them. A run that was interrupted begins anew."""
    import torch

    from lbsgd.data.share import Pixels
    from lbsgd.report.run_log import RunLog
    from lbsgd.train.facts import environment
    from lbsgd.train.images import FakeImageSource, FfcvFiles
    from lbsgd.train.run import require_writable

    require_simulable(request)
    plan = replace(request.plan, micro_batch=request.plan.per_worker_batch)  # a worker's images in a batch
    threads = request.flags.loader_threads or 1
    source = FfcvFiles(request.data, threads) if request.data else FakeImageSource()
    require_writable(request.output_dir)
    pixels = Pixels(resolution=plan.recipe.augmentation.resolution, device=torch.device("cpu"))
    images = source.open(plan, request.processes, pixels, stack)
    header = {"model": name, **plan.as_dict(), **described, "environment": environment(source.place)}
    log = stack.enter_context(RunLog(request.output_dir, header, 0 if request.flags.resume else None))
    torch.set_num_threads(threads)  # FFCV has changed it
    return Server(DigitsResNet().network(source.num_classes, plan), plan, request.flags), images, log


NOT_SIMULATED = (
    "evaluate_only",
    "max_iterations",
    "checkpoint_every",
    "compile",
    "cuda_graphs",
    "in_memory",
    "baseline",
)


def require_simulable(request):
    """Raise ConfigError for what the simulation would only seem to do: flags, several processes, fp16, bf16."""
    given = [flag for flag in NOT_SIMULATED if getattr(request.flags, flag)]
    if request.flags.evaluate_every > 1:
        given.append("evaluate_every")
    if given:
        raise ConfigError(f"the simulation does not know --{', --'.join(given)}; leave it out")
    if request.processes.world_size > 1:
        raise ConfigError("the workers are simulated on one process; start the recipe without a launcher")
    if request.plan.precision != "fp32":
        raise ConfigError(f"the workers are simulated in fp32, not {request.plan.precision}; give --precision fp32")


class Server:
    """Weights, momentum and the workers that take them: which gradient comes next, and how old its weights are."""

    def __init__(self, network, plan, flags):
        import numpy as np

        from lbsgd.algorithm.batch_norm import convert_batch_norm
        from lbsgd.train.inputs import build_optimizer

        self.network, self.plan, self.updates = convert_batch_norm(network, plan.per_worker_batch), plan, flags.updates
        self.optimizer, self.weights = build_optimizer(network, plan), list(network.parameters())
        self.random, self.spread = np.random.default_rng([plan.recipe.seed, 1]), flags.spread
        self.workers, self.time, self.gradients, self.moves = plan.num_workers, 0.0, 0, 0
        held = [weight.detach().clone() for weight in self.weights]
        self.ready = [(self.draw(), worker) for worker in range(self.workers)]
        heapq.heapify(self.ready)
        worker_copies = self.workers if self.asynchronous else 0
        self.held = {worker: ([weight.clone() for weight in held], 0) for worker in range(worker_copies)}

    @property
    def asynchronous(self):
        return self.updates == "async"

    def draw(self):
        """Return how long a worker takes for its next gradient: 1 on average."""
        return float(self.random.lognormal(-(self.spread**2) / 2, self.spread))

    def train(self, batches):
        """Take an epoch's batches of n images, one worker each."""
        losses, wrong, seen, ages, began = 0.0, 0, 0, [], self.time
        self.network.train()
        for batch in batches:
            loss, hits, age = self.asynchronously(batch) if self.asynchronous else self.synchronously(batch)
            losses, wrong, seen = losses + loss * len(batch[1]), wrong + hits, seen + len(batch[1])
            ages.append(age)
        return {
            "train_loss": losses / seen,
            "train_top1_error_pct": 100 * wrong / seen,
            "seconds": self.time - began,  # simulated
            "simulated_time": self.time,
            "staleness": sum(ages) / len(ages),
        }

    def gradient(self, batch, share):
        """Add a share of the gradient of n images; return their loss and how many are wrong."""
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = self.network(images)
        loss = cross_entropy(logits, labels)
        self.require_numbers(loss)
        (loss * share).backward()
        return loss.item(), int((logits.argmax(1) != labels).sum())

    def require_numbers(self, *found):
        """Raise TrainingError for a loss or weights that are not numbers, as the trainer does: the run has diverged."""
        if not all(tensor.isfinite().all() for tensor in found):
            raise TrainingError(f"after {self.gradients // self.workers} iterations the loss is not a number")

    def move(self, lr):
        from lbsgd.algorithm.sgd import lr_factor

        for group in self.optimizer.param_groups:
            group["lr"] = lr * lr_factor(group)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.moves += 1

    def lr(self):
        from lbsgd.algorithm.schedule import learning_rate

        return learning_rate(self.gradients // self.workers, self.plan.schedule)

    def asynchronously(self, batch):
        """Compute the gradient of the worker that is ready first, at the weights it holds, and move the server's."""
        import torch

        self.time, worker = heapq.heappop(self.ready)
        held, version = self.held[worker]
        with torch.no_grad():
            now = [weight.detach().clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, held)
        loss, wrong = self.gradient(batch, 1.0)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, now)
        age = self.moves - version
        self.move(self.lr() / self.workers)
        self.gradients += 1
        with torch.no_grad():
            torch._foreach_copy_(held, self.weights)
        self.held[worker] = (held, self.moves)
        heapq.heappush(self.ready, (self.time + self.draw(), worker))
        return loss, wrong, age

    def synchronously(self, batch):
        """Add one worker's gradient; after the last one the weights move, when the slowest is ready."""
        loss, wrong = self.gradient(batch, 1 / self.workers)
        lr = self.lr()
        self.gradients += 1
        if self.gradients % self.workers == 0:
            self.time += max(self.draw() for _ in range(self.workers))
            self.move(lr)
        return loss, wrong, 0

    def evaluate(self, batches):
        import torch

        self.require_numbers(*self.weights)  # no loss follows the last update
        self.network.eval()
        wrong = seen = 0
        with torch.no_grad():
            for images, labels in batches:
                wrong += int((self.network(images).argmax(1) != labels).sum())
                seen += len(labels)
        return {"val_top1_error_pct": 100 * wrong / seen, "val_images": seen}


if __name__ == "__main__":
    main()
