"""What holds for every notebook, found by reading it (nbdev-test is what executes them)."""
import ast
import functools
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from bdpo_lit._site import defined

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PARTS = ("theory", "algorithm", "offline", "evidence", "reference")
CHAPTERS = sorted(NBS.glob("*/*.ipynb"), key=lambda p: p.name)    # numbered through: in reading order
NOTEBOOKS = [NBS / "index.ipynb", *CHAPTERS]
PAGES = [*NOTEBOOKS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SLUG = REPOSITORY.removeprefix("https://github.com/")
INSTALL = f"""#| hide
#| eval: false
! [ -e /content ] && pip install -q git+{REPOSITORY}"""

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
by_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def read(path): return nbformat.read(path, 4)


def code(path): return [c for c in read(path).cells if c.cell_type == "code"]


def prose(path):
    "Text of a page without code and formulas (but with the labels of formulas)."
    text = path.read_text() if path.suffix == ".md" else \
        "\n\n".join(c.source for c in read(path).cells if c.cell_type != "code")
    for pattern in (r"^(```+|~~~+).*?^\1", r"^    .*?$", r"\$\$.*?\$\$", r"`[^`\n]+`", r"(?<!\\)\$[^$\n]+\$"):
        text = re.sub(pattern, "", text, flags=re.S | re.M)
    return text


def text_of(path):
    "All of a notebook's Markdown, formulas and labels included."
    return "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")


def figures(path): return [f for c in code(path) for f in re.findall(r"^#\|\s*label:\s*(fig-\S+)", c.source, re.M)]


@functools.cache
def labels(path):
    "Everything a link can point at within a page: figures, formulas, and (on the site) exported definitions."
    if path.suffix != ".ipynb": return []
    exported = [c.source for c in code(path) if re.search(r"^#\|\s*export\b", c.source, re.M)]
    return figures(path) + re.findall(r'<a id="([\w-]+)">', path.read_text().replace('\\"', '"')) + \
        [name for source in exported for name in defined(source)]


def headings(path):
    "Anchors Quarto makes of headings."
    for title in re.findall(r"^#+\s+(.*?)\s*(?:\{.*)?$", prose(path), re.M):
        yield re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", title.lower()).strip()).lstrip("0123456789.-_")


def exported_files(root): return {p.relative_to(root): p.read_text() for p in (root / "bdpo_lit").glob("*/*.py")}


@pytest.fixture(scope="module")
def scratch(copy_project, run):
    "A copy whose package was exported and whose notebooks were cleaned anew."
    project = copy_project("chapters")
    for module in exported_files(project): (project / module).unlink()
    run("nbdev-export", cwd=project)
    run("nbdev-clean", cwd=project)
    return project


def test_package_is_what_the_chapters_export(scratch):
    here, there = exported_files(ROOT), exported_files(scratch)
    differ = sorted(str(name) for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    assert not differ, f"run nbdev-export: {differ} not as the notebooks say"


@by_name
def test_clean(path, scratch):
    assert path.read_text() == (scratch / path.relative_to(ROOT)).read_text(), "run nbdev-clean"


def test_chapters_are_numbered_through():
    assert [int(p.name[:2]) for p in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))
    assert [p.parent.name for p in CHAPTERS] == sorted((p.parent.name for p in CHAPTERS), key=PARTS.index)


@by_chapter
def test_a_chapter_and_its_module_have_one_name(path):
    exports = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in code(path)), re.M)
    assert exports in ([], [f"{path.parent.name}.{path.stem[3:]}"])


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
    number = rf"{int(path.name[:2])} · " if path in CHAPTERS else ""
    assert re.match(rf"# {number}\S.*\n\n> \S", first.source), "starts with number, title and a one-line subtitle"
    badge = f"(https://colab.research.google.com/github/{SLUG}/blob/main/{path.relative_to(ROOT).as_posix()})"
    assert badge in first.source, f"the Colab badge leads to {badge}"
    assert [c.source for c in cells if "pip install" in c.source and c.cell_type == "code"] == [INSTALL]


@by_chapter
def test_every_page_opens_and_ends_the_same_way(path):
    opening = read(path).cells[1]
    assert opening.cell_type == "markdown", "nobody meets code before the opening"
    asked = ("*You will be able to*", "*You should know*", "*Time:*")
    assert [b for b in re.findall(r"^- (\*[^*]+\*)", opening.source, re.M)] == list(asked)
    assert not opening.source.startswith("- "), "the opening begins with a paragraph"
    titles = re.findall(r"^## (.+)$", text_of(path), re.M)
    end = ["In three lines", "Exercises", "Where next"] + ["Solutions"] * (path.parent.name != "reference")
    assert titles[-len(end):] == end
    lines = re.search(r"^## In three lines\n+(.*?)^## Exercises", text_of(path), re.M | re.S)[1]
    assert len(re.findall(r"^- ", lines, re.M)) == 3


