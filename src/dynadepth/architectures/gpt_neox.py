"""GPT-NeoX and Pythia: attention and MLP side by side on one residual; queries, keys and values in one matrix."""

from dynadepth.architectures.spec import ArchitectureSpec

GPT_NEOX = ArchitectureSpec(
    model_types=("gpt_neox",),
    attention="attention",
    parallel="use_parallel_residual",
    projector=None,
    note="queries, keys and values come from one fused matrix",
)
