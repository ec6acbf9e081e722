"""`python -m instdiff_jax COMMAND` is `instdiff COMMAND`."""

from instdiff_jax.cli import main

if __name__ == "__main__":
    main()
