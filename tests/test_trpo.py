"""TRPO: the step by oracle, closed form and finite differences; the line search in real runs."""
import copy

import pytest
import torch
from conftest import make_model, seeded
from exact_world import KL, KL_COEF, MASK, PREFIXES, SCORES, SEQUENCES, THETA, check_unbiased
from oracle_cases import T, cases, run_script, same
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import trpo
from common import returns_to_go, token_rewards
from plumbing import rollout
from plumbing.model import load_policy
from plumbing.offline import make_batch


@pytest.mark.parametrize("x, y", cases("trpo_step"))
def test_one_step_of_a_linear_policy(x, y):
    """Gradient, Fisher product, direction, length, and what the accepted step changes."""
    mask, A = T(x["mask"]), T(x["advantages"])
    share, actions = mask / mask.sum(), torch.tensor(x["actions"])
    W = T(x["weights"]).requires_grad_()

    def measure(weights):
        logits = T(x["features"]) @ weights
        logprobs = logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
        L = (trpo.surrogate(logprobs, old_logprobs, A) * share).sum()
        return trpo.mean_kl(old_logits, logits, share), L

    old_logits = T(x["features"]) @ T(x["weights"])
    old_logprobs = old_logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    kl, L = measure(W)
    gradient = torch.autograd.grad(L, W, retain_graph=True)[0]
    same(L.detach(), y["surrogate_before"])
    same(gradient, y["gradient"])
    assert kl.item() == pytest.approx(0, abs=1e-12)
    ours = trpo.fisher_vector_product(kl, [W], T(x["test_vector"]))
    same(ours.view_as(W), y["fisher_vector_product_undamped"])

    def matvec(vector):
        return trpo.fisher_vector_product(kl, [W], vector) + x["damping"] * vector

    direction = trpo.conjugate_gradient(matvec, gradient.flatten(), x["cg_iters"])
    same(direction.view_as(W), y["exact_solution"], rtol=1e-3, atol=1e-5)
    full = (2 * x["delta"] / direction.dot(matvec(direction))).sqrt()
    assert full.item() == pytest.approx(y["full_step_scale"], rel=1e-3)
    new = W.detach() + (x["backtrack_coeff"] ** y["accepted_backtracks"] * full * direction
                        ).view_as(W)
    kl, L = measure(new)
    same(new, y["new_weights"], rtol=1e-3, atol=1e-3)
    assert kl.item() == pytest.approx(y["kl_after"], rel=2e-3)
    assert L.item() == pytest.approx(y["surrogate_after"], rel=2e-3)


def test_the_expected_gradient_of_the_surrogate():
    """It is that of J, where advantages are not normalised; TRPO maximises."""
    def losses_of(logprobs, rows):
        r = token_rewards(SCORES[rows], KL[rows], MASK[rows], KL_COEF)
        return -trpo.surrogate(logprobs, logprobs.detach(), returns_to_go(r, MASK[rows]))
    check_unbiased(losses_of, 2)


