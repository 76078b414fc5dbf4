"""Other processes: forked children, and compiled kernels kept on disk."""

import os
import subprocess
import sys
import textwrap

import pytest

ONE_KERNEL = """
    import torch
    from steadynorm.kernels.cpu import stages as cpu
    x = torch.arange(12.0).reshape(4, 3)
    assert cpu.moments(x).mean.tolist() == [4.5, 5.5, 6.5]
    from steadynorm.kernels.cpu.kernels import forward_kernel
    print(forward_kernel(torch.float32, masked=False).cached)
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="XDG_CACHE_HOME is not read on Windows")
def test_the_next_process_finds_the_kernels(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert run(ONE_KERNEL, **home) == ["False"]
    assert run(ONE_KERNEL, **home) == ["True"]
    (folder,) = (tmp_path / "steadynorm").iterdir()
    stored = list(folder.rglob("*.nbc"))
    assert stored
    for file in stored:
        file.write_bytes(file.read_bytes()[:100])
    assert run(ONE_KERNEL, **home) == ["False"]  # damaged: compiled anew, no harm


@pytest.mark.skipif(sys.platform == "win32", reason="XDG_CACHE_HOME is not read on Windows")
def test_without_a_cache_folder_all_works(tmp_path):
    file = tmp_path / "file"
    file.write_text("where a folder would have to be")
    assert run(ONE_KERNEL, XDG_CACHE_HOME=str(file)) == ["False"]


FORK = """
    import os, signal, warnings
    import torch
    from steadynorm.kernels.cpu import stages as cpu
    from steadynorm.kernels.cpu import slabs
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    x = torch.randn(16, 24, 30, 30)
    right, _ = cpu.normalize(x, None, None, 1e-5)
    assert slabs.plan(16, 24, 900, 4, 2).threads == 2
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
