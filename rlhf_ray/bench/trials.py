"""What was tried to make a step faster on CPUs, each against what it would replace.

    python -m rlhf_ray.bench.trials [--compile] [NAME ...]

One thread unless said otherwise, bfloat16 (float32 and fewer trials on processors without instructions for that), GPT-2 of 4.3 M
parameters (4 layers, width 256, vocabulary 4,096), 16 rows of 32 + 48 tokens. Prints one line per trial: milliseconds of both,
their ratio, and whether it was kept. Median of 15 (imports: of 5, workers: of 3), in turns. NAME: one of TRIALS; without one,
all. All are without `cpu`, whose parts rlhf_ray/bench/ablation.py measures.
"""

import os
import sys

import torch

from rlhf_ray.bench.generation_trials import decode_attention, generation, spinning
from rlhf_ray.bench.start_trials import imports, workers
from rlhf_ray.bench.training_trials import (
    activation,
    adam,
    attention,
    attention_weights,
    compiled,
    embedding_gradient,
    entropy_beside_logprobs,
    gradient_at_one_column,
    gradient_bucket,
    head,
    last_feed_forward,
    rows_of_unlike_length,
    weights_in_16_bits,
)
from rlhf_ray.bench.trial import NARROW

# First those of other processes, before threads of this one spin.
TRIALS = (spinning, imports, workers, activation, head, gradient_at_one_column, entropy_beside_logprobs,
          rows_of_unlike_length, attention, attention_weights, weights_in_16_bits, last_feed_forward, adam,
          decode_attention, generation, gradient_bucket, embedding_gradient)  # fmt: skip
OF_BFLOAT16 = attention_weights, weights_in_16_bits

if __name__ == "__main__":
    os.environ["RLHF_RAY_CPU"] = "off"
    torch.set_num_threads(1)
    asked = [name for name in sys.argv[1:] if name != "--compile"]
    for part in TRIALS:
        if part.__name__ in asked or (not asked and (NARROW or part not in OF_BFLOAT16)):
            part()
    if "--compile" in sys.argv:
        compiled()
