"""Which programs jax compiles, told by its own monitoring."""

import contextlib
from collections.abc import Iterator

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that are compiled inside the block, a program read from the cache included."""
    names: list[str] = []

    def listen(event: str, _: float, fun_name: str = "", **__: object) -> None:
        if event == COMPILED:
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
