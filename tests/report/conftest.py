"""A saved tiny model for what needs one."""

from pathlib import Path

import pytest

from saved_model import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")
