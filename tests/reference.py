"""Every normalisation in float64, as loops over single values, written from the equations and not from `mbn`.

Letters are the paper's: x_i^(j) is the j-th value vector (C,) of batch i, where j runs over images and positions, n_i
their number, alpha_i the batch's weight, mu and s2 mean and biased variance, a hat for those that normalise, eta the
decay, lam lambda. All tensors are float64. Gradients are autograd's, through these loops.

What the layers keep as moments is kept here as the inputs themselves, so that eq. 6 is never assumed.
"""

import itertools
import math

import torch
from torch import Tensor

Vectors = list[Tensor]


def vectors(x: Tensor) -> Vectors:
    """x^(j): the n = N*H*W vectors (C,) of x (N, C, *spatial), image by image and position by position."""
    positions = list(itertools.product(*(range(size) for size in x.shape[2:])))
    return [image[(slice(None), *position)] for image in x for position in positions]


def tensor(xs: Vectors, shape: torch.Size) -> Tensor:
    """The (N, C, *spatial) tensor whose `vectors` are xs."""
    return torch.stack(xs).reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def moments(xs: Vectors) -> tuple[Tensor, Tensor]:
    """mu = sum_j x^(j) / n,  s2 = sum_j (x^(j) - mu)**2 / n."""
    return weighted_moments([xs], [1.0])


def weighted_moments(batches: list[Vectors], alpha: list[float]) -> tuple[Tensor, Tensor]:
    """Eq. 5.

    mu^ = sum_i alpha_i sum_j x_i^(j) / sum_i alpha_i n_i
    s2^ = sum_i sum_j alpha_i (x_i^(j) - mu^)**2 / sum_i alpha_i n_i
    """
    total = sum(a * len(xs) for a, xs in zip(alpha, batches, strict=True))
    mu_hat = torch.zeros_like(batches[0][0])
    for a, xs in zip(alpha, batches, strict=True):
        for x in xs:
            mu_hat = mu_hat + a * x
    mu_hat = mu_hat / total
    s2_hat = torch.zeros_like(mu_hat)
    for a, xs in zip(alpha, batches, strict=True):
        for x in xs:
            s2_hat = s2_hat + a * (x - mu_hat) ** 2
    return mu_hat, s2_hat / total


