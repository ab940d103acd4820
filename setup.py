"""Entry point of the build; all there is to say about the Python packages is in pyproject.toml.

The C++ and CUDA kernels of csrc/ will be compiled from here, ahead of time and against torch's
stable ABI, where torch and a compiler can be found. There are none yet.
"""

from setuptools import setup

setup()
