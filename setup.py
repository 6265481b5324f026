"""The one thing that setup.cfg cannot say: some C, which is optional.

Without a C compiler or libjpeg-turbo's header the package installs all the same, and FFCV decodes whole images.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lbsgd.data.native._kernels",
            [f"lbsgd/data/native/{name}.c" for name in ("bus_error", "crop_jpeg", "pixels")],
            depends=["lbsgd/data/native/huffman.h"],
            libraries=["jpeg", "m"],
            optional=True,
            # No fused multiply-add: the same pixels on any machine.
            extra_compile_args=["-O3", "-ffp-contract=off"],
        )
    ]
)
