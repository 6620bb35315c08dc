"""Each docstring's list of equations against the numbers printed in its paper (texts: WSSS_PAPERS)."""

import ast
import re

import pytest

from test_layout import METHODS, equations, everything_defined, section, tree

THESIS = "thesis_rrm_a2gnn_dfr_scl.txt"
# method: (text of its paper, chapter of the thesis or "")
PAPERS = {"rrm": (THESIS, "2"), "a2gnn": (THESIS, "3"), "dfr": (THESIS, "4"), "scl": (THESIS, "5"),
          "irnet": ("irnet.txt", ""), "cian": ("cian.txt", ""), "lpg": ("lpg.txt", ""),
          "selftrain_workpiece": ("selftrain_workpiece.txt", "")}
# Numbers that the extraction from PDF has lost, with the words that stand where the formula was: this paper
# came by a character recogniser, "(1)" became "O", "(2)" is gone. The test looks for these words.
LOST = {"selftrain_workpiece": {"1": r"^minL.* O$", "2": r"Total loss function is\n+L"}}
# The thesis prints $$ formula \quad (2.17)$$, the texts from web pages end a formula's line with " (7)". A
# formula has a backslash; a reference at the end of a sentence ("Eq. (3.6)") or a grant's number has none.
PRINTED = {True: r"\\quad ?\((\d\.\d+)\)[.,]?\$\$ *$", False: r"\\.* \((\d{1,2})\)$"}


def ordered(numbers):
    return sorted(numbers, key=lambda number: [int(part) for part in number.split(".")])


def printed(text, chapter=""):
    """Set of the equation numbers of a paper's text, of one chapter of the thesis where given."""
    found = re.findall(PRINTED[bool(chapter)], text, re.M)
    return {number for number in found if not chapter or number.startswith(f"{chapter}.")}


def single(numbers):
    """"5.2, 5.8" -> {"5.2", "5.8"}, "2.17–2.20" -> the four of them."""
    found = set()
    for part in re.split(r",\s*", numbers):
        first, last = re.fullmatch(r"([\d.]+)(?:–([\d.]+))?", part).groups()
        *chapter, low = first.split(".")
        high = (last or first).split(".")[-1]
        assert not last or last.split(".")[:-1] == chapter, f"from one chapter to another: {numbers}"
        found |= {".".join([*chapter, str(i)]) for i in range(int(low), int(high) + 1)}
    return found


def listed(docstring):
    """{number: [function]}; "(9) – why" is an equation without one, the reason of three words or more: []."""
    found = {}
    for numbers, name in equations(docstring):
        for number in single(numbers): found.setdefault(number, []).append(name)
    for numbers in re.findall(r"\(([\d.,\s–]+)\) – \w+(?:,?\s+\w+){2}", section(docstring, "Equations")):
        for number in single(numbers): found.setdefault(number, [])
    return found


def differences(docstring, numbers):
    """What a docstring's list lacks, and what the paper does not have."""
    found = set(listed(docstring))
    return ordered(numbers - found), ordered(found - numbers)


def test_the_numbers_are_read_right():
    thesis = ("$$a = b, \\quad (2.1)$$\nas Eq. (2.6)\n$$x\n y, \\quad (2.2),$$\n$$\\quad (3.1)$$\n")
    assert printed(thesis, "2") == {"2.1", "2.2"} and printed(thesis, "3") == {"3.1"}
    page = "k\\exp(x) (1)\ngrant No. (2018010071)\nas in (3)\nm_{i}=\\sum x, (2)\n"
    assert printed(page) == {"1", "2"}
    assert single("2.9–2.11") == {"2.9", "2.10", "2.11"} and single("5.2, 5.8") == {"5.2", "5.8"}
    doc = ("Title\n\nEquations    (1) first, Net.second    (2, 3) third\n"
           "             (4) – never computed, a limit\n")
    assert listed(doc) == {"1": ["first", "Net.second"], "2": ["third"], "3": ["third"], "4": []}
    assert differences(doc, {"1", "2", "3", "4"}) == ([], [])
    assert differences(doc.replace(", 3)", ")"), {"1", "2", "3", "4", "10"}) == (["3", "10"], [])
    assert differences(doc, {"1", "2", "4"}) == ([], ["3"])
    assert set(listed(doc.replace("never computed, a limit", "no"))) == {"1", "2", "3"}, "no reason is given"


def test_each_method_has_its_paper():
    assert set(METHODS) <= set(PAPERS)


@pytest.mark.parametrize("name", METHODS)
def test_the_list_is_the_papers(name, papers):
    file, chapter = PAPERS[name]
    text = (papers / file).read_text(encoding="utf-8")
    numbers, lost = printed(text, chapter), LOST.get(name, {})
    for number, words in lost.items():
        assert number not in numbers and re.search(words, text, re.M), f"({number}) is not where it was lost"
    numbers |= set(lost)
    last = max(int(number.split(".")[-1]) for number in numbers)
    counted = {f"{chapter}.{i}" if chapter else str(i) for i in range(1, last + 1)}
    assert numbers == counted, f"a number is garbled in {file}: {ordered(numbers ^ counted)}; add it to LOST"
    doc = ast.get_docstring(tree(name))
    if not chapter:                             # (3.1) in a paper that counts from (1) is a section
        parts = {number for number in listed(doc) if "." in number}
        headings = {part for part in parts if re.search(rf"^ *{re.escape(part)}\. ", text, re.M)}
        assert headings == parts, f"neither equations nor sections: {parts - headings}"
        numbers |= parts
    missing, foreign = differences(doc, numbers)
    assert not missing and not foreign, f"{name}.py lacks {missing} and lists {foreign}, not in its paper"
    unknown = {f for functions in listed(doc).values() for f in functions} - everything_defined(name)
    assert not unknown, f"{name}.py has no {unknown}"
