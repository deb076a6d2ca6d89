"""How many operations one unlearning score takes on gemma-2-2b, counted and not run.

    python benchmarks/unlearning_operations.py [--length 150] [--d-sae 16384]

Multiply-adds of the matrix products of one SAE's evaluation, from the model's dimensions: attention
scores, norms and what is done once per search are left out on both sides. Assumptions, all to be
seen below: 533 + 308 known questions, prompts of `--length` tokens, two corpora of 1024 sequences
of 1024 tokens, 16 interventions. The cached evaluator is counted twice: when every intervention is
another computation from the first position on (the worst case), and when a chosen feature fires in
half of the prompts, first at half of the length, and half of the interventions that fire are the
same as others.
"""

from __future__ import annotations

import argparse

D_MODEL, D_HEAD, HEADS, KV_HEADS, D_MLP, VOCABULARY, LAYERS = 2304, 256, 8, 4, 9216, 256_000, 26
QUESTIONS, INTERVENTIONS, CORPUS_TOKENS = 533 + 308, 16, 2 * 1024 * 1024

KEYS = 2 * D_MODEL * D_HEAD * KV_HEADS
LAYER = KEYS + 2 * D_MODEL * D_HEAD * HEADS + 3 * D_MODEL * D_MLP


def saebench(layer: int, length: int, d_sae: int) -> float:
    """All layers, all positions, the whole vocabulary; the SAE encodes and decodes in between."""
    encode = D_MODEL * d_sae
    sparsity = CORPUS_TOKENS * ((layer + 1) * LAYER + encode)
    asked = LAYERS * LAYER + VOCABULARY * D_MODEL + 3 * encode  # encodes once, decodes twice
    return sparsity + INTERVENTIONS * QUESTIONS * length * asked


def cached(layer: int, length: int, d_sae: int, share: float) -> float:
    """Encodes once; the layers behind the hook for a share of all rows' positions.

    In the last layer keys and values of all of them, everything else of one position.
    """
    encode = D_MODEL * d_sae
    encoding = (CORPUS_TOKENS + QUESTIONS * length) * encode
    rows = INTERVENTIONS * QUESTIONS
    after = length * ((LAYERS - layer - 2) * LAYER + KEYS) + LAYER
    return encoding + share * rows * after


def main() -> None:
    """Print a row for each layer of the seed study and of SAEBench's published SAEs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=150, help="tokens of a prompt")
    parser.add_argument("--d-sae", type=int, default=16_384)
    arguments = parser.parse_args()
    sizes = (arguments.length, arguments.d_sae)
    print("10^12 multiply-adds of one score, gemma-2-2b")
    print("layer  saebench  cached: worst  ratio  cached: 1/8 of it  ratio")
    for layer in (5, 12, 19):
        theirs = saebench(layer, *sizes)
        worst, usual = (cached(layer, *sizes, share=share) for share in (1.0, 0.125))
        print(
            f"{layer:5}  {theirs / 1e12:8.0f}  {worst / 1e12:13.0f}  {theirs / worst:5.1f}  "
            f"{usual / 1e12:17.0f}  {theirs / usual:5.1f}"
        )


if __name__ == "__main__":
    main()
