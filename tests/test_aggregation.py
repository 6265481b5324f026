"""Aggregation inside DeepSpeed: the bits of its own reduction, and the same ones wherever the processes run."""

import pytest
import torch
import torch.distributed as dist
from oracle import BOUND, K, N, distance, network
from processes import in_processes
from test_engine import recipe, train, trained
from torch import nn

import lbsgd
from lbsgd.config.json_file import set_precision
from lbsgd.train import placement
from lbsgd.train.engine_state import gather_state

SMALL_BUCKETS = 500  # elements: the oracle's network of 2,400 makes six


def aggregating(stage=0, micro_batch=N, bucket=SMALL_BUCKETS, overlap=True, precision="fp32", **block):
    config = recipe(stage, micro_batch=micro_batch)
    config["zero_optimization"] |= {"reduce_bucket_size": bucket, "overlap_comm": overlap}
    config["lbsgd"]["aggregation"] = block
    if precision != "fp32":
        set_precision(config, precision)
    return config
