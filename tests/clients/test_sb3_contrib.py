"""sb3-contrib: CrossQ with our BatchRenorm in the place of its own."""

import gymnasium
import pytest
import torch
from sb3_contrib import CrossQ
from sb3_contrib.common.torch_layers import BatchRenorm1d as Theirs
from sb3_contrib.crossq import policies
from torch.testing import assert_close

from mbn import BatchRenorm1d
from mbn.norm.base import norm_layers

pytestmark = pytest.mark.clients("sb3-contrib")


def test_our_formulas_are_theirs_up_to_the_unbiased_variance(figure):
    """Theirs divides by the unbiased variance: with c = sqrt((n - 1) / n), y = c * ours and d = c * ours.

    It also averages variances where we average standard deviations, and starts from 1: ours gets its averages here.
    """
    n, eps, warmup = 8, 1e-14, 3
    c = ((n - 1) / n) ** 0.5
    # Its correction begins after more than warmup_steps batches.
    theirs = Theirs(5, eps=eps, momentum=0.3, warmup_steps=warmup - 1).double()
    ours = BatchRenorm1d(5, eps, momentum=0.3, r_max=3, d_max=5 / c, warmup_steps=warmup).double()
    with torch.no_grad():
        ours.weight.copy_(theirs.scale.normal_())
    largest, bounded = 0.0, set()
    for t in range(9):
        x = (torch.randn(n, 5, dtype=torch.float64) * 2.0 ** (t % 4 - 1) + 3 * (t % 5)).requires_grad_()
        z = x.detach().clone().requires_grad_()
        ours.running_mean.copy_(theirs.ra_mean)
        ours.running_std.copy_(c * theirs.ra_var.sqrt())
        sigma = x.var(0, correction=0).sqrt()
        r, d = ours._correction(x.mean(0), sigma, ours.running_mean, ours.running_std)
        bounded |= {name for name, at in (("r", (r == 3) | (r == 1 / 3)), ("d", d.abs() == 5 / c)) if at.any()}
        y, expected = ours(x), theirs(z)
        dy = torch.randn_like(y)
        (y * dy).sum().backward()
        (expected * dy).sum().backward()
        for got, want in ((y, expected), (x.grad, z.grad), (ours.weight.grad, theirs.scale.grad)):
            assert_close(c * got, want, rtol=1e-9, atol=1e-9)
            largest = max(largest, float((c * got - want).detach().abs().max()))
        ours.weight.grad = theirs.scale.grad = None
        assert int(ours.num_batches_tracked) == int(theirs.steps)
    assert bounded == {"r", "d"}
    ours.running_std.copy_(theirs.ra_var.sqrt())
    ours.running_mean.copy_(theirs.ra_mean)
    assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-9)
    figure(f"largest difference {largest:.1e} over 9 batches in float64, 6 of them after the warm-up")


def test_crossq_learns_with_our_layers_and_its_file_has_their_state(figure, monkeypatch, tmp_path):
    monkeypatch.setattr(policies, "BatchRenorm1d", BatchRenorm1d)
    agent = CrossQ(
        "MlpPolicy",
        gymnasium.make("Pendulum-v1"),
        learning_starts=50,
        batch_size=32,
        policy_kwargs={"net_arch": [16, 16], "renorm_warmup_steps": 100},
        seed=0,
    )
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(250)
    layers = norm_layers(agent.policy)
    assert len(layers) == 3 + 2 * 3  # of the actor and of two critics
    assert not any(layer.training for layer in layers)
    assert {int(layer.num_batches_tracked) for layer in norm_layers(agent.critic)} == {200}
    assert all(value.isfinite().all() for value in agent.policy.state_dict().values())
    assert not any(torch.equal(old, p) for old, p in zip(before, agent.policy.parameters(), strict=True))
    agent.save(tmp_path / "agent")
    loaded = CrossQ.load(tmp_path / "agent")
    seen = agent.observation_space.sample()
    assert loaded.predict(seen, deterministic=True)[0] == agent.predict(seen, deterministic=True)[0]
    figure("200 updates on Pendulum, 100 of them after the warm-up")