@pytest.mark.parametrize("path", [p for p in CHAPTERS if p.parent.name != "reference"], ids=lambda p: p.stem)
def test_exercises_can_be_done(path):
    "Three or more, easy to hard, with hints; a checker that the stub fails, and at the end a solution that passes it."
    cells = read(path).cells
    place = {c.source[3:]: k for k, c in enumerate(cells) if c.source.startswith("## ")}
    tasks, solutions = cells[place["Exercises"]:place["Where next"]], cells[place["Solutions"]:]
    words, answers = ("\n".join(c.source for c in part if c.cell_type == "markdown") for part in (tasks, solutions))
    names = re.findall(r"^\*\*(\d+\. [^*]+)\*\* (★+)", words, re.M)
    assert len(names) >= 3 and {stars for _, stars in names} == {"★", "★★", "★★★"}
    assert words.count("<summary>Hint</summary>") == len(names)
    assert re.findall(r"^\*\*(\d+\. [^*]+)\*\*", answers, re.M) == [name for name, _ in names]
    checks = [(c, name) for c in tasks for name in re.findall(r"^attempt\((\w+)", c.source, re.M)]
    assert len(checks) >= 2
    for cell, name in checks:
        assert "**Not yet.**" in str(cell.outputs), f"{name} is content with the stub"
        assert any(re.search(rf"^{name}\(", c.source, re.M) for c in solutions), f"no solution is given to {name}"


@by_chapter
def test_a_picture_comes_early(path):
    "A reader sees the idea before the first long text: within the first 350 words."
    words = 0
    for cell in read(path).cells:
        if cell.cell_type == "markdown": words += len(cell.source.split())
        elif "label: fig-" in cell.source: break
    else: pytest.skip("a page without pictures") if path.stem.endswith("bibliography") else pytest.fail("no picture")
    assert words < 350


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
    long = [line for line in lines if len(line) > 88]
    assert not long, f"{len(long)} lines over 88 characters: {long}"


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
    "Modules of the package, as part.name, that a chapter imports anywhere in its code."
    for node in (n for cell in code(path) for s in parse(cell) for n in ast.walk(s)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "bdpo_lit"):
            below = (node.module or "").removeprefix("bdpo_lit").lstrip(".")
            yield from [below] if below else [a.name for a in node.names if a.name != "__version__"]
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("bdpo_lit.") for a in node.names if a.name.startswith("bdpo_lit."))


@by_chapter
def test_imports_only_from_chapters_before(path):
    "One exception: what all figures share stands at the end of the book, and imports nothing of it."
    names = {p: (p.parent.name, p.stem[3:]) for p in CHAPTERS}
    home = {".".join(n): p for p, n in names.items() if (ROOT / "bdpo_lit" / f"{'/'.join(n)}.py").exists()}
    for module in bdpo_lit_imports(path):
        if module == "reference.style": continue
        assert module in home, f"no chapter exports {module}"
        assert home[module].name <= path.name, f"{module} comes later, in {home[module].name}"
        assert path.stem[3:] != "style"


# ---- lessons: counted over the whole book

@functools.cache
def lessons():
    "Visible code cells: page, whether exported, the lines a reader sees, the cell."
    found = []
    for path in NOTEBOOKS:
        for cell in code(path):
            marks = set(re.findall(r"^#\|\s*([\w-]+)", cell.source, re.M))
            lines = [x for x in cell.source.splitlines() if x.strip() and not x.startswith("#|")]
            if lines and not marks & {"hide", "default_exp"}: found.append((path.stem, "export" in marks, lines, cell))
    return found


def test_cells_are_short():
    sizes = sorted(len(lines) for _, _, lines, _ in lessons())
    assert sizes[int(.9 * len(sizes))] <= 12, "nine of ten cells have 12 lines or less"
    assert not (long := [(stem, lines[0]) for stem, _, lines, _ in lessons() if len(lines) > 40]), f"over 40: {long}"


def shows(cell):
    "Whether a cell ends in a value, a table or a picture."
    kinds = {kind for out in cell.outputs for kind in out.get("data", {})}
    return any(k.startswith("image/") for k in kinds) or bool(kinds) and isinstance(parse(cell)[-1], ast.Expr)


def test_cells_show_their_point():
    taught = [(stem, lines, c) for stem, exported, lines, c in lessons() if not exported and (body := parse(c))
              and not all(isinstance(s, ast.Import | ast.ImportFrom) for s in body)]
    assert sum(shows(c) for *_, c in taught) >= .5 * len(taught)
    said = [(stem, x) for stem, lines, _ in taught for x in lines if re.search(r"""print\(f?["'][^"'{]{25,}""", x)]
    assert not said, f"sentences are text, not output: {said}"


