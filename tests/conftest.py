"""Fixtures shared by the test files."""

import os
import shutil

import pytest

# Nothing here may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import ONNX Runtime before this project
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes side by side (pytest -n) slow each other down many times over if each takes all cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """The shipped model's bundle goes into a cache of this test run, not the user's."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp().parent / "cache")
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The bundle of a tiny model, to look at."""
    from .fuzz import corpus  # with libraries that the lines above have to come before

    return corpus.bundle_folder(tmp_path_factory.mktemp("bundle") / "out")


@pytest.fixture
def copy(whole, tmp_path):
    """The same, to break."""
    return shutil.copytree(whole, tmp_path / "copy")
