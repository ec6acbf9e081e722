"""Settings for every test: full float32 matrix products, no network, one cache of compiled programs."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# Several files compile the same networks; a second run of the tests compiles next to nothing.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))


FAST_FOLDER = ROOT / "tests" / "unit"
# Tests outside it that take a second or two each.
FAST_FILES = {"test_compilation.py", "test_schedule.py", "test_solvers.py"}
# These trace full-size models, read millions of pickle instructions, and start a storage emulator and many commands.
NOT_FAST = {"test_rename.py", "test_torch_file_limits.py", "test_buckets.py"}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what is marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        quick = FAST_FOLDER in item.path.parents or item.path.name in FAST_FILES
        if quick and item.path.name not in NOT_FAST and "slow" not in item.keywords:
            item.add_marker("fast")
    if not config.getoption("--slow"):
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session", autouse=True)
def own_memory():
    """Commands called in the tests' process leave its allocator as it is: what they kept would be kept by all tests."""
    from instdiff_jax.parallel import runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "_mallopt", lambda parameter, value: False)
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose programs run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The folder of tests/support/tiny_checkpoint.py's model, to read only."""
    from tiny_checkpoint import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
    """A pipeline on that checkpoint."""
    from instdiff_jax import Pipeline

    return Pipeline.from_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def storage_url():
    """A storage emulator of this process."""
    from bucket import emulator

    with emulator() as url:
        yield url


@pytest.fixture(scope="module")
def bucket(storage_url, tmp_path_factory):
    """The gs:// path of a new bucket; this process and its children find it."""
    from bucket import environment, make_bucket

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(storage_url).items():
            patch.setenv(name, value)
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield make_bucket(storage_url, f"test-{cache.name}-{os.getpid()}")
