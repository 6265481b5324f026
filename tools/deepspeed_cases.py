"""The cases of the rules about several keys: which of them does this version of DeepSpeed refuse?

A rule of lbsgd/config/checks that is an error in plain DeepSpeed speaks only where the version refuses its case.
"""

from __future__ import annotations

from typing import Any

import deepspeed_oracle
import torch
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import constants

SGD = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}
ADAM = {"type": "AdamW", "params": {"lr": 0.01}}
LAMB = {"type": "Lamb", "params": {"lr": 0.01}}
STEP = {"type": "StepLR", "params": {"step_size": 30}}
CASES: dict[str, dict[str, Any]] = {
    "D14": {"torch_autocast": {"enabled": True, "dtype": "float16"}, "zero_optimization": {"stage": 1}},
    "D11": {"optimizer": {"type": "SGD", "params": {"lr": 0.001}}, "fp16": {"enabled": True}},
    "D15 fp16 bf16": {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    "D15 torch_autocast fp16": {"torch_autocast": {"enabled": True, "dtype": "float16"}, "fp16": {"enabled": True}},
    "D15 torch_autocast bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": True}},
    "D71 empty": {"optimizer": {"type": "SGD", "params": []}},
    "D76": {"optimizer": {"type": "Muon", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 3}},
    "D18": {"optimizer": SGD, "zero_optimization": {"stage": 1}},
    "D34": {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
    "D34 3": {"zero_optimization": {"stage": 3}, "prescale_gradients": True},
    "D35": {"data_types": {"grad_accum_dtype": "bf16"}},
    "D36": {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}, "zero_optimization": {"stage": 1}},
    "D37": {
        "optimizer": SGD,
        "zero_optimization": {"stage": 1, "elastic_checkpoint": True},
        "zero_allow_untested_optimizer": True,
    },
    "D40": {"autotuning": {"enabled": True}},
    "D86 off": {"optimizer": LAMB, "fp16": {"enabled": False, "loss_scale": 128}},
    "D86 bf16": {"optimizer": LAMB, "bf16": {"enabled": True}},
    "D47 zero": {"scheduler": STEP, "zero_optimization": {"stage": 1}},
    "D47 fp16": {"scheduler": STEP, "fp16": {"enabled": True}},
    "D47 bf16": {"scheduler": STEP, "bf16": {"enabled": True}},
}


def refused_cases() -> list[str]:
    """Return the codes of the cases that DeepSpeed refuses, or does not train with."""
    base = {"train_batch_size": 1, "gradient_clipping": 0.0, "optimizer": ADAM}
    return [code for code, case in CASES.items() if deepspeed_oracle.refusal({**base, **case})]


def optimizers_tested_with_zero() -> list[str]:
    """Return the optimizers that ZeRO takes without zero_allow_untested_optimizer."""
    names = [
        *ds_config.DEEPSPEED_OPTIMIZERS,
        *(name for name in vars(torch.optim) if name[0].isupper() and name != "Optimizer"),
    ]
    found = []
    for name in names:
        optimizer = {"type": name, "params": {"lr": 0.01}}
        why = deepspeed_oracle.refusal(
            {"train_batch_size": 1, "optimizer": optimizer, "zero_optimization": {"stage": 1}}, 2
        )
        if "untested" not in why:
            found.append(name)
    return found


def default_clipping() -> float:
    """Return the norm at which gradients are clipped where the JSON says nothing."""
    return float(constants.GRADIENT_CLIPPING_DEFAULT)
