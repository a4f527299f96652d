"""Numbers in text: found in every common spelling, and compared exactly.

Any minus sign, thousands separator and digit of Unicode is read, and so are fractions (``3/4``, ``\\frac{3}{4}``),
mixed numbers (``2 1/2``) and powers of ten (``3e5``, ``3 \\times 10^5``). Exponents and indices (``cm^2``, ``x_1``) are
not numbers. The cost is linear in the length of the text, whatever exponents it contains.
"""

import re
import unicodedata
from collections import deque
from fractions import Fraction

ExactNumber = Fraction | str
"""A value, or the canonical text of a number with too many digits for arithmetic. Equal numbers are equal objects."""

MAX_DIGITS = 1000
"""Digits, before and after the point together, up to which a number is a ``Fraction``."""

MAX_EXPONENT_DIGITS = 18

_MINUS = re.compile("[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_PLUS = re.compile("[\ufe62\uff0b]")
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-"
)
_SUPERSCRIPT = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")

_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")

_SEPARATOR = r"(?:,|\{,\}|\\[,;:! ]|[\u00a0\u2009\u202f'\u2019])"
_INTEGER = rf"(?:\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)|\d+(?:_\d+)*)"
_DECIMAL = rf"(?:{_INTEGER}|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?"
_TIMES = r" ?(?:\\times|\\cdot|[x*\u00d7\u00b7\u22c5]) ?"
_CURRENCY = r"(?:\\?[$\u20ac\u00a3\u00a5])"
_POWER = r" ?(?:\^|\*\*) ?\{?[-+]?\d"
NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])(?P<sign>[-+])(?=[\d.\\$\u20ac\u00a3\u00a5])(?:(?<!\$[-+]){_CURRENCY})?)?"  # a sign, not 5-2
    r"(?<!\d)(?<!\^)(?<!\^ )(?<!\^\{)(?<!\^[-+])(?<!\^\{[-+])(?<![^\W_]_)(?<!_\{)"  # no exponent, no index
    r"(?:"
    rf"\\[dt]?frac\{{(?P<upper>{_DECIMAL})\}}\{{(?P<lower>{_DECIMAL})\}}"
    rf"|(?<!/)(?:(?P<whole>\d+) )?(?P<above>(?>{_DECIMAL})) ?/ ?(?P<below>(?>{_DECIMAL}))(?! ?/ ?\d)"
    rf"|(?:(?P<factor>(?>{_DECIMAL})){_TIMES})?10 ?(?:\^|\*\*) ?\{{?(?P<power>[-+]?\d+)\}}?"
    rf"|(?P<plain>(?>{_DECIMAL}))(?!{_POWER})"  # no base of a power
    r")"
)
_NOT_A_DIGIT = re.compile(rf"{_SEPARATOR}|_")


def last_number(text: str) -> ExactNumber | None:
    """Return the last number of a text, exactly; None without one, or if its denominator is 0."""
    found = deque(NUMBER.finditer(plain_digits(text)), maxlen=1)
    return _value(found[0]) if found else None


def plain_digits(text: str) -> str:
    """Return a text with ASCII digits and signs, and superscripts written with ``^``."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    text = _VULGAR.sub(_spell_fraction, text)
    text = _PLUS.sub("+", _MINUS.sub("-", text)).replace("\u2044", "/")
    return "".join(character if character.isascii() else _plain(character) for character in text)


def _plain(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    return character if digit is None else str(digit)


def _spell_fraction(found: re.Match[str]) -> str:
    """Return a fraction that is one character as ``1/2``, after the digit before it as `` 1/2``."""
    before, character = found[1], found[2]
    return f"{before} "[: 2 * len(before)] + unicodedata.normalize("NFKC", character)


def _value(found: re.Match[str]) -> ExactNumber | None:
    """Return the number of a match of ``NUMBER``."""
    negative = found["sign"] == "-"
    if found["plain"] is not None:
        return _scaled(found["plain"], "0", negative)
    if found["power"] is not None:
        return _scaled(found["factor"] or "1", found["power"], negative)
    above = _scaled(found["above"] or found["upper"], "0", negative)
    below = _scaled(found["below"] or found["lower"], "0", False)
    if not isinstance(above, Fraction) or not isinstance(below, Fraction):
        return None if above is None or below is None else f"{above}/{below}"
    if not below:
        return None
    whole = Fraction(int(found["whole"][-MAX_DIGITS:])) if found["whole"] else Fraction(0)
    return above / below + (-whole if negative else whole)


def _scaled(decimal: str, power: str, negative: bool) -> ExactNumber | None:
    """Return ``decimal * 10**power``; None if an exponent has more than ``MAX_EXPONENT_DIGITS`` digits."""
    mantissa, _, exponent_text = _NOT_A_DIGIT.sub("", decimal).lower().partition("e")
    before, _, after = mantissa.partition(".")
    exponent = -len(after)
    for text in (exponent_text, power):
        sign, digits = text[:1] == "-", text.lstrip("+-").lstrip("0")
        if len(digits) > MAX_EXPONENT_DIGITS:
            return None
        exponent += -int(digits or "0") if sign else int(digits or "0")
    significant = (before + after).lstrip("0")
    stripped = significant.rstrip("0")
    exponent += len(significant) - len(stripped)
    if not stripped:
        return Fraction(0)
    if len(stripped) + abs(exponent) > MAX_DIGITS:
        return f"{'-' if negative else ''}{stripped}e{exponent}"
    value = Fraction(int(stripped)) * Fraction(10) ** exponent
    return -value if negative else value
