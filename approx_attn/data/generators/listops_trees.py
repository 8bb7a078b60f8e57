"""Random ListOps expressions, many at a time.

An expression is a digit or `[OP arg … arg ]` with two or more arguments that are expressions themselves.
Below the greatest depth a node is an operator with probability 1/4, else a digit; the root has depth 1.
An operator is MIN, MAX, MED (median, rounded down) or SM (sum modulo 10), and the number of its arguments
is uniform from 2. Expressions outside the wanted lengths are drawn again.

Trees are kept level by level: level d holds the number of arguments (0 for a digit) of all nodes at depth d,
tree after tree and from left to right. The arguments of the operators of one level are then the next level,
in order, and growth, evaluation and layout are array operations on neighbouring levels.

Source of the definition: Nangia and Bowman, ListOps (NAACL SRW 2018), in the variant of Tay et al., Long Range
Arena (ICLR 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DIGIT_TOKEN = 1  # digit v is token v + 1, and 0 is padding
OPERATORS = ("MIN", "MAX", "MED", "SM")
OPERATOR_TOKEN = 11
END_TOKEN = OPERATOR_TOKEN + len(OPERATORS)
VOCAB_SIZE = END_TOKEN + 1
TOKEN_NAMES = ("<pad>", *"0123456789", *(f"[{name}" for name in OPERATORS), "]")

OPERATOR_PROBABILITY = 0.25
ROOTS_PER_DRAW = 4096


class Expressions(NamedTuple):
    """Expressions as token ids in a row, with their lengths and values.

    Attributes:
        tokens: (total,) uint8.
        lengths: (expressions,) int64, tokens per expression.
        values: (expressions,) uint8, what each expression evaluates to, 0 to 9.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    values: np.ndarray

    def split(self) -> list[np.ndarray]:
        """The tokens of each expression."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def random_expressions(
    rng: np.random.Generator, count: int, *, max_depth: int, max_args: int, min_length: int, max_length: int
) -> Expressions:
    """`count` independent expressions with min_length < number of tokens < max_length.

    Args:
        max_depth: depth of the deepest digits; at least 2.
        max_args: most arguments of an operator; at least 2.
        min_length: at least 1, so that no expression is a lone digit.

    Raises:
        ValueError: hardly any expression has such a length.
    """
    parts: list[Expressions] = []
    found = drawn = 0
    while found < count:
        levels = grow(rng, ROOTS_PER_DRAW, max_depth, max_args, min_length, max_length)
        drawn += ROOTS_PER_DRAW
        if len(levels[0]):
            parts.append(fill(rng, levels))
            found += len(levels[0])
        elif found == 0 and drawn >= 100 * ROOTS_PER_DRAW:
            raise ValueError(
                f"data.min_length={min_length} and data.max_length={max_length} are out of reach for "
                f"data.max_depth={max_depth} and data.max_args={max_args}: none of {drawn} expressions fits."
            )
    joined = Expressions(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    lengths = joined.lengths[:count]
    return Expressions(joined.tokens[: lengths.sum()], lengths, joined.values[:count])


def grow(
    rng: np.random.Generator, roots: int, max_depth: int, max_args: int, min_length: int, max_length: int
) -> list[np.ndarray]:
    """Levels of those of `roots` random trees whose length is right; every root is an operator.

    A root that is a digit has length 1 and would be refused, so none is drawn.
    """
    levels: list[np.ndarray] = []  # number of arguments of each node
    trees: list[np.ndarray] = []  # tree of each node
    tree = np.arange(roots)
    length = np.ones(roots, np.int64)  # tokens of a tree if all nodes without arguments yet are digits
    for depth in range(1, max_depth + 1):
        is_operator = np.full(len(tree), depth == 1)
        if 1 < depth < max_depth:
            is_operator = rng.random(len(tree)) < OPERATOR_PROBABILITY
        num_args = np.where(is_operator, rng.integers(2, max_args + 1, len(tree)), 0)
        levels.append(num_args)
        trees.append(tree)
        length += np.bincount(tree, num_args + is_operator, minlength=roots).astype(np.int64)  # digit -> [OP args ]
        too_long = length >= max_length  # and it only grows: no need to follow it further
        tree = np.repeat(tree, np.where(too_long[tree], 0, num_args))
    fits = (length > min_length) & (length < max_length)
    return [level[fits[tree]] for level, tree in zip(levels, trees, strict=True)]


def fill(rng: np.random.Generator, levels: list[np.ndarray]) -> Expressions:
    """Draw digits and operators for the trees, evaluate them, and write them out from left to right."""
    symbols = [
        np.where(num_args > 0, rng.integers(len(OPERATORS), size=len(num_args)), rng.integers(10, size=len(num_args)))
        for num_args in levels
    ]  # operator or digit of each node

    values, sizes = [symbols[-1]], [np.ones(len(levels[-1]), np.int64)]
    for num_args, symbol in zip(levels[-2::-1], symbols[-2::-1], strict=True):  # from the leaves to the root
        inner = num_args > 0
        value, size = symbol.copy(), np.ones(len(num_args), np.int64)
        value[inner] = evaluate(symbol[inner], num_args[inner], values[0])
        size[inner] = 2 + segment_sums(sizes[0], num_args[inner])
        values.insert(0, value)
        sizes.insert(0, size)

    tokens = np.empty(sizes[0].sum(), np.uint8)
    position = np.cumsum(sizes[0]) - sizes[0]  # of the first token of each node of this level
    for depth, (num_args, symbol, size) in enumerate(zip(levels, symbols, sizes, strict=True)):
        inner = num_args > 0
        tokens[position] = np.where(inner, OPERATOR_TOKEN, DIGIT_TOKEN) + symbol
        tokens[(position + size - 1)[inner]] = END_TOKEN
        if depth + 1 < len(levels):
            child = sizes[depth + 1]
            before = np.cumsum(child) - child  # tokens of all nodes of the next level before this one
            first = np.cumsum(num_args[inner]) - num_args[inner]
            shift = position[inner] + 1 - before[first] if len(child) else np.empty(0, np.int64)
            position = before + np.repeat(shift, num_args[inner])
    return Expressions(tokens, sizes[0], values[0].astype(np.uint8))


def evaluate(operators: np.ndarray, num_args: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """Value of each operator; `arguments` holds those of all operators, one operator after another."""
    if len(operators) == 0:
        return np.empty(0, np.int64)
    owner = np.repeat(np.arange(len(operators)), num_args)
    ordered = np.sort(owner * 10 + arguments) % 10  # the arguments of each operator, sorted
    first = np.cumsum(num_args) - num_args
    last = first + num_args - 1
    median = (ordered[first + (num_args - 1) // 2] + ordered[first + num_args // 2]) // 2
    total = segment_sums(arguments, num_args) % 10
    return np.choose(operators, (ordered[first], ordered[last], median, total))


def segment_sums(items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum of the first counts[0] items, of the next counts[1], and so on; every count at least 1."""
    return np.add.reduceat(items, np.cumsum(counts) - counts) if len(counts) else np.empty(0, items.dtype)
