"""Read Hugging Face's parquet shards of images, such as imagenet-1k's: a column of files and a column of labels.

Parquet compresses its pages, and they follow the order of the shards. So the images are copied once into a file in the
scratch folder, and read from there in the order of the classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbsgd.convert.archives import MAX_IMAGE_BYTES
from lbsgd.convert.compressed import drop_content, require_room
from lbsgd.convert.files import Files
from lbsgd.disk import appearing, parse_note
from lbsgd.errors import DataError, one_line

ROWS = 64  # read at a time
BUFFER_BYTES = 1 << 20  # read from a shard at a time; by default PyArrow reads all of it
IMAGE, LABEL = "image", "label"


def copy_images(folder: Path, shard_names: list[str], target: Path) -> Files:
    """Write the shards' images into `target`, and return their places there.

    Raises DataError without PyArrow, and for a shard that is damaged or does not hold images and labels.
    """
    pyarrow = _pyarrow()
    split = target.name.partition(".")[0]
    drop_content(target.parent, rf"{split}\.[0-9a-f]+\.(images|listing)")  # of earlier versions of the shards
    require_room(target.parent, folder, sum((folder / name).stat().st_size for name in shard_names))
    files = Files("offsets", "shards", "labels")
    with appearing(target) as partial, open(partial, "wb") as file:
        for shard, name in enumerate(shard_names):
            try:
                _copy_shard(files, shard, folder / name, file)
            except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # an error of the disk, not of the content
                    raise
                raise DataError(
                    f"{folder / name} cannot be read as parquet ({one_line(error)}); fetch it again"
                ) from error
    return files


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"parquet cannot be read without PyArrow ({one_line(error)}); run: pip install 'lbsgd[parquet]'"
        ) from error
    return pyarrow


def _copy_shard(files: Files, shard: int, path: Path, target: Any) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        schema = file.schema_arrow
        if missing := [name for name in (IMAGE, LABEL) if name not in schema.names]:
            raise DataError(f"{path} has no column {missing[0]}, but {', '.join(schema.names)}")
        for label, class_name in enumerate(_class_names(schema.metadata or {})):
            if (other := files.class_names.setdefault(label, class_name)) != class_name:
                raise DataError(
                    f"{path}: label {label} is {class_name} here and {other} in another shard; give the shards of a "
                    "single data set"
                )
        for number, (image, label) in enumerate(_rows(file)):
            data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
            if not isinstance(data, bytes) or len(data) > MAX_IMAGE_BYTES:
                raise DataError(f"{path}: row {number} holds no image of at most {MAX_IMAGE_BYTES:,} bytes")
            if not isinstance(label, int) or not 0 <= label < 1 << 31:
                raise DataError(f"{path}: row {number} has label {label}, which is no number of a class")
            base = str(name or "").rpartition("/")[2]
            place = dict(offsets=target.tell(), sizes=len(data), shards=shard, labels=label)
            files.add(base or f"{path.stem}_{number:06}", **place)
            target.write(data)


def _rows(file: Any) -> Iterator[tuple[Any, Any]]:
    for batch in file.iter_batches(ROWS, columns=[IMAGE, LABEL]):
        yield from zip(batch.column(IMAGE).to_pylist(), batch.column(LABEL).to_pylist(), strict=True)


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Return the names of the labels that Hugging Face keeps with the schema, empty if it keeps none."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return [str(name) for name in parse_note(metadata[b"huggingface"])["info"]["features"][LABEL]["names"]]
    return []
