"""How the chapters become the site: `python -m bdpo_lit._site` (what `make docs` runs) stages the notebooks with nbdev,
adds an API page for every module, and has Quarto render them. Not part of the book; needs the dev extra.

nbdev replaces exported cells by their signatures. A book that implements each equation in a few lines must show the
lines, so `Page` does the opposite: definitions stand whole where they are derived, and signatures have pages of their
own. What the notebooks write so that Jupyter, Colab and GitHub can show it, `Page` turns into what Quarto has for it.
"""
import ast
import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib import import_module
from pathlib import Path

from fastcore.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.serve import proc_nbs
from nbdev.showdoc import show_doc, showdoc_nm

import bdpo_lit
from bdpo_lit.reference.style import RESULTS, result

PACKAGE = Path(bdpo_lit.__file__).parent
NBS = PACKAGE.parent / "nbs"
PARTS = dict(theory="Theory", algorithm="Algorithm", offline="Offline RL", evidence="Evidence", reference="Reference")
COLAB = "https://colab.research.google.com"


# ---- what there is

@functools.cache
def chapters() -> list[Path]:
    "All chapters in reading order: parts are folders, chapters are numbered through."
    return sorted(NBS.glob("*/[0-9][0-9]_*.ipynb"), key=lambda p: p.name)


def modules() -> list[str]:
    "All exported modules in reading order, as `part.name`."
    stems = [(p.parent.name, p.stem[3:]) for p in chapters()]
    return [f"{part}.{stem}" for part, stem in stems if (PACKAGE / part / f"{stem}.py").exists()]


def chapter_of(module: str) -> Path:
    part, stem = module.split(".")
    return next(p for p in chapters() if p.parent.name == part and p.stem[3:] == stem)


def parse(source: str) -> list[ast.stmt]:
    "Statements of a cell; a line of IPython's own stands for nothing."
    return ast.parse(re.sub(r"(?m)^(\s*)[!%](?!=).*$", r"\1pass", source)).body


def defined(source: str) -> list[str]:
    "Names that a cell or a module defines: functions, classes, and methods added by `@patch` as `Class.method`."
    found = []
    for node in parse(source):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = showdoc_nm(node)
            found += name if isinstance(name, list) else [name]
    return found


def private(name: str) -> bool: return any(part.startswith("_") for part in name.split("."))


@functools.cache
def homes() -> dict[str, str]:
    "Where each definition is: `name` -> `part.module`. A name that two modules define belongs to neither."
    found, twice = {}, set()
    for module in modules():
        for name in defined((PACKAGE / f"{module.replace('.', '/')}.py").read_text()):
            if name in found: twice.add(name)
            found[name] = module
    return {name: module for name, module in found.items() if name not in twice and not private(name)}


# ---- one page

CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.S | re.M)
FENCED = re.compile(r"(^```.*?^```)", re.S | re.M)
MATH = re.compile(r"(\$\$.*?\$\$|(?<![\\$])\$[^$]+?\$)", re.S)
TAGGED = r'<a id="([\w-]+)"></a>\s*\$\$(?:(?!\$\$).)*?\\tag\{(P\d+)\}'
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)|<[^>]+>)")


def prose(text: str, change) -> str:
    "Apply a change to running text only: not to code, formulas or links."
    for pattern in (CODE, MATH, LINK):
        if not pattern.search(text): continue
        parts = pattern.split(text)
        return "".join(part if i % 2 else prose(part, change) for i, part in enumerate(parts))
    return change(text)


def callouts(text: str) -> str:
    "A quotation that opens with a bold word and a title becomes Quarto's callout."
    def one(m):
        body = re.sub(r"(?m)^> ?", "", m[3]).strip("\n")
        title = f"## {m[2].strip()}\n" if m[2].strip() else ""
        return f"\n::: {{.callout-{m[1].lower()}}}\n{title}\n{body}\n:::\n"
    kinds = "Note|Tip|Warning|Caution|Important"
    return re.sub(rf"^> \*\*({kinds})\.([^*\n]*)\*\*((?:[^\n]*\n?)(?:^>[^\n]*\n?)*)", one, text, flags=re.M)


