"""The house rules: one file a method, which reads top to bottom, says what it does, can be copied out."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import tokenize
import types

import pytest

from conftest import ROOT, sh

ALL = "a2gnn rrm dfr irnet cian lpg scl selftrain_workpiece".split()
METHODS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
SHARED = ["common", "data"]
HOUSE = METHODS + SHARED
COLUMNS, LENGTH, NESTING = 110, 70, 4

# The functions that carry the method itself differ from file to file under one name. All others that share a
# name share every word; a variant gets another name.
OWN = re.compile(r"(Args|main|(train|evaluate|predict|augment)(_\w+)?)$")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@functools.cache
def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@functools.cache
def tree(name):
    return ast.parse(source(name))


@functools.cache
def tracked():
    """The repository's files: what git lists, new files included; in a copy without git, what lies here."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / n for n in listed.stdout.splitlines()]
    else:
        paths = [p for folder in (".", ".ci", "tests", "benchmarks") for p in (ROOT / folder).glob("*")]
    return [p for p in sorted(set(paths)) if p.is_file()]


def python_files():
    files = [p for p in tracked() if p.suffix == ".py"]
    assert len(files) >= len(HOUSE) + 2, "the repository's Python files were not found"
    return files


def definitions(name):
    """Top-level functions and classes of a file: {name: source text, decorators included}."""
    lines, found = source(name).splitlines(), {}
    for node in tree(name).body:
        if isinstance(node, DEFINITIONS):
            first = min([node.lineno, *[d.lineno for d in node.decorator_list]])
            found[node.name] = "\n".join(lines[first - 1:node.end_lineno])
    return found


def section(docstring, word):
    """A section of a docstring: from the line that begins with `word` to the next line without indent."""
    match = re.search(rf"^{word}\b(.*(?:\n(?:[ \t]+\S.*|[ \t]*(?=\n[ \t])))*)", docstring, re.M)
    return match.group(1) if match else ""


# ---------------------------------------------------------------- the files


def test_the_files_are_there():
    assert "a2gnn" in METHODS
    assert all((ROOT / f"{name}.py").exists() for name in SHARED)
    files = {"README.md", "RESULTS.md", "LICENSE", "requirements.txt", "pyproject.toml"}
    assert files <= {p.name for p in tracked()}


@pytest.mark.parametrize("name", HOUSE)
def test_no_sister_imports(name):
    """A method file needs common.py and data.py, nothing else of ours; those two need no method file."""
    ours = {p.stem for p in ROOT.glob("*.py")}
    imports = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import): imports |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py: relative import, line {node.lineno}"
            imports.add(node.module.split(".")[0])
    assert imports, f"{name}.py imports nothing at all?"
    assert imports & ours <= set(SHARED), f"{name}.py imports {imports & ours - set(SHARED)}"


def clones(files):
    """{file: {function: text}} -> ({name with several wordings: files}, number of names compared)."""
    texts = {}
    for file, functions in files.items():
        for function, text in functions.items():
            if not OWN.match(function): texts.setdefault(function, {})[file] = text
    several = {function: copies for function, copies in texts.items() if len(copies) > 1}
    return {f: sorted(c) for f, c in several.items() if len(set(c.values())) > 1}, len(several)


def test_repeated_helpers_are_word_identical():
    different, compared = clones({name: definitions(name) for name in METHODS})
    assert not different, f"same name, other words: {different}"
    assert compared or len(METHODS) < 2, "several method files, but no helper that two of them share?"


def test_the_comparison_of_helpers_sees_one_changed_word():
    one, two = {"peak": "return x.max()", "main": "a()"}, {"peak": "return x.amax()", "main": "b()"}
    assert clones({"a": one, "b": two}) == ({"peak": ["a", "b"]}, 1)
    assert clones({"a": one, "b": dict(one, main="c()")}) == ({}, 1)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_common_or_data_is_written_again(name):
    shared = set().union(*(definitions(s) for s in SHARED))
    assert len(shared) > 20
    again = {n for n in shared & set(definitions(name)) if not OWN.match(n)}
    assert not again, "common.py or data.py has these already: take theirs, or choose another name"


