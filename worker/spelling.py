"""Words as two texts can be compared by: one spelling for what is written in several.

Case, width, accents, dates, numbers and the endings of ordinals are brought to one form, so that "8th September 1956",
"September 8, 1956" and "1956-09-08" have the same words. Scripts that put no space between words are read by pairs of
characters. Names of months come from CLDR (Babel), spelled-out numbers from text2num, endings from the Snowball stemmers (NLTK),
lists of function words from stopwordsiso; a language that one of them lacks is compared without it.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from typing import Any

import regex
import stopwordsiso
from babel import Locale, UnknownLocaleError
from babel.dates import get_month_names
from nltk.stem.snowball import SnowballStemmer
from text_to_num import alpha2digit, text2num

MONTH = "month:"  # how the word for a month begins: "month:9"
DATE = "date:"  # a day and a month whose order is not known, the smaller first: "date:8-9"
NEAR = 3  # words between a day's number and its month, at most
STEMMED = {
    "ar": "arabic",
    "da": "danish",
    "nl": "dutch",
    "en": "english",
    "fi": "finnish",
    "fr": "french",
    "de": "german",
    "hu": "hungarian",
    "it": "italian",
    "no": "norwegian",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "es": "spanish",
    "sv": "swedish",
}  # as the Snowball stemmers call them
NUMERALS = ("en", "fr", "de", "es", "pt", "it", "nl")  # whose spelled-out numbers text2num reads
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"

_YEAR_FIRST = regex.compile(r"(?<!\d)(\d{4})\s*[-/.年]\s*(\d{1,2})\s*[-/.月]\s*(\d{1,2})(?!\d)\s*日?")
_YEAR_LAST = regex.compile(r"(?<!\d)(\d{1,2})\s?[-/.]\s?(\d{1,2})\s?[-/.]\s?(\d{4})(?!\d)")
_GROUPED = regex.compile(r"(?<![\d.,])\d{1,3}(?:[,.'’]\d{3})+(?![\d])")
_ORDINAL = regex.compile(r"(?<=\d)(?:st|nd|rd|th|º|ª|er|ème|eme)\b")
_TOKEN = regex.compile(
    rf"{MONTH}\d+|{DATE}\d+-\d+|\d+(?:[.,]\d+)?|[{UNSPACED}]+|(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}])+"
    rf"(?:['’](?:(?![{UNSPACED}])[\p{{L}}\p{{M}}])+)*"
)
_WORD = regex.compile(r"\p{L}+")
_UNSPACED = regex.compile(rf"[{UNSPACED}]+")
_POSSESSIVE = regex.compile(r"['’]s$")
_ACCENT = regex.compile(r"(?<=\p{Latin})\p{Mn}+")


def words(text: str, languages: Iterable[str] = ()) -> list[str]:
    """The words of a text in order, each in its one spelling.

    Args:
        languages: codes of those that it may be in: their spelled-out numbers are read as digits, and words lose the endings
            that they bend by.

    >>> words("Émile was born on the 8th of September, 1956, in Al-Kuwait.")
    ['emile', 'was', 'born', 'on', 'the', '8', 'of', 'month:9', '1956', 'in', 'al', 'kuwait']
    >>> words("08/09/1956"), words("13/09/1956"), words("1956年9月8日")
    (['date:8-9', '1956'], ['13', 'month:9', '1956'], ['1956', 'month:9', '8'])
    >>> words("She has twenty-three goats and two dogs.", ["en"])
    ['she', 'has', '23', 'goat', 'and', '2', 'dog']
    >>> words("東京に住む")
    ['東京', '京に', 'に住', '住む']
    """
    found = list(_tokens(_in_digits(text, languages)))
    stem = _stem(frozenset(languages))
    return [months()[word] if _is_month(found, at) else stem(word) for at, word in enumerate(found)]


def mentions(text: str, languages: Iterable[str] = ()) -> frozenset[str]:
    """Every word that a reader may find in a text: what `words` finds, and each other reading of it.

    >>> sorted(mentions("8 May"))
    ['8', 'date:5-8', 'may', 'month:5']
    >>> {"month:8", "month:9", "8", "9", "1956"} <= mentions("08/09/1956")
    True
    """
    found = list(_tokens(_in_digits(text, languages)))
    every = set(map(_stem(frozenset(languages)), found))
    for at, word in enumerate(found):
        if word.startswith(DATE):
            every.update(part for n in word[len(DATE) :].split("-") for part in (n, MONTH + n))
        month = word if word.startswith(MONTH) else months().get(word)
        if month is not None:
            every.add(month)
            every.update(_date(int(day), month) for day in _days_near(found, at))
        if _UNSPACED.fullmatch(word):
            every.update(word)
    return frozenset(every)


def languages(text: Iterable[str]) -> frozenset[str]:
    """Codes of the languages whose function words make up most of the words; several where they tie, none where none has one."""
    of = list(text)
    counts = {language: sum(word in known for word in of) for language, known in function_words().items()}
    most = max(counts.values())
    return frozenset(language for language, count in counts.items() if count == most > 0)


@cache
def function_words() -> dict[str, frozenset[str]]:
    """By language: words that carry grammar. Numbers are none, whatever a list says: they are what rows differ in."""
    return {
        language: frozenset(
            word for entry in stopwordsiso.stopwords(language) for word in _tokens(entry) if not _numeric(word)
        )
        for language in sorted(stopwordsiso.langs())
    }


@cache
def months() -> dict[str, str]:
    """A month's name, in full or abbreviated, in the languages of `function_words` -> its word."""
    found: dict[str, str] = {}
    for language in sorted(stopwordsiso.langs()):
        try:
            locale = Locale.parse(language)
        except (UnknownLocaleError, ValueError):
            continue
        for width in ("wide", "abbreviated"):
            for context in ("format", "stand-alone"):
                for number, name in get_month_names(width, context, locale).items():
                    spelled = list(_plain(name))
                    if len(spelled) == 1 and len(spelled[0]) > 2 and not _numeric(spelled[0]):
                        found.setdefault(spelled[0], f"{MONTH}{number}")
    return found


