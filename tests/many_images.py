"""Files with very many tiny images or very many bytes, and the cost of opening one in an otherwise empty process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from lbsgd.data.beton_format import (
    ALLOCATION,
    CHECKSUM,
    FIELD,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    MAGIC,
    NOTE,
    RAW,
    metadata_record,
)
from lbsgd.data.beton_layout import read_layout

SIDE, BLOCK = 8, 1 << 18
IMAGE_BYTES = 3 * SIDE * SIDE


def write_many(path, num_images):
    """Write a file as the converter does, with raw images of 8 x 8 pixels and labels 0 ... 9, using little memory."""
    fields, record = np.zeros(2, FIELD), metadata_record([IMAGE_FIELD, INT_FIELD])
    fields["type_id"], fields["name"] = (IMAGE_FIELD, INT_FIELD), ("image", "label")
    images_at = HEADER.itemsize + fields.nbytes + num_images * record.itemsize
    checksums_at = images_at + num_images * IMAGE_BYTES
    note = np.array((MAGIC, checksums_at), NOTE).tobytes().ljust(FIELD["arguments"].itemsize, b"\0")
    fields["arguments"][0] = np.frombuffer(note, FIELD["arguments"])[0]
    header = np.array((2, 2, 1 << 23, num_images, checksums_at + num_images * CHECKSUM.itemsize), HEADER)
    blocks = [np.arange(at, min(at + BLOCK, num_images)) for at in range(0, num_images, BLOCK)]
    pixels = np.random.default_rng(0).integers(0, 256, BLOCK * IMAGE_BYTES, np.uint8)
    with open(path, "wb") as file:
        file.write(header.tobytes() + fields.tobytes())
        for numbers in blocks:
            rows = np.zeros(len(numbers), record)
            rows["f0"]["mode"], rows["f0"]["width"], rows["f0"]["height"] = RAW, SIDE, SIDE
            rows["f0"]["data_at"], rows["f1"] = images_at + numbers * IMAGE_BYTES, numbers % 10
            file.write(rows.data)
        for numbers in blocks:
            file.write(pixels[: len(numbers) * IMAGE_BYTES].data)
        for numbers in blocks:
            file.write(np.zeros(len(numbers), CHECKSUM).data)
        for numbers in blocks:
            rows = np.zeros(len(numbers), ALLOCATION)
            rows["image"], rows["data_at"], rows["num_bytes"] = numbers, images_at + numbers * IMAGE_BYTES, IMAGE_BYTES
            file.write(rows.data)
    return path


def spread(file, path, num_bytes):
    """Write the images of an open file far from each other into a sparse file of more than `num_bytes`."""
    content, layout = file.path.read_bytes(), read_layout(file.path)

    def table(dtype, at, count=layout.num_images):
        return np.frombuffer(content, dtype, count, at).copy()

    rows, ends = table(layout.record, layout.metadata_at), table(ALLOCATION, layout.allocations_at)
    header, fields = table(HEADER, 0, 1), table(FIELD, HEADER.itemsize, 2)
    places = layout.images_at + np.arange(layout.num_images, dtype=np.uint64) * (num_bytes // layout.num_images)
    checksums_at = layout.images_at + num_bytes
    header["allocations_at"] = checksums_at + layout.num_images * CHECKSUM.itemsize
    note = np.array((MAGIC, checksums_at), NOTE).tobytes()
    fields["arguments"][layout.types.index(IMAGE_FIELD)] = note.ljust(FIELD["arguments"].itemsize, b"\0")
    with open(path, "wb") as target:
        for end, place in zip(ends, places, strict=True):
            target.seek(place)
            target.write(content[end["data_at"] : end["data_at"] + end["num_bytes"]])
        rows[layout.column(IMAGE_FIELD)]["data_at"][ends["image"]] = ends["data_at"] = places
        target.seek(checksums_at)
        target.write(table(CHECKSUM, layout.checksums_at).tobytes() + ends.tobytes())
        target.seek(0)
        target.write(header.tobytes() + fields.tobytes() + rows.tobytes())
    return path


COST = """
import json, resource, sys, time
import lbsgd.data.loaders
from lbsgd.data.loaders import TrainLoader
from lbsgd.data.beton import BetonFile
from lbsgd.data.share import Cut, Pixels, Share

def kilobytes(*names):
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(names))

path, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
before, marks = kilobytes("Anonymous:"), [(time.perf_counter(), time.process_time())]
def mark():
    marks.append((time.perf_counter(), time.process_time()))
beton = BetonFile.open(path)
mark()
cut = Cut(seed=0, global_batch=32 * world_size, micro_batch=32, share=Share(rank, world_size))
loader = TrainLoader(beton, cut, pixels=Pixels(resolution=8, device="cpu"), threads=1)
mark()
batches = loader.epoch(0)
next(batches)
mark()
wall, cpu = ([b - a for a, b in zip(times, times[1:])] for times in zip(*marks))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cost = dict(wall=wall, cpu=cpu, anonymous=kilobytes("Anonymous:") - before, peak=peak)
print(json.dumps(cost), flush=True)
sys.stdin.readline()  # the memory is there until the parent has looked
print(json.dumps(kilobytes("Pss:")), flush=True)
sys.stdin.readline()
"""


def costs(path, scratch, processes=1):
    """Return the cost of the first batch (micro batch 32) for each of some processes that start together.

    wall and cpu: seconds to open the file, build the loader and get the batch. anonymous, peak, pss: kilobytes.
    anonymous is memory that a process got after its imports and cannot share. If only one process maps pages of the
    file, 64 kB around each image that was read, they also count as private. Files shared by the host go into `scratch`.
    """
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(Path(__file__).parent.parent)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    started = [
        subprocess.Popen([sys.executable, "-c", COST, path, str(rank), str(processes)], **pipes)
        for rank in range(processes)
    ]
    found = [json.loads(process.stdout.readline()) for process in started]
    for process in started:
        print(file=process.stdin, flush=True)
    for process, cost in zip(started, found, strict=True):
        cost["pss"] = json.loads(process.stdout.readline())
    for process in started:
        process.communicate("\n")
    return found
