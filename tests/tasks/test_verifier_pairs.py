"""Pairs of response and answer for each verifier: what is paid, and near misses that must not be paid."""

import re

import pytest

from megatron_rl.tasks.code import extract_program
from megatron_rl.tasks.verifiers import exact, math, number, read_answer, regex

NUMBERS_PAID = """
5|5; The answer is 5.|5; #### 72|72; 72|#### 72; -5|-5; +5|5; is \u22125|-5; is \u20135|-5; is \u20145|-5
is \uff0d5|-5; is \ufe635|-5; is \u20105|-5; is \u20115|-5; is \u20125|-5; is \u20155|-5; -5|\u22125; $-5$|-5
**-5**|-5; (-5)|-5; -$5|-5; -\\$5|-5; $5|5; \u20ac5|5; 1,234|1234; 1234|1,234; 12,345,678|12345678; 1{,}234|1234
1\\,234|1234; 1\u202f234|1234; 1\u00a0234|1234; 1\u2009234|1234; 1'234|1234; 1\u2019234|1234; 1_234|1234
1_000_000|1e6; 5.0|5; 5.50|5.5; 05|5; 0.5|.5; -.5|-0.5; -0|0; 0.0|0; 1e3|1000; 1E3|1000; 1e+3|1000; 5e-1|0.5
1.5e2|150; 3 \\times 10^5|300000; 3 \\times 10^{5}|3e5; 3 \\cdot 10^{-2}|0.03; 3x10^2|300; 3*10**2|300
3\u00d710\u2075|300000; 3\u00d710\u207b\u00b2|0.03; 10^3|1000; 10^{3}|1000; -10^3|-1000; 10\u00b3|1000; 3/4|0.75
3 / 4|3/4; 6/8|3/4; -3/4|-0.75; \\frac{3}{4}|0.75; \\dfrac{3}{4}|3/4; \\tfrac{6}{8}|3/4; -\\frac{3}{4}|-.75
2 1/2|2.5; -2 1/2|-2.5; \u00bd|0.5; 2\u00bd|2.5; -\u00bd|-0.5; \u2212\u00bd|-1/2; 1\u20442|0.5; 1/3|2/6; 1/3|1/3
\uff15|5; \u0665|5; \u0967\u0968|12; 5 cm^2|5; 5 cm\u00b2|5; 5 m^{2}|5; 90^\\circ|90; 90\u00b0|90; 50%|50
x_1 = 5|5; x_{12} = 5|5; a^2 = 5|5; \\boxed{5}|5; \\boxed{-5}|-5; 2+3=5|5; 10 - 5 = 5|5; first 3, then 5|5; 5.|5
5!|5; _5_|5; __5__|5; `5`|5; 1/2/2024|2024; x = 10 / 5 = 2|2; 1.2.3|3; 5-2|2; 9007199254740993|9007199254740993
9007199254740993.0|9007199254740993; 0.1|0.10; 1e400|1e400; 10e399|1e400; 1e999999999|1e999999999; -1e400|-1e400
0e999999999|0; 123456789012345678901234567890|123456789012345678901234567890
"""

NUMBERS_NOT_PAID = """
is \u22125|5; is -5|5; -$5|5; is \u20145|5; is \uff0d5|5; is \u20105|5; -\u00bd|0.5; -\\frac{1}{2}|0.5
-10^3|1000; 5|-5; 9007199254740993|9007199254740992; 9007199254740992|9007199254740993; 1e400|1e401
1e400|-1e400; 1e309|1e310; 0.1000000000000000055511151231257827|0.1; 0.30000000000000004|0.3
1.0000000000000000000000000001|1; 1e-400|0; 1e-400|1e-401
123456789012345678901234567891|123456789012345678901234567890; 1e999999999|1e999999998; 1e9999999999999999999|1
3/4|4; 3/4|3; 3 / 4|4; \\frac{1}{2}|2; \\frac{1}{2}|1; 2 1/2|2; 2 1/2|0.5; 2\u00bd|2; 1/3|0.3333333333333333
5/0|0; 5/0|5; 3 \\times 10^5|5; 3 \\times 10^5|10; 3 \\times 10^{5}|3; 3\u00d710\u2075|3; 3\u00d710\u2075|10
10^5|5; 10^5|10; 2^{10}|10; 2^10|2; 5 cm^2|2; 5 cm\u00b2|52; x^2|2; x_1|1; x_{12}|12; x_{12}|2; x^{-5}|5
x^{-5}|-5; 1{,}234|234; 1\\,234|234; 1\u202f234|234; 1\u00a0234|234; 1'234|234; 1_234|234; 1,234|234; 1,234|1
1.5|5; 1.50|50; .5|5; 1e3|3; 1e3|1; 50%|0.5; five|5; |5; no number|0; 5 or 6|5; 6, not 5, no 7|5; 15|5; 51|5
5.1|5; 55|5; \\boxed{50}|5; 9999|999; 0x5|0; one 5 two 6|5; 1/2/2024|0.5; 12/3/4|4.5; 1e-5|-5; 1e-5|5; 5-2|-2
3.14|14; 3.14|3; inf|1e999; nan|0; 1.2.3|1.2; 12|1 2; 7|07.1; 0.999|1; 1e2|1e-2; 1000|1e4; -1|1e0; 0.50|0.05
3/5|5/3; 2/4|2; 1,000|1,00; 8|eight 9; 100|10; 4|-4; 6.02x10^23|23
"""


