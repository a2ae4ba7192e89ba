import pytest
import torch
from torch import nn

import espalier as es
from espalier.data import Loader, digits
from espalier.prune import Global, Prune
from espalier.recipes import DeepCompression
from espalier.share import KMeans
from espalier.train import Finetune


@pytest.fixture(scope="session")
def task():
    train, val, test = digits().split(-1, 300, 300, seed=0)
    train = train.take(torch.arange(400))
    return es.tasks.classification(
        Loader.of(train, batch_size=50, shuffle=True), Loader.of(val, batch_size=300), Loader.of(test, batch_size=300)
    )


@pytest.fixture(scope="session")
def trained(task):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return Finetune(epochs=6, lr=5e-3)(model, es.Context(task=task))


@pytest.fixture
def model(trained):
    import copy

    return copy.deepcopy(trained)


@pytest.fixture
def recipe():
    return DeepCompression(
        strength=0.5, prune=Prune(scope=Global(), epochs=2, lr=1e-3), share=KMeans(), finetune=Finetune(epochs=1)
    )
