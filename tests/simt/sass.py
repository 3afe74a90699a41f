"""Reads machine code, of sm_75 to sm_120: how many instructions, and how many in an inner loop.

An instruction has 128 bits: the operation in the lowest 12, the predicate that it depends on in the
next 4. NOP, and what depends on a predicate that is never true, is the assembler's padding and not
counted.

A loop is what lies between a branch backwards and its target. The inner loop of a kernel loads 16
bytes at once from global memory, has the most instructions for tensor cores that any loop has, and
no other such loop inside. Of the ways through it, along branches forward, that have all of these
products the one with the fewest instructions per load is counted. What only some rounds do, such as
to plan samples, is not on it, and a function that it calls is one instruction.

Of the loop around the inner one, the cheapest way with most loads and stores is counted, on which
the inner loop goes round once.
"""

import math
import struct
from typing import NamedTuple

SIZE = 16  # bytes of an instruction
NOP, EXIT, RETURN = 0x918, 0x94D, 0x950
BRANCHES = UNIFORM, BRANCH = 0x547, 0x947
PRODUCT = 0x23C  # HMMA
LOADS = 0x381, 0x981  # LDG
STORES = 0x386, 0x986  # STG
ALWAYS, NEVER = 7, 15  # predicates


class Instruction(NamedTuple):
    """What the loops are found by."""

    counts: bool  # is not padding
    load: bool  # of 16 bytes from global memory
    store: bool  # of 16 bytes
    product: bool
    predicate: int  # 8 more for its opposite
    target: int | None  # of a branch: the number of an instruction
    leaves: bool  # never goes on to the next instruction


class Loop(NamedTuple):
    """One way round."""

    products: int
    loads: int
    stores: int
    instructions: int


def kernels(binary, architecture):
    """{name: instructions} of each kernel of an ELF file."""
    table, entry_size, count, names_index = (
        struct.unpack_from("<Q", binary, 40)[0],
        *struct.unpack_from("<HHH", binary, 58),
    )
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", binary, table + i * entry_size) for i in range(count)
    ]
    names = sections[names_index][4]
    found = {}
    for name, _, _, _, offset, size, *_ in sections:
        text = binary[names + name : binary.index(b"\0", names + name)].decode()
        if text.startswith(".text."):
            words = struct.iter_unpack("<QQ", binary[offset : offset + size])
            found[text.removeprefix(".text.")] = [
                _decode(low | high << 64, number, architecture)
                for number, (low, high) in enumerate(words)
            ]
    return found


def _decode(word, number, architecture):
    operation, predicate = word & 0xFFF, word >> 12 & 15
    target = None
    if operation in BRANCHES:
        near, far = word >> 16 & 0xFF, word >> 34 & (1 << 48) - 1
        far -= far >> 47 << 48
        # from sm_90 on the lowest byte of the distance lies elsewhere
        distance = (far << 8 | near) if architecture >= 90 else far
        target = number + 1 + distance * 4 // SIZE
    conditional = predicate != ALWAYS or operation == UNIFORM or word >> 87 & 7 != ALWAYS
    return Instruction(
        counts=operation != NOP and predicate != NEVER,
        load=operation in LOADS and word >> 73 & 7 >= 6,
        store=operation in STORES and word >> 73 & 7 >= 6,
        product=operation == PRODUCT,
        predicate=predicate,
        target=target,
        leaves=operation in (BRANCH, EXIT, RETURN) and not conditional,
    )


def count(code):
    """How many instructions of a kernel do something."""
    return sum(instruction.counts for instruction in code)


def inner_loops(code):
    """Ways round the inner loop and round the one about it, or None where there is none."""
    loops = {}
    for last, instruction in enumerate(code):
        if instruction.target is not None and instruction.target <= last:
            ways = [way for way in _ways(code, instruction.target, last) if way.loads]
            if ways:
                products = max(way.products for way in ways)
                loops[instruction.target, last] = [w for w in ways if w.products == products]
    most = max((ways[0].products for ways in loops.values()), default=0)
    loops = {place: ways for place, ways in loops.items() if ways[0].products == most}
    depth = {  # counted from the inside
        (first, last): sum(first <= begin and end <= last for begin, end in loops)
        for first, last in loops
    }
    inner, around = (
        [way for place, ways in loops.items() if depth[place] == level for way in ways]
        for level in (1, 2)
    )
    return (
        min(inner, key=lambda way: way.instructions / way.loads, default=None),
        max(around, key=lambda way: (way.loads, way.stores, -way.instructions), default=None),
    )


def _ways(code, first, last):
    """The cheapest ways from the first to the last instruction, whatever there may be on one.

    A branch tells of the instructions before it that depend on its predicate whether they happen.
    """
    leaders = {first} | {i.target for i in code[first:last] if i.target is not None}
    leaders |= {n + 1 for n in range(first, last) if code[n].target is not None or code[n].leaves}
    leaders = sorted(n for n in leaders if first <= n <= last)
    ways = {}  # from the beginning of a block on: {(products, loads, stores): instructions}
    for begin, end in reversed([*zip(leaders, [*leaders[1:], last + 1], strict=True)]):
        block, exit_ = code[begin:end], code[end - 1]
        if end > last:
            after = [({(0, 0, 0): 0}, NEVER)]
        else:
            after = [] if exit_.leaves else [(ways.get(end, {}), exit_.predicate)]
            if exit_.target is not None and exit_.target > end - 1:
                after.append((ways.get(exit_.target, {}), exit_.predicate ^ 8))
        best = ways[begin] = {}
        for known, impossible in after:
            happen = [i for i in block if i.predicate != impossible or impossible == ALWAYS]
            own = [sum(getattr(i, kind) for i in happen) for kind in ("product", "load", "store")]
            for rest, instructions in known.items():
                key = tuple(a + b for a, b in zip(own, rest, strict=True))
                best[key] = min(instructions + count(block), best.get(key, math.inf))
    return [Loop(*key, instructions) for key, instructions in ways[first].items()]