def tables(text: str) -> str:
    "Tables scroll within themselves on a phone; their columns are as wide as what they hold."
    def width(cell): return len(re.sub(r"\]\([^)]*\)|<[^>]*>|[$`*\\[{}]", "", cell))
    def one(m):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in m[0].splitlines()]
        widest = [min(max(3, *map(width, column)), 120) for column in zip(rows[0], *rows[2:], strict=False)]
        ends = [(c.strip()[:1].strip("-"), c.strip()[-1:].strip("-")) for c in rows[1]]
        rule = "|".join(f"{left}{'-' * w}{right}" for (left, right), w in zip(ends, widest, strict=False))
        lines = m[0].splitlines()
        kind = "wide-table" if sum(widest) > 75 else "table-box"
        return f"::: {{.{kind}}}\n" + "\n".join([lines[0], f"|{rule}|", *lines[2:]]) + "\n:::\n"
    table = r"(?m)^\|.*\|[ ]*\n\|[ :|-]+\|[ ]*(?:\n\|.*\|[ ]*)+(?:\n|\Z)"
    return "".join(part if i % 2 else re.sub(table, one, part) for i, part in enumerate(FENCED.split(text)))


def formulas(text: str) -> str:
    "A long formula within a line scrolls within itself on a phone."
    def one(m):
        short = re.sub(r"[{}^_\\s]|\\[,;!:]", "", re.sub(r"\\[A-Za-z]+", "x", m[0]))
        return m[0] if m[0].startswith("$$") or len(short) < 36 else f"[{m[0]}]{{.long-formula}}"
    return "".join(part if i % 2 else MATH.sub(one, part) for i, part in enumerate(CODE.split(text)))


def citations(text: str) -> str:
    "A link whose title is a key of the bibliography becomes a citation."
    return re.sub(r'\[([^\]]*)\]\(\S+ "(@[\w:-]+)"\)', r"\2", text)


class Page(Processor):
    "Last of nbdev's processors: from the cells of a chapter to those of its page."
    def begin(self):
        cfg = get_config()
        self.path = Path(self.nb.path_).resolve().relative_to(cfg.nbs_path.resolve())
        self.up = "../" * (len(self.path.parts) - 1)
        self.homes = homes()
        cells, out = self.nb.cells, []
        formulas = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        self.here = {p: f"#{label}" for label, p in re.findall(TAGGED, formulas, re.S)}
        for k, cell in enumerate(cells):
            if cell.cell_type == "raw": out += [cell, self.badge(cfg)]
            elif cell.cell_type == "markdown": out.append(self.text(cell, opening=k == 1))
            elif cell.source.strip() and "default_exp" not in cell.directives_: out += self.code(cell)
        for cell in out:
            if cell.cell_type == "code": cell["outputs"] = [self.output(o, cell) for o in cell.get("outputs", [])]
            cell.metadata.pop("execution", None)
        self.nb.cells = out

    def badge(self, cfg):
        url = f"{COLAB}/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{cfg.nbs_path.name}/{self.path.as_posix()}"
        image = f'<img src="{COLAB}/assets/colab-badge.svg" alt="Open in Colab" height="20">'
        return mk_cell(f'<p class="badge-line"><a href="{url}">{image}</a></p>', "markdown")

    def text(self, cell, opening: bool):
        text = formulas(tables(citations(callouts(cell.source))))
        index = f"{self.up}reference/31_equations.ipynb"
        def equation(m): return f"[({m[1]})]({self.here.get(m[1], f'{index}#{m[1]}')})"
        text = prose(text, lambda t: re.sub(r"\((P\d+)\)", equation, t))
        text = re.sub(r"(?<![\[`])`([\w.]+)`(?![\]`])", self.symbol, text)
        cell.source = f"::: {{.opening}}\n{text}\n:::" if opening else text
        return cell

    def symbol(self, m):
        "A name in backticks leads to its definition."
        module = self.homes.get(m[1])
        if not module: return m[0]
        return f"[`{m[1]}`]({self.up}{chapter_of(module).relative_to(NBS).as_posix()}#{m[1]})"

    def code(self, cell) -> list:
        cell.source = re.sub(r"(?m)^#\|\s*(export\w*|slow|gpu|notest)\b.*\n?", "", cell.source)
        exported = "export" in cell.directives_
        body = parse(cell.source)
        if body and all(isinstance(s, ast.Import | ast.ImportFrom) for s in body) and "code-fold" not in cell.source:
            cell.source = '#| code-fold: true\n#| code-summary: "Imports"\n' + cell.source
        names = [n for n in defined(cell.source) if not private(n)] if exported else []
        page = f"{self.up}api/{self.path.parent.name}.{self.path.stem[3:]}.qmd"
        anchors = " ".join(f'[API]({page}#{n}){{#{n} .api title="{n}"}}' for n in names)
        return [mk_cell(f"::: {{.api-line}}\n{anchors}\n:::", "markdown"), cell] if anchors else [cell]

    def output(self, out, cell):
        "Quarto takes the richest form of an output that it knows; the others only make the page heavy."
        data = out.get("data", {})
        if "text/markdown" in data: data["text/markdown"] = tables("".join(data["text/markdown"]))
        if "image/png" in data: out["data"] = {k: v for k, v in data.items() if k in ("image/png", "text/plain")}
        if "text/html" in data:
            found = re.search(r'fig-alt: "?(.*?)"?$', cell.source, re.M)
            alt = html.escape(found[1] if found else "")
            text = re.sub(r"<img (?![^>]*alt=)", lambda m: f'<img alt="{alt}" ', "".join(data["text/html"]))
            data["text/html"] = text.replace('class="anim-slider"', 'class="anim-slider" aria-label="frame"')
        return out