@cache
def stemmed_function_words(language: str) -> frozenset[str]:
    return frozenset(map(_stem(frozenset({language})), function_words()[language]))


@cache
def _stem(languages: frozenset[str]) -> Callable[[str], str]:
    """By the rules of one of the languages; a word that they have none for stays."""
    known = sorted(languages & STEMMED.keys())
    if not known:
        return lambda word: word
    stemmer: Any = SnowballStemmer(STEMMED[known[0]])

    @lru_cache(maxsize=100_000)
    def stem(word: str) -> str:
        return word if _numeric(word) or _UNSPACED.match(word) else str(stemmer.stem(word))

    return stem


def _in_digits(text: str, languages: Iterable[str]) -> str:
    for language in sorted(set(languages) & set(NUMERALS)):
        text = _WORD.sub(lambda word, language=language: _number(word[0], language), alpha2digit(text, language))
    return text


@lru_cache(maxsize=100_000)
def _number(word: str, language: str) -> str:
    """A number word that stands alone, which alpha2digit leaves if it is small. One is left: it is an article, too."""
    try:
        value = text2num(word.casefold(), language)
    except ValueError:
        return word
    return word if value < 2 else str(value)


def _numeric(word: str) -> bool:
    return word[0].isdigit() or word.startswith((MONTH, DATE))


def _tokens(text: str) -> Iterator[str]:
    text = "".join(str(unicodedata.decimal(letter)) if letter.isdecimal() else letter for letter in text)
    plain = unicodedata.normalize("NFKC", _ACCENT.sub("", unicodedata.normalize("NFKD", text))).casefold()
    plain = _YEAR_FIRST.sub(lambda m: f" {m[1]} {MONTH}{int(m[2])} {int(m[3])} ", plain)
    plain = _YEAR_LAST.sub(lambda m: f" {_ordered(int(m[1]), int(m[2]))} {m[3]} ", plain)
    return _plain(plain)


def _plain(plain: str) -> Iterator[str]:
    plain = _GROUPED.sub(lambda m: regex.sub(r"\D", "", m[0]), plain.casefold())
    for word in _TOKEN.findall(_ORDINAL.sub(" ", plain)):
        if word[0].isdigit():
            whole, _, part = word.replace(",", ".").partition(".")
            yield (whole.lstrip("0") or "0") + (f".{part}" if part else "")
        elif _UNSPACED.fullmatch(word):
            yield from (word[i : i + 2] for i in range(max(1, len(word) - 1)))
        else:
            yield _POSSESSIVE.sub("", word)


def _ordered(first: int, second: int) -> str:
    """Day and month of a date whose order tells the country that it was written in, where the numbers tell it."""
    if first > 12:
        return f"{first} {MONTH}{second}"
    if second > 12:
        return f"{second} {MONTH}{first}"
    return _date(first, f"{MONTH}{second}")


def _date(day: int, month: str) -> str:
    low, high = sorted((day, int(month[len(MONTH) :])))
    return f"{DATE}{low}-{high}"


def _is_month(found: list[str], at: int) -> bool:
    """A month's name beside a number: "may" and "march" alone are words like others."""
    return found[at] in months() and any(word[0].isdigit() for word in _beside(found, at))


def _days_near(found: list[str], at: int) -> Iterator[str]:
    return (word for word in _beside(found, at) if len(word) <= 2 and word.isdecimal() and 1 <= int(word) <= 31)


def _beside(found: list[str], at: int) -> list[str]:
    return found[max(0, at - NEAR) : at] + found[at + 1 : at + 1 + NEAR]
