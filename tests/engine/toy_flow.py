"""A flow whose exact velocity is known: a mixture of Gaussians, in numpy and fp64."""

import numpy as np

from stretto.acceleration.caching.forecast import FORECASTERS


class GaussianMixtureFlow:
    """Rectified flow x = (1 - sigma) x0 + sigma noise of a mixture with diagonal covariances.

    Args:
        seed: of the means.
        size: dimensions; their spread falls like a power law, as the frequencies of images do.
        components: of the mixture.
    """

    def __init__(self, seed=0, size=64, components=6):
        spread = (1.0 + np.arange(size)) ** -0.95
        self.means = np.random.default_rng(seed).normal(size=(components, size)) * spread * 1.5
        self.variance = (0.3 * spread) ** 2

    def velocity(self, x, sigma):
        """Return the velocity [batch, size] of ``x`` [batch, size] at ``sigma`` > 0: (x - E[x0 | x]) / sigma."""
        keep = 1.0 - sigma
        total = keep**2 * self.variance + sigma**2
        offset = x[:, None] - keep * self.means
        log_share = -0.5 * (offset**2 / total).sum(-1)
        share = np.exp(log_share - log_share.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        clean = (share[..., None] * (self.means + keep * self.variance / total * offset)).sum(1)
        return (x - clean) / sigma


def euler(flow, x, sigmas, mask=None, forecaster="reuse", velocities=None, **settings):
    """Sample with Euler; skipped steps take their velocity from the forecaster. Velocities are appended if asked for."""
    chosen, history, steps = FORECASTERS[forecaster], [], len(sigmas) - 1
    for step in range(steps):
        if mask is None or mask[step]:
            velocity = flow.velocity(x, sigmas[step])
            history = [(step, velocity), *history][: chosen.depth(**settings)]
        else:
            weights = chosen.weights([at for at, _ in history], step, steps, **settings)
            velocity = sum(weight * snapshot for weight, (_, snapshot) in zip(weights, history))
        if velocities is not None:
            velocities.append(velocity)
        x = x + (sigmas[step + 1] - sigmas[step]) * velocity
    return x