@pytest.mark.parametrize("name", METHODS)
def test_anatomy(name):
    """Docstring, Args first, main last, and the command line at the end."""
    names = list(definitions(name))
    assert names[0] == "Args" and names[-1] == "main"
    doc = ast.get_docstring(tree(name))
    for word in ("Symbols", "Equations", "Commands", "Departures"):
        assert section(doc, word).strip(), f"{name}.py: the docstring has no section {word}"
    assert isinstance(tree(name).body[-1], ast.If) and "__main__" in source(name)[-60:]


@pytest.mark.parametrize("name", HOUSE)
def test_imports_stand_in_order(name):
    """Python's own, the libraries', then common and data; in a group `import` before `from`, both by name."""
    imports = [node for node in tree(name).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(imports) > 4
    keys = []
    for node in imports:
        module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        top = module.split(".")[0]
        group = 0 if top in sys.stdlib_module_names else 2 if top in SHARED else 1
        keys.append((group, isinstance(node, ast.ImportFrom), module.lower()))
        assert isinstance(node, ast.ImportFrom) or len(node.names) == 1, "one module a line"
    assert keys == sorted(keys), f"{name}.py: imports out of order"


# ---------------------------------------------------------------- the docstring is a map of the file


def equations(docstring):
    """A docstring's section "Equations", e.g. `(8) eq8_pairs  (6–7) Net, Net.forward` -> [(number, name)]."""
    found = []
    for number, names in re.findall(r"\(([\d.,\s–-]+)\)\s*((?:[A-Za-z_][\w.]*(?:,\s+(?=[A-Za-z_]))?)+)",
                                    section(docstring, "Equations")):
        found += [(number, n.rstrip(".")) for n in re.split(r",\s+", names)]
    return found


def everything_defined(name):
    """All functions and classes, also `Class.method` and methods by their own name."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, DEFINITIONS): found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, DEFINITIONS)}
    return found


def test_the_equation_lines_are_read_right():
    doc = ("Title\n\nEquations    (1) maps     (3.2–3.4) Net, eq3_4_loss   (5) Net.forward\n"
           "             (6, 7) walk\nFigures      (9) no")
    assert equations(doc) == [("1", "maps"), ("3.2–3.4", "Net"), ("3.2–3.4", "eq3_4_loss"),
                              ("5", "Net.forward"), ("6, 7", "walk")]


@pytest.mark.parametrize("name", METHODS)
def test_each_equation_has_its_function(name):
    doc, defined = ast.get_docstring(tree(name)), everything_defined(name)
    listed = equations(doc)
    assert len(listed) >= 3, f"{name}.py: the docstring maps {len(listed)} equations"
    assert not [(number, n) for number, n in listed if n not in defined]
    named = {n.split(".")[-1] for _, n in listed}
    unlisted = {n for n in defined if re.match(r"eq\d", n)} - named
    assert not unlisted, "equations' functions that the docstring does not list"


def departures(name):
    """Tags [Dn] that the docstring lists, and those in the code (comments and help texts included)."""
    doc = tree(name).body[0]
    below = "\n".join(source(name).splitlines()[doc.end_lineno:])
    tag = re.compile(r"\[(D\d+)\]")
    return set(tag.findall(section(ast.get_docstring(tree(name)), "Departures"))), set(tag.findall(below))


@pytest.mark.parametrize("name", METHODS)
def test_departures_are_tagged_in_place_and_listed(name):
    listed, tagged = departures(name)
    assert listed, f"{name}.py lists no departure from its paper"
    assert listed == tagged, f"only in the docstring or only in the code: {sorted(listed ^ tagged)}"
    assert listed == {f"D{i}" for i in range(1, len(listed) + 1)}, "the numbers have a gap"
    assert not re.search(r"\[D\d+[^\]\d]", source(name)), "one tag, one pair of brackets: [D1] [D2]"


# ---------------------------------------------------------------- the command line


def run_block(text):
    """Args' lines from `# --- run` to the next `# ---`."""
    match = re.search(r"^    # --- run.*?(?=^    # ---)", text, re.M | re.S)
    return match.group(0) if match else ""


def test_the_run_block_is_the_same_in_all_files():
    blocks = {name: run_block(source(name)) for name in METHODS}
    assert all(len(b.splitlines()) > 10 for b in blocks.values()), "no `# --- run` … `# ---`"
    assert len(set(blocks.values())) == 1, "the run blocks of Args differ: " + ", ".join(blocks)


def test_the_run_block_ends_where_the_method_begins():
    text = "    # --- run: same ---\n    seed: int = 0\n    # --- method ---\n    x: int = 1\n"
    assert run_block(text) == "    # --- run: same ---\n    seed: int = 0\n"
    assert run_block(text) == run_block(text.replace("x: int", "y: int"))
    assert run_block(text) != run_block(text.replace("seed: int = 0", "seed: int = 1"))


@pytest.mark.parametrize("name", METHODS)
def test_the_common_flags_are_there(name):
    flags = """data root train_list supervision out seed device amp workers backbone weights crf predict
        checkpoint fresh reuse preset""".split()
    fields = {f.name: f for f in dataclasses.fields(importlib.import_module(name).Args)}
    assert not set(flags) - set(fields)
    assert fields["data"].default in ("shapes", "solids"), "the plain command must need no download"


def without_help(name):
    """Fields of Args that no string below them explains."""
    args = next(n for n in tree(name).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    plain = []
    for node, below in zip(args.body, [*args.body[1:], None]):
        told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and not told: plain.append(node.target.id)
    return plain


@pytest.mark.parametrize("name", METHODS)
def test_each_field_says_what_it_is(name):
    assert not without_help(name)


# Runs a file's --help in a process where the network, every data file and our loaders sound an alarm.
HELP = r"""
import re, runpy, sys
import data
LIBRARIES = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix})
def alarm(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise SystemExit(f"network: {event} {args}")
    if event == "open" and isinstance(args[0], str) and not args[0].startswith(LIBRARIES):
        if re.search(r"\.(png|jpe?g|xml|mat|npz|pth|pt|params)$", args[0]):
            raise SystemExit(f"opened {args[0]}")
def loaded(*a, **k): raise SystemExit("loaded data")
data.load = data.draw_scene = loaded
sys.addaudithook(alarm)
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", [*METHODS, "data"])
def test_help_needs_no_data_and_no_network(name, tmp_path):
    done = sh("-c", HELP, f"{name}.py", cwd=tmp_path, env={"COLUMNS": 200})
    assert not list(tmp_path.iterdir()), "--help wrote files"
    if name == "data": return
    title = ast.get_docstring(tree(name)).splitlines()[0]
    for text in ("--supervision", "Departures", title.split("(")[0].strip()[:40]):
        assert text in done.stdout, f"--help does not show {text}"


# ---------------------------------------------------------------- commands that people copy


def commands(text):
    """Command lines that start with python or torchrun, as lists of words; `&&` and `\\` are understood."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.sub(r"^\s*(\$ |Commands\s+)?", "", line)
        if not re.match(r"(pip install|python|torchrun) ", line): continue
        found += [words for words in (shlex.split(part, comments=True) for part in line.split("&&"))
                  if words and words[0] in ("python", "torchrun")]
    return found


PAGES = "README.md", "benchmarks/RESULTS.md"


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(text):
    """Fenced blocks of a page, then what stands between single backticks in its prose, one a line."""
    fenced = r"^```\w*\n(.*?)^```"
    spans = re.findall(r"`([^`]+)`", re.sub(fenced, "", text, flags=re.M | re.S))
    return "\n".join([*re.findall(fenced, text, re.M | re.S), *(" ".join(s.split()) for s in spans)])


def anchors(text):
    """The names that GitHub gives to a page's headings: lower case, no punctuation, - for blanks."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_command_lines_are_read_right():
    text = ("pip install -r requirements.txt && python a.py\n"
            "$ torchrun --nproc-per-node 2 \\\n   b.py --x 1   # why\nwords about python c.py\n")
    assert commands(text) == [["python", "a.py"], ["torchrun", "--nproc-per-node", "2", "b.py", "--x", "1"]]
    text = "# A.py, b `c`\n`python a.py\n--x 1` and `b.py`\n```\npython c.py  # not `python d.py`\n```\n"
    assert commands(code_of(text)) == [["python", "c.py"], ["python", "a.py", "--x", "1"]]
    assert anchors(text + "## Data, more data\n") == {"apy-b-c", "data-more-data"}


ALL_COMMANDS = [(name, c) for name in PAGES for c in commands(code_of(page(name)))] + [
    (f"{name}.py", c) for name in HOUSE for c in commands(ast.get_docstring(tree(name)) or "")]


def test_readme_has_a_command_for_each_file_that_exists():
    words = {word for where, command in ALL_COMMANDS if where == "README.md" for word in command}
    assert {f"{name}.py" for name in [*METHODS, "data"]} <= words


@functools.cache
def help_of(*command):
    """What `python COMMAND --help` prints, run in this process; a subcommand that does not exist fails."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", [*command, "--help"])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end: runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    text = shown.getvalue()
    assert not end.value.code and f"{' '.join(command)} [-h]" in text, f"{command}: {text[-1000:]}"
    return text


@pytest.mark.parametrize("where, command", ALL_COMMANDS, ids=[f"{w}: {' '.join(c)}" for w, c in ALL_COMMANDS])
def test_each_command_parses(where, command):
    import tyro

    script = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
    assert script is not None, f"{where}: no script in {command}"
    path, flags = ROOT / command[script], command[script + 1:]
    assert path.is_file(), f"{where}: {command[script]} does not exist"
    if path.stem in METHODS:
        given = [f for f in flags if f != "--help"]
        tyro.cli(importlib.import_module(path.stem).Args, args=given)      # an unknown flag is a SystemExit
        return
    shown = help_of(command[script], *[f for f in flags[:1] if not f.startswith("-")])
    assert not [f for f in flags if f.startswith("--") and f.split("=")[0] not in shown], shown


def test_the_table_of_methods_says_what_exists():
    rows = re.findall(r"^\| `(\w+)\.py` \|.*paper: .*\|$", page("README.md"), re.M)
    assert sorted(rows) == sorted(ALL) and set(rows) == set(METHODS)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name):
    """Relative links, and the headings that they name."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page(name)) if "://" not in link]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_are_there(name):
    named = re.findall(r"`((?:benchmarks|tests|docs)/[\w./*-]+)`", page(name))
    assert named and not [path for path in named if not list(ROOT.glob(path))]


def test_measured_shares_on_the_front_page_stand_in_the_results():
    """Each share and mIoU of ours in the table at a glance, in benchmarks/RESULTS.md too."""
    table = re.search(r"^## Results at a glance$(.*?)^## ", page("README.md"), re.M | re.S).group(1)
    figures = re.findall(r"(?<!paper: )\b\d+ %|(?<=mIoU )[\d.]+", table)
    assert len(figures) > 15 and not [f for f in figures if f not in page("benchmarks/RESULTS.md")]


# ---------------------------------------------------------------- training can not reach ground truth


def supervisions():
    """The choices of a2gnn.py's --supervision, read without importing it."""
    if "a2gnn" not in METHODS: return []
    hints = [node.annotation for node in ast.walk(tree("a2gnn"))
             if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "supervision"]
    return [choice.value for hint in hints for choice in hint.slice.elts]


