"""`lbsgd check` judges a value as DeepSpeed reads it, and lets no nonsense pass to a plan or a run."""

import copy
import json

import pytest
from test_plan import edited

from lbsgd.config.checks.inspect import findings_of
from lbsgd.config.keypath import put

PLAIN = {"train_batch_size": 8, "gradient_clipping": 0.0, "timers": {"throughput": {"enabled": False}}}
SGD = {"type": "SGD", "params": {"lr": 0.1}}


def with_value(config, key, value):
    """A copy with a value at a key path, blocks made on the way."""
    config = copy.deepcopy(config)
    put(config, key, value) if value is not None else put(config, key, NULL)
    return json.loads(json.dumps(config).replace(json.dumps(NULL), "null"))


NULL = "null, which put would delete"


def found(config, key):
    """Code and severity of all that is said about a key."""
    return [(each.code, each.severity) for each in findings_of(config) if each.key == key]


@pytest.mark.parametrize(
    "base, key, value, code",
    [
        ("8k", "fp16.fp16_master_weights_and_grads", 0, None),
        ("8k", "fp16.fp16_master_weights_and_grads", "off", None),
        ("8k", "fp16.fp16_master_weights_and_grads", 1, "D36"),
        ("8k", "fp16.fp16_master_weights_and_grads", "maybe", "D70"),
        ("8k", "fp16.auto_cast", 1, None),
        ("8k", "fp16.auto_cast", "yes", None),
        ("8k", "fp16.auto_cast", 0, "D12"),
        ("8k", "fp16.auto_cast", None, "D70"),
        ("8k", "managed_gradient_accumulation", 1, None),
        ("8k", "managed_gradient_accumulation", 0, "D23"),
        ("8k", "managed_gradient_accumulation", "false", "D27"),
        ("8k", "zero_allow_untested_optimizer", 1, None),
        ("8k", "zero_allow_untested_optimizer", 0, "D18"),
        ("8k", "zero_allow_untested_optimizer", "no", "D27"),
        ("8k", "gradient_allreduce_op", "MEAN", None),
        ("8k", "gradient_allreduce_op", "Sum", "D05"),
        ("8k", "gradient_allreduce_op", "median", "D70"),
        ("digits", "communication_data_type", "fp32", None),
        ("digits", "communication_data_type", "FP32", None),
        ("digits", "communication_data_type", "BF16", "D22"),
        ("8k_zero2", "prescale_gradients", None, None),
        ("8k_zero2", "prescale_gradients", True, "D34"),
    ],
)
def test_a_value_is_called_what_it_is_to_deepspeed(base, key, value, code):
    codes = [each for each, _ in found(with_value(edited(base), key, value), key)]
    assert codes[:1] == ([code] if code else []), codes


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dump_state", "false", 'is "false", and DeepSpeed takes it for true'),
        ("disable_allgather", [], "is [], and DeepSpeed takes it for false"),
        ("checkpoint.use_node_local_storage", 2, "is 2, and DeepSpeed takes it for true"),
        ("flops_profiler.detailed", "", 'is "", and DeepSpeed takes it for false'),
        ("optimizer.params.fused", "no", 'is "no", and DeepSpeed takes it for true'),
        ("fp16.enabled", "off", 'is "off", and DeepSpeed takes it for false'),
        ("torch_autocast.enabled", "off", 'is "off", and DeepSpeed takes it for true'),
    ],
)
def test_a_switch_says_what_deepspeed_takes_it_for(key, value, words):
    for base, severity in ((edited(), "error"), ({**PLAIN, "optimizer": SGD}, "warning")):
        [finding] = [each for each in findings_of(with_value(base, key, value)) if each.code == "D27"]
        assert (finding.key, finding.message, finding.severity) == (key, words, severity)


@pytest.mark.parametrize("value", [True, False, 0, 1, 1.0, None])
def test_a_switch_that_is_clear_is_no_finding(value):
    assert found(with_value(edited(), "dump_state", value), "dump_state") == []
