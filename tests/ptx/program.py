"""The PTX of one kernel, parsed: its instructions, each with the source line it came from, its registers and labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace


class PTXError(Exception):
    """The kernel does what no kernel may do, or what the emulator does not know."""


@dataclass(frozen=True)
class Register:
    """A register, a special register, a parameter or a label, by name; ``negated`` of a predicate operand."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number; ``is_float``: the bits of a float32."""

    value: int
    is_float: bool = False


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, of a register, a parameter or the shared memory."""

    base: str
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Discard:
    """``_``: a result nobody wants."""


Operand = Register | Immediate | Address | Vector | Discard


@dataclass(frozen=True)
class Instruction:
    """``@guard op operands``; ``line`` is ``file.py:number`` of the kernel's source."""

    op: str
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str
    line: str

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers: ``ld.global.v4.b32`` in four."""
        return self.op.split(".")

    def __str__(self) -> str:
        return f"[{self.text} @ {self.line}]"


@dataclass(frozen=True)
class Program:
    """A kernel. ``parameters`` and ``registers`` map names (of registers: up to their number) to PTX types."""

    name: str
    parameters: dict[str, str]
    registers: dict[str, str]
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    threads: int  # a program of Triton's, that is a CTA
    shared: frozenset[str]  # names of the shared memory

    def barriers(self) -> list[int]:
        """Where its barriers stand."""
        return [at for at, i in enumerate(self.code) if i.op == "bar.sync"]

    def without(self, at: int) -> Program:
        """The program with instruction ``at`` left out."""
        gone = replace(self.code[at], op="nop", operands=(), guard=None)
        return replace(self, code=(*self.code[:at], gone, *self.code[at + 1 :]))

    def passed_over(self, at: int) -> range | None:
        """The instructions that a branch passes over to a place where they end, too; None if it is not so simple.

        That is where lanes that take it meet the others again: a straight line, each of whose instructions a lane runs
        for itself.
        """
        branch = self.code[at]
        if branch.guard is None:
            return None
        targets = {where: self._target(i) for where, i in enumerate(self.code) if i.parts[0] == "bra"}
        for where in range(at + 1, len(self.code)):
            i = self.code[where]
            if where == targets[at] or (i.guard is None and targets.get(where) == targets[at]):
                return range(at + 1, where)
            if where in targets.values() or i.guard or i.parts[0] in TOGETHER or branch.guard.name in _written(i):
                return None
        return None

    def _target(self, branch: Instruction) -> int:
        label = branch.operands[0]
        assert isinstance(label, Register)
        return self.labels[label.name]


TOGETHER = ("bra", "bar", "ret", "shfl", "ldmatrix", "stmatrix")  # what lanes of a warp do as one
OPERAND = re.compile(
    r"""\s*(?:
      (?P<vector>\{[^}]*\})
    | (?P<address>\[[^\]]*\])
    | 0[fF](?P<float>[0-9A-Fa-f]{8})
    | (?P<int>-?(?:0[xX][0-9A-Fa-f]+|\d+)U?)
    | (?P<name>!?[%$\w.]+)
    )\s*(?:,|$)""",
    re.VERBOSE,
)


def parse_operands(text: str) -> Iterator[Operand]:
    """The operands of an instruction, from left to right."""
    at, text = 0, text.strip()
    while at < len(text):
        found = OPERAND.match(text, at)
        if not found or not found.lastgroup:
            raise PTXError(f"cannot parse the operands {text!r} from {text[at:]!r} on")
        at, kind, word = found.end(), found.lastgroup, found[found.lastgroup]
        if kind == "vector":
            yield Vector(tuple(parse_operands(word[1:-1])))
        elif kind == "address":
            parsed = re.fullmatch(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?", word[1:-1].strip())
            if not parsed:
                raise PTXError(f"cannot parse the address {word!r}")
            yield Address(parsed[1], int(parsed[2] or "0", 0))
        elif kind == "float":
            yield Immediate(int(word, 16), is_float=True)
        elif kind == "int":
            yield Immediate(int(word.rstrip("U"), 0))
        elif word == "_":
            yield Discard()
        else:
            yield Register(word.lstrip("!"), word.startswith("!"))


def parse_instruction(statement: str, line: str) -> Instruction:
    """One statement, without its semicolon."""
    found = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if not found:
        raise PTXError(f"cannot parse {statement!r}")
    negated, guard, op, rest = found.groups()
    return Instruction(
        _canonical(op), tuple(parse_operands(rest)), Register(guard, bool(negated)) if guard else None, statement, line
    )


def _canonical(op: str) -> str:
    """The state space next to the name; ``shared::cta``, which is a program's own shared memory, as ``shared``."""
    name, *modifiers = op.replace("shared::cta", "shared").split(".")
    if name in ("ld", "st", "atom", "red"):
        modifiers.sort(key=lambda modifier: modifier not in ("global", "shared", "param"))
    return ".".join([name, *modifiers])


