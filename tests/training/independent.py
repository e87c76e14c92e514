"""Eq. 1 computed with the parts of the independent implementation."""

import torch


def independent_logits(reference, sample, compressed):
    """Logits that predict the responses, float64 ``[N, V]``, from the reference's own parts."""
    features, kinds = reference.features(sample.tiles) if len(sample.tiles) else [], iter(compressed)
    rows, wanted, tiles, counts = [], [], iter(features), iter(sample.counts)
    for span in sample.spans:
        rows.append(reference._embed(span.ids))
        wanted += [span.response] * len(span.ids)
        if span.image:
            image = [reference.project(next(tiles), bool(next(kinds))) for _ in range(next(counts))]
            rows += image
            wanted += [False] * sum(map(len, image))
    logits = reference.logits(torch.cat(rows), len(wanted))
    return logits[:-1][torch.tensor(wanted[1:])].double()


def kl(reference, policy):
    p, q = reference.softmax(-1), policy.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean().item()
