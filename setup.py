"""The CPU kernels: evenstep/kernels/cpu*.cpp and their headers, built once per instruction set and loaded with ctypes.

They are optional. Without a compiler the install succeeds, and the plain version of everything serves.

A wheel carries recipes/ inside the package, so that ``evenstep pretrain recipes/demo.toml`` works without a clone.

The description on a package index is README.md with absolute links: `long_description`. They and `project_urls` come
from ``repository`` below ``[tool.evenstep]`` of pyproject.toml.
"""

import platform
import re
import shutil
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

OPTIMISE = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
AVX2 = ["-mavx2", "-mfma", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
BUILDS = {"default": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS |= {"avx2": AVX2, "avx512": AVX512}
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildKernels(build_ext):
    """Build each extension in a directory of its own: all have the same sources."""

    def build_extension(self, ext):
        shared, self.build_temp = self.build_temp, f"{self.build_temp}/{ext.name}"
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


class WithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("recipes", Path(self.build_lib, "evenstep", "recipes"), dirs_exist_ok=True)


def long_description(readme, repository):
    """``readme`` for a page outside of the repository, such as that of a package index: links to its files and pictures
    become addresses below ``repository``. If that is empty, links become their text, and pictures are left out with
    their captions, a paragraph in italics.
    """
    target = r"\((?!https?://|#|mailto:)([^)\s]+)\)"
    if not repository:
        text = re.sub(rf"!\[[^\]]*\]{target}\n*(?:\*[^*]+\*\n+)?", "", readme)
        return re.sub(rf"\[([^\]]*)\]{target}", r"\1", text)
    # A page of the forge shows a file at blob/, and raw/ is the file itself, which a picture needs
    text = re.sub(rf"!\[([^\]]*)\]{target}", rf"![\1]({repository}/raw/main/\2)", readme)
    return re.sub(rf"(?<!!)\[([^\]]*)\]{target}", rf"[\1]({repository}/blob/main/\2)", text)


def project_urls(repository):
    """The links that a package index shows beside the description; none without a ``repository``."""
    places = {
        "Repository": "",
        "Documentation": "/blob/main/docs/index.md",
        "Changelog": "/blob/main/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {name: repository + place for name, place in places.items()} if repository else {}


REPOSITORY = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["evenstep"]["repository"]

setup(
    project_urls=project_urls(REPOSITORY),
    long_description=long_description(Path("README.md").read_text(encoding="utf-8"), REPOSITORY),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            f"evenstep.kernels._cpu_{name}",
            sorted(map(str, Path("evenstep/kernels").glob("cpu*.cpp"))),
            depends=sorted(map(str, Path("evenstep/kernels").glob("*.h"))),
            extra_compile_args=[*OPTIMISE, *flags, *OPENMP],
            extra_link_args=OPENMP,
            language="c++",
            optional=True,
        )
        for name, flags in BUILDS.items()
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": WithRecipes},
)
