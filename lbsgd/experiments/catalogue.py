"""Every study and every data set by name. To add one, write one small file and add one line here."""

from __future__ import annotations

from lbsgd.errors import ConfigError
from lbsgd.experiments.data_sets import cifar10, digits, digits18, imagenet, scenes
from lbsgd.experiments.grid import DataSet, Study
from lbsgd.experiments.studies import (
    asynchronous,
    baseline_lr,
    elbow,
    figure1,
    longer,
    longer_figure1,
    longer_figure5,
    longer_table1,
    longer_table2a,
    longer_table2b,
    longer_table2c,
    table1,
    table2a,
    table2b,
    table2c,
    table3a,
    table3b,
    update_magnitude,
)

STUDIES = {
    module.STUDY.name: module.STUDY
    for module in (
        table1,
        table2a,
        table2b,
        table2c,
        table3a,
        table3b,
        figure1,
        elbow,
        longer,
        longer_figure1,
        longer_table1,
        longer_table2a,
        longer_table2b,
        longer_table2c,
        longer_figure5,
        baseline_lr,
        asynchronous,
        update_magnitude,
    )
}
DATA_SETS = {module.DATA_SET.name: module.DATA_SET for module in (digits, cifar10, imagenet, digits18, scenes)}


def find_study(name: str) -> Study:
    if name in DATA_SETS:
        raise ConfigError(f"reproduce: {name} is a data set, and one of them comes last, after the experiments")
    if name not in STUDIES:
        raise ConfigError(f"reproduce: there is no experiment {name!r}; there are {', '.join(STUDIES)}")
    return STUDIES[name]


def find_data_set(name: str) -> DataSet:
    if name not in DATA_SETS:
        raise ConfigError(f"reproduce: there is no data set {name!r}; there are {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
