"""A loop of Accelerate's that is resumed in the middle of an epoch ends as the uninterrupted one."""

from oracle import distance, network
from processes import in_processes
from test_libraries import ON_CPU, config_of, floats
from test_reuse import images_and_labels, run_block, with_json

from lbsgd.train.engine import start_processes

STOPPED = 3  # updates; an epoch has two
PREPARED = "engine, sgd = accelerator.prepare(model, parts.optimizer)\n"
STEPPED = "            parts.scheduler.step()\n"
SAVED = (
    STEPPED,
    f"{STEPPED}            if parts.scheduler.last_epoch == {STOPPED}:\n"
    "                lbsgd.agree_statistics(model), accelerator.save_state('state')\n",
)
RESUMED = [
    (PREPARED, f"{PREPARED}accelerator.load_state('state')\nt = parts.scheduler.last_epoch\n"),
    ("in range(plan.epochs)", "in range(t // plan.iterations_per_epoch, plan.epochs)"),
    ("set_epoch(epoch)", "set_epoch(epoch, max(0, t - epoch * plan.iterations_per_epoch))"),
]


def of_a_run(folder, *changes):
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    names = dict(model=network(), world_size=2, dataset=images_and_labels())
    names["InitProcessGroupKwargs"] = InitProcessGroupKwargs
    registered = (PREPARED, f"{PREPARED}accelerator.register_for_checkpointing(parts.scheduler)\n")
    names = run_block("accelerate", folder, [ON_CPU, *changes, registered], **names)
    AcceleratorState._reset_state(reset_partial_state=True)
    return floats({name: tensor.clone() for name, tensor in names["model"].state_dict().items()})


def in_accelerate(folder):
    start_processes()
    return of_a_run(folder, SAVED), of_a_run(folder, *RESUMED)


def test_with_the_scheduler_registered_a_saved_state_goes_on_in_the_middle_of_an_epoch(tmp_path):
    config = config_of()
    config["lbsgd"]["momentum"], config["zero_optimization"]["stage"] = {"form": "lr_inside"}, 1
    for whole, resumed in in_processes(2, in_accelerate, str(with_json(tmp_path, config))):
        assert distance(resumed, whole) < 1e-7