class _Layer:
    """What the three normalisations with batch statistics share: which forward pass remembers, and groups of images."""

    def __init__(self, channels: int, forwards: int, group_size: int | None, eps: float = 1e-5) -> None:
        self.channels, self.forwards, self.group_size, self.eps = channels, forwards, group_size, eps

    def groups(self, x: Tensor) -> list[Tensor]:
        """x cut into groups of group_size images, in their order; the last one may be smaller."""
        groups: list[list[Tensor]] = []
        for i, image in enumerate(x):
            if i == 0 or (self.group_size is not None and i % self.group_size == 0):
                groups.append([])
            groups[-1].append(image)
        return [torch.stack(images) for images in groups]

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor, number: int = 1) -> Tensor:
        """The first forward, which is differentiated, or the second, after the step: the same rule.

        Each group of images is normalised as if it were the batch. The last of a layer's forwards remembers x, after it
        was normalised.
        """
        y = torch.cat([self.normalize(group, gamma, beta) for group in self.groups(x)])
        if number == self.forwards:
            self.remember(x)
        return y

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu_B and sigma_B = sqrt(s2_B + eps), biased."""
        mu_B, s2_B = moments(vectors(x))
        return mu_B, (s2_B + self.eps) ** 0.5

    def renormalize(self, x: Tensor, gamma: Tensor, beta: Tensor, r: Tensor | int, d: Tensor | int) -> Tensor:
        """y = gamma ((x - mu_B) / sigma_B r + d) + beta."""
        mu_B, sigma_B = self.batch_statistics(x)
        return tensor([gamma * ((v - mu_B) / sigma_B * r + d) + beta for v in vectors(x)], x.shape)

    def evaluate(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """y = gamma (x - mu) / sigma + beta with the test-time statistics."""
        mu, sigma = self.test_statistics()
        return tensor([gamma * (v - mu) / sigma + beta for v in vectors(x)], x.shape)


class MBN(_Layer):
    """Memorized batch normalisation (Guo et al. 2018). `memory` holds the remembered inputs, the newest first."""

    def __init__(self, channels, k, eta=0.9, lam=0.1, forwards=2, gradient="paper", group_size=None) -> None:
        super().__init__(channels, forwards, group_size)
        self.k, self.eta, self.lam, self.gradient = k, eta, lam, gradient
        self.memory: list[Vectors] = []

    def alpha(self) -> list[float]:
        """Eq. 8: alpha_B = 1 and alpha_i = lam eta**a_i, the age a_i of the newest remembered batch being 0."""
        return [1.0] + [self.lam * self.eta**a for a in range(len(self.memory))]

    def training_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu^, s2^ of x and the memory."""
        return weighted_moments([vectors(x), *self.memory], self.alpha())

    def normalize(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """y = gamma (x - mu^) / sqrt(s2^ + eps) + beta (eq. 7); the memory is constant.

        With gradient "batch" the same y as y = gamma ((x - mu_B) / sigma_B r + d) + beta, where r and d are constants.
        """
        if self.gradient == "batch":
            return self.renormalize(x, gamma, beta, *self.correction(x.detach()))
        mu_hat, s2_hat = self.training_statistics(x)
        return tensor([gamma * (v - mu_hat) / (s2_hat + self.eps) ** 0.5 + beta for v in vectors(x)], x.shape)

    def correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """r = sigma_B / sigma^ and d = (mu_B - mu^) / sigma^."""
        mu_hat, s2_hat = self.training_statistics(x)
        mu_B, sigma_B = self.batch_statistics(x)
        sigma_hat = (s2_hat + self.eps) ** 0.5
        return sigma_B / sigma_hat, (mu_B - mu_hat) / sigma_hat

    def remember(self, x: Tensor) -> None:
        """Enter x, whole, as age 0; what is older than k batches is forgotten."""
        self.memory = [vectors(x.detach()), *self.memory][: self.k]

    def pooled(self) -> tuple[Tensor, Tensor]:
        """The moments of the memory alone, weights eta**a; mean 0 and variance 1 before anything was remembered."""
        if not self.memory:
            zeros = torch.zeros(self.channels, dtype=torch.float64)
            return zeros, zeros + 1
        return weighted_moments(self.memory, [self.eta**a for a in range(len(self.memory))])

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        m, v = self.pooled()
        return m, (v + self.eps) ** 0.5

    def buffers(self) -> dict[str, Tensor]:
        """What a layer's buffers must hold, by name; rows of the memory that are still empty hold zeros."""
        mean = torch.zeros(self.k, self.channels, dtype=torch.float64)
        var, count = torch.zeros_like(mean), mean.new_zeros(self.k)
        for a, xs in enumerate(self.memory):
            mean[a], var[a] = moments(xs)
            count[a] = len(xs)
        m, v = self.pooled()
        w = sum((self.eta**a * len(xs) for a, xs in enumerate(self.memory)), 0.0)
        return {
            "memory_mean": mean,
            "memory_var": var,
            "memory_count": count,
            "memory_weight": mean.new_tensor([w]),
            "running_mean": m,
            "running_var": v,
        }


class BRN(_Layer):
    """Batch renormalisation (Ioffe 2017, algorithm 1); the first update copies.

    It is batch normalisation until `warmup_steps` updates.
    """

    def __init__(
        self, channels, momentum=0.01, r_max=3.0, d_max=5.0, warmup_steps=0, forwards=1, group_size=None
    ) -> None:
        super().__init__(channels, forwards, group_size)
        self.momentum, self.r_max, self.d_max, self.warmup_steps = momentum, r_max, d_max, warmup_steps
        self.mu = torch.zeros(channels, dtype=torch.float64)
        self.sigma = torch.ones(channels, dtype=torch.float64)
        self.updates = 0

    def correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """r = clip(sigma_B / sigma, 1 / r_max, r_max), d = clip((mu_B - mu) / sigma, -d_max, d_max)."""
        mu_B, sigma_B = self.batch_statistics(x)
        if self.updates < self.warmup_steps:
            return torch.ones_like(mu_B), torch.zeros_like(mu_B)
        r, d = torch.empty_like(mu_B), torch.empty_like(mu_B)
        for c in range(self.channels):
            r[c] = min(max(sigma_B[c] / self.sigma[c], 1 / self.r_max), self.r_max)
            d[c] = min(max((mu_B[c] - self.mu[c]) / self.sigma[c], -self.d_max), self.d_max)
        return r, d

    def normalize(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return self.renormalize(x, gamma, beta, *self.correction(x.detach()))

    def remember(self, x: Tensor) -> None:
        """mu += momentum (mu_B - mu), sigma += momentum (sigma_B - sigma): mu_B, sigma_B of groups are averaged."""
        mu_B, sigma_B = torch.zeros_like(self.mu), torch.zeros_like(self.sigma)
        for group in self.groups(x.detach()):
            mu, sigma = self.batch_statistics(group)
            mu_B, sigma_B = mu_B + len(group) / len(x) * mu, sigma_B + len(group) / len(x) * sigma
        step = self.momentum if self.updates else 1.0
        self.mu = self.mu + step * (mu_B - self.mu)
        self.sigma = self.sigma + step * (sigma_B - self.sigma)
        self.updates += 1

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        return self.mu, self.sigma

    def buffers(self) -> dict[str, Tensor]:
        counter = torch.tensor(self.updates)
        return {"running_mean": self.mu, "running_std": self.sigma, "num_batches_tracked": counter}


class BN(_Layer):
    """Batch normalisation with torch's conventions: momentum 0.1, unbiased variance in the moving average."""

    def __init__(self, channels, momentum=0.1, forwards=1, group_size=None) -> None:
        super().__init__(channels, forwards, group_size)
        self.momentum = momentum
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.var = torch.ones(channels, dtype=torch.float64)
        self.updates = 0

    def normalize(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """y = gamma (x - mu_B) / sigma_B + beta."""
        return self.renormalize(x, gamma, beta, r=1, d=0)

    def remember(self, x: Tensor) -> None:
        """mean += momentum (mu_B - mean), var += momentum (s2_B n / (n - 1) - var): both of groups are averaged."""
        mu_B, var_B = torch.zeros_like(self.mean), torch.zeros_like(self.var)
        for group in self.groups(x.detach()):
            xs = vectors(group)
            mu, s2 = moments(xs)
            mu_B = mu_B + len(group) / len(x) * mu
            var_B = var_B + len(group) / len(x) * s2 * len(xs) / (len(xs) - 1)
        self.mean = self.mean + self.momentum * (mu_B - self.mean)
        self.var = self.var + self.momentum * (var_B - self.var)
        self.updates += 1

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        return self.mean, (self.var + self.eps) ** 0.5

    def buffers(self) -> dict[str, Tensor]:
        counter = torch.tensor(self.updates)
        return {"running_mean": self.mean, "running_var": self.var, "num_batches_tracked": counter}


def unit_convolution(x: Tensor, W: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """u_i = gamma_i (W_i * x) / ||W_i||_2 + beta_i, stride 1, no padding (Arpit et al. 2016).

    x: (N, C, H, W'), W: (C_out, C, kh, kw); the norm runs over (C, kh, kw).
    """
    rows, _, kh, kw = W.shape
    columns = []
    for i in range(rows):
        norm = sum(w**2 for w in W[i].flatten()) ** 0.5
        places = itertools.product(range(x.shape[2] - kh + 1), range(x.shape[3] - kw + 1))
        u = [gamma[i] * (x[:, :, p : p + kh, q : q + kw] * W[i]).sum((1, 2, 3)) / norm + beta[i] for p, q in places]
        columns.append(torch.stack(u, 1).reshape(len(x), x.shape[2] - kh + 1, -1))
    return torch.stack(columns, 1)


def standard_relu(u: Tensor) -> Tensor:
    """o = (max(u, 0) - sqrt(1 / (2 pi))) / sqrt((1 - 1 / pi) / 2)."""
    mean, std = math.sqrt(1 / (2 * math.pi)), math.sqrt((1 - 1 / math.pi) / 2)
    return torch.stack([(v if v > 0 else v * 0) - mean for v in u.flatten()]).reshape(u.shape) / std
