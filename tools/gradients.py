"""
Which gradient does each script follow? Most scripts divide by lengths or by standard deviations, so
their expected gradient is not exactly that of J = E[score] - kl_coef * KL(pi || pi_ref). This tool
computes both gradients and prints how they differ, as tables in markdown.

    python -m tools.gradients        three minutes

Each cell is "cosine / length". A cosine of 1 means that the two gradients have the same direction.
The length is that of the expected gradient, divided by that of the gradient of J.

The world is small enough for exact answers. There are 2 prompts, and each has its own table as a
policy: 3 symbols, of which 0 is EOS, and at most 3 tokens, which makes 15 completions. For each
batch, the loss is composed of the script's functions as train() composes them. The whole batch is
one mini-batch, and pi = pi_old. The derivatives of the loss with respect to the log-probs are
averaged over all batches of N = 4 completions, each with its probability, or over --batches random
batches of N = 16 and of 64. K is the group size. The last column has the cosine at N = 64 in worlds
with other random numbers: the median, the lowest and the highest.

Rows without a KL are compared with the gradient of E[score]. PRIME's reward model is as at the
start, so that q = 0. A row "only" is RLOO with a sum over tokens and one change that GRPO makes.
"""
import argparse
import itertools
import math
from collections import namedtuple

import torch
from tqdm import tqdm

from common import (kl_estimate, normalize_rewards, ppo_clip_loss, returns_to_go, token_rewards,
                    whiten)
from grpo import group_advantages, grpo_loss
from ppo import gae
from prime import implicit_rewards, prime_advantages
from raft import best_of_k
from reinforce import reinforce_loss
from reinforce_pp import reinforce_pp_advantages, reinforce_pp_baseline_advantages
from remax import remax_advantages
from rloo import leave_one_out_advantages
from trpo import surrogate

KL_COEF, CLIP_EPS, REWARD_CLIP = 0.1, 0.2, 5.0
PARTS = 20   # the random batches are split into so many parts, for the standard errors
OTHERS = 20  # worlds with other random numbers
PREFIXES = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
SCORES = dict(binary="0 or 1", normal="normally distributed")
SEQUENCES = [p + (0,) for p in PREFIXES] + list(itertools.product((1, 2), repeat=3))
MASK = torch.tensor([[float(t < len(y)) for t in range(3)] for y in SEQUENCES]).double()
SYMBOLS = torch.tensor([y + (0,) * (3 - len(y)) for y in SEQUENCES])                  # (15, 3)
STATES = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else -1 for t in range(3)]
                       for y in SEQUENCES])                                           # (15, 3)

# Logits are (2, 7, 3): prompt, prefix, symbol. Scores are (30,): the 15 completions of each prompt.
World = namedtuple("World", "logits ref_logits scores")
# What a script knows of a batch of n: (n,) or (n, 3) each. Only the last two depend on the batch.
Batch = namedtuple("Batch", "old_logprobs ref_logprobs mask kl scores greedy_scores mean_score "
                            "values z_scores is_best")


