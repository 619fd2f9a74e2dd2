"""What holds for every notebook, found by reading it (nbdev-test is what executes them)."""
import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
PAGES = [*CHAPTERS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SLUG = REPOSITORY.removeprefix("https://github.com/")
INSTALL = f"""#| hide
#| eval: false
! [ -e /content ] && pip install -q "bdpo_lit @ git+{REPOSITORY}\""""

by_name = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def read(path): return nbformat.read(path, 4)


def code(path): return [c for c in read(path).cells if c.cell_type == "code"]


def prose(path):
    "Text of a page without code and formulas (but with the labels of formulas)."
    text = path.read_text() if path.suffix == ".md" else \
        "\n\n".join(c.source for c in read(path).cells if c.cell_type != "code")
    for pattern in (r"^(```+|~~~+).*?^\1", r"^    .*?$", r"\$\$.*?\$\$", r"`[^`\n]+`", r"(?<!\\)\$[^$\n]+\$"):
        text = re.sub(pattern, "", text, flags=re.S | re.M)
    return text


def labels(path):
    "Everything a link or a reference can point at within a page."
    found = re.findall(r"\{#([\w-]+)", prose(path))
    if path.suffix == ".ipynb":
        found += [label for c in code(path) for label in re.findall(r"^#\|\s*label:\s*(\S+)", c.source, re.M)]
    return found


def headings(path):
    "Anchors Quarto makes of headings."
    for title in re.findall(r"^#+\s+(.*?)\s*(?:\{.*)?$", prose(path), re.M):
        yield re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", title.lower()).strip()).lstrip("0123456789.-_")


@pytest.fixture(scope="module")
def scratch(copy_project, run):
    "A copy whose package was exported and whose notebooks were cleaned anew."
    project = copy_project("chapters")
    for module in (project / "bdpo_lit").glob("[!_]*.py"): module.unlink()
    run("nbdev-export", cwd=project)
    run("nbdev-clean", cwd=project)
    return project


def test_package_is_what_the_chapters_export(scratch):
    here, there = ({p.name: p.read_text() for p in (root / "bdpo_lit").glob("*.py")} for root in (ROOT, scratch))
    differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    assert not differ, f"run nbdev-export: {differ} not as the notebooks say"


@by_name
def test_clean(path, scratch):
    assert path.read_text() == (scratch / "nbs" / path.name).read_text(), "run nbdev-clean"


@by_name
def test_stored_outputs(path):
    for cell in code(path):
        for out in cell.outputs:
            assert out.output_type != "error", f"a stored error: {cell.source[:80]}"
            data = out.get("data", {})
            text = out.get("text", "") + "".join(str(v) for kind, v in data.items() if kind.startswith("text/"))
            found = re.findall(r"(?<![\w.])/(?:home|root|Users|tmp|work)/\S+", text)
            assert not found, f"a path of the machine it was made on: {found}"
            if any(kind.startswith("image/") for kind in data):
                assert re.search(r'^#\|\s*fig-alt:\s*"?\S', cell.source, re.M), f"no alt text: {cell.source[:80]}"


@by_name
def test_opening_cells(path):
    first, *_ = cells = read(path).cells
    assert re.match(r"# \S.*\n\n> \S", first.source), "starts with a title and a one-line subtitle"
    badge = f"(https://colab.research.google.com/github/{SLUG}/blob/main/nbs/{path.name})"
    assert badge in "".join(c.source for c in cells[:2]), f"the Colab badge leads to {badge}"
    assert [c.source for c in cells if "pip install" in c.source and c.cell_type == "code"] == [INSTALL]


def test_install_cell_does_nothing_outside_colab(tmp_path, run):
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\ntouch "$(dirname "$0")/called"\n')
    pip.chmod(0o755)
    command = INSTALL.splitlines()[-1].removeprefix("! ")
    for guard, called in (("/no/such/folder", False), (str(tmp_path), True)):
        run("sh", "-c", f"PATH={tmp_path}:$PATH; {command.replace('/content', guard)}", check=False)
        assert (tmp_path / "called").exists() == called


@by_name
def test_line_length(path):
    lines = [line for cell in code(path) for line in cell.source.splitlines() if not line.startswith("#|")]
    assert not (long := [line for line in lines if len(line) > 120]), f"{len(long)} lines over 120 characters: {long}"


@by_name
def test_imports_have_their_own_cells(path):
    for cell in code(path):
        if not (body := parse(cell)): continue
        imports = [isinstance(s, ast.Import | ast.ImportFrom) for s in body]
        assert all(imports) or not any(imports), f"imports have a cell of their own: {cell.source[:80]}"


@by_name
def test_leaves_no_trace(path):
    "nbdev-test runs several chapters in one process: a global default would reach the next one."
    for cell in code(path):
        leaks = re.findall(r"\bset_(?:default_dtype|default_device|default_tensor_type|grad_enabled)\b", cell.source)
        assert not leaks, f"{leaks} outlives the chapter; give dtype= and device= where tensors are made"


def parse(cell): return ast.parse(re.sub(r"^\s*[!%].*$", "pass", cell.source, flags=re.M)).body


def bdpo_lit_imports(path):
    for node in (n for cell in code(path) for s in parse(cell) for n in ast.walk(s)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "bdpo_lit"):
            below = (node.module or "").removeprefix("bdpo_lit").lstrip(".")
            yield from [below] if below else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("bdpo_lit.") for a in node.names if a.name.startswith("bdpo_lit."))


@by_name
def test_imports_only_from_chapters_before(path):
    home = {}
    for chapter in reversed(CHAPTERS):
        exported = re.findall(r"^#\|\s*default_exp\s+(\w+)", "\n".join(c.source for c in code(chapter)), re.M)
        home |= {module: chapter for module in exported}
    for module in bdpo_lit_imports(path):
        assert module in home, f"no chapter exports {module}"
        assert home[module] <= path, f"{module} comes later, in {home[module].name}"


@by_name
def test_references(path):
    known = labels(path)
    assert len(known) == len(set(known)), "a label given twice"
    used = re.findall(r"(?<![\w@])@((?:eq|fig|sec|tbl|thm)-[\w-]*\w)", prose(path))
    used += re.findall(r"@((?:eq|fig|sec|tbl|thm)-[\w-]*\w)", "\n".join(
        line for c in code(path) for line in c.source.splitlines() if line.startswith("#|")))
    assert set(used) <= set(known), f"references to nothing: {set(used) - set(known)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links(path):
    text = prose(path)
    assert not (found := re.findall(r"!\[\s*\]\([^)]*\)(?!\{[^}]*fig-alt)", text)), f"images without alt text: {found}"
    links = re.findall(r"\]\(([^()\s]+(?:\([^()]*\))?)[^()]*\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link): continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and target.is_relative_to(ROOT), f"{link} leads nowhere"
        if anchor: assert anchor in {*labels(target), *headings(target)}, f"{link}: no such place on that page"
