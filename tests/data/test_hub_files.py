import gc
import os

import pytest

from irasim_diffusers.data.hub import HubFiles


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only systems with fork copy objects to other processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_has_a_separate_folder(tmp_path, monkeypatch):
    """DataLoader workers are forks; with a shared folder, one process would delete files that another one reads."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
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
    other = os.read(reading, 1000).decode()
    os.close(reading)
    assert other != str(parent)
    assert os.path.basename(other).startswith(f"{child}-")
    assert (parent / "file").read_text(encoding="utf-8") == "mine"
    del files
    gc.collect()
    assert not parent.exists()
