"""FFCV's own Loader, always in a process of its own."""

from processes import in_processes


def with_stock_ffcv(function, *arguments):
    """Return function(*arguments) from a process of its own, because it makes a Loader of FFCV's.

    Such a Loader sets `mutable` on types that Numba shares and has as keys of its tables. Their hash changes with it,
    and two keys can become equal: when Numba tidies up, in some later test, it walks through such a table without end.
    """
    return in_processes(1, function, *arguments)[0]


def read_by_stock_ffcv(path, num_images, os_caches=(True,)):
    """Return the images and the labels of a file in one batch, for each os_cache: by a memory map, or by pages."""
    return with_stock_ffcv(_read, path, num_images, os_caches)


def _read(path, num_images, os_caches):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    import lbsgd.data.ffcv_loader  # noqa: F401  imports FFCV with compiled code that is kept, which takes seconds less

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
