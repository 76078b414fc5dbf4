"""Other processes: forked children, and compiled kernels kept on disk."""

import os
import sys
import textwrap

import pytest
from tests.kernels import processes
from tests.kernels.processes import as_a_stranger, as_root, run

not_on_windows = pytest.mark.skipif(
    sys.platform == "win32", reason="XDG_CACHE_HOME is not read on Windows"
)

ONE_KERNEL = """
    import torch
    from steadynorm.kernels.cpu import stages as cpu
    x = torch.arange(12.0).reshape(4, 3)
    assert cpu.moments(x).mean.tolist() == [4.5, 5.5, 6.5]
    from steadynorm.kernels.cpu.kernels import forward_kernel
    print(forward_kernel(torch.float32, masked=False).cached)
"""

# A kernel that compiles at once, from a file as all kernels are.
SEVEN = """
    def seven(arguments):
        arguments[0] = 7
"""
LOAD_SEVEN = """
    from seven import seven
    from steadynorm.kernels.cpu import runtime as cpu_runtime
    from steadynorm.kernels.cpu.arguments import Arguments
    kernel = cpu_runtime.compile_kernel(seven, "seven")
    arguments = Arguments()
    kernel(arguments, 1)
    assert arguments.rows == 7
    print(kernel.cached)
"""


@pytest.fixture
def path_to_seven(public):
    """`PYTHONPATH` by which the kernel `seven` is found."""
    (public / "seven.py").write_text(textwrap.dedent(SEVEN))
    return os.pathsep.join(filter(None, (str(public), os.environ.get("PYTHONPATH"))))


@pytest.fixture
def seven(public, path_to_seven):
    """Runs `LOAD_SEVEN` with the cache in `public / "cache"`: is the kernel loaded?"""
    cache = public / "cache"
    cache.mkdir()

    def load(**options):
        environment = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": path_to_seven}
        return run(LOAD_SEVEN, **{**environment, **options}) == ["True"]

    return load


def stored(public):
    return [path for path in (public / "cache").rglob("*") if path.is_file()]


@not_on_windows
def test_the_next_process_finds_the_kernels(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert run(ONE_KERNEL, **home) == ["False"]
    assert run(ONE_KERNEL, **home) == ["True"]


@not_on_windows
def test_a_damaged_kernel_is_compiled_again(seven, public):
    assert not seven()
    assert seven()
    for file in stored(public):
        whole = bytearray(file.read_bytes())
        whole[-len(whole) // 3] ^= 4  # in the machine code
        file.write_bytes(whole)
    assert not seven()
    assert seven()


@as_root
def test_a_kernel_of_somebody_else_is_not_loaded(seven, public):
    assert not seven()
    for file in stored(public):
        os.chown(file, processes.STRANGER, processes.STRANGER)
    assert not seven()


@not_on_windows
def test_a_kernel_that_others_can_write_is_not_loaded(seven, public):
    before = os.umask(0)
    try:
        assert not seven()
    finally:
        os.umask(before)
    made = [public / "cache" / "steadynorm", *stored(public)]
    assert {path.stat().st_mode & 0o077 for path in made} == {0}
    assert seven()
    for file in stored(public):
        file.chmod(0o666)
    assert not seven()


@as_a_stranger
def test_a_cache_that_can_only_be_read_is_used(seven, public):
    (public / "cache" / "steadynorm").mkdir(mode=0o755)
    assert not seven()
    assert seven(stranger=True)


@not_on_windows
def test_without_a_cache_folder_all_works(seven, public):
    (public / "file").write_text("where a folder would have to be")
    assert not seven(XDG_CACHE_HOME=str(public / "file"))


@as_a_stranger
def test_without_a_home_and_an_account_all_works(seven):
    assert not seven(stranger=True, without=("HOME", "XDG_CACHE_HOME"), XDG_CACHE_HOME="")


FORK = """
    import os, signal, warnings
    import torch
    from steadynorm.kernels.cpu import stages as cpu
    from steadynorm.kernels.cpu import slabs
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    x = torch.randn(16, 24, 30, 30)
    right, _ = cpu.normalize(x, None, None, 1e-5)
    assert slabs.cut(16, 24, 900, 4, 2).threads == 2
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang is a failure
        y, _ = cpu.normalize(x, None, None, 1e-5)
        # Not torch.equal: PyTorch's own threads are gone as well, and it does not know.
        os._exit(0 if (y.numpy() == right.numpy()).all() else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    y, _ = cpu.normalize(x, None, None, 1e-5)
    assert torch.equal(y, right)
"""

LOADER = """
    import warnings
    import torch
    from steadynorm.kernels.cpu import stages as cpu
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    x = torch.randn(16, 24, 30, 30)
    right, _ = cpu.normalize(x, None, None, 1e-5)

    class Normalized(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return cpu.normalize(x, None, None, 1e-5)[0]

    loader = torch.utils.data.DataLoader(
        Normalized(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    print(sum(torch.equal(y, right) for y in loader))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    assert run(FORK) == ["0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_data_loader():
    assert run(LOADER) == ["4"]


COMPILING = """
    import os, signal, threading, time
    import torch
    from numba.core.compiler_lock import global_compiler_lock
    from seven import seven
    from steadynorm.kernels.cpu import runtime as cpu_runtime
    from steadynorm.kernels.cpu.arguments import Arguments
    from steadynorm.kernels.cpu.kernels import forward_kernel

    threading.Thread(target=forward_kernel, args=(torch.float32,)).start()
    while global_compiler_lock._lock.acquire(blocking=False):
        global_compiler_lock._lock.release()
        time.sleep(0.001)
    child = os.fork()  # while the thread compiles
    if child == 0:
        signal.alarm(60)  # a hang is a failure
        kernel, arguments = cpu_runtime.compile_kernel(seven, "seven"), Arguments()
        kernel(arguments, 1)
        os._exit(arguments.rows)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_another_thread_compiles(public, path_to_seven):
    assert run(COMPILING, XDG_CACHE_HOME=str(public), PYTHONPATH=path_to_seven) == ["7"]
