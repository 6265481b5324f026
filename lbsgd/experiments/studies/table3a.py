"""Table 3a: pre-training at a large batch, and the detector that starts from it (Sec. 5.4)."""

from __future__ import annotations

from lbsgd.experiments.grid import Claim, DataSet, Row, Study

FACTORS = (1, 8, 16, 24)  # of the base batch of digits18; in the paper 1 to 64 times 256
DETECTORS_FACTOR = 4  # of the scenes' base batch: 8 images an update


def row_from(backbone: int, factor: int = DETECTORS_FACTOR) -> Row:
    """Return the row of a detector at `factor` times the base batch.

    Its backbone is digits18's run at the factor `backbone` with the same seed. Table 3b uses the backbone of the first
    row here, so the two tables share a row.
    """
    weights = f"{{work_dir}}/runs/reproduce/digits18/x{backbone}/seed{{seed}}/weights.pt"
    return Row(
        name_of(backbone, factor),
        factor,
        inputs=(("--backbone_weights", weights),),
        made_by="lbsgd reproduce figure1 digits18 --results runs/backbones",
    )


def name_of(backbone: int, factor: int = DETECTORS_FACTOR) -> str:
    return f"x{factor}_from_x{backbone}"


def rows(data: DataSet) -> tuple[Row, ...]:
    return tuple(map(row_from, FACTORS))


def claims(data: DataSet) -> tuple[Claim, ...]:
    return tuple(
        Claim(f"pre-training at {factor} times the batch leaves box AP level", row.name, "same", name_of(1))
        for factor, row in zip(FACTORS[1:], rows(data)[1:], strict=True)
    )


STUDY = Study("table3a", "pre-training and detection", "Table 3a", rows, claims, is_detection=True)
