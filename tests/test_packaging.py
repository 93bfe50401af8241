"""What a release promises: one version, types, dependencies, citations; sdist and wheel that install."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import evenstep

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert evenstep.__version__ == PROJECT["version"] == citation["version"]


def test_torch_and_numpy_are_all_that_it_needs():
    assert [re.match(r"\w+", need)[0] for need in PROJECT["dependencies"]] == ["torch", "numpy"]


def test_optimizers_telemetry_and_low_bits_work_where_torch_and_numpy_are_all_there_is(tmp_path):
    program = [sys.executable, str(ROOT / "tests/support/torch_alone.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_stabilize_is_the_function_whatever_was_imported_first():
    """Each import in a child of one process that has loaded torch and nothing of evenstep."""
    code = """
import importlib, os, sys, torch
for first in ("evenstep.optim.stabilize", "evenstep.optim.transforms", "evenstep"):
    assert not any(name.partition(".")[0] == "evenstep" for name in sys.modules)
    if not os.fork():
        importlib.import_module(first)
        from evenstep.optim import stabilize as a
        from evenstep import stabilize as b
        print(first, a is b, callable(a), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    names = ("evenstep.optim.stabilize", "evenstep.optim.transforms", "evenstep")
    assert done.stdout.splitlines() == [f"{name} True True" for name in names], done.stderr


def test_every_paper_is_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    cited = " ".join(reference["url"] for reference in citation["references"])
    assert all(paper in cited for paper in ("2501.06842", "2502.17055v1", "2502.17055v3", "2506.16659"))
    assert all(
        reference["authors"] and reference["title"] and reference["year"] for reference in citation["references"]
    )


def test_versions_of_python_are_those_of_the_workflow_and_of_the_wheels():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    said = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    wheels = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["build"]
    assert tested == said == ["3.11", "3.12", "3.13"]
    assert re.findall(r"cp3(\d+)-", wheels) == [version.partition(".")[2] for version in said]


def test_what_the_workflow_runs_exists():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = "\n".join(step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (\w+)", commands)) <= set(targets)
    assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/]+\.py", commands))


def test_the_description_on_an_index_has_no_link_that_leads_nowhere():
    tree = ast.parse((ROOT / "setup.py").read_text())
    [function] = (node for node in tree.body if getattr(node, "name", "") == "long_description")
    names = {"re": re}
    exec(compile(ast.Module([function], []), "setup.py", "exec"), names)
    text = "![a](docs/a.png)\n\n*A caption, [c](c.md).*\n\n[b](docs/b.md#c), [d](https://e.org), [f](#g)\n"
    known = names["long_description"](text, "https://forge.org/x")
    assert "![a](https://forge.org/x/raw/main/docs/a.png)" in known
    assert "[b](https://forge.org/x/blob/main/docs/b.md#c), [d](https://e.org), [f](#g)" in known
    assert names["long_description"](text, "") == "b, [d](https://e.org), [f](#g)\n"
    readme = (ROOT / "README.md").read_text()
    for repository in ("https://forge.org/x", ""):
        links = re.findall(r"\]\(([^)\s]+)\)", names["long_description"](readme, repository))
        assert [link for link in links if not link.startswith(("https://", "#"))] == []


@pytest.mark.parametrize("repository", ["", "https://forge.org/x"])
def test_one_line_of_pyproject_gives_every_address_of_the_repository(repository, tmp_path):
    """The metadata of a package that is built with it, and without one."""
    for name in ("README.md", "LICENSE", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    project, changed = re.subn(r"(?m)^repository = .*", f'repository = "{repository}"', PYPROJECT)
    assert changed == 1
    (tmp_path / "pyproject.toml").write_text(project)
    (tmp_path / "evenstep").mkdir()
    build = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-W", "error", "-c", build], cwd=tmp_path, check=True, capture_output=True)
    [path] = tmp_path.glob("*.dist-info/METADATA")
    metadata = message_from_string(path.read_text())
    urls = metadata.get_all("Project-URL", [])
    links = re.findall(r"\]\((https://[^)]+)\)", metadata.get_payload())
    if repository:
        assert [url.partition(", ")[0] for url in urls] == ["Repository", "Documentation", "Changelog", "Issues"]
        assert all(url.partition(", ")[2].startswith(repository) for url in urls)
        # Documents that are linked exist
        there = [link.partition("/main/")[2].partition("#")[0] for link in links + urls if "/main/" in link]
        assert len(there) > 10 and all((ROOT / file).exists() for file in there)
    else:
        assert urls == [] and links and all(link.startswith("https://arxiv.org/") for link in links)


def test_the_extra_of_developers_builds_without_isolation():
    """``make dist`` and the tests here use the setuptools of the environment, which not every torch brings."""
    project = tomllib.loads(PYPROJECT)
    assert set(project["build-system"]["requires"]) <= set(project["project"]["optional-dependencies"]["dev"])


def test_the_citation_names_the_repository_if_there_is_one():
    repository = tomllib.loads(PYPROJECT)["tool"]["evenstep"]["repository"]
    assert not repository or yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == repository
    assert not repository or re.fullmatch(r"https://\S+[^/\s]", repository)


def manifest():
    spec = importlib.util.spec_from_file_location("manifest", ROOT / "tools" / "manifest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_manifest_lists_what_an_archive_has_and_what_it_must_not_have(tmp_path):
    with zipfile.ZipFile(tmp_path / "a-1.whl", "w") as wheel:
        wheel.writestr("evenstep/toml.py", "x = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("")
    with tarfile.open(tmp_path / "a-1.tar.gz", "w:gz") as sdist:
        sdist.add(tmp_path / "tests", "a-1/tests")
    tool = manifest()
    assert tool.manifest(tmp_path / "a-1.whl")[0].startswith("a-1.whl: 1 files, 6 bytes, ")
    assert tool.unwanted(tool.contents(tmp_path / "a-1.whl")) == []
    assert tool.unwanted(tool.contents(tmp_path / "a-1.tar.gz")) == ["tests/test_x.py"]
    assert tool.unwanted(["evenstep/bench/report.py", "evenstep/__pycache__/x.pyc", "lab/x.py"]) == [
        "evenstep/__pycache__/x.pyc",
        "lab/x.py",
    ]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from the files that git would commit, so that no build of this checkout gets in."""
    there = tmp_path_factory.mktemp("sdist")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, there / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=there, check=True, capture_output=True)
    [path] = (there / "dist").glob("*.tar.gz")
    return path


def wheel_of(sdist, out, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    subprocess.run([*command, str(sdist)], check=True, capture_output=True, env=os.environ | environment)
    [path] = out.glob("*.whl")
    return path


def kernels_in(wheel):
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".dylib", ".pyd"))]


@pytest.mark.slow
def test_the_sdist_holds_the_sources_of_the_kernels_and_no_half_of_the_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "evenstep/kernels/cpu.cpp",
        "evenstep/kernels/cpu_threads.h",
        "recipes/demo.toml",
        "CITATION.cff",
        "LICENSE",
    } <= names
    assert manifest().unwanted(names) == [] and not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
def test_without_a_compiler_the_sdist_becomes_a_wheel_that_installs_alone(sdist, tmp_path):
    wheel = wheel_of(sdist, tmp_path, CC="/bin/false", CXX="/bin/false")
    names = zipfile.ZipFile(wheel).namelist()
    assert kernels_in(wheel) == []
    assert "evenstep/py.typed" in names and any(name.startswith("evenstep/telemetry/assets/") for name in names)
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.toml")}
    assert {f"evenstep/{name}" for name in recipes} <= {*names}
    assert manifest().unwanted(names) == [] and not [name for name in names if name.startswith("recipes/")]
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, cwd=tmp_path)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    said = subprocess.run(
        [python, "-c", "import evenstep; print(evenstep.__file__, evenstep.__version__)"], **quiet(clean, tmp_path)
    )
    assert str(tmp_path) in said.stdout and said.stdout.strip().endswith(PROJECT["version"])
    said = subprocess.run([tmp_path / "env" / "bin" / "evenstep", "--version"], **quiet(clean, tmp_path))
    assert said.stdout == f"evenstep {PROJECT['version']}\n"


def quiet(environment, folder):
    return {"env": environment, "cwd": folder, "capture_output": True, "text": True, "check": True}


def test_no_modules_import_each_other(monkeypatch):
    """Imports inside functions and for types alone included."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import reading_cost

    assert reading_cost.cycles(reading_cost.imports(reading_cost.modules())) == []
    assert reading_cost.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.slow
def test_with_a_compiler_the_wheel_has_kernels_that_serve(sdist, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    wheel = wheel_of(sdist, tmp_path)
    assert len(kernels_in(wheel)) == 3
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", "there", wheel]
    subprocess.run(install, check=True, cwd=tmp_path, capture_output=True)
    program = (
        "import torch, evenstep; p = torch.nn.Parameter(torch.ones(8)); p.grad = torch.ones(8);"
        "evenstep.StableSPAM([p], lr=0.5, fused=True).step(); print(evenstep.__file__, p[0].item())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "there")}
    said = subprocess.run([sys.executable, "-c", program], **quiet(environment, tmp_path)).stdout.split()
    assert str(tmp_path) in said[0] and abs(float(said[1]) - 0.5) < 1e-3
