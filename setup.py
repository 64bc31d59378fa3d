"""The one thing pyproject.toml cannot say: build the CPU kernels as a plain shared library, where there is a compiler.

Not a Python extension: ONNX Runtime loads it, whatever the Python. So its name carries no Python version, nor does the
wheel's. Without a compiler the installation goes on without it (`optional`); `corral doctor` tells.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "corral.kernels.corral_cpu_ops"
SOURCES = Path("kernels/src")


class BuildLibrary(build_ext):
    """Names the file lib….so, and looks for no Python entry point in it."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        file = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(sys.platform, f"lib{name}.so")
        return str(Path(*folders, file))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class TagWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            NAME,
            sources=sorted(map(str, SOURCES.glob("*.cc"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            language="c++",
            # Without contraction, or instruction sets would differ in bits: kernels/src/elementwise.h.
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-g0"],
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
