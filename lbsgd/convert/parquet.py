"""Hugging Face's parquet shards of images, such as those of imagenet-1k: a column of files and one of labels.

Parquet compresses its pages, in the order of the shards. So the images are copied, once, into one file of the scratch
folder, from which they are read in the order of the classes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbsgd.convert.archives import MAX_IMAGE_BYTES
from lbsgd.convert.compressed import require_room
from lbsgd.convert.files import Files
from lbsgd.disk import appearing
from lbsgd.errors import DataError

ROWS = 64  # that are read at a time
IMAGE, LABEL = "image", "label"


def copy_images(folder: Path, shard_names: list[str], target: Path) -> Files:
    """Write the images of some shards into `target`, and return their places there.

    Raises DataError without PyArrow, for a damaged shard, and for one that does not hold images and labels.
    """
    pyarrow = _pyarrow()
    require_room(target.parent, folder, sum((folder / name).stat().st_size for name in shard_names))
    files = Files("offsets", "labels")
    with appearing(target) as partial, open(partial, "wb") as file:
        for name in shard_names:
            try:
                _copy_shard(files, folder / name, file)
            except pyarrow.ArrowException as error:
                reason = str(error).splitlines()[0]
                raise DataError(f"{folder / name} cannot be read as parquet ({reason}); fetch it again") from error
    return files


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"parquet cannot be read without PyArrow ({error}); run: pip install 'lbsgd[parquet]'"
        ) from error
    return pyarrow


def _copy_shard(files: Files, path: Path, target: Any) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as shard:
        schema = shard.schema_arrow
        if missing := [name for name in (IMAGE, LABEL) if name not in schema.names]:
            raise DataError(f"{path} has no column {missing[0]}, but {', '.join(schema.names)}")
        files.class_names.update(enumerate(_class_names(schema.metadata or {})))
        for number, (image, label) in enumerate(_rows(shard)):
            data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
            if not isinstance(data, bytes) or len(data) > MAX_IMAGE_BYTES:
                raise DataError(f"{path}: row {number} holds no image of at most {MAX_IMAGE_BYTES:,} bytes")
            if not isinstance(label, int) or label < 0:
                raise DataError(f"{path}: row {number} has label {label}; images without a class cannot be used")
            base = str(name or "").rpartition("/")[2]
            files.add(base or f"{path.stem}_{number:06}", offsets=target.tell(), sizes=len(data), labels=label)
            target.write(data)


def _rows(shard: Any) -> Iterator[tuple[Any, Any]]:
    for batch in shard.iter_batches(ROWS, columns=[IMAGE, LABEL]):
        yield from zip(batch.column(IMAGE).to_pylist(), batch.column(LABEL).to_pylist(), strict=True)


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Return the names of the labels that Hugging Face keeps beside the schema; none if it has none."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return [str(name) for name in json.loads(metadata[b"huggingface"])["info"]["features"][LABEL]["names"]]
    return []
