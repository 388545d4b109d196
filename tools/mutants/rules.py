"""Finds what can be broken in a CUDA source: one small change of the text per mutant. And writes a text that has them all.

The rules read tokens, not a grammar. They rely on clang-format, which the sources pass: an operator with two operands has
spaces on both sides, and the brackets of a template have not.
"""

import bisect
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping

TOKEN = re.compile(
    r"""
    (?P<skip> //[^\n]* | /\*.*?\*/ | ^[ \t]*\#(?:[^\n]*\\\n)*[^\n]* | \n | [^\S\n]+)
  | (?P<string> R"\((?:.*?)\)" | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+')
  | (?P<number> \.?\d(?:[\w.]|(?<=[eE])[+-])*)
  | (?P<name> [A-Za-z_]\w*)
  | (?P<operator> <<= | >>= | \.\.\. | -> | :: | && | \|\| | == | != | <= | >= | [-+*/%&|^]= | << | >> | \+\+ | -- | .)
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
CONDITIONAL = re.compile(r"^[ \t]*#[ \t]*(if|ifdef|ifndef|elif|else|endif)\b[ \t]*(.*)$", re.MULTILINE)

ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="}
OPENING, CLOSING = dict(zip("([{", ")]}")), dict(zip(")]}", "([{"))
BOUNDARY_OF_COMPARISON = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
COMPARISONS = {*BOUNDARY_OF_COMPARISON, "==", "!="}
# What ends an expression of any kind, and what ends an operand of the operators further down.
ENDS = ASSIGNMENTS | {",", ";", "?", ":", "return", "{", "}", "(", ")", "[", "]"}
ENDS_OF = {
    "||": ENDS | {"||"},
    "&&": ENDS | {"||", "&&"},
    "&": ENDS | {"||", "&&", "|", "^", "&"},
    "%": ENDS | {"||", "&&", "|", "^", "&", "+", "-", "<<", ">>"} | COMPARISONS,
    "compare": ENDS | {"||", "&&", "|", "^", "&"} | COMPARISONS,
}
# Statements that are not deleted: their first word.
KEPT = {"return", "continue", "break", "using", "typedef", "static_assert", "case", "default", "goto", "delete", "new"}
CONTROL = {"if", "for", "while", "switch"}
COMPILE_TIME = {"constexpr", "static_assert", "using", "template", "typedef"}


# Kinds of mutants: a wait, fence, barrier or arrival less; a bound, mask or other condition less; what else can be wrong.
SYNCHRONIZATION, GUARD, OTHER = KINDS = ("synchronization", "guard", "other")
SYNCHRONIZES = re.compile(r"wait|sync|fence|commit|arrive|release|expect|skip|barrier")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The text of `path` with [start, end) replaced."""

    path: str  # relative to csrc
    function: str
    start: int
    end: int
    before: str
    after: str
    whole: tuple[int, int]  # the expression or statement that changes
    whole_after: str
    line: str  # the source's line that changes, without indentation and comments
    kind: str
    id: str

    def apply(self, source: str) -> str:
        assert source[self.start : self.end] == self.before
        return source[: self.start] + self.after + source[self.end :]


@dataclasses.dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    end: int
    is_spaced: bool  # white space before and after


@dataclasses.dataclass(frozen=True)
class Change:
    """Tokens [start, end) replaced, in the expression or statement [first, last)."""

    start: int
    end: int
    after: str
    first: int
    last: int
    kind: str = OTHER


def find_mutants(path: str, source: str) -> list[Mutant]:
    """Every mutant of a source, in the order of the text."""
    tokens = tokenize(source)
    changes = {}
    for function, first, last in functions(tokens):
        for change in Function(tokens, first, last).changes():
            changes.setdefault((tokens[change.start].start, tokens[change.end - 1].end, change.after), (function, change))
    mutants, seen = [], {}
    for (start, end, after), (function, change) in sorted(changes.items(), key=lambda item: item[0]):
        before = source[start:end]
        line = source[source.rfind("\n", 0, start) + 1 : source.find("\n", end)]
        line = " ".join(re.sub(r"//[^\n]*", "", line).split())
        text = "\0".join((line, " ".join(before.split()), after))
        number = seen[function, text] = seen.get((function, text), -1) + 1
        digest = hashlib.sha256(f"{text}\0{number}".encode()).hexdigest()[:8]
        whole = tokens[change.first].start, tokens[change.last - 1].end
        whole_after = f"{join(tokens[change.first : change.start])} {after} {join(tokens[change.end : change.last])}"
        name = f"{path}:{function}:{digest}"
        mutants.append(Mutant(path, function, start, end, before, after, whole, whole_after, line, change.kind, name))
    return mutants


# The variable that says which mutant runs: its place in the list, from 1 on, or 0 for the source as it is.
SWITCH = "sparse_attn_mutant"


def with_switch(source: str, mutants: list[Mutant], numbers: Mapping[str, int]) -> str:
    """The source with all mutants in it, of which `SWITCH` chooses one. Lines stay where they are."""
    places = {}
    for mutant in mutants:
        places.setdefault(mutant.whole, []).append((numbers[mutant.id], mutant.whole_after))
    ordered = sorted(places.items(), key=lambda item: (item[0][0], -item[0][1]))
    return f'extern "C" int {SWITCH}; ' + rewritten(source, 0, len(source), ordered)


def rewritten(source: str, start: int, end: int, places: list) -> str:
    """[start, end) of the source, with the alternatives [((start, end), [(number, text)])] in it."""
    text = ""
    while places:
        (begin, stop), alternatives = places[0]
        inner = [place for place in places[1:] if place[0][0] < stop]
        if any(place[0][1] > stop for place in inner):
            raise ValueError(f"two changes overlap: {source[begin:stop]!r}")
        own = rewritten(source, begin, stop, inner)
        is_statement = own.endswith(";")
        for number, after in alternatives:
            if is_statement:
                own = f"{{ if ({SWITCH} == {number}) {{ {after} }} else {{ {own} }} }}"
            else:
                own = f"({SWITCH} == {number} ? ({after}) : ({own}))"
        text += source[start:begin] + own
        start, places = stop, places[1 + len(inner) :]
    return text + source[start:end]


def code_digest(source: str) -> str:
    """Changes with the code, not with comments and white space."""
    return hashlib.sha256(join(tokenize(source)).encode()).hexdigest()[:12]


def join(tokens: list[Token]) -> str:
    return " ".join(token.text for token in tokens)


def tokenize(source: str) -> list[Token]:
    """The code that the simulator's build compiles, without comments and directives."""
    skipped = inactive_parts(source)
    tokens = []
    for match in TOKEN.finditer(source):
        start, end = match.span()
        if match.lastgroup == "skip" or any(begin <= start < stop for begin, stop in skipped):
            continue
        is_spaced = source[start - 1 : start].isspace() and source[end : end + 1].isspace()
        tokens.append(Token(match.lastgroup, match.group(), start, end, is_spaced))
    return tokens


def inactive_parts(source: str) -> list[tuple[int, int]]:
    """Where the text is for a GPU only: [(start, end)]. Knows conditions on SPARSE_ATTN_HOST_SIM."""
    parts, open_conditions = [], []
    for match in CONDITIONAL.finditer(source):
        word, condition = match.groups()
        if word.startswith("if"):
            is_active = {"SPARSE_ATTN_HOST_SIM": True, "!SPARSE_ATTN_HOST_SIM": False}.get(condition.strip())
            open_conditions.append((is_active, match.end()))
        else:
            is_active, start = open_conditions.pop()
            if is_active is False:
                parts.append((start, match.start()))
            if word != "endif":
                open_conditions.append((None if is_active is None else not is_active, match.end()))
    return parts


def functions(tokens: list[Token]) -> Iterator[tuple[str, int, int]]:
    """(name, first token, token after the last) of each function with a body. Constructors include their initialisers."""
    partner = partners(tokens)
    names = []  # of the classes around
    i = head = 0
    while i < len(tokens):
        text = tokens[i].text
        if text == ";" or text == ":" and tokens[i - 1].text in ("public", "private", "protected"):
            head = i + 1
        elif text == "}":
            head = i + 1
            if names:
                names.pop()
        elif text in "([":
            i = partner[i]
        elif text == "{":
            words = [token.text for token in tokens[head:i]]
            if "namespace" in words or "extern" in words:
                names.append(None)
                head = i + 1
            elif "(" in words:
                parameters = first_parameters(tokens, head, i, partner)
                colon = partner[parameters] + 1
                is_constructor = tokens[colon].text == ":"
                name = tokens[parameters - 1].text
                yield "::".join([*filter(None, names), name]), colon if is_constructor else i, partner[i] + 1
                i = partner[i]
                head = i + 1
            elif {"class", "struct", "enum", "union"} & set(words):
                names.append(class_name(words))
                head = i + 1
            else:  # the braces of an initialiser
                i = partner[i]
        i += 1


def first_parameters(tokens, start, end, partner) -> int:
    """The bracket that opens a function's parameters."""
    i = start
    while i < end:
        if tokens[i].text == "(":
            if not tokens[i - 1].text.startswith("__"):
                return i
            i = partner[i]
        i += 1
    raise ValueError(f"no parameters before offset {tokens[end].start}")


def class_name(words: list[str]) -> str:
    at = max(i for i, word in enumerate(words) if word in ("class", "struct", "enum", "union"))
    return words[at + 1] if at + 1 < len(words) else ""


def partners(tokens: list[Token]) -> dict[int, int]:
    """The index of the other bracket, by that of each bracket."""
    found, opened = {}, []
    for i, token in enumerate(tokens):
        if token.text in OPENING:
            opened.append(i)
        elif token.text in CLOSING:
            j = opened.pop()
            if OPENING[tokens[j].text] != token.text:
                raise ValueError(f"brackets do not match at offset {token.start}")
            found[i], found[j] = j, i
    return found


class Function:
    """Tokens [first, last) of one function, and the changes that the rules find in them."""

    def __init__(self, tokens: list[Token], first: int, last: int):
        self.tokens, self.first, self.last = tokens, first, last
        self.partner = partners(tokens[:last])
        self.fixed = [*self.compile_time_parts()]

    def changes(self) -> Iterator[Change]:
        rules = {
            SYNCHRONIZATION: (self.deleted_synchronization, self.longer_waits),
            GUARD: (self.conditions, self.operands, self.bare_comparisons, self.choices),
            OTHER: (self.deleted_statements, self.boundaries, self.remainders, self.bit_masks, self.factors),
        }
        for kind, of_kind in rules.items():
            for rule in of_kind:
                yield from (dataclasses.replace(change, kind=kind) for change in rule() if not self.is_fixed(change.start))

    def whole(self, start: int, end: int, after: str) -> Change:
        """A change of an entire expression."""
        return Change(start, end, after, start, end)

    # --- what the rules are made of ---

    def text(self, i: int) -> str:
        return self.tokens[i].text

    def where(self, *texts: str) -> Iterator[int]:
        return (i for i in range(self.first, self.last) if self.text(i) in texts)

    def operators(self, *texts: str) -> Iterator[int]:
        return (i for i in self.where(*texts) if self.tokens[i].is_spaced)

    @functools.cached_property
    def brackets(self) -> list[int]:
        return sorted(i for i in self.partner if self.text(i) in OPENING)

    def enclosing(self, i: int) -> int:
        """The bracket around token i."""
        at = bisect.bisect_left(self.brackets, i) - 1
        while at >= 0 and self.partner[self.brackets[at]] < i:
            at -= 1
        return self.brackets[at]

    def ends(self, i: int, stops: set[str]) -> bool:
        text = self.text(i)
        if text in COMPARISONS or text == "&":
            return text in stops and self.tokens[i].is_spaced
        return text in stops or text in ("SPARSE_ATTN_HERE", "SPARSE_ATTN_AT")

    def left(self, i: int, stops: set[str]) -> int:
        """The first token of the operand that ends before token i."""
        while True:
            i -= 1
            if self.text(i) in CLOSING and not self.is_block_end(i):
                i = self.partner[i]
            elif self.ends(i, stops):
                return i + 1

    def right(self, i: int, stops: set[str]) -> int:
        """The token after the operand that starts after token i."""
        while True:
            i += 1
            if self.text(i) in OPENING:
                i = self.partner[i]
            elif self.ends(i, stops):
                return i

    def is_block_end(self, i: int) -> bool:
        """Whether a closing brace ends a statement, rather than a lambda or an initialiser."""
        return self.text(i) == "}" and (i + 1 >= self.last or self.tokens[i + 1].kind == "name" or self.text(i + 1) in "{}+-*(")

    def condition_of(self, i: int) -> str | None:
        """The control word whose condition token i, an opening bracket, opens."""
        if self.text(i) != "(":
            return None
        before = self.text(i - 1)
        return self.text(i - 2) if before == "constexpr" else before if before in CONTROL else None

    def statement(self, end: int) -> int:
        """The first token of the statement that ends with the semicolon at `end`."""
        i = end
        while True:
            i -= 1
            text = self.text(i)
            if text in (";", "{", "else", "do") or text.isupper() and "UNROLL" in text or self.is_block_end(i):
                return i + 1
            if text in CLOSING:
                i = self.partner[i]
                if self.condition_of(i) is not None:
                    return self.partner[i] + 1

    @functools.cached_property
    def statements(self) -> list[tuple[int, int]]:
        """(first token, its semicolon) of each simple statement."""
        ends = [i for i in self.where(";") if self.text(self.enclosing(i)) == "{"]
        return [(self.statement(end), end) for end in ends]

    def compile_time_parts(self) -> Iterator[tuple[int, int]]:
        for i in self.where(*COMPILE_TIME):
            if self.text(i - 1) == "if":
                yield i, self.partner[i + 1]
            else:
                yield i, self.right(i, {";", "{"})

    def is_fixed(self, i: int) -> bool:
        return any(start <= i <= end for start, end in self.fixed)

    def primary_end(self, i: int) -> int:
        """The token after the operand of a tightly binding operator that starts at token i."""
        if self.text(i) in ("-", "!", "~", "*", "&"):
            i += 1
        while True:
            if self.text(i) in "([":
                i = self.partner[i]
            elif self.tokens[i].kind not in ("name", "number"):
                return i
            i += 1
            if self.text(i) in ("::", ".", "->"):
                i += 1
            elif self.text(i) not in "([":
                return i

    # --- rules ---

    def deleted_synchronization(self):
        """Waits, fences, barriers, and what they wait for."""
        yield from (change for change in self.deletions() if self.synchronizes(change))

    def deleted_statements(self):
        """Other calls for their effect, assignments, increments."""
        yield from (change for change in self.deletions() if not self.synchronizes(change))

    def synchronizes(self, change: Change) -> bool:
        return any(SYNCHRONIZES.search(token.text) for token in self.tokens[change.start : change.end])

    def deletions(self):
        for start, end in self.statements:
            words = [token.text for token in self.tokens[start:end]]
            if not words or words[0] in KEPT | CONTROL | COMPILE_TIME or words[0] == "static_cast":
                continue
            if self.is_call(start, end) or self.is_assignment(start, end) or "++" in (words[0], words[-1]):
                yield self.whole(start, end + 1, ";")

    def is_call(self, start: int, end: int) -> bool:
        if self.text(end - 1) != ")":
            return False
        callee = self.outside_brackets(start, self.partner[end - 1])
        return bool(callee) and not self.declares(callee) and not any(token.text in ASSIGNMENTS for token in callee)

    def is_assignment(self, start: int, end: int) -> bool:
        tokens = self.outside_brackets(start, end)
        at = next((i for i, token in enumerate(tokens) if token.text in ASSIGNMENTS), 0)
        return at > 0 and not self.declares(tokens[tokens[0].text == "*" : at])

    def outside_brackets(self, start: int, end: int) -> list[Token]:
        found, i = [], start
        while i < end:
            if self.text(i) in OPENING:
                i = self.partner[i]
            else:
                found.append(self.tokens[i])
            i += 1
        return found

    def declares(self, tokens: list[Token]) -> bool:
        """Whether a type is followed by a name."""
        pairs = zip(tokens, tokens[1:])
        return any((a.kind == "name" and a.text != "template" or a.text in "*&>") and b.kind == "name" for a, b in pairs)

    def conditions(self):
        """`if` always or never, `while` never."""
        for i in self.where("if", "while"):
            if self.text(i + 1) == "(":
                for value in ("true", "false") if self.text(i) == "if" else ("false",):
                    yield self.whole(i + 2, self.partner[i + 1], value)

    def operands(self):
        """One operand of && or || dropped."""
        for operator, neutral in (("&&", "true"), ("||", "false")):
            for i in self.operators(operator):
                yield self.whole(self.left(i, ENDS_OF[operator]), i, neutral)
                yield self.whole(i + 1, self.right(i, ENDS_OF[operator]), neutral)

    def boundaries(self):
        """< is <=, and the like."""
        for i in self.operators(*BOUNDARY_OF_COMPARISON):
            if not self.is_unrolled(i) and not self.is_clamp(i):
                start, end = self.comparison(i)
                yield Change(i, i + 1, BOUNDARY_OF_COMPARISON[self.text(i)], start, end)

    def comparison(self, i: int) -> tuple[int, int]:
        """The expression whose operator is token i."""
        return self.left(i, ENDS_OF["compare"]), self.right(i, ENDS_OF["compare"])

    def is_unrolled(self, i: int) -> bool:
        """Whether a comparison bounds a loop by a constant."""
        if self.condition_of(self.enclosing(i)) != "for":
            return False
        bound = self.tokens[i + 1 : self.right(i, ENDS_OF["compare"])]
        return all(token.kind != "name" or re.match(r"k[A-Z]|Config$", token.text) for token in bound)

    def is_clamp(self, i: int) -> bool:
        """Whether a comparison chooses between the two values that it compares: where they are equal both are right."""
        start, end = self.comparison(i)
        if self.text(end) != "?":
            return False
        colon = self.right(end, {":"})
        sides = [self.source(end + 1, colon), self.source(colon + 1, self.right(colon, {",", ";", ")", "]", "}"}))]
        return sorted(sides) == sorted([self.source(start, i), self.source(i + 1, end)])

    def bare_comparisons(self):
        """A comparison that stands alone is true or false."""
        for i in self.operators(*COMPARISONS):
            start, end = self.comparison(i)
            before, after = self.text(start - 1), self.text(end)
            if before in ("=", "return", "(", ",", "{") and after in ";),}" and self.condition_of(start - 1) is None:
                if self.condition_of(self.enclosing(i)) != "for":
                    yield self.whole(start, end, "true")
                    yield self.whole(start, end, "false")

    def choices(self):
        """One side of c ? x : y."""
        for i in self.where("?"):
            start = self.left(i, ENDS)
            colon = self.end_of_side(i)
            end = self.end_of_side(colon)
            for first, last in ((i + 1, colon), (colon + 1, end)):
                yield self.whole(start, end, f"({self.source(first, last)})")

    def end_of_side(self, i: int) -> int:
        """Where what follows the "?" or ":" of a choice ends; other choices may stand in it."""
        depth = 0
        while True:
            i += 1
            text = self.text(i)
            if text in {",", ";", ")", "]", "}"} or (text == ":" and depth == 0):
                return i
            depth += (text == "?") - (text == ":")
            if text in OPENING:
                i = self.partner[i]

    def source(self, start: int, end: int) -> str:
        return join(self.tokens[start:end])

    def remainders(self):
        """x % n is x."""
        for i in self.operators("%"):
            end = self.primary_end(i + 1)
            yield Change(i, end, "", self.left(i, ENDS_OF["%"]), end)

    def bit_masks(self):
        """x & mask is x."""
        for i in self.operators("&"):
            end = self.right(i, ENDS_OF["&"])
            yield Change(i, end, "", self.left(i, ENDS_OF["&"] - {"&"}), end)

    def longer_waits(self):
        """wait<n> leaves n + 1 under way."""
        for i in self.where("<"):
            if "wait" in self.text(i - 1) and not self.tokens[i].is_spaced:
                end = next(j for j in range(i, self.last) if self.text(j) == ">")
                first, semicolon = next((a, b) for a, b in self.statements if a <= i < b)
                yield Change(i + 1, end, f"({self.source(i + 1, end)}) + 1", first, semicolon + 1)

    def factors(self):
        """A factor that sums are multiplied by is 1."""
        for i in self.where("="):
            if "factor" in self.text(i - 1):
                yield self.whole(i + 1, self.right(i, {";", ","}), "1")
