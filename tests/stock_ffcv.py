"""FFCV's own Loader, always in a separate process."""

from numba.typed import typeddict
from processes import in_processes

from lbsgd.data.kept_code import keep


def with_stock_ffcv(function, *arguments):
    """Return function(*arguments) from a separate process, because it makes one of FFCV's Loaders.

    Such a Loader sets `mutable` on types that Numba shares and uses as keys of its tables. That changes their hash, and
    two keys can become equal. When Numba cleans up, in some later test, it walks through such a table forever.
    """
    return in_processes(1, _with_kept_code, function, *arguments)[0]


def _with_kept_code(function, *arguments):
    """Keep between tests what Numba compiles to make and to read FFCV's typed dictionary, which takes ten seconds."""
    import lbsgd.data.ffcv_loader  # noqa: F401  imports FFCV with kept code for what it writes into the dictionary

    keep(typeddict._getitem)
    return function(*arguments)


def read_by_stock_ffcv(path, num_images, os_caches=(True,)):
    """Return the images and labels of a file in one batch, for each os_cache: by a memory map, or by pages."""
    return with_stock_ffcv(_read, path, num_images, os_caches)


def _read(path, num_images, os_caches):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    found = []
    for os_cache in os_caches:
        loader = Loader(
            str(path),
            num_images,
            num_workers=1,
            os_cache=os_cache,
            order=OrderOption.SEQUENTIAL,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
        )
        [(images, labels)] = loader
        found.append((images.copy(), labels.ravel().tolist()))
    return found
