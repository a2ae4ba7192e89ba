"""Data: readers for the digits, MNIST, Fashion-MNIST and CIFAR-10, and an in-memory batch loader."""

from espalier.data.cifar import cifar10
from espalier.data.digits import digits
from espalier.data.idx import fashion_mnist, mnist
from espalier.data.images import Images, Normalisation
from espalier.data.loader import Loader
from espalier.data.standard import Splits, standard

__all__ = [
    "Images",
    "Loader",
    "Normalisation",
    "Splits",
    "cifar10",
    "digits",
    "fashion_mnist",
    "mnist",
    "standard",
]
