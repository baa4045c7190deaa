"""Rows whose exact KL, or its gradient, rounds badly; shared by the tests of every backend."""

import torch

KINDS = ["peaked", "offset", "cold", "saturated", "outlier"]


def hard_rows(kind, vocabulary, generator):
    """(logits, reference, temperature): what rounds badly on its way through p·(log p − log q − KL)/τ."""
    z, ref = 3 * torch.randn(2, 8, vocabulary, generator=generator)
    if kind == "peaked":
        return 10 * z, 10 * ref, 1.0
    if kind == "offset":
        return z + 1e4, ref - 1e4, 1.0
    if kind == "cold":
        return 1e-3 * z, 1e-3 * ref, 1e-3
    if kind == "saturated":  # one token holds all of p, or all but 1e-7 to 1e-2 of it; the KL is hundreds of nats
        ref = 0.3 * ref
        z[:, 1] = z.amax(-1) + torch.logspace(-2.2, -1, len(z))
        return z, ref, 1e-3
    z = 1e-3 * z  # flat, and what the reference thinks of the likeliest token is far off
    return z, ref.scatter(-1, z.argmax(-1, keepdim=True), -40.0), 1.0