def shapes_args(supervision):
    return types.SimpleNamespace(data="shapes", root="data/shapes", train_list="train_aug",
                                 supervision=supervision)


def test_a2gnn_knows_every_supervision():
    from data import REVEALS

    assert "box" in supervisions() and "full" in supervisions() and set(supervisions()) <= set(REVEALS)


@pytest.mark.parametrize("supervision", supervisions())
def test_training_samples_carry_only_what_the_supervision_reveals(supervision):
    from data import REVEALS, Draws, collate, flip, load, normalise

    labels = set(REVEALS["full"])
    assert {"mask", "instances", "boxes", "points", "scribble"} == labels
    train = load(shapes_args(supervision), "train")
    assert len(train) > 100
    drawn = Draws(train, lambda sample, rng: normalise(flip(sample)), seed=0)
    for sample in (train[0], train[len(train) - 1], drawn[3], collate([drawn[0]])):
        assert set(vars(sample)) & labels == set(REVEALS[supervision])
        assert hasattr(sample, "mask") == (supervision == "full")
    assert hasattr(load(shapes_args(supervision), "val")[0], "mask")
    assert hasattr(load(shapes_args(supervision), "train", masks=True)[0], "mask")      # the evaluation call


# ---------------------------------------------------------------- a feel for size, and no traces


