"""Build the Cython modules; everything else about the package is in pyproject.toml."""

import glob
import os

from Cython.Build import cythonize
from setuptools import Extension, setup

FOLDERS = ("kernelshim", "stack")
JOBS = int(os.environ.get("ULNET_BUILD_JOBS", "0")) or len(os.sched_getaffinity(0))


def extensions() -> list[Extension]:
    """One extension for each .pyx below the import name, reached through the links in ulnet/."""
    sources = sorted(p for f in FOLDERS for p in glob.glob(f"ulnet/{f}/*.pyx"))
    if not sources:
        # A broken unpacking (links turned into text files) would otherwise give an empty wheel.
        raise SystemExit("setup.py: no .pyx file below ulnet/*/: were the links in ulnet/ unpacked as links?")
    sanitize = os.environ.get("ULNET_SANITIZE", "")
    # -g0: an interpreter built with -g passes it on, and debug information then takes a third of the build.
    flags = ["-O2", "-g0", "-fno-strict-aliasing", "-Wno-unused-function"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"]
    return [
        Extension(
            path[:-4].replace("/", "."),
            [path],
            include_dirs=["."],
            extra_compile_args=flags,
            extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [],
        )
        for path in sources
    ]


setup(
    ext_modules=cythonize(
        extensions(),
        include_path=["."],
        nthreads=JOBS,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
        },
        show_all_warnings=False,
    ),
    options={"build_ext": {"parallel": JOBS}},
)
