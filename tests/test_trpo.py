"""TRPO: the step by oracle, closed form and finite differences; the line search in real runs."""
import json
import math

import pytest
import torch

import trpo
from conftest import CONFIGS, make_model
from plumbing import rewards
from plumbing.model import load_policy, plain_logprobs
from plumbing.rollout import make_batch, token_logits
from test_command_line import metrics, weights
from test_exact_gradient import MASK, PREFIXES, SEQUENCES, THETA
from test_mathematics import T, cases, check_padding, same
from test_scripts import blind, here, shorter, train  # noqa: F401


@pytest.mark.parametrize("x, y", cases("trpo_step"))
def test_one_step_of_a_linear_policy(x, y):
    """Gradient, Fisher product, direction, length and the first step that is accepted."""
    mask, A, delta = T(x["mask"]), T(x["advantages"]), x["delta"]
    actions, W = torch.tensor(x["actions"]), T(x["weights"]).requires_grad_()

    def at(W):
        logits = T(x["features"]) @ W
        return logits, logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)

    logits, logprobs = at(W)
    old_logits, old = logits.detach(), logprobs.detach()
    L = trpo.surrogate(logprobs, old, A, mask)
    gradient = torch.autograd.grad(L, W, retain_graph=True)[0]
    same(L.detach(), y["surrogate_before"])
    same(gradient, y["gradient"])
    kl = trpo.mean_kl(old_logits, logits, mask)
    assert kl.item() == pytest.approx(0, abs=1e-12)
    ours = trpo.fisher_vector_product(kl, [W], T(x["test_vector"]), 0.0)
    same(ours.view_as(W), y["fisher_vector_product_undamped"])

    def matvec(vector):
        return trpo.fisher_vector_product(kl, [W], vector, x["damping"])

    direction = trpo.conjugate_gradient(matvec, gradient.flatten(), x["cg_iters"])
    same(direction.view_as(W), y["exact_solution"], rtol=1e-3, atol=1e-5)
    # Spinning Up adds 1e-8 to a denominator, by which it ends up to 3e-4 from the solution.
    same(direction.view_as(W), y["cg_direction_spinup"], rtol=0, atol=1e-3)
    scale = (2 * delta / direction.dot(matvec(direction))).sqrt()
    assert scale.item() == pytest.approx(y["full_step_scale"], rel=1e-3)
    for backtracks in range(x["max_backtracks"]):
        step = x["backtrack_coeff"] ** backtracks * scale * direction
        logits, logprobs = at(W.detach() + step.view_as(W))
        kl, L = trpo.mean_kl(old_logits, logits, mask), trpo.surrogate(logprobs, old, A, mask)
        if kl <= delta and L > y["surrogate_before"]:
            break
    assert backtracks == y["accepted_backtracks"]
    same(W.detach() + step.view_as(W), y["new_weights"], rtol=1e-3, atol=1e-3)
    assert kl.item() == pytest.approx(y["kl_after"], rel=2e-3)
    assert L.item() == pytest.approx(y["surrogate_after"], rel=2e-3)


def tabular_kl(theta):
    """All 15 sequences of the enumerated world as one batch -> KL(pi_theta_0 || pi_theta)."""
    states = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(3)]
                           for y in SEQUENCES])
    return trpo.mean_kl(THETA[states], theta[states], MASK), states


