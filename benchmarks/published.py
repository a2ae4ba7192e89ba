"""What the papers of the low-bit methods lose to their own full precision: read beside our own differences."""

QUOTED, RESNET18 = "CIFAR-10, ResNet-20, quoted by APoT", "ImageNet, ResNet-18"
GAPS = {
    **{f"dorefa, {b}/{b}": (gap, QUOTED) for b, gap in ((4, 1.1), (3, 1.7), (2, 3.4))},
    **{f"pact, {b}/{b}": (gap, QUOTED) for b, gap in ((4, -0.1), (2, 1.9))},
    **{f"lq-net, {b}/{b}": (gap, QUOTED) for b, gap in ((3, 0.0), (2, 1.4))},
    **{f"apot, {b}/{b}": (gap, "CIFAR-10, ResNet-20") for b, gap in ((4, 0.51), (3, 0.47), (2, 2.0))},
    **{f"lsq, {b}/{b}": (gap, RESNET18) for b, gap in ((4, -0.6), (3, 0.3), (2, 2.9))},
    **{f"relaxed, {b}/{b}": (gap, "MNIST, LeNet-5") for b, gap in ((8, -0.09), (4, -0.06), (2, 0.12))},
    **{f"inq, {b}/32": (gap, RESNET18) for b, gap in ((5, -0.71), (4, -0.62), (3, 0.19), (2, 2.25))},
    **{f"dorefa, {scheme}, 2/2": (5.6, "ImageNet, ResNet-50") for scheme in ("two-stage", "progressive", "guided")},
    "relaxed, straight-through, three times the epochs, 2/2": (-0.01, "MNIST, LeNet-5"),
    "fixed-point, 8/8": (-0.06, "MNIST, LeNet-5"),
    "twn, 2/32": (0.01, "MNIST, LeNet-5"),
    "ttq, 2/32": (0.64, "CIFAR-10, ResNet-20"),
    "lr-net, ternary, 2/32": (-0.14, "MNIST, LeNet-5"),
    "admm, ternary, 2/32": (2.1, RESNET18),
}
"""What the paper (or who quotes it) loses to its own full precision in points, by label; the nearest data it has."""
