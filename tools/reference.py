"""python tools/reference.py [docs/api]

Make the API reference from the docstrings, as HTML pages by pdoc. A warning stops it. Start at docs/api/index.html.
"""

import importlib
import os
import pkgutil
import typing
import warnings
from pathlib import Path
from types import ModuleType

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # importing lbsgd's modules imports DeepSpeed

import pdoc

import lbsgd
from lbsgd.commands.flag_types import OneLineParser, path


def main(folder: Path) -> None:
    warnings.simplefilter("error", UserWarning)  # pdoc's kind of warning
    for name in lbsgd.__all__:  # they load when first used, which pdoc does not do
        setattr(lbsgd, name, getattr(lbsgd, name))
    names = [module.name for module in pkgutil.walk_packages(lbsgd.__path__, "lbsgd.") if "._" not in module.name]
    for module in map(importlib.import_module, names):
        resolve_named_tuples(module)
    rooms = [name for name in names if name.count(".") == 1]  # pdoc finds the modules inside them
    pdoc.render.configure(docformat="markdown", footer_text="Goyal et al. 2017 on DeepSpeed", math=False)
    pdoc.pdoc("lbsgd", *rooms, "!lbsgd.data.native._kernels", output_directory=folder)
    print(f"{folder / 'index.html'}: {len(names) + 1} pages")


def resolve_named_tuples(module: ModuleType) -> None:
    """Replace type names in a named tuple's constructor by the types. pdoc would look them up in another module."""
    for thing in vars(module).values():
        if isinstance(thing, type) and hasattr(thing, "_field_defaults") and thing.__module__ == module.__name__:
            thing.__new__.__annotations__ = typing.get_type_hints(thing)


if __name__ == "__main__":
    flags = OneLineParser(description=__doc__)
    flags.add_argument("folder", nargs="?", type=path, default=Path("docs/api"))
    main(flags.parse_args().folder)