def pairs(text: str) -> list[tuple[str, str]]:
    found = [pair for line in text.strip("\n").split("\n") for pair in line.split("; ")]
    return [(response, answer) for response, _, answer in (pair.rpartition("|") for pair in found)]


def test_there_are_more_than_100_pairs():
    assert len(pairs(NUMBERS_PAID)) > 100
    assert len(pairs(NUMBERS_NOT_PAID)) > 100


def test_equal_numbers_are_paid():
    assert [pair for pair in pairs(NUMBERS_PAID) if number("", *pair) != 1.0] == []


def test_numbers_that_are_not_equal_are_not_paid():
    assert [pair for pair in pairs(NUMBERS_NOT_PAID) if number("", *pair) != 0.0] == []


def test_votes_agree_exactly_if_the_verifier_does():
    wrong: list[tuple[str, str]] = []
    for paid, text in ((True, NUMBERS_PAID), (False, NUMBERS_NOT_PAID)):
        wrong += [
            pair for pair in pairs(text) if (read_answer("number", pair[0]) == read_answer("number", pair[1])) != paid
        ]
    assert wrong == []


@pytest.mark.parametrize(
    "unit", ["1,", "1", "1e9", "1/", "-$", "1 ", "1,234", "1 /", "1x", "10^", "\\frac{1}{", ".1", "+-", "1_", "\u00bd"]
)
def test_the_cost_is_linear_in_the_text(unit):
    number("", unit * 40_000, "1")  # a quadratic search of 40,000 repetitions takes minutes


EXACT_PAID = [
    (f"{before}{text}{after}", f"{other}{text}")
    for text in ("4", "yes", "x + 1", "\\frac{1}{2}", "caf\u00e9", "a\nb", "0.50")
    for before, after, other in (
        ("", "", ""),
        (" ", "", ""),
        ("", "\n", ""),
        ("\t", " \r\n", " "),
        ("\u00a0", "", "\n"),
    )
]
EXACT_NOT_PAID = [
    (response, text)
    for text in ("4", "yes", "x + 1", "\\frac{1}{2}", "caf\u00e9", "a\nb", "0.50")
    for response in (
        *(f"{text}.", f"{text} {text}", f"the answer is {text}", f"{text}\u200b", text.swapcase() + "x"),
        *(text[:-1], text + text[-1], f"'{text}'", f"**{text}**", f"${text}$", ""),
    )
] + [("4.0", "4"), ("Yes", "yes"), ("x+1", "x + 1"), ("cafe\u0301", "caf\u00e9"), ("a b", "a\nb"), ("\uff14", "4")]


def test_exact_is_exact_except_for_surrounding_space():
    assert len(EXACT_PAID) + len(EXACT_NOT_PAID) > 100
    assert [pair for pair in EXACT_PAID if exact("", *pair) != 1.0] == []
    assert [pair for pair in EXACT_NOT_PAID if exact("", *pair) != 0.0] == []


REGEX_WORDS = ("cat", "42", "x^2", "yes", "3.5", "(a)", "end", "$5", "a|b", "[z]")


