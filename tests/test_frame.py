"""What holds the project together: metadata, lock, address, site, commands, wheel."""
import ast
import configparser
import importlib.metadata
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from nbdev.config import get_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
DEPENDENCIES = [Requirement(d) for d in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]
CHAPTERS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))


# ---- one project, told twice: pyproject.toml (nbdev 3, pip) and settings.ini (nbdev 2)

def test_settings_agree_with_pyproject():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    found = dict(parser["DEFAULT"])
    cfg = get_config(ROOT)
    expected = {name: str(cfg[name]) for name in (
        "lib_name", "title", "description", "author", "git_url", "user", "repo", "branch", "doc_host", "doc_baseurl",
        "recursive", "readme_nb", "tst_flags", "custom_sidebar", "put_version_in_init", "min_python",
        "update_pyproject", "clean_ids", "clear_all", "jupyter_hooks")}
    expected |= {name: cfg.get(name).name for name in ("lib_path", "nbs_path", "doc_path")}
    expected |= dict(
        version=cfg.version, license=PROJECT["license"].lower(), keywords=" ".join(PROJECT["keywords"]),
        requirements=" ".join(PROJECT["dependencies"]),
        dev_requirements=" ".join(PROJECT["optional-dependencies"]["dev"]),
        console_scripts="\n".join(f"{name}={target}" for name, target in PROJECT["scripts"].items()),
        copyright=f"2026 {cfg.author}", author_email="")
    only_nbdev_2 = dict(status="4", audience="Science/Research", language="English", black_formatting="False")
    assert found == expected | only_nbdev_2


def test_one_version():
    assert "version" in PROJECT["dynamic"], "bdpo_lit/__init__.py holds the version"
    assert importlib.metadata.version("bdpo_lit") == get_config(ROOT).version, "reinstall: pip install --no-deps -e ."


def imported(file):
    "Top-level names of the other people's packages that a file imports, anywhere in it."
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        else: continue
        yield from {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"bdpo_lit"}


def test_every_import_is_a_declared_dependency():
    declared = {canonicalize_name(Requirement(d).name) for d in PROJECT["dependencies"]}
    owners, missing = importlib.metadata.packages_distributions(), set()
    for file in sorted((ROOT / "bdpo_lit").glob("*.py")):
        for name in imported(file):
            if not declared & {canonicalize_name(d) for d in owners.get(name, [name])}: missing.add((file.name, name))
    assert not missing, f"imported, but not in [project.dependencies]: {sorted(missing)}"


# ---- the lock

@pytest.fixture(scope="module")
def lock():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    bad = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*(post\d+)?", line)]
    assert not bad, f"name==version only, no local versions, hosts or paths: {bad}"
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines), "a package is listed twice"
    return pins


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=str)
def test_lock_is_within_the_ranges(requirement, lock):
    version = lock.get(canonicalize_name(requirement.name))
    assert version and requirement.specifier.contains(version), f"make lock: {requirement} against {version}"


def test_lock_names_every_indirect_dependency(lock):
    linux = dict(python_version="3.11", python_full_version="3.11.7", sys_platform="linux", platform_system="Linux",
                 extra="")
    missing = {}
    for name in lock:
        try: needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError: continue
        for r in map(Requirement, needed):
            if re.match(r"nvidia|cuda|triton", r.name) or (r.marker and not r.marker.evaluate(linux)): continue
            if canonicalize_name(r.name) not in lock: missing[r.name] = name
    assert not missing, f"make lock: needed but not pinned (name: by whom): {missing}"


# ---- the address of the repository stands in pyproject.toml; all else follows

def strange_addresses(root, files):
    "Where the project's name stands under another owner than the one in pyproject.toml."
    owner, repo = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"].split("/")[-2:]
    for file in files:
        if (root / file).is_symlink() or not (root / file).is_file(): continue
        text = (root / file).read_text(errors="ignore")
        host = r"(?:github\.com|research\.google\.com/github)[/:]"
        for found in re.findall(rf"{host}([\w.-]+/(?:{re.escape(repo)}|bdpo_lit)\b)", text):
            if found != f"{owner}/{repo}": yield f"{file}: {found}"


def test_one_address(run, copy_project):
    files = run("git", "ls-files", "-co", "--exclude-standard").stdout.splitlines()
    assert not list(strange_addresses(ROOT, files))
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["repository-code"] == PROJECT["urls"]["Repository"]
    assert f"git clone {PROJECT['urls']['Repository']}" in (ROOT / "README.md").read_text()


