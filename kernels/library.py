"""The custom-op library beside this file: is it there, whole, and of this machine's kind?"""

from __future__ import annotations

import ctypes
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from corral.spec.cpu_ops import LIBRARY
from corral.spec.errors import EnvironmentProblem

PATH = Path(__file__).with_name(
    {"win32": f"{LIBRARY}.dll", "darwin": f"lib{LIBRARY}.dylib"}.get(sys.platform, f"lib{LIBRARY}.so")
)
REMEDY = (
    "Install a C++ compiler (`apt install g++` or alike) and corral again (`pip install --force-reinstall --no-deps` as "
    "before), or compile the checkpoint with `--kernels stock`."
)


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library that loads. `instruction_set` names the kernels this processor will run."""

    path: Path
    version: int
    instruction_set: str


def find_library(path: Path | None = None) -> Library:
    """Load the library and ask what it is. Raises EnvironmentProblem, with the remedy, where it is missing or broken."""
    path = path or PATH
    if not path.is_file():
        raise EnvironmentProblem(
            f"corral's CPU kernels are not installed ({path} is missing): corral was installed without a C++ compiler. "
            + REMEDY
        )
    try:
        _check_whole(path)
        loaded = ctypes.CDLL(str(path))
        version, instruction_set = loaded.corral_cpu_ops_version, loaded.corral_cpu_ops_instruction_set
    except (OSError, AttributeError) as error:
        raise EnvironmentProblem(f"corral's CPU kernels do not load from {path}: {error}. {REMEDY}") from None
    instruction_set.restype = ctypes.c_char_p
    return Library(path=path, version=int(version()), instruction_set=instruction_set().decode())


def _check_whole(path: Path) -> None:
    """Raise OSError for an ELF file that is cut short: the system's loader would die of one instead of refusing it."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF" or header[4:5] != b"\x02":
        return  # another system's format, or nonsense, which its loader refuses by itself
    size = path.stat().st_size
    order = "<" if header[5:6] == b"\x01" else ">"
    if len(header) < 64:
        raise OSError(f"it has {size} bytes, less than a header")
    sections_offset, section_size, sections = (
        *struct.unpack_from(f"{order}Q", header, 40),
        *struct.unpack_from(f"{order}HH", header, 58),
    )
    end = sections_offset + section_size * sections  # the table of sections is what a linker writes last
    if end > size:
        raise OSError(f"it has {size} bytes, expected {end}: it is incomplete")
