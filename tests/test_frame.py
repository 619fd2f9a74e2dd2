"""What holds the project together: metadata, lock, address, site, commands, wheel."""
import ast
import configparser
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbdev.config import get_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
DEPENDENCIES = [Requirement(d) for d in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]
CHAPTERS = sorted((ROOT / "nbs").glob("*/*.ipynb"), key=lambda p: p.name)
PAGES = ["index.ipynb", *(p.relative_to(ROOT / "nbs").as_posix() for p in CHAPTERS)]


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
    "Top-level names of the other people's packages that a file imports and cannot do without."
    tree = ast.parse(file.read_text())
    optional = {node for t in ast.walk(tree) if isinstance(t, ast.Try) for b in t.body for node in ast.walk(b)
                if any(h.type is None or "ImportError" in ast.unparse(h.type) for h in t.handlers)}
    for node in ast.walk(tree):
        if node in optional: continue
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        else: continue
        yield from {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"bdpo_lit"}


def test_every_import_is_a_declared_dependency():
    declared = {canonicalize_name(Requirement(d).name) for d in PROJECT["dependencies"]}
    owners, missing = importlib.metadata.packages_distributions(), set()
    for file in sorted((ROOT / "bdpo_lit").rglob("*.py")):
        if file.name == "_site.py": continue    # makes the site, with the dev extra
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


def test_one_address(run):
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
    for url in PROJECT["urls"].values(): assert not run("git", "grep", "-lF", url, cwd=project, check=False).stdout
    cfg = configparser.ConfigParser()
    cfg.read(project / "settings.ini")
    assert (cfg["DEFAULT"]["user"], cfg["DEFAULT"]["repo"]) == ("some.one", "other-name")


# ---- the site (its pages are tested in test_pages.py)

SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]


def test_every_chapter_is_in_the_sidebar_in_reading_order():
    def walk(items):
        for item in items:
            if isinstance(item, str): yield item
            elif isinstance(item["contents"], list): yield from walk(item["contents"])
    assert [p for p in walk(SITE["sidebar"]["contents"]) if p != "teaching.qmd"] == PAGES


def test_site_agrees_with_the_project():
    assert (SITE["title"], SITE["description"]) == (PYPROJECT["tool"]["nbdev"]["title"], PROJECT["description"])
    assert (SITE["repo-url"], SITE["site-url"]) == (PROJECT["urls"]["Repository"], PROJECT["urls"]["Homepage"])
    for file in ("favicon", "image"): assert (ROOT / "nbs" / SITE[file]).exists()


def test_readme_and_index_list_every_chapter():
    "The same rows in both: number, title and link, and a line on what it is about."
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "nbs" / "index.ipynb").read_text()
    rows = re.findall(r"^\| (\d+) \| \[(.*?)\]\(nbs/(\S+)\) \| (.*) \|$", readme, re.M)
    assert [row[2] for row in rows] == PAGES[1:]
    for number, title, file, about in rows:
        first = nbformat.read(ROOT / "nbs" / file, 4).cells[0].source
        assert first.startswith(f"# {number} · {title}\n"), f"chapter {number} has another title"
        assert f"| {number} | [{title}]({file}) | {about} |" in index


# ---- commands

def targets():
    makefile = (ROOT / "Makefile").read_text()
    return re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()


def test_make_lists_every_target(run):
    listed = re.findall(r"^  make (\S+) +\S", run("make", "--no-print-directory").stdout, re.M)
    assert sorted(listed) == sorted(targets())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"nbs/{page}" for page in PAGES)])
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


def alone(site, run, program):
    "What a program prints far from the repository, with the wheel installed."
    (site.parent / "empty").mkdir(exist_ok=True)
    return run("python", "-W", "ignore", "-c", program, cwd=site.parent / "empty", PYTHONPATH=str(site)).stdout.split()


def test_wheel_imports_everywhere(site, run):
    files = [p.relative_to(ROOT) for p in sorted((ROOT / "bdpo_lit").glob("*/*.py")) if p.stem != "__init__"]
    every = [".".join(file.with_suffix("").parts) for file in files]
    shown = alone(site, run, f"import importlib\nfor name in {every}: print(importlib.import_module(name).__file__)")
    assert [f for f in shown if f.endswith(".py")] == [str(site / file) for file in files]
    top = {p.name for p in site.iterdir()} - {"bin"}
    assert top == {"bdpo_lit", f"bdpo_lit-{get_config(ROOT).version}.dist-info"}


def test_wheel_carries_the_results(site, run):
    "A chapter opened alone finds its numbers and pictures in the package."
    names = [p.name for p in (ROOT / "bdpo_lit" / "results").rglob("*") if p.is_file()]
    program = (f"from bdpo_lit.reference.style import RESULTS, picture, result\nfor name in {names}:\n"
               "    print(name, bool(picture(name, 'x').data if name[-3:] in ('png', 'gif') else result(name)))")
    shown = alone(site, run, program)
    assert dict(zip(shown[::2], shown[1::2])) == dict.fromkeys(names, "True")


def test_public_names_come_lazily(site, run):
    """`import bdpo_lit` is quick, without torch, and has what a user needs."""
    light = "import bdpo_lit, sys; print('torch' in sys.modules, 'BDPO' in dir(bdpo_lit), len(bdpo_lit.__all__) > 10)"
    assert alone(site, run, light) == ["False", "True", "True"]
    names = "import bdpo_lit\nfor n in bdpo_lit.__all__: print(getattr(getattr(bdpo_lit, n), '__name__', n) == n)"
    assert set(alone(site, run, names)) == {"True"}
    unknown = "import bdpo_lit\ntry: bdpo_lit.nothing\nexcept AttributeError as e: print(e)"
    assert "'nothing'" in alone(site, run, unknown)


def test_commands_are_installed(site):
    assert {p.name for p in (site / "bin").iterdir()} == set(PROJECT["scripts"])


def test_bdpo_help(site, run):
    shown = run("python", "-W", "ignore", site / "bin" / "bdpo", "--help", cwd=site.parent, PYTHONPATH=str(site)).stdout
    assert "demo" in shown