def test_the_fisher_product_is_that_of_the_dense_hessian():
    """Of a table of logits it is diag(p) - p p^T for each state, as often as it is visited."""
    states = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(3)]
                           for y in SEQUENCES])
    theta, share = THETA.clone().requires_grad_(), MASK / MASK.sum()
    kl = trpo.mean_kl(THETA[states], theta[states], share)
    ours = torch.stack([trpo.fisher_vector_product(kl, [theta], v) for v in torch.eye(21).double()])
    exact = torch.zeros(21, 21).double()
    for s in range(len(PREFIXES)):
        p, visits = THETA[s].softmax(0), ((states == s) * MASK).sum()
        exact[3 * s : 3 * s + 3, 3 * s : 3 * s + 3] = visits * (p.diag() - p[:, None] * p)
    torch.testing.assert_close(ours, exact / MASK.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_fisher_product_of_a_transformer_is_a_finite_difference(name, monkeypatch):
    """Through padding and shared prompts, v^T F v is the mean variance of the logits' change by v:
    (logits at theta + h v - logits at theta - h v) / 2h, of the tokens as the policy draws them.
    The logits are fp32 also where other passes are in bf16."""
    policy, T, rows = make_model(name).eval(), 0.7, torch.arange(4)
    batch = make_batch([[5, 6, 7], [8]], [[9, 4, 2], [5, 2], [6, 7, 8, 2], [2]], "cpu")
    policy.set_attn_implementation("eager")
    monkeypatch.setattr(rollout, "use_bf16", lambda device: True)
    logits, share = trpo.token_logits(policy, batch, rows, T), batch.mask / batch.mask.sum()
    parameters, h, ends = list(policy.parameters()), 1e-3, []
    start = parameters_to_vector(parameters).detach()
    v, p = torch.randn(len(start), generator=seeded()), logits.detach().softmax(-1)
    kl = trpo.mean_kl(logits.detach(), logits, share)
    ours = trpo.fisher_vector_product(kl, parameters, v)
    for sign in (1, -1):
        vector_to_parameters(start + sign * h * v, parameters)
        ends.append(trpo.token_logits(policy, batch, rows, T).detach())
    change = (ends[0] - ends[1]) / (2 * h)
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    assert ours.dot(v).item() == pytest.approx((variance * share).sum().item(), rel=5e-3)


def test_conjugate_gradients_end_early():
    """They need a product for each different eigenvalue, and none where the gradient is 0."""
    eigenvalues, b, calls = T([1, 1, 2, 2, 5]), torch.arange(5).double(), []

    def matvec(v):
        calls.append(v)
        return eigenvalues * v
    same(trpo.conjugate_gradient(matvec, b, 20), b / eigenvalues)
    assert len(calls) == 3
    assert (trpo.conjugate_gradient(matvec, 0 * b) == 0).all() and len(calls) == 3


@pytest.fixture
def train(tmp_path, monkeypatch, few_problems, folders):
    """train(name, reward, **flags) trains a tiny model -> the rows of its log."""
    return lambda name, reward, **flags: run_script(
        trpo, monkeypatch, tmp_path / "run", reward, model=folders(name), **{
            **dict(prompts_per_step=16, micro_batch_size=16, kl_coef=0.01), **flags})


def shorter(completion_ids, **columns):
    return [1 / len(ids) for ids in completion_ids]


def equal(completion_ids, **columns):
    return [0.5] * len(completion_ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_after_every_step_the_kl_is_at_most_delta(train, monkeypatch, name):
    """The KL as a loop: row by row, without padding or cache, summed over the vocabulary."""
    batches, kls, real_sample, real_log = [], [], trpo.sample, trpo.Run.log

    def spy(policy, *args):
        batches.append((copy.deepcopy(policy), real_sample(policy, *args)))
        return batches[-1][1]

    def log(run, *args, **numbers):
        total, (old, batch) = 0.0, batches[-1]
        for i, completion, mask in zip(batch.owner.tolist(), batch.completions, batch.mask.bool()):
            ids = torch.cat([torch.tensor(batch.prompts[i]), completion[mask]])[None]
            with torch.no_grad():
                p, q = ((net(input_ids=ids).logits[0, len(batch.prompts[i]) - 1 : -1].double() / 0.8
                         ).log_softmax(-1) for net in (old, run.policy))
            total += (p.exp() * (p - q)).sum().item()
        kls.append(total / batch.mask.sum().item())
        real_log(run, *args, **numbers)

    monkeypatch.setattr(trpo, "sample", spy)
    monkeypatch.setattr(trpo.Run, "log", log)
    rows = train(name, shorter, steps=3, temperature=0.8, delta=0.02, cg_iterations=3,
                 fisher_fraction=0.2, micro_batch_size=5)
    assert [row["kl_step"] for row in rows] == pytest.approx(kls, rel=1e-3, abs=1e-6)
    assert all(kl <= 0.02 for kl in kls) and max(kls) > 0.01
    assert all(row["real_gain"] > 0 or row["tries"] == 10 for row in rows)
    assert any(1 < row["tries"] and row["real_gain"] > 0 for row in rows)  # shortened
    assert all(row["kl_full_step"] > 0.02 for row in rows if row["tries"] > 1)


def test_a_tiny_step_gains_what_was_predicted(train, monkeypatch, tmp_path):
    """Where L is a straight slope and KL a parabola: delta, less the part that is damping.
    Also with advantages that are not centred: L before the step is their mean, not 0."""
    real = trpo.reinforce_pp_advantages
    monkeypatch.setattr(trpo, "reinforce_pp_advantages", lambda *args: real(*args) + 3 * args[2])
    (row,) = train("llama", shorter, prompts_per_step=32, delta=1e-6, damping=1e-3,
                   cg_iterations=20, temperature=0.6, fisher_fraction=1.0)
    assert row["real_gain"] == pytest.approx(row["predicted_gain"], rel=0.05)
    assert row["tries"] <= 2 and row["kl_full_step"] == pytest.approx(1e-6, rel=0.15)
    assert "eager" not in (tmp_path / "run" / "model" / "config.json").read_text()


@pytest.mark.parametrize("flags", [dict(delta=1e-30), dict(kl_coef=0.0)])
def test_a_step_that_is_refused_leaves_everything_as_it_was(train, tmp_path, folders, flags):
    """To the last bit: no length is short enough; or there is no advantage and so no direction."""
    (row,) = train("gpt2", shorter if "delta" in flags else equal, max_tries=3, **flags)
    assert row["tries"] == 3 and row["kl_step"] == row["real_gain"] == 0, row
    assert row["predicted_gain"] == 0 and all(value == value for value in row.values())
    start, end = (load_policy(model, "cpu")[0].state_dict()
                  for model in (folders("gpt2"), tmp_path / "run"))
    assert all(torch.equal(start[key], end[key]) for key in start)
