"""PTX text to a Module: kernels with instructions, labels, registers, parameters, and the variables around them.

Only syntax lives here. Nested `{ }` scopes (inline assembly) get their registers and labels renamed, so that
later stages see flat names. Comments vanish, line numbers stay; `.loc` lines become each instruction's `source`.
"""

import re
import struct
from dataclasses import dataclass, field

from .errors import ParseError

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def type_bytes(name):
    """Size in bytes of a PTX type name such as 'f32', 'b16', 'f16x2', 'pred'."""
    if name == "pred":
        return 1
    lanes = re.fullmatch(r"([a-z]+)(\d+)(?:x(\d+))?", name)
    return BYTES[lanes.group(2)] * int(lanes.group(3) or 1)


@dataclass(frozen=True)
class Reg:
    name: str


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Imm:
    """An integer, or the bit pattern of a 0f/0d literal with `float_bits` 32 or 64."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Sym:
    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Mem:
    """[base + offset], and for tensor copies [base, {coordinates}]."""

    base: object
    offset: int = 0
    coords: tuple = ()


@dataclass(frozen=True)
class Not:
    reg: Reg


@dataclass(frozen=True)
class Pair:
    """d|p: a result and a predicate."""

    first: object
    second: object


SINK = Sym("_")


@dataclass
class Instr:
    op: str
    mods: tuple
    operands: list
    guard: object
    line: int
    text: str
    source: str = ""
    scopes: tuple = ()

    @property
    def name(self):
        return ".".join((self.op, *self.mods))


@dataclass
class Variable:
    """A .shared, .local, .global, .const or .param declaration; `size` None for an unsized extern array."""

    name: str
    space: str
    align: int
    size: int | None
    init: bytes | None = None
    type: str = "b8"


@dataclass
class Kernel:
    name: str
    params: list
    instrs: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    registers: dict = field(default_factory=dict)
    variables: list = field(default_factory=list)
    directives: dict = field(default_factory=dict)


@dataclass
class Module:
    version: str = ""
    target: str = ""
    kernels: dict = field(default_factory=dict)
    variables: list = field(default_factory=list)


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_SPACE = re.compile(r"\s+")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n;]*;?")
_FILE = re.compile(r"\.file\s+(\d+)\s+\"([^\"]*)\"[^\n;]*;?")
_PRAGMA = re.compile(r"\.pragma[^;]*;")
_SECTION = re.compile(r"\.section\s+\S+\s*\{.*?\}", re.S)
_HEADER = re.compile(r"\.(version|target|address_size)\s+([^\n;]+)")
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|local|global|const)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$.]+)\s*((?:\[\d*\])*)\s*(?:=\s*([^;]*))?;"
)
_ENTRY = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+\s*)?)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_REG = re.compile(r"\.reg\s+\.(\w+)\s+([^;]*);")
_TUNING = re.compile(
    r"\.(reqntid|maxntid|minnctapersm|maxnreg|maxclusterrank|reqnctapercluster)\s+([\d,\s]+)"
)
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]+)$")
_NAME = r"[A-Za-z_$%][\w$]*(?:\.[xyzw])?"


def parse(text):
    """Module from PTX text. Raises ParseError."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text):
        blank = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
        self.text = _SECTION.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), blank)
        self.lines = text.split("\n")
        self.pos = 0
        self.files = {m.group(1): m.group(2).rsplit("/", 1)[-1] for m in _FILE.finditer(self.text)}
        self.source = ""
        self.newlines = [i for i, c in enumerate(self.text) if c == "\n"]

    def line(self, pos=None):
        import bisect

        return bisect.bisect_left(self.newlines, self.pos if pos is None else pos) + 1

    def fail(self, message):
        line = self.line()
        raise ParseError(f"line {line}: {message}: {self.lines[line - 1].strip()!r}")

    def skip(self):
        m = _SPACE.match(self.text, self.pos)
        if m:
            self.pos = m.end()
        return self.pos < len(self.text)

    def match(self, pattern):
        m = pattern.match(self.text, self.pos)
        if m:
            self.pos = m.end()
        return m

    def until(self, char):
        end = self.text.find(char, self.pos)
        if end < 0:
            self.fail(f"no {char!r} until the end of the text")
        piece = self.text[self.pos : end]
        self.pos = end + 1
        return piece

    def module(self):
        module = Module()
        while self.skip():
            if m := self.match(_HEADER):
                setattr(module, m.group(1), m.group(2).strip())
            elif self.match(_FILE) or self.match(_PRAGMA):
                continue
            elif m := self.match(_VARIABLE):
                module.variables.append(self.variable(m))
            elif m := self.match(_ENTRY):
                self.entry(module, m.group(1))
            elif self.text.startswith(".weak", self.pos) or self.text.startswith(".alias", self.pos):
                self.until(";")
            else:
                self.fail("not understood at module level")
        return module

    def variable(self, m):
        space, align, kind, name, dims, init = m.groups()
        width = type_bytes(kind)
        count = 1
        for d in re.findall(r"\[(\d*)\]", dims):
            count = None if d == "" or count is None else count * int(d)
        data = None
        if init is not None:
            values = re.findall(r"[-\w.]+", init)
            data = b"".join(_literal_bytes(v, width) for v in values)
            data = data.ljust(width * (count or len(values)), b"\0")
            count = count or len(values)
        size = None if count is None else width * count
        return Variable(name, space, int(align or width), size, data, kind)

    def entry(self, module, kind):
        self.skip()
        if kind == "func":
            body = self.text.find(";", self.pos), self.text.find("{", self.pos)
            if 0 <= body[0] < body[1] or body[1] < 0:
                self.until(";")
                return
            self.fail("device functions are not supported: inline them")
        name = re.compile(r"[\w$]+").match(self.text, self.pos).group()
        self.pos += len(name)
        self.skip()
        params = []
        if self.text[self.pos] == "(":
            self.pos += 1
            for align, ptype, pname, count in _PARAM.findall(self.until(")")):
                size = type_bytes(ptype) * int(count or 1)
                params.append(Variable(pname, "param", int(align or type_bytes(ptype)), size, None, ptype))
        kernel = Kernel(name, params)
        while self.skip() and self.text[self.pos] != "{":
            if m := self.match(_TUNING):
                kernel.directives[m.group(1)] = tuple(int(v) for v in m.group(2).split(",") if v.strip())
            elif self.text.startswith(".explicitcluster", self.pos):
                self.pos += len(".explicitcluster")
            else:
                self.fail("not understood before a kernel's body")
        module.kernels[name] = kernel
        self.body(kernel)

    def body(self, kernel):
        scopes, serial = [], 0
        while self.skip():
            c = self.text[self.pos]
            if c == "{":
                self.pos += 1
                scopes.append((serial, {}))
                serial += 1
            elif c == "}":
                self.pos += 1
                scopes.pop()
                if not scopes:
                    break
            elif c == ";":
                self.pos += 1
            elif m := self.match(_LOC):
                self.source = f"{self.files.get(m.group(1), '?')}:{m.group(2)}"
            elif self.match(_PRAGMA) or self.match(_FILE):
                continue
            elif m := self.match(_REG):
                self.registers(kernel, scopes, *m.groups())
            elif m := self.match(_VARIABLE):
                kernel.variables.append(self.variable(m))
            elif m := self.match(_LABEL):
                kernel.labels[self.scoped(scopes[-1], m.group(1))] = len(kernel.instrs)
            elif c == ".":
                self.fail("directive not understood in a kernel")
            else:
                kernel.instrs.append(self.instruction(tuple(scopes)))
        for instr in kernel.instrs:
            scopes = instr.scopes
            instr.operands = [self.resolve(kernel, scopes, o) for o in instr.operands]
            if instr.guard is not None:
                instr.guard = self.resolve(kernel, scopes, instr.guard)
            instr.scopes = ()

    @staticmethod
    def scoped(scope, name):
        return name if scope[0] == 0 else f"{name}@{scope[0]}"

    def registers(self, kernel, scopes, kind, names):
        for item in names.split(","):
            item = item.strip()
            m = re.fullmatch(r"([\w$%]+)<(\d+)>", item)
            every = [f"{m.group(1)}{i}" for i in range(int(m.group(2)))] if m else [item]
            for name in every:
                full = self.scoped(scopes[-1], name)
                scopes[-1][1][name] = full
                kernel.registers[full] = kind

    def instruction(self, scopes):
        start = self.pos
        raw = self.until(";")
        text = " ".join(raw.split())
        m = re.match(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if not m:
            self.pos = start
            self.fail("not an instruction")
        negated, guard, opcode, rest = m.groups()
        guard = None if guard is None else (Not(Sym(guard)) if negated else Sym(guard))
        op, *mods = opcode.split(".")
        try:
            operands = [self.operand(p) for p in _split(rest)]
        except ValueError as e:
            self.pos = start
            self.fail(str(e))
        return Instr(op, tuple(mods), operands, guard, self.line(start), text, self.source, scopes)

    def operand(self, s):
        s = s.strip()
        if s.startswith("{"):
            return Vec(tuple(self.operand(p) for p in _split(s[1:-1])))
        if s.startswith("["):
            inner = _split(s[1:-1])
            coords = tuple(self.operand(p) for p in inner[1:])
            m = re.fullmatch(rf"({_NAME}|\d\w*)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?", inner[0].strip())
            if not m:
                raise ValueError(f"address {s!r} not understood")
            offset = int((m.group(2) or m.group(3) or "0").replace(" ", ""), 0)
            return Mem(self.operand(m.group(1)), offset, coords)
        if s.startswith("!"):
            return Not(self.operand(s[1:]))
        if "|" in s:
            first, second = s.split("|")
            return Pair(self.operand(first), self.operand(second))
        if re.match(r"[-+]?\d", s):
            return _number(s)
        m = re.fullmatch(rf"({_NAME})(?:\s*\+\s*(-?\d+))?", s)
        if not m:
            raise ValueError(f"operand {s!r} not understood")
        return Sym(m.group(1), int(m.group(2) or 0))

    def resolve(self, kernel, scopes, o):
        """Names become registers, special registers or symbols (labels, variables) by the scopes around them."""
        if isinstance(o, Vec):
            return Vec(tuple(self.resolve(kernel, scopes, i) for i in o.items))
        if isinstance(o, Mem):
            base = self.resolve(kernel, scopes, o.base)
            return Mem(base, o.offset, tuple(self.resolve(kernel, scopes, c) for c in o.coords))
        if isinstance(o, Not):
            return Not(self.resolve(kernel, scopes, o.reg))
        if isinstance(o, Pair):
            return Pair(self.resolve(kernel, scopes, o.first), self.resolve(kernel, scopes, o.second))
        if not isinstance(o, Sym) or o == SINK:
            return o
        for scope in reversed(scopes):
            if o.name in scope[1]:
                return Reg(scope[1][o.name])
            label = self.scoped(scope, o.name)
            if label in kernel.labels:
                return Sym(label, o.offset)
        return Special(o.name) if o.name.startswith("%") else o


def _split(s):
    """Split at top-level commas."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(s):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(s[last:i])
            last = i + 1
    tail = s[last:]
    return [*parts, tail] if tail.strip() else parts


def _number(s):
    m = _FLOAT.match(s)
    if m:
        return Imm(int(m.group(2), 16), 32 if m.group(1) in "fF" else 64)
    if "." in s:
        return Imm(struct.unpack("<Q", struct.pack("<d", float(s)))[0], 64)
    s = s.rstrip("U")
    if re.fullmatch(r"[-+]?0[0-7]+", s):
        return Imm(int(s, 8))
    return Imm(int(s, 0))


def _literal_bytes(v, width):
    number = _number(v)
    return (number.value & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
