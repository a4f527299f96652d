from pathlib import Path

import pytest
import torch

from tests.inference_server import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("moe"))