def parse(ptx: str) -> Program:
    """The only kernel of ``ptx``. Raises PTXError for what the emulator does not know, such as functions."""
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{]*)\{", ptx, re.DOTALL)
    if not entry:
        raise PTXError("no .entry")
    if re.search(r"^\s*(?:\.visible\s+|\.weak\s+)?\.func\b", ptx, re.MULTILINE):
        raise PTXError("a kernel that calls functions")
    name, parameters, directives = entry.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if not threads:
        raise PTXError("no .reqntid")
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.MULTILINE))
    registers: dict[str, str] = {}
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    line, pending = "?", ""
    for raw in _body(ptx, entry.end()).split("\n"):
        text = raw.split("//")[0].strip()
        if text.startswith((".loc", ".file")):
            found = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
            if found:
                line = f"{files[found[1]].rsplit('/', 1)[-1]}:{found[2]}"
            continue
        pending = f"{pending} {text}".strip()
        while pending:
            label = re.match(r"([$\w]+):\s*", pending)
            if label:
                labels[label[1]] = len(code)
                pending = pending[label.end() :]
            elif pending[0] in "{}":  # a scope of inline assembly; Triton numbers the registers in it apart
                pending = pending[1:].strip()
            elif ";" in pending:
                statement, pending = (part.strip() for part in pending.split(";", 1))
                if statement.startswith(".reg"):
                    _, kind, names = statement.split(None, 2)
                    registers |= {re.sub(r"<\d+>$", "", n.strip()): kind[1:] for n in names.split(",")}
                elif statement.startswith(".pragma") or not statement:
                    continue
                elif statement.startswith("."):
                    raise PTXError(f"unknown directive {statement!r}")
                else:
                    code.append(parse_instruction(statement, line))
            else:
                break  # the statement goes on in the next line
    if pending:
        raise PTXError(f"text without an end: {pending!r}")
    return Program(
        name,
        {n: t for t, n in re.findall(r"\.param\s+\.(\w+)\s+[^,]*?([\w$]+)\s*(?:,|$)", parameters)},
        registers,
        tuple(code),
        labels,
        int(threads[1]),
        frozenset(re.findall(r"\.extern \.shared[^;]*?(\w+)\[\]", ptx)),
    )


def _body(ptx: str, start: int) -> str:
    """What stands between the brace before ``start`` and the one that closes it."""
    depth = 1
    for found in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            return ptx[start : start + found.start()]
    raise PTXError("a brace is not closed")


def contract(program: Program) -> Program:
    """Fuse each ``mul.f32`` into the ``add.f32`` or ``sub.f32`` that alone uses its result, as ptxas may.

    The fused instruction is ``fused.add`` (x y + c), ``fused.left`` (x y - c) or ``fused.right`` (c - x y).
    """
    uses, definitions = Counter[str](), Counter[str]()
    for i in program.code:
        uses.update(name for at, operand in enumerate(i.operands) if at or not _defines(i) for name in _names(operand))
        if _defines(i):
            definitions.update(_names(i.operands[0]))
    code, starts = list(program.code), set(program.labels.values())
    products: dict[str, int] = {}  # by register, of this basic block
    for at, i in enumerate(program.code):
        if at in starts or i.parts[0] in ("bra", "bar", "ret"):
            products = {}
        if i.guard:
            continue
        if i.op == "mul.f32" and all(_steady(operand, definitions) for operand in i.operands):
            products[next(_names(i.operands[0]))] = at
        elif i.op in ("add.f32", "sub.f32"):
            for k in (1, 2):
                factor = i.operands[k]
                if isinstance(factor, Register) and uses[factor.name] == 1 and factor.name in products:
                    product = products.pop(factor.name)
                    kind = "add" if i.op == "add.f32" else "left" if k == 1 else "right"
                    _, x, y = code[product].operands
                    code[at] = replace(i, op=f"fused.{kind}", operands=(i.operands[0], x, y, i.operands[3 - k]))
                    code[product] = replace(code[product], op="nop", operands=())
                    break
    return replace(program, code=tuple(code))


def _names(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Address):
        yield operand.base
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _names(item)


def _defines(i: Instruction) -> bool:
    return bool(i.operands) and i.parts[0] not in ("st", "stmatrix", "red", "bra", "bar")


def _written(i: Instruction) -> set[str]:
    return set(_names(i.operands[0])) if _defines(i) else set()


def _steady(operand: Operand, definitions: Counter[str]) -> bool:
    """Whether an operand is the same wherever it is read."""
    return isinstance(operand, Immediate) or all(definitions[name] == 1 for name in _names(operand))
