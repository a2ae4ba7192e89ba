"""Short forms of a task and the built-in metrics, under one name: ``espalier.tasks``."""

from espalier.core.metric import Accuracy, Agreement, Loss, Metric
from espalier.core.task import Task, classification

__all__ = ["Accuracy", "Agreement", "Loss", "Metric", "Task", "classification"]