def depth(node, level=0):
    """Deepest nesting of for/while/if/with/try below a node; an `elif` counts as its `if`."""
    nests = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    other = node.orelse if isinstance(node, ast.If) else []
    chained = other if len(other) == 1 and isinstance(other[0], ast.If) else []
    below = [(c, isinstance(c, nests) and c not in chained) for c in ast.iter_child_nodes(node)]
    return max([level, *(depth(c, level + deeper) for c, deeper in below)])


def test_lines_fit_beside_a_pdf():
    long = [f"{p.name}:{i}: {len(line)}" for p in python_files()
            for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1) if len(line) > COLUMNS]
    assert not long, f"more than {COLUMNS} columns"


def test_functions_fit_on_a_screen():
    checked, large = 0, []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
            checked += 1
            length, nesting = node.end_lineno - node.lineno + 1, depth(node)
            if length > LENGTH or nesting > NESTING:
                large.append(f"{path.name}:{node.lineno} {node.name}: {length} lines, nesting {nesting}")
    assert checked > 50 and not large


def test_nesting_is_counted_right():
    text = "if x: pass\nelif x: pass\nelse:\n    for i in x:\n        with i: pass\n"
    assert depth(ast.parse(text)) == 3


def test_nothing_is_left_for_later():
    words = re.compile("TO" "DO|FIX" "ME|XX" "X|NotImplemented" "Error|place" "holder")
    left = [f"{p.name}:{i}: {line.strip()}" for p in python_files()
            for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1) if words.search(line)]
    assert not left