def test_the_fisher_product_is_that_of_the_dense_hessian():
    """Of a table of logits it is known: diag(p) - p p^T for each state, as often as it is visited.

    And the same by differentiating the KL, written as a loop, twice; and it is symmetric, PSD.
    """
    theta = THETA.clone().requires_grad_()
    kl, states = tabular_kl(theta)
    ours = torch.stack([trpo.fisher_vector_product(kl, [theta], v, 0.0)
                        for v in torch.eye(theta.numel(), dtype=torch.float64)])
    exact = torch.zeros(theta.numel(), theta.numel(), dtype=torch.float64)
    for s in range(len(PREFIXES)):
        p = THETA[s].softmax(0)
        share = ((states == s) * MASK).sum() / MASK.sum()
        exact[3 * s : 3 * s + 3, 3 * s : 3 * s + 3] = share * (p.diag() - p[:, None] * p)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)

    def loop(flat):
        total, p, q = 0, THETA.softmax(1), flat.view(-1, 3).softmax(1)
        for y in SEQUENCES:
            for t in range(len(y)):
                s = PREFIXES.index(y[:t])
                total = total + sum(p[s, a] * (p[s, a] / q[s, a]).log() for a in range(3))
        return total / sum(map(len, SEQUENCES))

    hessian = torch.autograd.functional.hessian(loop, THETA.flatten())
    torch.testing.assert_close(ours, hessian, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(ours).min() > -1e-12
    damped = trpo.fisher_vector_product(kl, [theta], torch.ones(21, dtype=torch.float64), 0.5)
    torch.testing.assert_close(damped, exact.sum(1) + 0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_fisher_product_of_a_transformer_is_a_finite_difference(name):
    """Through padding and shared prompts: (grad KL(theta + h v) - grad KL(theta - h v)) / 2h.

    And parameters that the KL does not depend on count as 0.
    """
    policy = make_model(name).eval()
    policy.set_attn_implementation("eager")
    policy.double()
    batch = make_batch([[5, 6, 7], [8]], [[9, 4, 2], [5, 2], [6, 7, 8, 2], [2]], "cpu")
    unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameters, rows = [*policy.parameters(), unused], torch.arange(4)
    old = token_logits(policy, batch, rows, 0.7).detach()

    def kl():
        return trpo.mean_kl(old, token_logits(policy, batch, rows, 0.7), batch.mask)

    def gradient():
        parts = torch.autograd.grad(kl(), parameters, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    torch.manual_seed(0)
    v, h, ends = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64), 1e-4, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, part in zip(parameters, v.split([p.numel() for p in parameters])):
                p += sign * h * part.view_as(p)
        ends.append(gradient())
    with torch.no_grad():
        for p, part in zip(parameters, v.split([p.numel() for p in parameters])):
            p += h * part.view_as(p)
    ours = trpo.fisher_vector_product(kl(), parameters, v, 0.0)
    exact = (ends[0] - ends[1]) / (2 * h)
    assert (ours - exact).norm() < 1e-3 * exact.norm() and exact.norm() > 0.01
    assert (ours[-3:] == 0).all()


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_changes_nothing(garbage):
    """Neither the values nor the gradients."""
    def every_function(mask, logprobs, old, A):
        leaf = logprobs.clone().requires_grad_()
        logits, old_logits = (torch.stack([x, 2 * x, 3 - x], -1) for x in (leaf, old))
        L, kl = trpo.surrogate(leaf, old, A, mask), trpo.mean_kl(old_logits, logits, mask)
        yield L.detach()
        yield kl.detach()
        yield torch.autograd.grad(L + kl, leaf)[0]

    check_padding(every_function, garbage)


def test_conjugate_gradients():
    torch.manual_seed(0)
    half, b, calls = torch.randn(8, 8).double(), torch.randn(8).double(), []
    A = half @ half.T + 0.1 * torch.eye(8)

    def matvec(v):
        calls.append(v)
        return A @ v

    exact = torch.linalg.solve(A, b)
    torch.testing.assert_close(trpo.conjugate_gradient(matvec, b, 20), exact, rtol=1e-4, atol=1e-5)
    assert len(calls) < 20  # it has ended early
    errors = [((x - exact) @ A @ (x - exact)).item() for x in
              (trpo.conjugate_gradient(matvec, b, n) for n in range(8))]
    assert errors == sorted(errors, reverse=True)  # in the norm of A, each iteration is nearer
    calls.clear()
    x = trpo.conjugate_gradient(matvec, torch.zeros(8).double())
    assert (x == 0).all() and not calls
    x = trpo.conjugate_gradient(matvec, b, 20, tolerance=1.0)
    assert 1e-10 < (b - A @ x).square().sum() < 1.0


# ------------------------------------------------------------------------------------ in a real run

@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_after_every_step_the_kl_is_at_most_delta(folders, here, name):  # noqa: F811
    """The KL as a loop: row by row, without padding or cache, summed over the vocabulary."""
    here.setitem(rewards.REWARDS, "last_number", shorter)
    batches, policies, real_sample, real_log = [], [], trpo.sample, trpo.Run.log

    def spy(policy, *args, **kwargs):
        batches.append(real_sample(policy, *args, **kwargs))
        policies.append([load_policy(folders(name), "cpu")[0], policy])
        policies[-1][0].load_state_dict(policy.state_dict())
        return batches[-1]

    kls = []

    def after(self, step, **row):
        total, (old, new), batch = 0.0, policies[-1], batches[-1]
        for i, m in zip(batch.owner.tolist(), range(len(batch.mask))):
            ids = batch.completions[m][batch.mask[m].bool()]
            row_ids = torch.cat([torch.tensor(batch.prompts[i]), ids])[None]
            with torch.no_grad():
                p, q = (net(input_ids=row_ids).logits[0, -len(ids) - 1 : -1].double() / 0.8
                        for net in (old, new))
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total += (p.exp() * (p - q)).sum().item()
        kls.append(total / batch.mask.sum().item())
        real_log(self, step, **row)

    here.setattr(trpo, "sample", spy)
    here.setattr(trpo.Run, "log", after)
    train("trpo", folders(name), steps=3, prompts=16, temperature=0.8, delta=0.02, damping=0.1,
          fisher_fraction=0.2, micro_batch_size=5)
    rows = metrics("run")
    assert [row["kl_step"] for row in rows] == pytest.approx(kls, rel=1e-3, abs=1e-6)
    assert all(kl <= 0.02 for kl in kls) and max(kls) > 0.01
    assert all(row["real_gain"] > 0 or row["tries"] == 10 for row in rows)
    assert any(1 < row["tries"] and row["real_gain"] > 0 for row in rows)  # shortened
    assert all(row["kl_full_step"] > 0.02 for row in rows if row["tries"] > 1)
    assert all(row["kl_full_step"] == row["kl_step"] for row in rows if row["tries"] == 1)


def test_a_tiny_step_gains_what_was_predicted(folders, here):  # noqa: F811
    """Where L is a straight slope and KL a parabola: delta, less the part that is damping.

    Also with advantages that are not centred: L before the step is their mean, not 0.
    """
    real = trpo.reinforce_pp_advantages
    here.setattr(trpo, "reinforce_pp_advantages", lambda *args: real(*args) + 3 * args[2])
    here.setitem(rewards.REWARDS, "last_number", shorter)
    train("trpo", folders("llama"), steps=1, prompts=32, delta=1e-6, damping=1e-3, cg_iterations=20,
          temperature=0.6)
    (row,) = metrics("run")
    assert row["real_gain"] == pytest.approx(row["predicted_gain"], rel=0.05)
    assert row["tries"] <= 2 and row["kl_full_step"] == pytest.approx(1e-6, rel=0.15)


@pytest.mark.parametrize("flags", [dict(delta=1e-30), dict(kl_coef=0.0)])
def test_a_step_that_is_refused_leaves_everything_as_it_was(folders, here, flags):  # noqa: F811
    """To the last bit: no length is short enough; or there is no advantage and so no direction."""
    here.setitem(rewards.REWARDS, "last_number", shorter if "delta" in flags else blind)
    train("trpo", folders("gpt2"), max_tries=3, **flags)
    for row in metrics("run"):
        assert row["tries"] == 3 and row["kl_step"] == row["real_gain"] == 0, row
        assert row["predicted_gain"] == 0 and all(value == value for value in row.values())
    old = load_policy(folders("gpt2"), "cpu")[0].state_dict()
    assert all(torch.equal(old[key], value) for key, value in weights("run").items())


def test_the_saved_model_is_not_bound_to_eager_attention(folders, here):  # noqa: F811
    train("trpo", folders("llama"), steps=1)
    config = json.loads(open("run/model/config.json").read())
    assert "eager" not in json.dumps(config)
    assert load_policy("run", "cpu")[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", CONFIGS)
def test_token_logits_are_those_of_the_plain_pass(folders, name):
    """Gathered at the tokens they are its log-probs; of every architecture, at temperature 0.7."""
    policy, _ = load_policy(folders(name), "cpu")
    batch = make_batch([[5, 6, 7], [8]], [[9, 4, 2], [5, 2], [6, 7, 8, 2], [2]], "cpu")
    with torch.no_grad():
        logits = token_logits(policy, batch, torch.tensor([3, 0, 2]), 0.7)
        plain = plain_logprobs(policy, batch, 0.7)
    assert logits.shape == (3, 4, 18)
    for row, i in zip(logits, (3, 0, 2)):
        n = len(plain[i])
        found = row[:n].log_softmax(-1).gather(-1, batch.completions[i, :n, None])[:, 0]
        torch.testing.assert_close(found, plain[i], rtol=1e-4, atol=1e-5)
        assert (row[n:] == 0).all()


def test_token_logits_are_fp32_also_where_the_others_are_not(folders, monkeypatch):
    from plumbing import rollout
    policy, _ = load_policy(folders("llama"), "cpu")
    batch = make_batch([[5, 6, 7]], [[9, 4, 2]], "cpu")
    rows, exact = torch.arange(1), token_logits(policy, batch, torch.arange(1), 1.0)
    monkeypatch.setattr(rollout, "use_bf16", lambda device: True)
    assert torch.equal(token_logits(policy, batch, rows, 1.0), exact)
    noisy = rollout.token_logprobs(policy, batch, rows, 1.0)
    assert not torch.equal(noisy, rollout.pick(exact, batch.completions, 1.0))
