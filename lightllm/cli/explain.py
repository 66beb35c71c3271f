"""From a parser's account of what it could not read to a sentence a person can act on.

Jsonargparse nests its messages as the configuration is nested, says what each type of a union missed, and prints the
whole value. Kept is the field's path, what is wrong there, and the nearest right spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lightllm.cli.spelling import class_paths, fields_of, nearest


@dataclass
class Finding:
    """What is wrong in one place, as one type of a union has it."""

    text: str
    depth: int
    path: str
    """The field, as in `model.adapter`."""
    owner: str | None
    """Class path of what has, or lacks, the field."""
    value: str | None = None
    """What was given there."""
    nullable: bool = False
    """Whether nothing would have done as well."""
    rank: int = field(init=False)
    """How much it tells; of the types of a union, the best guess at what was meant is the one that tells most."""

    def __post_init__(self) -> None:
        ranks = (_UNKNOWN_FIELD, _MISSING, _EXPECTED, _NO_CLASS)  # as `explain` tells them
        self.rank = next((rank for rank, pattern in enumerate(ranks) if pattern.match(self.text)), len(ranks))


_UNRECOGNIZED = "unrecognized arguments: "
_UNKNOWN_FIELD = re.compile(
    r"(?:(?:Option|Key) '|unrecognized arguments: --)(?P<name>[\w.]+)"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<option>[^']+)'"
)
_MISSING = re.compile(r"the following arguments are required: (.+)")
_EXPECTED = re.compile(r"Expected an? (?!dot import path|path but)(.+)")
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (\S+)|module '([^']+)' has no attribute '([^']+)'|No module named '([^']+)'"
)


def explain(message: str, options: Iterable[str]) -> str:
    """The parser's `message` in one line or a few.

    Args:
        message: Of an `ArgumentError` of jsonargparse's.
        options: The names of the parser's own options, without dashes.
    """
    options = list(options)
    if message.startswith(_UNRECOGNIZED):
        return _unrecognized(message.removeprefix(_UNRECOGNIZED), options)
    findings = list(_findings(message))
    if not findings:
        return message
    best = min(finding.rank for finding in findings)
    chosen = [finding for finding in findings if finding.rank == best]
    tell = (_unknown_field, _missing, _expected, _no_class, _as_it_is)[best]
    if tell is _expected:
        return _expected_one_of(chosen)
    told = [tell(finding) for finding in chosen]
    if tell is _missing and not chosen[0].path and "config" in options:
        return f"{told[0]}: name a configuration with --config"
    return next((one for one in told if "did you mean" in one), told[0])


_PREFIXES = (
    ("key", re.compile(r'Parser key "([^"]+)"(?: element \d+)?:\s*')),
    ("class", re.compile(r"Problem with given class_path '([^']+)':\s*")),
    ("", re.compile(r"Type \S.*? expects a function or a callable class:\s*")),
)
_GIVEN = re.compile(r"Given value: (.*)", re.DOTALL)
_INNARDS = re.compile(
    r"Does not validate against any|Subtypes: |Errors:$|Given value type: |Expected a path but |"
    r"Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with"
)
_PART = re.compile(r"(?:Namespace\(|NestedArg\(|\{)(?:'?class_path'?[=:] ?'([\w.]+)')?")
"""The value of a part: what is wrong is said of one of its fields."""
_NOTHING = "Expected a <class 'NoneType'>"


def _findings(message: str) -> Iterator[Finding]:
    """What each line says, with the place that the lines above it give."""
    above: list[tuple[int, str, str]] = []
    found: list[Finding] = []
    for line in filter(str.strip, message.splitlines()):
        text = re.sub(r"^(\s*)- ", r"\1  ", line)
        depth, text = len(text) - len(text.lstrip()), text.strip()
        above = [one for one in above if one[0] < depth]
        for kind, pattern in _PREFIXES * 2:
            if match := pattern.match(text):
                above.append((depth, kind, match[1] if kind else ""))
                text = text[match.end() :]
        given = _GIVEN.match(text)
        if text == _NOTHING:
            for one in found:
                one.nullable |= one.depth == depth
        elif given:
            for one in found:
                if one.depth >= depth and one.value is None and not _PART.match(given[1]):
                    one.value = given[1].split(". Got value: ")[0]
        elif text and not _INNARDS.match(text):
            text, *values = text.split(". Got value: ")
            path = ".".join(value for _, kind, value in above if kind == "key")
            owners = [value for _, kind, value in above if kind == "class"]
            owners += [match[1] for value in values if (match := _PART.match(value)) and match[1]]
            plain = [value for value in values if not _PART.match(value)]
            found.append(Finding(text, depth, path, owners[-1] if owners else None, plain[0] if plain else None))
    yield from found


def _unrecognized(arguments: str, options: list[str]) -> str:
    told = []
    for argument in arguments.split():
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--"):
            told.append(f"there is no option --{name}{_hint(nearest(name, options), '--')}")
    return "; ".join(told) or f"what is {arguments!r} for? Options begin with --"


def _unknown_field(finding: Finding) -> str:
    match = _UNKNOWN_FIELD.match(finding.text)
    assert match is not None
    name, group = match["name"] or match["option"], match["group"]
    owner = {None: finding.owner, "trainer": "lightning.pytorch.Trainer"}.get(group, finding.owner)
    path = ".".join(part for part in (finding.path, group, name) if part)
    if owner is None:
        # Of the configuration itself, where the first part may be what is misspelt.
        first = name.partition(".")[0]
        near = nearest(first, SECTIONS)
        return f"{path}: a configuration has no {first!r}{_hint(near)}"
    *inner, wrong = name.split(".")
    for part in inner:
        within = fields_of(owner).get(part)
        if within is None:
            wrong = wrong if part in fields_of(owner) else part
            break
        owner = within
    return f"{path}: {owner.rpartition('.')[2]} has no field {wrong!r}{_hint(nearest(wrong, fields_of(owner)))}"


SECTIONS = ("trainer", "model", "data", "run", "log", "checkpoint", "throughput", "predictions", "seed_everything")
"""What a configuration consists of."""


def _missing(finding: Finding) -> str:
    match = _MISSING.match(finding.text)
    assert match is not None
    names = [".".join(part for part in (finding.path, name.strip()) if part) for name in match[1].split(",")]
    return f"{' and '.join(sorted(names))} {'is' if len(names) == 1 else 'are'} missing"


def _no_class(finding: Finding) -> str:
    match = _NO_CLASS.match(finding.text)
    assert match is not None
    short, module, attribute, absent = match.groups()
    given = finding.owner if finding.owner is not None and (module or absent) else short or f"{module}.{attribute}"
    if absent is not None and not absent.startswith("lightllm"):
        return f"{finding.path}: there is no class {given!r}: no module is called {absent!r}, here or installed"
    paths = class_paths()
    near = nearest(given.rpartition(".")[2], paths)
    if near is not None and "." in given:
        near = paths[near]
    return f"{finding.path}: there is no class {given!r}{_hint(near)}"


def _expected(finding: Finding) -> str:
    return _expected_one_of([finding])


def _expected_one_of(findings: list[Finding]) -> str:
    deepest = max(findings, key=lambda finding: finding.path.count("."))
    here = [finding for finding in findings if finding.path == deepest.path]
    wanted, choices = [], []
    for finding in here:
        match = _EXPECTED.match(finding.text)
        assert match is not None
        literals = re.findall(r"'([^']*)'", match[1]) if "Literal" in match[1] else []
        choices += literals
        wanted += literals or [_type_name(match[1])]
    wanted += ["null"] if any(finding.nullable for finding in here) else []
    value = next((finding.value for finding in here if finding.value is not None), None)
    *most, last = dict.fromkeys(wanted)
    sentence = f"{deepest.path}: expected {', '.join(most)}{' or ' if most else ''}{last}"
    if value is None:
        return sentence
    return f"{sentence}, not {value!r}{_hint(nearest(value, choices))}"


def _type_name(type_text: str) -> str:
    match = re.fullmatch(r"<class '([\w.]+)'>", type_text)
    name = match[1] if match else type_text
    return {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}.get(name, name)


def _hint(near: str | None, prefix: str = "") -> str:
    return f" (did you mean {(prefix + near)!r}?)" if near else ""


def _as_it_is(finding: Finding) -> str:
    return finding.text