def test_no_code_is_commented_out():
    """A comment that parses as a call or an assignment is code kept for later; sentences do not parse."""
    left = []
    for path in python_files():
        with tokenize.open(path) as file:
            comments = [t for t in tokenize.generate_tokens(file.readline)
                        if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")]
        left += [f"{path.name}:{t.start[0]} {t.string}" for t in comments if is_code(t.string.lstrip("# "))]
    assert not left


def is_code(text):
    try: body = ast.parse(text).body
    except SyntaxError: return False
    statement = body[0] if len(body) == 1 else None
    if isinstance(statement, ast.Expr): return isinstance(statement.value, ast.Call)
    return isinstance(statement, (ast.Assign, ast.Return, ast.Import, ast.ImportFrom, ast.Raise, ast.Assert))


def test_no_file_names_a_place_on_one_machine():
    """No absolute path, and the neighbouring folders only in .ci/run, which looks whether they exist."""
    absolute = re.compile(r"(?<![\w.~$}:/-])/(work|root|home|Users|mnt|opt|scratch|tmp)/")
    texts = [p for p in tracked() if p.suffix in (".py", ".md", ".toml", ".txt", ".json", ".yml", "")]
    assert len(texts) >= len(HOUSE) + 5
    left = []
    for path in texts:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            neighbour = "../" "shared" in line and path.parent.name != ".ci"
            if absolute.search(line) or neighbour: left.append(f"{path.name}:{i}: {line.strip()}")
    assert not left