# ---- pages of the API

def api_page(module: str) -> str:
    "Signatures and documentation of all public definitions of a module, in the order of its source."
    cfg, mod, path = get_config(), import_module(f"bdpo_lit.{module}"), PACKAGE / f"{module.replace('.', '/')}.py"
    chapter = chapter_of(module).relative_to(NBS)
    title = json.loads((NBS / chapter).read_text())["cells"][0]["source"][0].strip("# \n")
    tree = ast.parse(path.read_text())
    lines = {n: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
             for n in defined(ast.unparse(node))}
    doc = " ".join((mod.__doc__ or "").split())
    out = [f'---\ntitle: "{module}"\ndescription: {json.dumps(doc)}\npagetitle: "API: {module}"\n---\n',
           f"Derived in chapter [{title}](../{chapter.as_posix()}).\n"]
    for name, line in lines.items():
        if private(name): continue
        obj = mod
        for part in name.split("."): obj = getattr(obj, part)
        out += [f"## {name} {{#{name}}}\n", "::: {.api-line}",
                f"[derivation](../{chapter.as_posix()}#{name}) · "
                f"[source]({cfg.git_url}/blob/{cfg.branch}/bdpo_lit/{module.replace('.', '/')}.py#L{line})\n:::\n",
                re.sub(r"^---\s*.*?(?=```python)", "", show_doc(obj, name=name)._repr_markdown_(), flags=re.S) + "\n"]
    return "\n".join(out)


def api_index() -> str:
    rows = ["---\ntitle: API\ndescription: Every public name of the package, by module.\n---\n",
            "Names of general use come from the package itself, imported when they are first used: "
            + ", ".join(f"`{n}`" for n in bdpo_lit.__all__) + ".\n"]
    for part, title in PARTS.items():
        rows.append(f"\n## {title}\n\n| module | |\n|:--|:--|")
        for module in modules():
            if not module.startswith(f"{part}."): continue
            doc = (import_module(f"bdpo_lit.{module}").__doc__ or "").split("\n\n")[0].replace("\n", " ")
            rows.append(f"| [`{module}`]({module}.qmd) | {doc} |")
    return tables("\n".join(rows) + "\n")


# ---- where each equation of the paper is derived, implemented and checked