def make_world(kind, distance=1.5, seed=19):
    """kind of scores: "binary", 0 or 1; or "normal". distance: how far the reference is away."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    uniform = torch.rand(2, 15, generator=generator, dtype=torch.float64)
    scores = (uniform < torch.tensor([[0.75], [0.3]])).double()
    if kind == "normal":
        scores = torch.randn(2, 15, generator=generator, dtype=torch.float64)
    return World(logits, logits + distance * noise, scores.flatten())


def completion_logprobs(logits):
    """(2, 7, 3) -> (30, 3): the log-probs of the tokens of all completions, 0 on padding."""
    return (logits.log_softmax(-1)[:, STATES, SYMBOLS] * MASK).flatten(0, 1)


def all_completions(world):
    """-> a Batch of all 30, and their probabilities (30,), which sum to 1 for each prompt."""
    old_logprobs, ref_logprobs = map(completion_logprobs, (world.logits, world.ref_logits))
    scores, mask = world.scores, MASK.repeat(2, 1)
    probabilities = old_logprobs.sum(dim=1).exp()
    kl = kl_estimate(old_logprobs, ref_logprobs, "k1")
    is_greedy = (world.logits.argmax(-1)[:, STATES] == SYMBOLS) | (MASK == 0)         # (2, 15, 3)
    greedy_scores = scores[is_greedy.all(-1).flatten()].repeat_interleave(15)
    mean_score = (probabilities * scores).sum() / 2
    # The value of a prefix is the mean return of all completions that begin with it.
    returns = returns_to_go(token_rewards(scores, kl, mask, KL_COEF), mask)
    states = torch.cat([STATES, torch.where(STATES < 0, -1, STATES + 7)])             # (30, 3)
    weights = (states[:, None] == states) * probabilities[:, None]                    # (30, 30, 3)
    values = (weights * returns).sum(dim=1) / weights.sum(dim=1)
    unknown = torch.full_like(scores, math.nan)  # before there is a batch
    return Batch(old_logprobs, ref_logprobs, mask, kl, scores, greedy_scores,
                 mean_score.expand(30), values, unknown, unknown), probabilities


def objective_gradient(world, kl_coef):
    """The gradient of J with respect to the logits, exactly: -> (2, 7, 3)."""
    logits = world.logits.clone().requires_grad_()
    logps = completion_logprobs(logits).sum(dim=1)
    ref_logps = completion_logprobs(world.ref_logits).sum(dim=1)
    J = (logps.exp() * (world.scores - kl_coef * (logps - ref_logps))).sum() / 2
    return torch.autograd.grad(J, logits)[0]


# The losses, as phases 3 and 4 of each train() have them: b is a Batch, K the group size. The whole
# batch is one mini-batch; these three are the lines in which the scripts compute `share`.

def by_token(b):
    return b.mask / b.mask.sum()


def by_completion(b):
    return b.mask / b.mask.sum(dim=1, keepdim=True) / len(b.mask)


def sum_over_tokens(b):
    return b.mask / len(b.mask)


def reinforce(logprobs, b, K):
    """The baseline is the expected score; the script's is a moving average of scores."""
    advantages = b.scores - KL_COEF * b.kl.sum(dim=1) - b.mean_score
    return (reinforce_loss(logprobs, advantages) * sum_over_tokens(b)).sum()


def clip_loss(logprobs, b, advantages):
    losses, _ = ppo_clip_loss(logprobs, b.old_logprobs, advantages, CLIP_EPS)
    return (losses * by_token(b)).sum()


def reinforce_pp(logprobs, b, K):
    return clip_loss(logprobs, b, reinforce_pp_advantages(b.z_scores, b.kl, b.mask, KL_COEF))


def group_baseline(logprobs, b, K):
    loss = clip_loss(logprobs, b, reinforce_pp_baseline_advantages(b.scores, b.mask, K))
    k2 = kl_estimate(logprobs, b.ref_logprobs, "k2")
    return loss + KL_COEF * (k2 * by_token(b)).sum()


def ppo(logprobs, b, K, lam=0.95):
    shaped = token_rewards(b.scores, b.kl, b.mask, KL_COEF)
    advantages, _ = gae(shaped, b.values, b.mask, gamma=1.0, lam=lam)
    return clip_loss(logprobs, b, whiten(advantages, b.mask))


def ppo_at_start(logprobs, b, K):
    return ppo(logprobs, b._replace(values=torch.zeros_like(b.values)), K)


def trpo(logprobs, b, K):
    advantages = reinforce_pp_advantages(b.z_scores, b.kl, b.mask, KL_COEF)
    L = surrogate(logprobs, logprobs.detach(), advantages)
    return -(L * by_token(b)).sum()  # TRPO maximises


def rloo(logprobs, b, K):
    advantages = leave_one_out_advantages(b.scores - KL_COEF * b.kl.sum(dim=1), K)
    return clip_loss(logprobs, b, advantages[:, None])


