import os

import pytest
from fork_server import fork_server

FORK = """
import gc, os, sys
from pathlib import Path

import huggingface_hub.utils._cache_assets as cache
from irasim_diffusers.data.hub import HubFiles

cache.HF_ASSETS_CACHE = sys.argv[1]
files = HubFiles("org/name", "main")
parent = files._folder()
assert files._folder() == parent
(parent / "file").write_text("mine", encoding="utf-8")
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, str(files._folder()).encode())
    del files
    gc.collect()
    os._exit(0)
os.waitpid(child, 0)
os.close(writing)
other = Path(os.read(reading, 1000).decode())
assert other != parent, other
assert other.name.startswith(f"{child}-"), other
assert (parent / "file").read_text(encoding="utf-8") == "mine"
del files
gc.collect()
assert not parent.exists()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires os.fork")
def test_forked_process_has_a_separate_folder(tmp_path):
    """DataLoader workers may be forks; with one folder, a process would delete files that another reads.

    A new process makes the fork, because a fork of this process would lack its threads.
    """
    result = fork_server().run("-c", FORK, tmp_path)
    assert result.stdout == "done\n", result.stderr
