"""Reads a CUDA source text: the names in it that C++ itself does not tell.

The text is the project's own, so simple patterns do; what they misread does not compile.
"""

import dataclasses
import re

BOUNDS = r"__launch_bounds__\(((?:[^()]|\([^()]*\))*)\)"
ENTRY = re.compile(rf"__global__\s+void\s+(?:{BOUNDS}\s*)?(\w+)\s*\(([^)]*)\)")
STRUCT = re.compile(r"\bstruct\s+(?:alignas\([^)]*\)\s*)?(\w+)\s*\{")
MEMBERS = re.compile(r"(?:[\w:]+\s+)+(\w+(?:\s*,\s*\w+)*)\s*")


@dataclasses.dataclass
class Entry:
    """A kernel: its name, ``__launch_bounds__`` and the names and types of its parameters."""

    name: str
    bounds: str  # C++ expressions: most threads per block, least blocks per multiprocessor
    parameters: list  # of (type, name)


def entries(code):
    """The kernels of a source text by name."""
    found = {}
    for bounds, name, declaration in ENTRY.findall(_without_comments(code)):
        words = [re.findall(r"\w+", parameter) for parameter in declaration.split(",")]
        types = [(" ".join(w[:-1]).removeprefix("const "), w[-1]) for w in words if w]
        found[name] = Entry(name, bounds, types)
    return found


def structs(code):
    """The names of the data members of each struct of a source text, by the struct's name."""
    code = _without_comments(code)
    return {match[1]: _members(_block(code, match.end())) for match in STRUCT.finditer(code)}


def lines(code):
    """The (file, line number, text) of each line, as its #line directives say."""
    file, number = "kernel.cu", 1
    for text in code.split("\n"):
        directive = re.fullmatch(r'\s*#line (\d+) "(.*)"', text)
        if directive:
            number, file = int(directive[1]), directive[2]
        else:
            yield file, number, text
            number += 1


def _without_comments(code):
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.S)
    return re.sub(r"//.*|^\s*#.*$", "", code, flags=re.M)


def _block(code, start):
    """The text from behind an opening brace to its closing one; a block inside is but a ``;``"""
    depth, text = 1, ""
    for character in code[start:]:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            break
        if depth == 1:
            text += ";" if character == "}" else character
    return text


def _members(body):
    declarations = (MEMBERS.fullmatch(statement.strip()) for statement in body.split(";"))
    return [name for match in declarations if match for name in re.findall(r"\w+", match[1])]