def grpo_parts(advantages_of, share_of, kl_coef):
    """GRPO's loss, or only some of what it has beyond RLOO."""
    def loss(logprobs, b, K):
        losses, _ = grpo_loss(logprobs, b.old_logprobs, b.ref_logprobs, advantages_of(b.scores, K),
                              CLIP_EPS, kl_coef)
        return (losses * share_of(b)).sum()
    return loss


grpo = grpo_parts(group_advantages, by_completion, KL_COEF)
std_only = grpo_parts(group_advantages, sum_over_tokens, 0.0)
length_only = grpo_parts(leave_one_out_advantages, by_completion, 0.0)
k3_only = grpo_parts(leave_one_out_advantages, sum_over_tokens, KL_COEF)


def remax(logprobs, b, K):
    advantages = remax_advantages(b.scores, b.greedy_scores, b.kl, b.mask, KL_COEF)
    return clip_loss(logprobs, b, advantages)


def prime(logprobs, b, K):
    q = implicit_rewards(b.ref_logprobs, b.ref_logprobs, 0.05)  # 0: prm starts as the reference
    return clip_loss(logprobs, b, prime_advantages(q, b.scores, b.mask, K))


def raft(logprobs, b, K):
    chosen = b.mask * b.is_best[:, None]
    return -(logprobs * chosen / chosen.sum().clamp(min=1)).sum()


def kl_in_reward(logprobs, b, K):
    return (reinforce_loss(logprobs, -b.kl.sum(dim=1)) * sum_over_tokens(b)).sum()


def kl_in_loss(kind):
    return lambda logprobs, b, K: kl_estimate(logprobs, b.ref_logprobs, kind).sum()


NO_KL = (prime, raft, std_only, length_only)
ROWS = [("reinforce", 1, reinforce),
        ("reinforce_pp", 1, reinforce_pp),
        ("reinforce_pp --group_baseline", 2, group_baseline),
        ("reinforce_pp --group_baseline", 4, group_baseline),
        ("ppo, critic at 0", 1, ppo_at_start),
        ("ppo, exact critic", 1, ppo),
        ("trpo, its gradient g", 1, trpo),
        ("rloo", 2, rloo), ("rloo", 4, rloo),
        ("grpo", 2, grpo), ("grpo", 4, grpo),
        ("grpo, only the std", 4, std_only), ("grpo, only the mean over tokens", 4, length_only),
        ("grpo, only k3", 4, k3_only),
        ("remax", 1, remax),
        ("prime, q = 0", 2, prime), ("prime, q = 0", 4, prime),
        ("raft", 2, raft), ("raft", 4, raft)]
KL_ROWS = [("k1 in the reward", kl_in_reward), ("k1 in the loss", kl_in_loss("k1")),
           ("k2 in the loss", kl_in_loss("k2")), ("k3 in the loss", kl_in_loss("k3"))]


# Expectations. A batch is n indices of completions, 0 to 29; K neighbours are a group.