def equations() -> dict[int, dict]:
    "By the paper's number: places of the book that display it, functions whose docstring names it, and their checks."
    found = {int(row["number"]): dict(row, shown=[], functions=[], checks=[]) for row in result("paper_equations.csv")}
    tests = {p.name: p.read_text() for p in sorted((NBS.parent / "tests").glob("test_*.py"))}
    for chapter in chapters():
        where, cells = chapter.relative_to(NBS).as_posix(), json.loads(chapter.read_text())["cells"]
        number, sources = int(chapter.stem[:2]), ["".join(c["source"]) for c in cells]
        for cell, text in zip(cells, sources):
            if cell["cell_type"] == "markdown":
                for anchor, p in re.findall(TAGGED, text, re.S):
                    found[int(p[1:])]["shown"].append((number, f"{where}#{anchor}"))
            elif re.search(r"(?m)^#\|\s*export\b", text):
                for name in (n for n in defined(text) if not private(n)):
                    for p in {int(p) for p in re.findall(r"\(P(\d+)\)", text)}:
                        found[p]["functions"].append((name, f"{where}#{name}"))
                        called = re.compile(rf"\b{re.escape(name.split('.')[-1])}\(")
                        checks = [t for c, t in zip(cells, sources) if c["cell_type"] == "code" and called.search(t)
                                  and re.search(r"\b(assert|test_\w+)\b", t) and "#| export" not in t]
                        if checks: found[p]["checks"].append(f"chapter {number}")
                        if name in homes(): found[p]["checks"] += [f for f, t in tests.items() if called.search(t)]
    return found


def write_index():
    "Keep the index where chapter 31 reads it."
    rows = [dict(number=n, says=e["says"], reason=e["reason"], shown=e["shown"],
                 functions=list(dict(e["functions"]).items()), checks=list(dict.fromkeys(e["checks"])))
            for n, e in equations().items()]
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (RESULTS / "equation_index.json").write_text(f"[{text}]\n")


def bibliography() -> str:
    "References.bib as a list, oldest first."
    rows = []
    for entry in re.findall(r"@\w+\{[\w:-]+,(.*?)\n\}", (NBS / "references.bib").read_text(), re.S):
        field = {k: re.sub("[{}]", "", v) for k, v in re.findall(r"(\w+) = \{((?:[^{}]|\{[^{}]*\})*)\}", entry)}
        names = [" ".join(reversed(name.split(", "))) for name in field["author"].split(" and ")]
        names = ["et al." if name == "others" else name for name in names]
        place = next((field[k] for k in ("journal", "booktitle", "publisher", "howpublished") if k in field), "arXiv")
        link = f"https://doi.org/{field['doi']}" if "doi" in field else field.get("url")
        title = f"[{field['title']}]({link})" if link else field["title"]
        rows.append((field["year"], field["author"], f'- {", ".join(names)} ({field["year"]}). {title}. *{place}*.'))
    return "\n".join(row for *_, row in sorted(rows))


def write_bibliography():
    "Put the list into chapter 34, which Jupyter and Colab show, too."
    path = NBS / "reference" / "34_bibliography.ipynb"
    nb = json.loads(path.read_text())
    k = next(k for k, c in enumerate(nb["cells"]) if "".join(c["source"]) == "## Sources")
    nb["cells"][k + 1]["source"] = bibliography().splitlines(True)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")


# ---- for teachers: what each chapter asks and gives, and a page to hand out for each part

KEY = dict(theory="P1 P6 P11 P17 P31 P30 P35", algorithm="P9 P13 P15 P18 P16")    # equations on the handouts


def cells_of(chapter: Path) -> list[tuple[str, str]]:
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(chapter.read_text())["cells"]]


def title_of(chapter: Path) -> str: return cells_of(chapter)[0][1].splitlines()[0].lstrip("# ")


def objectives() -> str:
    "What a reader can do after each chapter, should know before, and how long it takes, from the chapters' openings."
    rows = []
    for part, title in PARTS.items():
        if part == "reference": continue
        rows.append(f"\n### {title}\n")
        for path in (p for p in chapters() if p.parent.name == part):
            said = [" ".join(x.split()) for x in re.split(r"(?m)^- \*(?:You [^*]+|Time:)\*", cells_of(path)[1][1])[1:]]
            head = f"**[{title_of(path)}]({path.name}).**"
            line = "{} *You will be able to* {} *You should know* {} *Time:* {}".format(head, *said)
            rows.append(from_root(line) + "\n")
    return "\n".join(rows)


def from_root(text: str, up: str = "") -> str:
    "Links between chapters, as seen from elsewhere."
    where = {p.name: up + p.relative_to(NBS).as_posix() for p in chapters()}
    return re.sub(r"\]\((?!https?:)(?:\.\./)?(?:\w+/)?(\d\d_\w+\.ipynb)", lambda m: f"]({where[m[1]]}", text)


