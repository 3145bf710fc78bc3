"""TRL's own trainers as an oracle: on the same weights and completions, the same loss and gradient.

TRL gets our completions instead of sampling; the rest of its step is its own: tokenising, padding,
log-probs, rewards, advantages, loss. The policy then moves a little, so that the ratios are not 1.
"""
import copy

import pytest
import torch

import common
import grpo
import rloo
from conftest import make_model, save_folder
from dr_grpo import constant_mean, dr_grpo_advantages
from plumbing import toy
from plumbing.rollout import all_logprobs, sample, token_logprobs

trl = pytest.importorskip("trl", reason="an oracle for development: requirements-dev.txt")
datasets = pytest.importorskip("datasets")

# TRL passes no position_ids, so that GPT-2's prompts must not need padding.
PROMPTS = dict(llama=["8+9-5=", "1+2=", "7-3+4-1="], gpt2=["8+9-5=", "1+2+3=", "7-3+4="])
K, TEMPERATURE, KL_COEF, LONGEST = 4, 0.7, 0.1, 14


def reward(completions, **columns):
    """Of the text, and no two the same, so that no group is constant."""
    return [len(set(text)) - 0.3 * len(text) + 0.01 * i for i, text in enumerate(completions)]


def nudge(model):
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)


@pytest.fixture(params=["llama", "gpt2"])
def step(request, tmp_path):
    """A function (trainer class, config class, more settings) -> TRL's batch, its loss and gradient
    after the nudge; and ours: policy, before and after it, reference, batch, scores."""
    tokenizer, prompts = toy.make_tokenizer(), PROMPTS[request.param]
    folder = save_folder(tmp_path / "model", request.param, scale=0.1)  # the reference
    policy, ref_model = (make_model(request.param, scale=0.1, seed=seed).eval() for seed in (3, 0))
    for model in (policy, ref_model):  # gpt2: no dropout, in TRL neither
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    ids = tokenizer(prompts, add_special_tokens=False).input_ids
    batch = sample(policy, tokenizer, ids, K, LONGEST, TEMPERATURE,
                   torch.Generator().manual_seed(0))
    completions = [row[mask.bool()].tolist() for row, mask in zip(batch.completions, batch.mask)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    assert 1 < len(set(map(len, completions))) and not batch.finished.all()

    def run(trainer_class, config_class, **settings):
        rows = [dict(prompt=prompt) for prompt in prompts for _ in range(K)]
        config = config_class(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(rows),
            num_generations=K, max_completion_length=LONGEST, temperature=TEMPERATURE,
            beta=KL_COEF, epsilon=0.2, num_iterations=2, disable_dropout=True, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", **settings)
        trainer = trainer_class(model=folder, reward_funcs=reward, args=config,
                                train_dataset=datasets.Dataset.from_list(rows),
                                processing_class=tokenizer)
        trainer.model.load_state_dict(policy.state_dict())
        alone = trainer_class is trl.RLOOTrainer
        trainer._generate_single_turn = lambda *args: completions if alone else (completions, None)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        theirs = trainer._generate_and_score_completions(rows)
        nudge(trainer.model)
        loss = trainer._compute_loss(trainer.model, theirs)
        loss.backward()
        return theirs, loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}

    moved = copy.deepcopy(policy)
    nudge(moved)
    yield run, policy, moved, ref_model, batch, torch.tensor(reward(texts))


def same_gradient(model, theirs):
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-5, atol=1e-5)
    assert max(grad.abs().max() for grad in theirs.values()) > 0.01  # there is one to compare


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_grpo(step, loss_type):
    run, _, moved, ref_model, batch, scores = step
    theirs, loss, gradient = run(
        trl.GRPOTrainer, trl.GRPOConfig, loss_type=loss_type,
        scale_rewards="none" if loss_type == "dr_grpo" else "group",
        use_bias_correction_kl=False)  # its default multiplies k3 by the ratio, as DeepSeek-V3.2
    A, aggregate = dict(
        grpo=(grpo.group_advantages(scores, K), grpo.response_mean),
        bnpo=(grpo.group_advantages(scores, K), common.masked_mean),
        dr_grpo=(dr_grpo_advantages(scores, K),
                 lambda values, mask: constant_mean(values, mask, LONGEST)))[loss_type]
    torch.testing.assert_close(A, theirs["advantages"], rtol=1e-5, atol=1e-5)
    rows, ref_logprobs = torch.arange(len(A)), all_logprobs(ref_model, batch, 5, TEMPERATURE)
    ours, clip_frac = grpo.grpo_loss(
        token_logprobs(moved, batch, rows, TEMPERATURE), batch.logprobs, ref_logprobs, A,
        batch.mask, 0.2, KL_COEF, aggregate)
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=1e-5)
    assert 0 < clip_frac < 1
    same_gradient(moved, gradient)


def test_rloo(step):
    run, policy, moved, ref_model, batch, scores = step
    theirs, loss, gradient = run(trl.RLOOTrainer, trl.RLOOConfig)
    rows, ref_logprobs = torch.arange(len(scores)), all_logprobs(ref_model, batch, 5, TEMPERATURE)
    kl = common.kl_estimate(batch.logprobs, ref_logprobs)
    A = rloo.leave_one_out_advantages(scores - KL_COEF * kl.sum(1), K)
    torch.testing.assert_close(A, theirs["advantages"], rtol=1e-5, atol=1e-5)
    ours, _ = rloo.sequence_ratio_loss(token_logprobs(moved, batch, rows, TEMPERATURE),
                                       batch.logprobs, A, batch.mask, 0.2)
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=1e-5)
    same_gradient(moved, gradient)