def all_batches(world, n, K):
    """-> indices (batches, n), and the probability of each batch (batches,).

    The members of a group come in every order, because raft.py takes the first of those that are
    equally good. The order of the groups changes nothing, so one order stands for all.
    """
    _, probabilities = all_completions(world)
    members = torch.cartesian_prod(*[torch.arange(15)] * K).view(-1, K)
    groups = torch.cat([members, members + 15])
    chances = probabilities[groups].prod(dim=1) / 2
    picks = torch.combinations(torch.arange(len(groups)), n // K, with_replacement=True)
    # The number of orders is (n / K)! / (m! for each group that is m times in the batch). To get
    # m!, multiply for each group how often it has occurred so far: 1 * 2 * ... * m.
    so_far = (picks[:, :, None] == picks[:, None, :]).tril().sum(dim=2)
    orders = math.factorial(n // K) / so_far.prod(dim=1)
    return groups[picks].flatten(1), orders * chances[picks].prod(dim=1)


def random_batches(world, n, K, count, generator):
    """-> indices (count, n): for each group a prompt, and then K completions of this prompt."""
    _, probabilities = all_completions(world)
    prompts = torch.randint(2, (count * n // K,), generator=generator)
    members = torch.multinomial(probabilities.view(2, 15)[prompts], K, True, generator=generator)
    return (members + 15 * prompts[:, None]).view(count, n)


def derivatives(world, indices, weights, K, losses):
    """The weighted sum over batches of d loss / d log-probs -> (losses, 30, 3)."""
    batch = Batch(*(x[indices] for x in all_completions(world)[0]))
    # vmap, below, runs a loss on all batches at once. It can neither follow the `if` in
    # normalize_rewards nor select rows, so that these two parts of phase 3 stand here.
    if reinforce_pp in losses or trpo in losses:
        z_scores = [normalize_rewards(scores, REWARD_CLIP) for scores in batch.scores]
        batch = batch._replace(z_scores=torch.stack(z_scores))
    if raft in losses:
        groups = batch.scores.view(-1, K)
        best = best_of_k(batch.scores.flatten(), K)[groups.amax(1) > groups.amin(1)]
        is_best = torch.zeros_like(batch.scores).flatten().index_fill(0, best, 1)
        batch = batch._replace(is_best=is_best.view_as(batch.scores))
    sums = torch.zeros(len(losses), 30, 3, dtype=torch.float64)
    for i, loss in enumerate(losses):
        of_one_batch = torch.func.grad(lambda logprobs, b: loss(logprobs, b, K))
        gradients = torch.func.vmap(of_one_batch)(batch.old_logprobs, batch)  # (batches, n, 3)
        weighted = weights[:, None, None] * gradients
        sums[i].index_add_(0, indices.flatten(), weighted.flatten(0, 1))
    return sums


def expected_gradients(world, n, K, losses, count=None):
    """-> (parts, losses, 2, 7, 3): gradients whose sum over the parts is the expected gradient.

    Exact, in one part; or from `count` random batches, in PARTS parts.
    """
    if count is None:
        indices, weights = all_batches(world, n, K)
        chunks = zip(indices.split(20_000), weights.split(20_000))
        tables = sum(derivatives(world, *chunk, K, losses) for chunk in chunks)[None]
    else:
        generator, size = torch.Generator().manual_seed(n), count // PARTS
        weights = torch.full((size,), 1 / (size * PARTS), dtype=torch.float64)
        tables = torch.stack([derivatives(world, random_batches(world, n, K, size, generator),
                                          weights, K, losses) for _ in range(PARTS)])
    logits = world.logits.clone().requires_grad_()
    gradients = torch.autograd.grad(completion_logprobs(logits), logits, tables.flatten(0, 1),
                                    is_grads_batched=True)[0]
    return gradients.view(*tables.shape[:2], *logits.shape)


def compare(parts, exact):
    """(parts, 2, 7, 3), (2, 7, 3) -> cosine and length (2,), their standard errors (2,).

    The errors are those of the jackknife, which leaves out one part at a time.
    """
    def cosine_and_length(gradient):
        product = (gradient * exact).sum() / exact.norm()
        return torch.stack([product / gradient.norm(), gradient.norm() / exact.norm()])
    whole, n = parts.sum(dim=0), len(parts)
    if n == 1:
        return cosine_and_length(whole), torch.zeros(2)
    others = torch.stack([cosine_and_length((whole - part) * n / (n - 1)) for part in parts])
    return cosine_and_length(whole), others.std(dim=0) * (n - 1) / n**0.5


# The tables.

TEXT = """\
The scores are {scores}. Their mean is {score[0]:.2f} for one prompt and {score[1]:.2f} for
the other. A completion has {tokens:.2f} tokens and a KL of {kl:.2f} nats, on average. The standard
errors are at most {errors[0]:.4f} for a cosine and {errors[1]:.3f} for a length.
"""
KL_TEXT = """\
The KL alone, summed over the tokens, compared with the gradient of KL(pi || pi_ref). The columns
differ in the distance from the reference, in nats per completion.
"""


def measure(world, rows, n, K, count):
    """-> cosine and length of each row (rows, 2), and their standard errors (rows, 2)."""
    gradients = expected_gradients(world, n, K, [loss for _, _, loss in rows], count)
    found = [compare(gradients[:, i], -objective_gradient(world, 0.0 if loss in NO_KL else KL_COEF))
             for i, (_, _, loss) in enumerate(rows)]
    return [torch.stack(part) for part in zip(*found)]


def score_table(kind, count, progress):
    """The table of one kind of scores, as text."""
    world, cells, largest = make_world(kind), {row: [] for row in ROWS}, torch.zeros(2)
    if kind != "binary":  # prime.py takes scores from 0 to 1
        cells = {row: [] for row in ROWS if row[2] is not prime}
    for K in (1, 2, 4):
        rows = [row for row in cells if row[1] == K]
        for n in (4, 16, 64):
            found, errors = measure(world, rows, n, K, None if n == 4 else count)
            largest = torch.maximum(largest, errors.amax(dim=0))
            for row, (cosine, length) in zip(rows, found):
                cells[row].append(f"{cosine:.4f} / {length:.3f}")
            progress.update()
        others = torch.stack([measure(make_world(kind, seed=seed), rows, 64, K, count // 20)[0]
                              for seed in range(100, 100 + OTHERS)])[:, :, 0]
        for row, cosines in zip(rows, others.T):
            cells[row].append(f"{cosines.median():.3f} "
                              f"({cosines.min():.3f} to {cosines.max():.3f})")
        progress.update()
    batch, p = all_completions(world)
    lines = [TEXT.format(scores=SCORES[kind], score=(p * batch.scores).view(2, 15).sum(dim=1),
                         kl=p @ batch.kl.sum(dim=1) / 2, tokens=p @ batch.mask.sum(dim=1) / 2,
                         errors=largest),
             f"| script | K | kl_coef of J | N = 4 | N = 16 | N = 64 | {OTHERS} other worlds |",
             "|---|---|---|---|---|---|---|"]
    for (name, K, loss), found in cells.items():
        kl_coef = "0" if loss in NO_KL else str(KL_COEF)
        lines.append(f"| {' | '.join([name, str(K), kl_coef, *found])} |")
    return "\n".join(lines)


def kl_table():
    """The table of the KL, as text. Scores play no part in it."""
    lines = [["the KL as"], ["---"], *([name] for name, _ in KL_ROWS)]
    for distance in (0.5, 1.5, 3.0):
        world = make_world("binary", distance)
        batch, p = all_completions(world)
        exact = -objective_gradient(world._replace(scores=torch.zeros(30)), 1.0)
        gradients = expected_gradients(world, 1, 1, [loss for _, loss in KL_ROWS])
        lines[0].append(f"KL = {p @ batch.kl.sum(dim=1) / 2:.2f}")
        lines[1].append("---")
        for i, line in enumerate(lines[2:]):
            (cosine, length), _ = compare(gradients[:, i], exact)
            line.append(f"{cosine:.4f} / {length:.3f}" if length > 1e-9 else "no direction / 0")
    return "\n".join([KL_TEXT, *(f"| {' | '.join(line)} |" for line in lines)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000, help="random batches of 16, of 64")
    args = parser.parse_args()
    if args.batches < 20 * PARTS:
        parser.error(f"--batches {args.batches} must be at least {20 * PARTS}")
    with tqdm(total=12 * len(SCORES)) as progress:
        tables = [score_table(kind, args.batches, progress) for kind in SCORES]
    print("\n\n".join([*tables, kl_table()]))


if __name__ == "__main__":
    main()