def handout(part: str) -> str:
    "One page for a part: its chapters in three lines each, and its equations."
    left = KEY.get(part, "").split()
    out = [f'---\ntitle: "{PARTS[part]}: a handout"\ndescription: The part in a page, made from its chapters.\n---\n']
    for path in (p for p in chapters() if p.parent.name == part):
        cells = cells_of(path)
        k = next(k for k, (_, text) in enumerate(cells) if text == "## In three lines")
        lines = re.sub(r"\]\((#[\w-]+)\)", f"]({path.name}\\1)", cells[k + 1][1])
        head = f"## [{title_of(path)}]({path.name})"
        out.append(f"{from_root(head, '../')}\n\n{citations(from_root(lines, '../'))}\n")
        text = "\n".join(text for _, text in cells)
        shown = {n: m for m, n in re.findall(r"(\$\$(?:(?!\$\$).)*?\\tag\{(P\d+)\}\s*\$\$)", text, re.S)}
        out += [shown[n] + "\n" for n in left if n in shown]
        left = [n for n in left if n not in shown]
    return formulas("\n".join(out))


# ---- the whole site

def stage() -> Path:
    "All pages as Quarto will see them, in _proc/."
    cfg = get_config()
    os.chdir(cfg.config_path)
    staged = proc_nbs(cfg.nbs_path, n_workers=1, force=True)
    api = staged / "api"
    api.mkdir()
    (api / "index.qmd").write_text(api_index())
    for module in modules(): (api / f"{module}.qmd").write_text(api_page(module))
    (staged / "_objectives.md").write_text(formulas(citations(objectives())))
    (staged / "handouts").mkdir()
    for part in PARTS:
        if part != "reference": (staged / "handouts" / f"{part}.qmd").write_text(handout(part))
    head = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    made = dict(version=bdpo_lit.__version__, commit=head.stdout.strip() or "unknown", date=date.today().isoformat())
    (staged / "_variables.yml").write_text("\n".join(f'{k}: "{v}"' for k, v in made.items()) + "\n")
    return staged


def anchor_404(page: Path):
    "The page for wrong addresses is shown under any of them: its links start from the site's root, said once."
    root = re.search(r"site-url: https?://[^/\s]+(/\S*)?", (NBS / "_quarto.yml").read_text())[1] or "/"
    text = re.sub(rf'((?:href|src)=")(?:{re.escape(root)}|/)(?:\./)?(?!/)', r"\1", page.read_text())
    page.write_text(text.replace("<head>", f'<head>\n<base href="{root}">', 1))


def llms() -> str:
    "The book for programs that read: every page with its address and what it is about, in reading order."
    site = (NBS / "_quarto.yml").read_text()
    url, about = re.search(r"site-url: (\S+)", site)[1], re.search(r'description: "(.*)"', site)[1]
    out = [f"# BDPO, read and run\n\n> {about}\n"]
    for part, title in PARTS.items():
        out.append(f"## {title}\n")
        for path in (p for p in chapters() if p.parent.name == part):
            name, _, description, *_ = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()
            out.append(f"- [{name.lstrip('# ')}]({url}{part}/{path.stem[3:]}.html): {description.lstrip('> ')}")
        out.append("")
    return "\n".join([*out, f"## API\n\n- [All modules]({url}api/index.html)\n"])


def main() -> int:
    """Build _docs/. A warning of Quarto's is a failure. `--index` only writes the index of equations and the
    list of sources, `--stage` the pages."""
    if "--index" in sys.argv[1:]:
        write_index()
        write_bibliography()
        return 0
    staged = stage()
    if "--stage" in sys.argv[1:]: return 0
    run = subprocess.run(["quarto", "render", ".", "--to", "html", "--no-execute"], cwd=staged,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    if run.returncode: return run.returncode    # the last good site stays
    docs = Path("_docs")
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(staged / "_docs", docs)
    anchor_404(docs / "404.html")
    (docs / "llms.txt").write_text(llms())
    warned = [line for line in run.stdout.splitlines() if "WARN" in line]
    return int(bool(warned))


if __name__ == "__main__": sys.exit(main())