def test_make_address(run, copy_project):
    project = copy_project("address")
    run("git", "init", "-q", cwd=project)
    run("git", "add", "-A", cwd=project)
    make = ("make", "-o", ".venv/.ready", "address", f"BIN={Path(sys.executable).parent}")
    assert run(*make, "URL=git@somewhere", cwd=project, check=False).returncode != 0
    run(*make, "URL=https://github.com/some.one/other-name", cwd=project)
    files = run("git", "ls-files", cwd=project).stdout.splitlines()
    assert not list(strange_addresses(project, files))
    assert not run("git", "grep", "-lF", PROJECT["urls"]["Repository"], cwd=project, check=False).stdout
    cfg = configparser.ConfigParser()
    cfg.read(project / "settings.ini")
    assert (cfg["DEFAULT"]["user"], cfg["DEFAULT"]["repo"]) == ("some.one", "other-name")


# ---- the site

def test_every_chapter_is_in_the_sidebar():
    def walk(items): return [name for i in items for name in (walk(i["contents"]) if isinstance(i, dict) else [i])]
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]
    assert sorted(walk(sidebar["contents"])) == CHAPTERS


def test_every_chapter_is_in_the_readme():
    listed = re.findall(r"\]\(nbs/(\w+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert sorted({*listed, "index.ipynb"}) == sorted({*CHAPTERS, "index.ipynb"})


def test_index_and_readme_list_the_same_chapters():
    index = (ROOT / "nbs" / "index.ipynb").read_text()
    rows = re.findall(r"^\| \[.*?\]\(nbs/\w+\.ipynb\) \|.*$", (ROOT / "README.md").read_text(), re.M)
    missing = [row for row in rows if row.replace("(nbs/", "(") not in index]
    assert rows and not missing, f"not in the index: {missing}"


def test_site_can_be_staged(run, copy_project):
    project = copy_project("site")
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink()
    (project / "stub").mkdir()
    (project / "stub" / "quarto").symlink_to(shutil.which("true"))   # nbdev asks only whether there is one
    run("sh", "-c", f'PATH="{project}/stub:$PATH" nbdev-proc-nbs --n-workers 1', cwd=project)
    staged = {p.name for p in (project / "_proc").iterdir()}
    assert {*CHAPTERS, "_quarto.yml", "nbdev.yml", "styles.css"} <= staged
    site = yaml.safe_load((project / "_proc" / "nbdev.yml").read_text())["website"]
    assert (site["title"], site["repo-url"]) == (PYPROJECT["tool"]["nbdev"]["title"], PROJECT["urls"]["Repository"])


# ---- commands

def targets():
    makefile = (ROOT / "Makefile").read_text()
    return re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()


def test_make_lists_every_target(run):
    listed = re.findall(r"^  make (\S+) +\S", run("make", "--no-print-directory").stdout, re.M)
    assert sorted(listed) == sorted(targets())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"nbs/{c}" for c in CHAPTERS)])
def test_promised_commands_exist(page):
    promised = set(re.findall(r"(?:`|^    |\"    )make ([a-z][a-z-]+)", (ROOT / page).read_text(), re.M))
    assert promised <= set(targets())
    if page == "README.md": assert {"demo", "test"} <= promised


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_are_pinned(workflow):
    text = workflow.read_text()
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    for use in re.findall(r"uses: *(.*)", text):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} +# v\d+\.\d+\.\d+", use), use


# ---- the wheel

@pytest.fixture(scope="module")
def site(run, copy_project):
    "A folder into which the project's wheel was installed, far from the repository."
    project = copy_project("wheel")
    run("python", "-m", "build", "--wheel", "--no-isolation", cwd=project)
    wheel, = (project / "dist").iterdir()
    run("pip", "install", "-q", "--no-deps", "--no-index", "--target", project.parent / "site", wheel)
    return project.parent / "site"


def test_wheel_imports_everywhere(site, run):
    every = sorted(f"bdpo_lit.{p.stem}" for p in (ROOT / "bdpo_lit").glob("*.py") if p.stem != "__init__")
    program = f"import importlib, bdpo_lit\nfor name in {every}: print(importlib.import_module(name).__file__)"
    files = run("python", "-W", "ignore", "-c", program, cwd=site.parent, PYTHONPATH=str(site)).stdout.split()
    assert [f for f in files if f.endswith(".py")] == [str(site / f"{m.replace('.', '/')}.py") for m in every]
    top = {p.name for p in site.iterdir()} - {"bin"}
    assert top == {"bdpo_lit", f"bdpo_lit-{get_config(ROOT).version}.dist-info"}


def test_commands_are_installed(site):
    assert {p.name for p in (site / "bin").iterdir()} == set(PROJECT["scripts"])


def test_bdpo_help(site, run):
    shown = run("python", "-W", "ignore", site / "bin" / "bdpo", "--help", cwd=site.parent, PYTHONPATH=str(site)).stdout
    assert "demo" in shown
