"""The pages as readers meet them: the chapters staged for Quarto, without Quarto. Where a rendered site is at hand
(BDPO_LIT_DOCS names its folder, as in the workflow that builds it), its links, pictures and leftovers are checked."""
import ast
import json
import os
import re
import urllib.parse
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import yaml

from bdpo_lit import _site
from bdpo_lit.reference.style import result

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [p.relative_to(ROOT / "nbs") for p in _site.chapters()]
squeeze = lambda text: re.sub(r"\s+", "", text)


@pytest.fixture(scope="module")
def staged(run, copy_project):
    project = copy_project("pages")
    run("python", "-W", "ignore", "-m", "bdpo_lit._site", "--stage", cwd=project, PYTHONPATH=str(project))
    return project / "_proc"


@pytest.fixture(scope="module")
def pages(staged): return {p: nbformat.read(staged / p, 4).cells for p in CHAPTERS}


def definitions():
    for module in _site.modules():
        source = (ROOT / "bdpo_lit" / f"{module.replace('.', '/')}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield module, node.name, source.splitlines()[node.lineno - 1:node.end_lineno]


def test_every_definition_is_on_a_page_whole(pages):
    def plain(code):    # nbdev makes imports relative
        return re.sub(r"from(?:bdpo_lit)?\.+(?:\w+\.)?(\w+import)", r"from\1", squeeze(code))
    shown = {f"{path.parent.name}.{path.stem[3:]}": plain("\n".join(c.source for c in cells if c.cell_type == "code"))
             for path, cells in pages.items()}
    missing = [f"{m}.{name}" for m, name, lines in definitions() if plain("\n".join(lines)) not in shown[m]]
    assert not missing, f"not on any page, or not whole: {missing}"


def test_nothing_is_shown_twice_or_by_signature(pages):
    for path, cells in pages.items():
        text = "\n".join(c.source for c in cells)
        assert "show_doc" not in text and "__main__" not in text, path
        found = Counter(re.findall(r"(?m)^(?:def|class) (\w+)", text))
        twice = [n for n, k in found.items() if k > 1 and n in _site.homes()]
        assert not twice, f"{path}: {twice}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_page_opens_with_words(path, pages):
    "Front matter with number, title and description; the badge; the opening; and no code before it."
    front, badge, opening, *_ = pages[path]
    meta = yaml.safe_load(front.source.strip().strip("-"))
    assert meta["title"].startswith(f"{int(path.name[:2])} · ") and meta["description"]
    assert f"{path.as_posix()}" in badge.source and "colab" in badge.source
    assert opening.source.startswith("::: {.opening}") and opening.source.rstrip().endswith(":::")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_imports_are_folded_and_nothing_internal_is_left(path, pages):
    for cell in pages[path]:
        if cell.cell_type != "code": continue
        assert not re.search(r"(?m)^#\|\s*(export|hide|default_exp|slow|gpu|eval)\b", cell.source), cell.source
        assert "pip install" not in cell.source
        body = ast.parse(re.sub(r"(?m)^\s*[!%].*$", "pass", cell.source)).body
        if body and all(isinstance(s, ast.Import | ast.ImportFrom) for s in body):
            assert re.search(r"(?m)^#\|\s*code-fold: true", cell.source), f"imports in the open: {cell.source}"


def test_what_notebooks_write_becomes_what_quarto_has():
    note = "> **Note. A title**\n>\n> Text with $x$.\n> More.\n\nAfter."
    assert _site.callouts(note) == "\n::: {.callout-note}\n## A title\n\nText with $x$.\nMore.\n:::\n\nAfter."
    assert _site.citations('as [Ho et al. (2020)](https://doi.org/x "@ho2020ddpm") found') == "as @ho2020ddpm found"
    assert _site.prose("a `a` $a$ [a](a) a", str.upper) == "A `a` $a$ [a](a) A"
    table = f"| a | b |\n|:--|--:|\n| {'x' * 40} | [1](there) |\n"
    rule = f"|:{'-' * 42}|{'-' * 3}:|"
    assert _site.tables(table) == "::: {.table-box}\n" + table.replace("|:--|--:|", rule) + ":::\n"
    assert "wide-table" in _site.tables(table.replace("[1]", "y" * 50))


def test_cited_keys_are_in_the_bibliography():
    known = set(re.findall(r"@\w+\{([\w:-]+),", (ROOT / "nbs" / "references.bib").read_text()))
    text = "".join((ROOT / "nbs" / p).read_text() for p in CHAPTERS)
    used = set(re.findall(r'\\"@([\w:-]+)\\"\)', text))
    listed = "".join(nbformat.read(ROOT / "nbs/reference/34_bibliography.ipynb", 4).cells[4].source)
    assert listed == _site.bibliography(), "run python -m bdpo_lit._site --index"
    assert used <= known, f"cited, but not in references.bib: {used - known}"
    assert known <= used | {"gao2025bdpo"}, f"in references.bib, but cited nowhere: {known - used}"


def test_pages_for_teachers_are_made_from_the_chapters(staged):
    said = (staged / "_objectives.md").read_text()
    for path in CHAPTERS:
        if path.parent.name == "reference": continue
        handout = (staged / "handouts" / f"{path.parent.name}.qmd").read_text()
        assert f"({path.as_posix()}).**" in said and f"(../{path.as_posix()})" in handout
    for part, numbers in _site.KEY.items():
        handout = (staged / "handouts" / f"{part}.qmd").read_text()
        assert sorted(re.findall(r"\\tag\{(P\d+)\}", handout)) == sorted(numbers.split())


# ---- the API and the index of equations

def test_api_has_every_public_name(staged):
    for module in _site.modules():
        page = (staged / "api" / f"{module}.qmd").read_text()
        names = [n for n in _site.defined((ROOT / "bdpo_lit" / f"{module.replace('.', '/')}.py").read_text())
                 if not _site.private(n)]
        assert re.findall(r"(?m)^## (\S+) \{#", page) == names, f"{module}: all names, in the order of the source"
        assert "__main__" not in page
        for name in names: assert f"#{name})" in page, f"{module}: {name} has no link to its derivation"


def test_index_of_equations_is_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(_site, "RESULTS", tmp_path)
    _site.write_index()
    new, old = ((folder / "equation_index.json").read_text() for folder in (tmp_path, _site.PACKAGE / "results"))
    assert new == old, "run python -m bdpo_lit._site --index and execute chapter 31"
    table, = (c for c in nbformat.read(ROOT / "nbs/reference/31_equations.ipynb", 4).cells if "Markdown(" in c.source)
    shown = "".join(table.outputs[0].data["text/markdown"])
    assert all(f'id="P{row["number"]}"' in shown for row in result("equation_index.json"))


def test_equations_of_the_paper_lead_to_code_and_back():
    rows = result("equation_index.json")
    for row in rows:
        assert row["functions"] or row["reason"], f"(P{row['number']}) has neither a function nor a reason"
        assert row["checks"] or not row["functions"], f"(P{row['number']}): nothing checks its functions"
    text = "".join((ROOT / "nbs" / p).read_text() for p in CHAPTERS) + \
        "".join(p.read_text() for p in (ROOT / "bdpo_lit").glob("*/*.py"))
    named = {int(n) for n in re.findall(r"\(P(\d+)\)", text)}
    assert named <= {row["number"] for row in rows}, "a number that the index does not know"


def test_symbols_are_known():
    "Greek letters of all formulas are in the tables of chapter 32."
    known = (ROOT / "nbs/reference/32_symbols.ipynb").read_text()
    greek = ("alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi "
             "varphi chi psi omega ell Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split()
    for path in CHAPTERS:
        formulas = " ".join("".join(m) for c in nbformat.read(ROOT / "nbs" / path, 4).cells if c.cell_type == "markdown"
                            for m in re.findall(r"\$\$(.*?)\$\$|(?<!\$)\$([^$]+)\$", c.source, re.S))
        used = {m for m in re.findall(r"\\([A-Za-z]+)", formulas) if m in greek}
        missing = sorted(m for m in used if not re.search(rf"\\\\{m}(?![A-Za-z])", known))
        assert not missing, f"{path}: {missing} not in the table of symbols"


# ---- a rendered site

DOCS = os.environ.get("BDPO_LIT_DOCS")
rendered = pytest.mark.skipif(not DOCS, reason="no rendered site: make docs, then BDPO_LIT_DOCS=_docs")


class Html(HTMLParser):
    "Ids, links, pictures and visible text of a page."
    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.images, self.text, self.depth, self.base = set(), [], [], [], 0, None
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "base": self.base = attrs["href"]
        if attrs.get("id"): self.ids.add(attrs["id"])
        if link := attrs.get("href" if tag in ("a", "link") else "src"): self.links.append(link)
        if tag == "img": self.images.append(attrs)
        if tag in ("script", "style", "code", "pre"): self.depth += 1

    def handle_endtag(self, tag): self.depth -= tag in ("script", "style", "code", "pre")

    def handle_data(self, data):
        if self.depth <= 0: self.text.append(data)


@pytest.fixture(scope="module")
def site():
    docs = Path(DOCS).resolve()
    pages = {p.relative_to(docs).as_posix(): Html(p) for p in sorted(docs.rglob("*.html"))}
    assert len(pages) > 2 * len(CHAPTERS) - 10
    return pages


@rendered
def test_links_of_the_site_lead_somewhere(site):
    docs, broken = Path(DOCS).resolve(), []
    for name, page in site.items():
        for link in page.links:
            if re.match(r"(https?:|mailto:|data:|javascript:|//)", link): continue
            file, _, anchor = link.partition("#")
            file, anchor = urllib.parse.unquote(file.split("?")[0]), urllib.parse.unquote(anchor)
            here = docs if page.base else (docs / name).parent
            target = (here / file).resolve() if file else docs / name
            if target.is_dir(): target /= "index.html"
            known = site.get(target.relative_to(docs).as_posix()) if target.is_relative_to(docs) else None
            if not target.exists() or (anchor and known and anchor not in known.ids): broken.append(f"{name}: {link}")
    assert not broken, broken


@rendered
def test_pictures_of_the_site_are_there_and_described(site):
    for name, page in site.items():
        undescribed = [i.get("src", "")[:60] for i in page.images if not (i.get("alt") or "").strip()]
        assert not undescribed, f"{name}: {undescribed}"


@rendered
def test_no_markup_is_left_on_the_site(site):
    for name, page in site.items():
        text = "".join(page.text)
        raw = r":::\s*\{?|(?m:^\s*#\|)|\{#(?:eq|fig|sec|tbl)-|\?@|(?<!\w)@(?:eq|fig)-|<IPython\.core"
        found = re.findall(raw, text)
        assert not found, f"{name}: {found}"


@rendered
def test_search_finds_numbers_and_code(site):
    entries = json.loads((Path(DOCS) / "search.json").read_text())
    assert any(e["title"].startswith("10 · ") for e in entries)
    assert any("def step_value" in e["text"] for e in entries)