@by_name
def test_headings_have_their_own_cells(path):
    for cell in read(path).cells[1:]:
        if cell.cell_type == "markdown" and re.search(r"^#{2,4} ", cell.source, re.M):
            assert len(cell.source.strip().splitlines()) == 1, f"a heading shares its cell: {cell.source[:60]}"


# ---- formulas, figures, chapters: how they are numbered and named

def tags(path):
    "Label -> number of a notebook's displayed equations."
    pattern = r'<a id="(eq-[\w-]+)"></a>\s*\$\$(?:(?!\$\$).)*?\\tag\{([^}]*)\}'
    return dict(re.findall(pattern, text_of(path), re.S))


@by_chapter
def test_equations_carry_their_numbers(path):
    found = tags(path)
    assert len(re.findall(r"\\tag\{", text_of(path))) == len(found), "a number without a label just before it"
    own = [t for t in found.values() if not re.fullmatch(r"P\d+", t)]
    assert own == [f"{int(path.name[:2])}.{k + 1}" for k in range(len(own))], "own equations are numbered chapter.k"


@by_name
def test_what_only_quarto_shows_is_not_used(path):
    for raw in (r"(?<![\w@`])@(?:eq|fig|sec|tbl)-", r"^:::", r"\{#(?:eq|fig|sec|tbl)-", r"\{fig-alt="):
        found = re.findall(raw + ".{0,20}", prose(path), re.M)
        assert not found, f"raw text in Jupyter and on Colab: {found}"


@by_name
def test_numbers_in_references_are_those_of_the_target(path):
    "[(4.2)](#eq-x), [Figure 3](#fig-x), [chapter 13](../offline/13_data.ipynb)."
    text = text_of(path)
    for number, file, label in re.findall(r"\[\((P?[\d.]+)\)\]\(([^)#]*)#(eq-[\w-]+)\)", text):
        target = (path.parent / file).resolve() if file else path
        assert tags(target).get(label) == number, f"({number}) leads to {label}, which is {tags(target).get(label)}"
    for number, label in re.findall(r"\[Figure (\d+)\]\(#(fig-[\w-]+)\)", text):
        assert figures(path).index(label) + 1 == int(number), f"{label} is not figure {number}"
    for number, file in re.findall(r"\[(?:[Cc]hapters? )?(\d+)\]\(([^)#]*?\.ipynb)[^)]*\)", text):
        assert file.split("/")[-1].startswith(f"{int(number):02d}_"), f"chapter {number} is not {file}"


@by_name
def test_chapters_are_named_with_a_link(path):
    text = re.sub(r"\[[^\]]*\]\([^)]*\)", "", prose(path))
    assert not (found := re.findall(r".{0,20}\b[Cc]hapters? \d+", text)), f"no link: {found}"


@by_name
def test_labelled_figures_have_their_picture(path):
    for cell in code(path):
        if not (label := re.search(r"^#\|\s*label:\s*(fig-\S+)", cell.source, re.M)): continue
        kinds = {k for out in cell.outputs for k in out.get("data", {})}
        assert kinds & {"image/png", "image/svg+xml", "text/html", "text/markdown"}, f"{label[1]} has no stored picture"
        assert re.search(r'^#\|\s*fig-cap:\s*"?\S', cell.source, re.M), f"{label[1]} has no caption"
        assert re.search(r'^#\|\s*fig-alt:\s*"?\S', cell.source, re.M), f"{label[1]} has no alternative text"


@by_chapter
def test_every_equation_of_the_paper_has_its_number_in_code(path):
    "A docstring names equations of the paper as (P13); a bare (13) could be any."
    for cell in code(path):
        assert not (found := re.findall(r"Eqs?\. \(\d+\)", cell.source)), f"{found}: write (P13) for the paper's (13)"


# ---- what runs where

@by_name
def test_results_are_read_from_the_package(path):
    for cell in code(path):
        found = re.findall(r"""["'](?:\.\./)*(?:nbs/)?results/[^"']*["']""", cell.source)
        assert not found, f"{found}: use result(...) or picture(...), so that the chapter runs alone"


@by_name
def test_cells_that_take_long_ask_first(path):
    for cell in code(path):
        for kind in re.findall(r"^#\|\s*(slow|gpu)\s*$", cell.source, re.M):
            harmless = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
            runs = any(not isinstance(s, harmless) for s in parse(cell))
            assert f'wanted("{kind}"' in cell.source or not runs, f"'Run all' in Jupyter runs this: {cell.source[:80]}"


@pytest.mark.parametrize("stem", ["22_results", "33_differences"])
def test_a_chapter_runs_alone(stem, tmp_path, monkeypatch):
    "As on Colab: the package installed, the notebook in an empty folder."
    from nbclient import NotebookClient
    monkeypatch.chdir(tmp_path)
    path, = NBS.glob(f"*/{stem}.ipynb")
    NotebookClient(read(path), timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


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
