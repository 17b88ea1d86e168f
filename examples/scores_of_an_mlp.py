"""Sensitivity and the diagonal of the Fisher information of a classifier that is no language model, exact per sample.

python examples/scores_of_an_mlp.py
"""

import torch
from torch import nn

import pkt


def cross_entropy(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One loss a sample [B]: what `pkt.sensitivity` asks of a loss_fn."""
    return nn.functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="none")


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    batches = [{"images": torch.randn(64, 1, 28, 28), "labels": torch.randint(0, 10, (64,))} for _ in range(4)]
    sens = pkt.sensitivity(model, batches, loss_fn=cross_entropy)  # Σ_j |θ · ∂L(x_j)/∂θ|
    fisher = pkt.sensitivity(model, batches, loss_fn=cross_entropy, measure="fisher")  # Σ_j (∂L(x_j)/∂θ)²
    print(sens)
    # The truth, one sample at a time.
    first = {key: value[:1] for key, value in batches[0].items()}
    (gradient,) = torch.autograd.grad(cross_entropy(model, first).sum(), [model[1].weight])
    one = pkt.sensitivity(model, [first], loss_fn=cross_entropy, measure="fisher")
    print("largest difference from autograd:", (one["1.weight"] - gradient.square()).abs().max().item())
    weights = model[1].weight.detach().abs().flatten()
    kept = [set(s["1.weight"].flatten().topk(1000).indices.tolist()) for s in (sens, fisher)]
    kept.append(set(weights.topk(1000).indices.tolist()))
    print(f"of the 1000 weights with the largest S, {len(kept[0] & kept[1])} have the largest Fisher information,")
    print(f"and {len(kept[0] & kept[2])} the largest magnitude")


if __name__ == "__main__":
    main()
