"""What every test stands on, stated before jax loads: eight CPU devices, no network, a quiet libtpu."""

import os

# A platform named beforehand is kept: `JAX_PLATFORMS=cuda,cpu bash scripts/test.sh tests/kernels` uses a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Of a flag given twice XLA takes the last, so the suite has its eight devices whatever was set before.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # LLVM's optimisations are a third of the suite's time, which is compiling mostly. What XLA itself makes of a
    # program (fusion, buffers, sharding) stays as users have it; a GPU's programs are left alone, and so are the TPU's,
    # which do without LLVM.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# libtpu compiles for machines that are not there. Without these it asks a metadata server what machine this
# is, complains at length when none answers, and lets no second process load it.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-4")

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would need the network fails at once and says so
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests start subprocesses

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Compilation makes an example's first run slow and its next ones fast: a deadline would only measure that.
hypothesis.settings.register_profile("maxlike", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("maxlike")


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight CPU devices, in order."""
    found = jax.devices("cpu")
    assert len(found) == 8, f"{len(found)} CPU devices and not 8: was jax used before tests/conftest.py?"
    return found


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's compilation cache. Each worker has its own, since JAX writes to one without a lock."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True, scope="session")
def _programs_of_the_command_line_are_kept_elsewhere(programs: Path) -> Iterator[None]:
    """In this process by the constant, in its children by the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maxlike.cli.PROGRAMS", str(programs))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
        yield


@pytest.fixture(autouse=True)
def _no_test_leaves_a_compilation_cache_behind() -> Iterator[None]:
    # The command line sets one for its process, which here is every later test's too. Those that compile for a TPU
    # would find their programs in it, put there by another, and no host without that TPU can load them.
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    if any(getattr(jax.config, name) != value for name, value in before.items()):
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX decides once whether it has one


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_module() -> Iterator[None]:
    # XLA:CPU maps every program into memory several times. The whole suite's come to more mappings than Linux allows a
    # process (vm.max_map_count, 65,530), and the compiler crashes when it gets no more. Modules share small programs,
    # so they are kept while there is ample room for the next module's.
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > 10_000:
        jax.clear_caches()
