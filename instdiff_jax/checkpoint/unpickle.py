"""Reads the data in a pickle without executing anything it names.

This is not Python's unpickler with a filter: it is a small interpreter of pickle's instructions that
knows dicts, lists, tuples, strings, numbers, and what `torch.save` writes for tensors. Every other
global, and whatever the pickle would build or call with it, becomes an `Inert` object.
"""

import pickletools
from collections.abc import Callable, Iterable
from typing import Any

from instdiff_jax.errors import InputError, short

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_NO_EFFECT = frozenset(("PROTO", "FRAME"))
# Bounds on time and memory. Real files have about 30 instructions per tensor, and at most a few ten thousand tensors.
_MAX_STEPS = 4_000_000
_MAX_DEPTH = 1_000_000
_MAX_ARGUMENTS = 16


class Inert:
    """Stands for an object that was not built; `name` is the class or function that would have made it."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


class Global:
    """The name of a class or function found in a pickle; it is never looked up."""

    def __init__(self, name: str):
        self.name = name


_MARK = object()


def add_items(target: dict, items: Iterable[tuple[Any, Any]]) -> None:
    """Adds items to a dict. Raises ValueError for a key that exists.

    Only text and 64-bit integers can name weights; hashing or showing other keys may take forever.
    """
    for key, value in items:
        if not isinstance(key, str) and not (type(key) is int and -(2**63) <= key < 2**63):
            continue
        if key in target:
            raise ValueError(f"the key {short(key)} occurs twice")
        target[key] = value


class _Machine:
    """The pickle machine: a stack, a memo, and the functions for allowed globals."""

    def __init__(self, functions: dict[str, Callable[..., Any]], persistent_load: Callable[[Any], Any]):
        self.functions = functions
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            self.count(1)
            if name == "STOP":
                return self.stack.pop()
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name not in _NO_EFFECT:
                method = getattr(self, f"op_{name.lower()}", None)
                if method is None:
                    raise ValueError(f"the instruction {name} is not allowed")
                method(argument)
        raise ValueError("it does not end")

    def count(self, steps: int) -> None:
        """Counts work done. More than any real file needs is an error."""
        self.steps += steps
        if self.steps > _MAX_STEPS or max(len(self.stack), len(self.memo)) > _MAX_DEPTH:
            raise ValueError("it has more entries than any checkpoint")

    def pop_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("an item has no beginning")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            add_items(target, zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def call(self, function: Any, arguments: Any) -> Any:
        """The result of a call in a pickle; only functions given to `read_pickle` are called."""
        if not isinstance(function, Global):
            return Inert("unknown object")
        if function.name in self.functions and isinstance(arguments, tuple):
            if len(arguments) > _MAX_ARGUMENTS:
                raise ValueError(f"{function.name} with {len(arguments)} arguments")
            # The memo allows the same list to be passed many times.
            self.count(sum(len(argument) for argument in arguments if isinstance(argument, (list, tuple))))
            return self.functions[function.name](*arguments)
        return Inert(function.name)

    def op_mark(self, _) -> None:
        self.stack.append(_MARK)

    def op_pop(self, _) -> None:
        self.stack.pop()

    def op_pop_mark(self, _) -> None:
        self.pop_mark()

    def op_dup(self, _) -> None:
        self.stack.append(self.stack[-1])

    def op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    op_binget = op_long_binget = op_get

    def op_tuple(self, _) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def op_tuple1(self, _) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_tuple2(self, _) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def op_tuple3(self, _) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def op_list(self, _) -> None:
        self.stack.append(self.pop_mark())

    def op_append(self, _) -> None:
        self.extend([self.stack.pop()])

    def op_appends(self, _) -> None:
        self.extend(self.pop_mark())

    def op_dict(self, _) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def op_setitem(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def op_setitems(self, _) -> None:
        self.set_items(self.pop_mark())

    def op_empty_set(self, _) -> None:
        self.stack.append(Inert("set"))

    def op_additems(self, _) -> None:
        self.pop_mark()

    def op_frozenset(self, _) -> None:
        self.pop_mark()
        self.stack.append(Inert("frozenset"))

    def op_global(self, name: str) -> None:
        self.stack.append(Global(name.replace(" ", ".", 1)))

    def op_stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"))

    def op_reduce(self, _) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    op_newobj = op_reduce

    def op_newobj_ex(self, _) -> None:
        del self.stack[-2:]
        function = self.stack.pop()
        self.stack.append(Inert(function.name if isinstance(function, Global) else "unknown object"))

    def op_obj(self, _) -> None:
        function = self.pop_mark()[0]
        self.stack.append(Inert(function.name if isinstance(function, Global) else "unknown object"))

    def op_inst(self, name: str) -> None:
        self.pop_mark()
        self.stack.append(Inert(name.replace(" ", ".", 1)))

    def op_build(self, _) -> None:
        self.stack.pop()  # an object's state: its attributes hold no weights

    def op_binpersid(self, _) -> None:
        self.stack.append(self.persistent_load(self.stack.pop()))


def read_pickle(
    data: bytes, functions: dict[str, Callable[..., Any]], persistent_load: Callable[[Any], Any], where: str
) -> Any:
    """Reads a pickle as plain data.

    Args:
        data: the pickle.
        functions: functions for the allowed globals, by "module.name". They must be safe
            for any arguments and raise ValueError or TypeError for wrong ones.
        persistent_load: resolves a persistent id; the same rules apply.
        where: the file, for the error.

    Returns:
        Dicts, lists, tuples, strings, numbers, results of `functions`, and `Global` and `Inert` for the rest.

    Raises:
        InputError: if the pickle is incomplete or invalid. InputErrors of the functions pass through.
    """
    try:
        return _Machine(functions, persistent_load).run(data)
    except InputError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: the pickle inside is corrupt ({error})") from error
    except MemoryError as error:
        raise InputError(f"{where}: the pickle inside is corrupt (it claims too much memory)") from error
