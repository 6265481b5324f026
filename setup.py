"""The one thing that setup.cfg cannot say: a piece of C, which is optional.

Without a C compiler or libjpeg-turbo's header the package installs all the same, and FFCV decodes whole images.
"""

from setuptools import Extension, setup

setup(ext_modules=[Extension("lbsgd._crop_jpeg", ["lbsgd/crop_jpeg.c"], libraries=["jpeg"], optional=True)])
