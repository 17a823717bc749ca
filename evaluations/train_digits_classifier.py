#!/usr/bin/env python
"""Train the digits classifier: `python evaluations/train_digits_classifier.py --out FILE`.

A stratified 80 % of the digits is trained on, with shifts, small rotations and faint noise; the
other 20 % only measures. Prints the held-out accuracy and writes the weights in 16 bits.
"""

import math

from guided_diffusion.config.command_line import make_bare_parser, not_negative
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import atomic_path
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script

_BATCH_SIZE, _LR = 64, 2e-3  # the rate rises over one epoch, then falls along half a cosine


def train(seed: int, epochs: int):
    """Train on the fixed split.

    Args:
        seed: of initial weights, order of images and augmentation. The split does not depend on it.
        epochs: passes over the training images, at least 1.

    Returns:
        the classifier (rounded to 16 bits, as it is stored; evaluation mode) and its accuracy on
        the held-out 360 images, in 0..1.
    """
    import torch
    from sklearn.model_selection import train_test_split
    from torch.nn import functional as F

    from evaluations.digits_classifier import DigitsClassifier, to_input
    from guided_diffusion.io.digits import load_digit_images

    images, labels = load_digit_images()
    kept, held_out = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    x, y = to_input(images), torch.from_numpy(labels.copy())
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=1e-2)
    steps_per_epoch = math.ceil(len(kept) / _BATCH_SIZE)
    total = epochs * steps_per_epoch

    def factor(step: int) -> float:
        return min(1, (step + 1) / steps_per_epoch) * 0.5 * (1 + math.cos(math.pi * step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    training = torch.tensor(kept)
    for _ in range(epochs):
        order = training[torch.randperm(len(kept), generator=generator)]
        for batch in order.split(_BATCH_SIZE):
            logits = model(augment(x[batch], generator))
            loss = F.cross_entropy(logits, y[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.half().float().eval()
    with torch.no_grad():
        correct = model(x[held_out]).argmax(1) == y[held_out]
    return model, correct.double().mean().item()


def augment(x, generator):
    """Shift by up to 1.5 pixels, turn by up to 10 degrees, add noise of up to 0.1.

    Args:
        x: float32 [N, 1, 16, 16] in [-1, 1].
        generator: torch.Generator that draws every number used.

    Returns:
        images of the same shape; the noise may leave [-1, 1] by a little.
    """
    import torch
    from torch.nn import functional as F

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    angle = uniform(len(x)) * math.radians(10)
    shift = uniform(len(x), 2) * (1.5 / 8)
    affine = torch.stack(
        [
            torch.stack([angle.cos(), -angle.sin(), shift[:, 0]], 1),
            torch.stack([angle.sin(), angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1  # beyond the edge is black
    strength = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return moved + strength * torch.randn(x.shape, generator=generator)


def main() -> None:
    """Parse, train, write."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("--seed", type=not_negative, default=0, help="of everything random (default 0)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the data (default 40)")
    parser.add_argument("--out", type=local_path, required=True, help="file to write")
    args = parser.parse_args()
    if args.epochs < 1:
        raise UserError("--epochs must be at least 1")
    if args.seed >= 2**63:
        raise UserError("--seed must be less than 2^63")

    import torch

    torch.set_num_threads(1)  # sums run in another order with more, which would give other weights
    model, accuracy = train(args.seed, args.epochs)
    # Through an open file: given a name, torch.save would write that name into the archive.
    with atomic_path(args.out) as temporary, open(temporary, "wb") as file:
        torch.save(model.half().state_dict(), file)
    print(f"held-out accuracy {accuracy:.4f} on 360 images; wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
