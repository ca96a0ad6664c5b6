"""On a GPU: a captured adversarial step equals the eager one, phase by phase."""

from __future__ import annotations

import pytest
import torch

from genfast.models import DCGANConfig, Discriminator, Generator
from genfast.train.adversarial import AdversarialStep, Objective

pytestmark = pytest.mark.cuda
OBJECTIVES = [
    Objective("logistic", r1=0.5, path_length=2.0, d_every=2, g_every=3),
    Objective("relativistic", r1=0.1, r2=0.1),
    Objective("wgan", gradient_penalty=10.0),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.loss)
def test_a_captured_step_equals_the_eager_one(objective: Objective) -> None:
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    shape, latent, states = (8, 1, 28, 28), 16, []
    try:
        for capture in (False, True):
            torch.manual_seed(0)
            config = DCGANConfig(latent=latent, channels=8, discriminator_norm=False)
            step = AdversarialStep(
                Generator(config).cuda().double(), Discriminator(config).cuda().double(), shape, latent, objective, capture=capture
            )
            draw = torch.Generator().manual_seed(1)
            for k in range(9):
                step.load(**{name: torch.rand(t.shape, generator=draw) for name, t in step.inputs.items()})
                for lr in step.lr.values():
                    lr.fill_(1e-3 / (1 + k))
                step.ema_weight.fill_(1 / (1 + k))
                step.run(objective.discriminator_phases(k))
                step.run(objective.generator_phases(k))
            states.append(({**step.state()}, step.take_means()))
    finally:
        torch.backends.cudnn.deterministic = before
    (eager, means), (captured, captured_means) = states
    assert eager.keys() == captured.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(captured[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert captured_means == pytest.approx(means, rel=1e-6)
