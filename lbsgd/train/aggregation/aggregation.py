"""Aggregate gradients during back-propagation (Sec. 4), in place of DeepSpeed's own reduction at ZeRO stages 0 and 1.

In the last pass of an iteration a bucket starts as soon as its last gradient has come and all previous buckets have
started, so buckets start in the same order on all processes. `engine.backward` ends by waiting for them. In earlier
passes gradients only add up. At stage 1 ZeRO then takes its share of gradients that are already means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.nn import Parameter

from lbsgd.config.aggregation import Choice, choose
from lbsgd.config.keypath import get
from lbsgd.config.plan import Plan
from lbsgd.config.schema import Aggregation as Wanted
from lbsgd.errors import ConfigError, TrainingError
from lbsgd.train.aggregation.buckets import Bucket, fill
from lbsgd.train.aggregation.phases import Job, phases_of, runner
from lbsgd.train.aggregation.placement import Placement
from lbsgd.train.clock import Waits, events_of
from lbsgd.train.deepspeed_setup import leaves_gradients_in_place
from lbsgd.train.trained import every_parameter
from lbsgd.train.zero_host import take_gradients_in_place


@dataclass(frozen=True)
class AggregationSettings:
    """Settings from DeepSpeed's own keys, with DeepSpeed's meaning.

    bucket_elements    zero_optimization.reduce_bucket_size
    overlap            zero_optimization.overlap_comm
    before, after      divisors of the gradients before and after the sum; their product is the world size
    """

    bucket_elements: int
    overlap: bool
    before: float
    after: float

    @classmethod
    def of(cls, plan: Plan) -> AggregationSettings:
        """Read the settings. By default fp16 gradients are divided before the sum, which would otherwise overflow."""
        config = plan.config
        before = get(config, "gradient_predivide_factor", 1.0)
        if get(config, "prescale_gradients", False) or (plan.precision == "fp16" and before == 1):
            before = plan.world_size
        return cls(
            bucket_elements=plan.bucket_elements,
            overlap=plan.overlaps,
            before=before,
            after=plan.world_size / before,
        )


class Aggregation:
    """Aggregates one engine's gradients with the chosen algorithm. All processes must build it."""

    def __init__(self, engine, settings: AggregationSettings, placement: Placement, choice: Choice):
        self.engine, self.settings, self.placement, self.choice = engine, settings, placement, choice
        parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self.buckets = fill(parameters, settings.bucket_elements, dist.get_world_size())
        self.bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        self.jobs: list[Job] = []
        self.done_in_pass: int | None = None
        device = self.buckets[0].buffer.device
        self.runner = runner(phases_of(choice, placement, device, settings.after), device)
        if settings.overlap:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, parameter: Parameter) -> None:
        """Note a gradient of the last pass. autograd calls this once it has accumulated the gradient.

        Gradients of other backward calls, such as another engine's on the same network, only add up, as in DeepSpeed.
        """
        engine = self.engine
        is_own = engine._running_engine_backward and not engine.inside_no_sync_ctxt
        if not is_own or not engine.is_gradient_accumulation_boundary():
            return
        bucket = self.bucket_of[parameter]
        self.require_new(parameter not in bucket.missing)
        bucket.note(parameter)
        self.start_complete()

    def start_complete(self) -> None:
        """Start the complete buckets, up to the first incomplete one."""
        for bucket in self.buckets[len(self.jobs) :]:
            if bucket.missing:
                return
            self.jobs.append(self.start(bucket))

    def start(self, bucket: Bucket) -> Job:
        bucket.take()
        if self.settings.before != 1:
            bucket.buffer.div_(self.settings.before)
        return self.runner.start(bucket.buffer)

    def finish(self) -> None:
        """Start the buckets that have not started, and wait until every gradient is the mean over the processes."""
        self.require_new(False)
        self.require_known()
        for bucket in self.buckets:
            for parameter in list(bucket.missing):
                bucket.note(parameter)
        self.start_complete()
        self.begin()
        self.done_in_pass = self.engine.micro_steps

    def close(self) -> None:
        """End the threads that run the phases. Nothing can be aggregated afterwards."""
        self.runner.close()

    def begin(self) -> None:
        """Wait until no buffer is in use, and expect the gradients of the next iteration."""
        for job in self.jobs:
            self.runner.wait(job)
        self.jobs, self.done_in_pass = [], None
        for bucket in self.buckets:
            bucket.empty()

    def require_new(self, came_before: bool) -> None:
        """Raise TrainingError if a gradient arrives after its aggregation has begun."""
        if came_before or self.done_in_pass == self.engine.micro_steps:
            raise TrainingError(
                f"in iteration {self.engine.global_steps} a gradient came twice in the last pass, the second time "
                "after its aggregation had begun; call engine.backward once per pass (and where an earlier call has "
                "raised, start again from a checkpoint), or delete lbsgd.aggregation from the JSON"
            )

    def require_known(self) -> None:
        """Raise TrainingError for a parameter unfrozen or added later, because it would differ between processes."""
        known, module = self.bucket_of, self.engine.module
        if all(each in known for each in every_parameter(module) if each.requires_grad):
            return
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in known:
                raise TrainingError(
                    f"{name} was unfrozen or added after lbsgd.initialize, and would not be aggregated; initialize "
                    "again, or delete lbsgd.aggregation from the JSON"
                )


