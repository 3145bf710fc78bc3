"""
What fits on one GPU? The memory of a training step, by formula.

    python -m tools.memory
    python -m tools.memory --completions 512 --new_tokens 1024

Always there, per parameter: 4 bytes for the weight, 4 for its gradient, 8 for AdamW's moments; 4
for the reference, if there is one; 16 for PPO's critic or PRIME's reward model; 2 for the bf16 copy
in use. (trpo.py: 59 in all, 55 without a reference, all in fp32.) Beyond that

    prompts           prompt tokens x (8 x MLP width + 16 x width + 6 x layers x key/value width)
                      bytes, while the prompts of a step are read
    keys and values   tokens x layers x key/value width x 6 bytes (keys in fp32, as they leave the
                      rotary embedding, values in bf16), while sampling
    sampler           completions x vocabulary x 22 bytes, likewise
    activations       tokens x layers x (34.5 x width + 8 x MLP width) bytes in bf16, while
                      updating; with --gradient_checkpointing 4 x width instead
    logits            completion tokens x vocabulary x 4 bytes (bf16, and their gradient), likewise
    log-softmax       1,024 tokens x vocabulary x 16 bytes (fp32, and its gradient), likewise; it is
                      taken of 1,024 tokens at a time

of which the largest phase counts. Each completion is taken to have a prompt of its own. Tokens
while updating: those of --micro_batch_size completions.
"""
import argparse
from collections import namedtuple

Model = namedtuple("Model", "parameters layers width mlp kv_width vocabulary")
MODELS = {
    "SmolLM2-135M": Model(134.5e6, 30, 576, 1536, 192, 49152),
    "Qwen2.5-0.5B": Model(494e6, 24, 896, 4864, 128, 151936),
    "Qwen2.5-1.5B": Model(1544e6, 28, 1536, 8960, 256, 151936),
    "Qwen2.5-3B": Model(3086e6, 36, 2048, 11008, 256, 151936),
    "Qwen2.5-7B": Model(7616e6, 28, 3584, 18944, 512, 152064),
}
SCRIPTS = {  # bytes per parameter
    "no reference: sft, raft, or --kl_coef 0": 18, "reinforce, reinforce_pp, remax, rloo, grpo": 22,
    "ppo, prime: a second network as well": 38}


def gigabytes(m, per_parameter, args, recompute):
    """What is always there, and the largest phase."""
    tokens, kv_width = args.prompt_tokens + args.new_tokens, m.layers * m.kv_width
    reading = args.completions * args.prompt_tokens * (8 * m.mlp + 16 * m.width + 6 * kv_width)
    sampling = args.completions * (tokens * kv_width * 6 + m.vocabulary * 22)
    layer = 4 * m.width if recompute else 34.5 * m.width + 8 * m.mlp
    targets = args.micro_batch_size * args.new_tokens
    updating = args.micro_batch_size * tokens * m.layers * layer + m.vocabulary * (
        4 * targets + 16 * min(targets, 1024))
    return (m.parameters * per_parameter + max(reading, sampling, updating)) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in dict(completions=256, micro_batch_size=8, prompt_tokens=128,
                            new_tokens=256).items():
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"without it {value}")
    args = parser.parse_args()
    print("| GB, and with --gradient_checkpointing | " + " | ".join(SCRIPTS) + " |")
    print("|---" * (1 + len(SCRIPTS)) + "|")
    for name, model in MODELS.items():
        cells = []
        for size in SCRIPTS.values():
            plain, recomputed = (gigabytes(model, size, args, r) for r in (False, True))
            fits = next((f", {gpu} GB" for gpu in (24, 80) if 1.1 * recomputed <= gpu), ", neither")
            cells.append(f"{plain:.1f} / {recomputed:.1f}{fits}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nIt fits if a GPU of 24 or of 80 GB has it, and a tenth of it more for the allocator.")


if __name__ == "__main__":
    main()
