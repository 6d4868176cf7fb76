"""The embedded models' weights for llama.cpp, in bf16 and Q8_0: the numbers that transformers computes with."""

import tempfile
from pathlib import Path

from dynadepth import hub


def gguf_files(name: str, folder: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    """`folder/NAME-KIND.gguf` for each kind (`bf16`, `q8_0`), made from the embedded GGUF file where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{name}-{kind}.gguf" for kind in kinds}
    missing = {kind: path for kind, path in files.items() if not path.exists()}
    if missing:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source = hub.fetch_gguf(name, Path(work))
            for kind, path in missing.items():
                made = Path(work) / path.name
                rewrite(source, made, kind)
                made.rename(path)
    return files


def rewrite(source: Path, target: Path, kind: str) -> None:
    """The same model and tokenizer with every matrix dequantised, rounded to bfloat16 and, for `q8_0`, quantised."""
    import gguf
    from gguf.quants import dequantize, quantize

    bf16, wanted = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType[kind.upper()]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        of_array = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of_array)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            values = quantize(values, bf16)
            values = values if wanted == bf16 else quantize(dequantize(values, bf16), wanted)
            writer.add_tensor(tensor.name, values, raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
