"""The cases of the rules about several keys: which of them does this version of DeepSpeed refuse?

The rules of lbsgd/config/checks ask for these cases (`Document.refused`). They report a plain JSON only if its version
of DeepSpeed refuses the case: by an error, or by weights that do not become what they should be.
"""

from __future__ import annotations

from typing import Any

import deepspeed_oracle
import torch
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import constants

ADAM = {"type": "AdamW", "params": {"lr": 0.01}}
LAMB = {"type": "Lamb", "params": {"lr": 0.01}}
CASES: dict[str, dict[str, Any]] = {
    "D14": {"torch_autocast": {"enabled": True, "dtype": "float16"}, "zero_optimization": {"stage": 1}},
    "D11": {"optimizer": {"type": "SGD", "params": {"lr": 0.001}}, "fp16": {"enabled": True}},
    "D15 fp16 bf16": {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    "D15 torch_autocast fp16": {"torch_autocast": {"enabled": True, "dtype": "float16"}, "fp16": {"enabled": True}},
    "D15 torch_autocast bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": True}},
    "D71 empty": {"optimizer": {"type": "SGD", "params": []}},
    "D76": {"optimizer": {"type": "Muon", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 3}},
    "D86 off": {"optimizer": LAMB, "fp16": {"enabled": False, "loss_scale": 128}},
    "D86 bf16": {"optimizer": LAMB, "bf16": {"enabled": True}},
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
    """Return the norm at which gradients are clipped if the JSON does not give one."""
    return float(constants.GRADIENT_CLIPPING_DEFAULT)
