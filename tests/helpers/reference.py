"""KernelWarehouse by its definition (paper, section 3), one mixture and one sample at a time; shares no code with kw.

Tests compare kw with it. Parameters are read from a layer by name, and nothing else is.
"""

import math

import torch


def hand_out(mixtures, budget):
    """The anchoring rule. Gives the number of cells; per layer, each mixture's cell, None for the zero cell; and
    whether every cell was handed out exactly once."""
    cells = max(int(sum(mixtures) * budget), 1)
    start, layers, handed = 0, [], []
    for m in mixtures:
        own, taken = [], []
        for t in range(m):
            if budget >= 1:
                span = list(range(start + t * int(budget), start + (t + 1) * int(budget)))
                own.append(span[0])
                taken += span
            else:
                q = int(1 / budget)
                if t % q == (t // q) % q:
                    own.append(start + len(taken))
                    taken.append(own[-1])
                else:
                    own.append(None)
        layers.append(own)
        handed += taken
        start += len(taken)
    return cells, layers, sorted(handed) == list(range(cells))


def normalize(norm, hidden, training):
    """BatchNorm1d or LayerNorm on (B, H), from their formulas."""
    if isinstance(norm, torch.nn.LayerNorm):
        mean, var = hidden.mean(1, keepdim=True), hidden.var(1, unbiased=False, keepdim=True)
    elif training:
        mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    return (hidden - mean) / torch.sqrt(var + norm.eps) * norm.weight + norm.bias


def scores(attention, pooled, m, n, start=0, local=None, training=False):
    """z (B, m, n + 1), the zero cell's score last. With `local`, the layer's own cells are `start` to `start + local`,
    and the others are scored through a basis."""
    hidden = pooled @ attention.fc1.weight.T
    if attention.fc1.bias is not None:
        hidden = hidden + attention.fc1.bias
    hidden = normalize(attention.norm, hidden, training).clamp(min=0)
    flat = hidden @ attention.fc2.weight.T
    if attention.fc2.bias is not None:
        flat = flat + attention.fc2.bias
    width = flat.shape[1] // m
    z = torch.empty(len(pooled), m, n + 1, dtype=pooled.dtype)
    for b in range(len(pooled)):
        for t in range(m):
            row = flat[b, t * width : (t + 1) * width]
            if local is None:
                z[b, t] = row
                continue
            own, basis, zero = row[:local], row[local:-1], row[-1]
            others = [sum(w * x for w, x in zip(weights, basis, strict=True)) for weights in attention.fc3.weight]
            bias = attention.basis_bias[t * (n + 1) : (t + 1) * (n + 1)]
            z[b, t] = torch.stack([*others[:start], *own, *others[start:], zero]) + bias
    return z


def squash(row, function):
    """One mixture's scores, the zero cell's last, to attentions."""
    if function in ("caf", "contrast"):
        return [score / (sum(abs(other) for other in row) + 1e-3) for score in row]
    if function == "softmax":
        return [math.exp(score) / sum(math.exp(other) for other in row) for score in row]
    return [{"sigmoid": lambda s: 1 / (1 + math.exp(-s)), "tanh": math.tanh}[function](score) for score in row]


def contrast(z, anchors, tau, function="caf"):
    """CAF, or what takes its place: z (B, m, n + 1) to alpha (B, m, n); `anchors` those of `hand_out`."""
    samples = []
    for sample in z.tolist():
        rows = []
        for row, anchor in zip(sample, anchors, strict=True):
            beta = [float(cell == anchor) for cell in range(len(row) - 1)]
            rows.append([(1 - tau) * a + tau * b for a, b in zip(squash(row, function)[:-1], beta, strict=True)])
        samples.append(rows)
    return torch.tensor(samples, dtype=z.dtype)


def kernel(alpha, cells, shape, span=1):
    """One sample's kernel of `shape`, as in nn.Conv*d.weight, cell by cell in the order (position, output, input).
    Cells (n, o, i * span) are of `span` positions: one, or all of the kernel's."""
    n, o, i = cells.shape[0], cells.shape[1], cells.shape[2] // span
    out = torch.empty(shape[0], shape[1], math.prod(shape[2:]), dtype=cells.dtype)
    mixture = 0
    for position in range(0, out.shape[2], span):
        for a in range(shape[0] // o):
            for b in range(shape[1] // i):
                mixed = (alpha[mixture].view(n, 1, 1) * cells).sum(0).view(o, i, span)
                out[a * o : (a + 1) * o, b * i : (b + 1) * i, position : position + span] = mixed
                mixture += 1
    return out.view(shape)


@torch.no_grad()
def forward(layer, static, x, anchors, tau, cells, function="caf", span=1):
    """What `layer` must give: `static`, torch's layer of the same arguments, with each sample's own kernel."""
    channels_first = x.movedim(-1, 1) if isinstance(static, torch.nn.Linear) else x
    pooled = channels_first.reshape(*channels_first.shape[:2], -1).mean(2)
    z = scores(layer.attention, pooled, len(anchors), len(cells), training=layer.training)
    out = []
    for sample, alpha in zip(x, contrast(z, anchors, tau, function), strict=True):
        static.weight.copy_(kernel(alpha, cells, static.weight.shape, span))
        if static.bias is not None:
            static.bias.copy_(layer.bias)
        out.append(static(sample[None]))
    return torch.cat(out)