def test_regex_matches_anywhere_and_nothing_else():
    for word in REGEX_WORDS:
        pattern = re.escape(word)
        paid = [(word, pattern), (f"so {word}.", pattern), (f"{word}\nno", pattern), (word, f"^{pattern}$")]
        paid += [(f"is {word}", f"{pattern}$"), (f"Is: {word} ", f"(?i)is: {pattern}")]
        missed = [("", pattern), (word[:-1], pattern), (f"so {word}", f"^{pattern}"), (f"{word} no", f"{pattern}$")]
        missed += [(f"{word}\nno", f"{pattern}$"), (f"no\n{word}", f"^{pattern}"), (word[::-1] + "!", f"^{pattern}$")]
        assert [pair for pair in paid if regex("", *pair) != 1.0] == []
        assert [pair for pair in missed if regex("", *pair) != 0.0] == []


MATH_VALUES = {
    "0": ("0.0", "\\frac{0}{5}"),
    "\\frac{1}{2}": ("0.5", "\\frac{2}{4}", "2^{-1}"),
    "-3": ("-3.0", "-\\frac{6}{2}"),
    "\\sqrt{2}": ("2^{\\frac{1}{2}}", "\\frac{2}{\\sqrt{2}}"),
    "\\pi": ("\\frac{2\\pi}{2}",),
    "x^2+2x+1": ("(x+1)^2", "1+2x+x^2"),
    "\\{1,2\\}": ("\\{2,1\\}",),
    "(3,4)": ("(3, 4)",),
    "[1,2)": ("[1, 2)",),
    "1000": ("10^3", "1{,}000"),
}


def test_math_pays_equal_values_and_no_others():
    spellings = {value: (value, *others) for value, others in MATH_VALUES.items()}
    paid = [(f"so $\\boxed{{{text}}}$", value) for value, texts in spellings.items() for text in texts]
    missed = [
        (f"so $\\boxed{{{text}}}$", value)
        for value in spellings
        for other, texts in spellings.items()
        if other != value
        for text in texts[:1]
    ]
    missed += [("", "5"), ("no", "5"), ("$\\boxed{-3}$", "3"), ("$\\boxed{0.3333}$", "\\frac{1}{3}")]
    assert len(paid) + len(missed) > 100
    assert [pair for pair in paid if math("", *pair) != 1.0] == []
    assert [pair for pair in missed if math("", *pair) != 0.0] == []


LANGUAGES = (
    *(
        "",
        "python",
        "python3",
        "Python",
        "PYTHON",
        "py",
        "py3",
        "ipython",
        "python3.11",
        " python",
        "\tpython ",
        "{.python}",
    ),
    *(
        "{python}",
        "python title='a'",
        "python linenums=1",
        "python,ignore",
        "python {cmd=true}",
        "{.python .numberLines}",
    ),
)
FENCES = (("```", "```"), ("````", "````"), ("~~~", "~~~"), ("```", "`````"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_block_is_found_in_any_spelling_of_its_fence(language):
    for opening, closing in FENCES:
        for end in ("\n", "\r\n"):
            text = f"Text:{end}{opening}{language}{end}if 1:{end}  print(1){end}{closing}{end}"
            assert extract_program(text) == "if 1:\n  print(1)\n", repr(text)
            unclosed = f"Text:{end}{opening}{language}{end}print(1)"
            assert extract_program(unclosed) == "print(1)\n", repr(unclosed)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("1. Item\n   ```python\n   if 1:\n     print(1)\n   ```\n", "if 1:\n  print(1)\n"),
        ("```python\nprint('```')\n```\n", "print('```')\n"),
        ("````python\ns = '''\n```\n'''\n````\n", "s = '''\n```\n'''\n"),
        ("Code: ```python\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)```", "print(1)\n"),
        ("Write a ```python block``` first:\n```python\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\nOutput:\n```text\n1\n```\n", "print(1)\n"),
        ("```python\nprint(1)\n```\n```cpp\nint main() {}\n```\n", "print(1)\n"),
        ("```python\nwrong\n```\nBetter:\n```py\nprint(1)\n```\n", "print(1)\n"),
        ("~~~python\n```\n~~~\n", "```\n"),
        ("print(1)\r\n", "print(1)\n"),
    ],
)
def test_the_program_is_the_last_block_that_may_be_python(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize("language", ["text", "output", "cpp", "javascript", "pyret", "json", "pythonic", "bash"])
def test_a_block_of_another_language_is_no_program(language):
    text = f"```{language}\nprint(1)\n```\n"
    assert extract_program(text) == text
