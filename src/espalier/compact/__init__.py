"""Compact networks: ready ones for small images."""

from espalier.compact.resnet import CifarResNet, load_pretrained, resnet20, resnet56

__all__ = ["CifarResNet", "load_pretrained", "resnet20", "resnet56"]
