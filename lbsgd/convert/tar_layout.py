"""Find train/ and val/ in a tar: at the top, in a folder, or as deep as in Kaggle's ILSVRC/Data/CLS-LOC."""

from __future__ import annotations

from pathlib import Path

from lbsgd.convert.by_class import ByClass
from lbsgd.convert.files import Files
from lbsgd.convert.left_out import OTHER_SOURCE
from lbsgd.convert.source_images import SPLITS
from lbsgd.errors import DataError
from lbsgd.units import shortened

DEEPEST = 4  # train/ is at most the fourth folder of a path

Splits = dict[str, ByClass]  # those of SPLITS that hold images


def splits_in(members: Files, tar: Path, path: Path) -> Splits:
    """Return the images of train/ and val/ in one folder of a tar.

    tar: the archive, or its content if it is compressed. path: the archive. Raises DataError if several folders hold
    train/ or val/, because only one can be meant.
    """
    bases: dict[str, Splits] = {}  # by the folder that train/ and val/ lie in, such as ILSVRC/Data/CLS-LOC/
    for row, name in enumerate(members.names):
        folders = name.split("/")[:-1][:DEEPEST]
        depth = next((depth for depth, folder in enumerate(folders) if folder in SPLITS), None)
        if depth is None:
            continue
        base = "".join(f"{folder}/" for folder in folders[:depth])
        splits = bases.setdefault(base, {})
        if folders[depth] not in splits:
            origin, stamp = f"{path}, {base}{folders[depth]}", path.stat().st_mtime_ns
            splits[folders[depth]] = ByClass(members, tar, str(path), place=origin, stamp=stamp)
        splits[folders[depth]].add_by_folder(row, name[len(base) + len(folders[depth]) + 1 :])
    return _chosen(bases, path)


def _chosen(bases: dict[str, Splits], path: Path) -> Splits:
    with_images = {
        base: {name: found for name, found in splits.items() if found.rows or found.loose}
        for base, splits in bases.items()
    }
    whole = [base for base, splits in with_images.items() if len(splits) == len(SPLITS)]
    chosen: Splits = {}
    for name in SPLITS:
        holders = [base for base in whole or with_images if name in with_images[base]]
        if len(holders) > 1:
            raise DataError(
                f"{path} holds {name}/ in several folders ({shortened(sorted(holders))}), and only one can be meant; "
                f"unpack it yourself and name the folder with --source"
            )
        if holders:
            chosen[name] = with_images[holders[0]][name]
            others = [base for base in with_images if name in with_images[base] and base != holders[0]]
            for base in others:
                chosen[name].left_out.add(OTHER_SOURCE, f"{path}, {base}{name}")
    return chosen
