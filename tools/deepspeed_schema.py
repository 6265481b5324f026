"""Write what DeepSpeed accepts, by asking DeepSpeed itself, so that `lbsgd check` can read it without DeepSpeed.

    python tools/deepspeed_schema.py                    the installed DeepSpeed
    python tools/deepspeed_schema.py --source FOLDER    the unpacked source of another version (nothing is compiled)
    python tools/deepspeed_schema.py --torch            torch's optimizers and schedulers

It reads pydantic's models and the signatures of optimizers and schedulers. It tries values if code decides what is
accepted: getters, asserts, ranges in constructors. The files, lbsgd/config/accepted/*.json, ship with lbsgd.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lbsgd.commands.flag_types import OneLineParser

FOLDER = Path(__file__).parent.parent / "lbsgd" / "config" / "accepted"


def main() -> None:
    """Write the files."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--source", metavar="FOLDER", help="the unpacked source of another version of DeepSpeed")
    parser.add_argument("--torch", action="store_true", help="write torch's part only, which all versions share")
    given = parser.parse_args()
    if given.source and not Path(given.source, "deepspeed/__init__.py").is_file():  # or the installed one would answer
        parser.error(f"--source {given.source}: no unpacked source of DeepSpeed, which has deepspeed/__init__.py")
    if given.source and os.environ.get("PYTHONPATH", "").split(":")[0] != given.source:
        os.environ["PYTHONPATH"] = f"{given.source}:{os.environ.get('PYTHONPATH', '')}"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import deepspeed_oracle

    deepspeed_oracle.start()
    deepspeed_oracle.refusal({"train_batch_size": 1})  # the first call imports much
    deepspeed_oracle.LONGEST_SECONDS = 20
    import deepspeed
    import deepspeed_cases
    import deepspeed_keys
    import deepspeed_objects

    version = deepspeed.__version__.split("+")[0].strip()
    short = ".".join(version.split(".")[:2])
    if given.torch:
        write(FOLDER / "torch.json", deepspeed_objects.of_torch())
        os._exit(0)
    found = {
        "version": version,
        "default_clipping": deepspeed_cases.default_clipping(),
        "refuses": deepspeed_cases.refused_cases(),
        "zero_tested": deepspeed_cases.optimizers_tested_with_zero(),
        **deepspeed_keys.keys(),
        "optimizers": deepspeed_objects.own_optimizers(),
        "schedulers": deepspeed_objects.own_schedulers(),
    }
    write(FOLDER / f"deepspeed_{short}.json", found)
    print(f"{time.process_time():.0f} seconds of a CPU", file=sys.stderr)
    os._exit(0)


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a part of the schema, one line for each entry of the second level, so that a diff is readable."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in sorted(value.items()))
            lines.append(f"{json.dumps(name)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
