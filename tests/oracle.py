"""The paper's algorithm in plain float64 PyTorch, one worker after another: the reference for runs through DeepSpeed.

k workers normalise n images each, separately, and keep separate running statistics (Sec. 2.3). The loss is
normalised by kn (Remark 3). Momentum has form (9), or form (10) with or without its correction (Remark 2). γ and β do
not decay (Sec. 5.1). Nothing here uses lbsgd or DeepSpeed.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

K, N, ITERATIONS = 8, 8, 20  # workers of N images
MOMENTUM, WEIGHT_DECAY = 0.9, 0.01
BOUND = 1e-5  # correct fp32 runs stay within 6e-7; the mistakes in test_pitfalls.py exceed 100 times this


def learning_rate(t):
    """Rise in equal steps from 0.05 to 0.05 · kn/n = 0.4 over 10 iterations; a tenth of that from the 15th on.

    Sec. 2.1, 2.2 and 5.1.
    """
    return 0.05 + 0.35 * t / 10 if t < 10 else 0.4 if t < 15 else 0.04


class Residual(nn.Module):
    """A residual block that ends in γ = 0 (Sec. 5.1); the shortcut's batch norm has no "bn" in its name.

    GELU replaces ReLU, whose kink amplifies rounding: in some runs 3e-7 becomes 2e-4 within 10 iterations.
    """

    def __init__(self, classes=5, activation=F.gelu):
        super().__init__()
        self.activation = activation
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, classes)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        x = self.activation(self.bn(self.conv(x)))
        block = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.fc(self.activation(block + self.shortcut(x)).mean((2, 3)))


def network(seed=0, **options):
    torch.manual_seed(seed)
    return Residual(**options)


def global_batch(t):
    """Return the kn images and labels of iteration t, those of worker w from w·n to (w+1)·n.

    The colours depend on the label, so that there is something to learn.
    """
    generator = torch.Generator().manual_seed(t)
    colours = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (K * N,), generator=generator)
    return torch.randn(K * N, 3, 6, 6, generator=generator) + colours[labels], labels


def train(model, iterations=ITERATIONS, k=K, form=9, correction=True, dtype=torch.float64):
    """Return weights and momentum by name after some iterations.

    The weights include running statistics, averaged over the workers.
    """
    weights = {name: w.detach().to(dtype) for name, w in model.named_parameters()}
    statistics = [{name: buffer.to(dtype, copy=True) for name, buffer in model.named_buffers()} for _ in range(k)]
    momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for t in range(iterations):
        workers = [worker.chunk(k) for worker in global_batch(t)]
        gradients = [gradient(model, weights, *worker) for worker in zip(statistics, *workers, strict=True)]
        for name, w in weights.items():
            decay = 0 if name.rpartition(".")[0] in norms else WEIGHT_DECAY
            g = sum(part[name] for part in gradients) + decay * w
            weights[name], momentum[name] = update(w, momentum[name], g, t, form, correction)
    running = [name for name in statistics[0] if "running" in name]
    return weights | {name: sum(own[name] for own in statistics) / k for name in running}, momentum


def gradient(model, weights, statistics, images, labels):
    """Return ∇ Σ loss/kn over one worker's images (Remark 3). This updates the worker's running statistics."""
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    device, dtype = next(iter(weights.values())).device, next(iter(weights.values())).dtype
    logits = functional_call(model.train(), (weights, statistics), images.to(device, dtype))
    loss = F.cross_entropy(logits.to(dtype), labels.to(device), reduction="sum") / (K * N)
    return dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


def update(w, u, g, t, form, correction):
    """Make one step of Nesterov's SGD (Sec. 5.1) in one of the two forms of Sec. 3:

    (9)    u ← m·u + g                       w ← w − η_t·(m·u + g)
    (10)   v ← m·(η_t/η_{t−1})·v + η_t·g     w ← w − (m·v + η_t·g)       without correction  v ← m·v + η_t·g
    """
    lr, last_lr = learning_rate(t), learning_rate(max(0, t - 1))
    if form == 9:
        u = MOMENTUM * u + g
        return w - lr * (MOMENTUM * u + g), u
    v = MOMENTUM * (lr / last_lr if correction else 1) * u + lr * g
    return w - (MOMENTUM * v + lr * g), v


def distance(weights, expected):
    """Return the largest max |Δ| / max |expected| among weights, running means and running variances."""

    def flat(tensors, names):
        return torch.cat([tensors[name].detach().double().cpu().flatten() for name in names])

    means, variances = ([name for name in expected if name.endswith(end)] for end in ("running_mean", "running_var"))
    kinds = [[name for name in expected if name not in means + variances], means, variances]

    def relative(names):
        return (flat(weights, names) - flat(expected, names)).abs().max() / flat(expected, names).abs().max()

    return float(torch.stack([relative(names) for names in kinds if names]).max())
