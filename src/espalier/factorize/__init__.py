"""Factorisation: a layer as several smaller ones in a row, at ranks that make it smaller."""

from __future__ import annotations

from espalier.core.method import Method
from espalier.core.registry import register
from espalier.factorize.activation_aware_svd import ActivationAwareSVD
from espalier.factorize.autoencoder import Autoencoder
from espalier.factorize.basis_filters import BasisFilters
from espalier.factorize.budget import Budget
from espalier.factorize.channel_svd import ChannelSVD
from espalier.factorize.cp import CP
from espalier.factorize.energy import Energy
from espalier.factorize.evbmf import Evbmf
from espalier.factorize.factorization import Factorization
from espalier.factorize.fixed import Fixed
from espalier.factorize.low_rank_training import LowRankTraining
from espalier.factorize.rank import RankChoice
from espalier.factorize.ratio import Ratio
from espalier.factorize.spatial_svd import SpatialSVD
from espalier.factorize.svd import SVD
from espalier.factorize.tensor_train import TensorTrain
from espalier.factorize.tucker import Tucker

METHODS: tuple[type[Method], ...] = (
    SVD, SpatialSVD, ChannelSVD, Tucker, CP, TensorTrain, Autoencoder, ActivationAwareSVD, LowRankTraining,
    BasisFilters, Energy, Ratio, Evbmf, Budget, Fixed,
)  # fmt: skip

register("factorize", METHODS)

__all__ = [
    "CP", "METHODS", "SVD", "ActivationAwareSVD", "Autoencoder", "BasisFilters", "Budget", "ChannelSVD", "Energy",
    "Evbmf", "Factorization", "Fixed", "LowRankTraining", "RankChoice", "Ratio", "SpatialSVD", "TensorTrain", "Tucker",
]  # fmt: skip
