"""Products of a few rows, and linear skip paths: the kernels against the plain way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dynadepth.compiled import kernel, linear
from dynadepth.routing.skip_path import LinearPath, Memory, Reality

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    reason = kernel.load()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize(("out", "width"), [(8, 64), (13, 37), (130, 576), (3, 1536), (1, 5)])
def test_the_product_is_that_of_float32(
    dtype: torch.dtype, weight_dtype: torch.dtype, rows: int, out: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, width, generator=generator).to(dtype)
    weight = torch.randn(out, width, generator=generator)
    scale = None
    if weight_dtype is torch.int8:
        scale = torch.rand(out, generator=generator) / 32
        weight = torch.randint(-128, 128, (out, width), generator=generator).to(torch.int8)
    weight = weight.to(weight_dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    expected = x.double() @ weight.double().T
    expected = (expected if scale is None else expected * scale.double()) + bias.double()
    found = torch.ops.dynadepth.small_linear(x, weight, scale, bias)
    assert found.dtype is dtype
    assert found.shape == (rows, 1, out)
    size = (x.double().abs() @ weight.double().abs().T * (1 if scale is None else scale.double())).max().item()
    torch.testing.assert_close(
        found.double(), expected, atol=4e-7 * size, rtol=0 if dtype is torch.float32 else torch.finfo(dtype).eps
    )


def test_a_model_uses_it_for_a_few_rows_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False)).bfloat16()
    few, many = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 9, 64).bfloat16()
    with torch.no_grad():
        expected = model(few), model(many)
    made = linear.make_small(model)
    assert len(made) == 2
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = model(few), model(many)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(e.count for e in profile.key_averages() if e.key == "dynadepth::small_linear") == 2
    assert model(few).requires_grad
    linear.make_plain(made)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_other_dtypes_stay_as_they_are() -> None:
    assert linear.make_small(nn.Linear(8, 8)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "rank", "rows"), [(64, 8, 1), (576, 64, 3), (37, 5, 2), (640, 64, 8)])
@pytest.mark.parametrize("padded", [False, True])
def test_one_token_of_a_skip_path_is_one_kernel(
    dtype: torch.dtype, width: int, rank: int, rows: int, padded: bool
) -> None:
    torch.manual_seed(rank)
    path = LinearPath(width, rank)
    nn.init.normal_(path.write, std=0.3)
    nn.init.normal_(path.bias)
    path.to(dtype)
    prompt, hidden = torch.randn(rows, 7, width).to(dtype).split([4, 3], 1)
    real = torch.rand(rows, 3, generator=torch.Generator().manual_seed(rows)) < 0.5
    tokens = list(zip(hidden.split(1, 1), real.split(1, 1), strict=True))

    def steps() -> tuple[list[torch.Tensor], Memory]:
        memory, found = path(prompt, None, path.begin(rows, hidden))[1], []
        for token, mask in tokens:
            contribution, memory = path(token, Reality.of(mask) if padded else None, memory)
            found.append(contribution)
        return found, memory

    with torch.no_grad():
        expected, memory = steps()
        made = linear.make_small(nn.ModuleList([path]))
        assert made == [path]
        with torch.profiler.profile() as profile:
            found, after = steps()
    assert sum(e.count for e in profile.key_averages() if e.key == "dynadepth::path_step") == 3
    largest = max(t.abs().max().item() for t in expected)
    loose = {"atol": (16 if dtype is torch.float32 else 4) * torch.finfo(dtype).eps * largest, "rtol": 0}
    torch.testing.assert_close(found, expected, **loose)
    for name in ("last", "total", "count"):
        torch.testing.assert_close(getattr(after, name), getattr(memory, name), **loose)
    linear.make_plain(made)
    assert type(path) is LinearPath


@pytest.mark.parametrize("left_over", [0, 1])
def test_threads_share_the_rows_of_a_weight(left_over: int) -> None:
    x, weight = torch.randn(2, 1, 640).bfloat16(), torch.randn(4096 + left_over, 640).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.ops.dynadepth.small_linear(x, weight, None, None)
        torch.set_num_threads(2)
        together = torch.ops.dynadepth.small_linear(x, weight, None, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_a_compiler_without_openmp_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that refuses -fopenmp, and writes its arguments in place of a library."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" --version "*) echo 1; exit 0;; *" -fopenmp "*) exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done; echo built > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    for _ in range(2):  # said again in the next process, for what was kept
        with pytest.warns(UserWarning, match="has no OpenMP"):
            library = kernel._built(str(compiler))
    assert Path(library).read_text() == "built\n"
