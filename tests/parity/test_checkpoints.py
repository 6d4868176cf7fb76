"""The base keeps its parameter names, and `save_pretrained` writes the base model alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .matrix import CELLS, Cell, inputs
from .models import FAMILIES, tiny

ROUTERS = [cell for cell in CELLS if cell.sticky]
"""One cell a target: routers are the same modules at every granularity."""


@pytest.mark.parametrize("cell", ROUTERS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_files_are_the_base_models(name: str, cell: Cell, tmp_path: Path) -> None:
    model, batch = tiny(name), inputs()
    wanted, names = model(**batch).logits, [key for key, _ in model.named_parameters()]
    state = dict(model.state_dict())
    model.save_pretrained(tmp_path / "bare")

    cell.attach(model)
    assert [key for key, _ in model.named_parameters() if ".depth_" not in key] == names
    routed = {key: tensor for key, tensor in model.state_dict().items() if ".depth_" not in key}
    assert list(routed) == list(state)
    assert all(tensor.data_ptr() == state[key].data_ptr() for key, tensor in routed.items())
    model.load_state_dict(state, strict=False)

    model.save_pretrained(tmp_path / "routed")
    files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("bare", "routed")]
    assert files[0] == files[1]
    bare, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("bare", "routed"))
    assert bare.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in bare.items())
    assert (tmp_path / "bare/config.json").read_text() == (tmp_path / "routed/config.json").read_text()

    plain = type(tiny(name))
    again, info = plain.from_pretrained(
        tmp_path / "routed", output_loading_info=True, attn_implementation=model.config._attn_implementation
    )
    assert type(again) is plain
    assert not any(info.values()), info
    assert torch.equal(again(**batch).logits, wanted)