# --- in the engine ----------------------------------------------------------------------------------------------------


def attach(engine, plan: Plan) -> None:
    """Make the engine aggregate as the plan says, and measure how long it waits. All processes must call this.

    engine.aggregation    an `Aggregation`, or None if DeepSpeed's own reduction runs
    engine.waiting        the `Waits` between the end of back-propagation and the end of aggregation
    """
    engine.aggregation, engine.waiting = None, Waits(events_of(engine.device))
    reduce = engine.allreduce_gradients
    if plan.aggregates and plan.world_size > 1:
        if engine.has_moe_layers:
            raise ConfigError(
                "lbsgd.aggregation takes the mean over all processes, and experts have groups of their own; delete it "
                "from the JSON"
            )
        placement = Placement.gather()
        choice = choose(plan.recipe.aggregation or Wanted(), placement.sizes, dist.get_backend())
        engine.aggregation = Aggregation(engine, AggregationSettings.of(plan), placement, choice)
        engine.coalesce_grad_reduction = refuse_coalescing
        reduce = instead_of(engine, reduce)
    if leaves_gradients_in_place(plan):
        take_gradients_in_place(engine)
    engine.allreduce_gradients = engine.waiting.timed(reduce)


def instead_of(engine, reduce):
    """Return the replacement of engine.allreduce_gradients, which DeepSpeed calls after each backward."""

    def allreduce_gradients(*arguments, **options):
        if engine.is_gradient_accumulation_boundary():
            engine.aggregation.finish()
            if not engine.zero_optimization():
                return
        reduce(*arguments, **options)

    return allreduce_gradients


def refuse_coalescing(*_):
    raise ConfigError(
        "engine.coalesce_grad_reduction goes past lbsgd's aggregation; accumulate by passes (smaller "
        "train_micro_batch_size_per_gpu), or delete lbsgd.aggregation from the JSON"
    )


def aggregation_words(plan: Plan, engine) -> str:
    """Describe how this run's gradients are aggregated, for the screen and the log."""
    if plan.world_size == 1:
        return "none: one process"
    if engine.aggregation is None:
        return f"DeepSpeed's own: {plan.own_reduction}"
    aggregation, order = engine.aggregation, ""
    if not aggregation.placement.in_blocks:
        order = "; ranks are not in blocks, and grouped by host"
    when = "during" if aggregation.settings.overlap else "after"
    return f"{aggregation.choice}{order}; {len(aggregation.buckets)} buckets, {when} back-propagation"
