"""Task: what "good" means. Data, loss, how to call the model, and the metric that decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.errors import DataError, EspalierError, ModelError, NeedError, UsageError
from espalier.core.metric import Accuracy, Agreement, Metric, Score, check_classes, first_tensor
from espalier.core.model import device_of, evaluating

Split = Literal["train", "val", "test"]
Batch = Any


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor in a nested batch moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value


LABEL_KEYS = ("labels", "label", "targets", "target")


def default_predict(model: nn.Module, batch: Batch) -> Any:
    """Call the model: ``(x, ..., y)`` without its last item, a dict without its label keys, a tensor as it is."""
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in LABEL_KEYS})
    if isinstance(batch, (tuple, list)):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)


def default_target(batch: Batch) -> Any:
    """The label of a batch: the last item of a tuple, the label key of a dict, or None."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]
    return None


@dataclass(frozen=True, kw_only=True)
class Task:
    """Re-iterable ``train``/``val``/``test`` (each optional), loss, how to call the model, and the metric.

    ``loss(output, target) -> scalar``; ``predict(model, batch) -> output``; ``target(batch)``. Decisions are
    taken on ``val``; ``test`` is read once, at the end. Without labels the metric is agreement with the original.
    """

    train: Iterable[Batch] | None = None
    val: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    metric: Metric | None = None
    predict: Callable[[nn.Module, Batch], Any] = default_predict
    target: Callable[[Batch], Any] = default_target

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            data = getattr(self, name)
            if data is None:
                continue
            if isinstance(data, Iterator):
                raise DataError(
                    f"{name} is a one-shot {type(data).__name__}: it would be empty on the second pass. Give something "
                    "that can be iterated again: a list, a DataLoader, or an object whose __iter__ starts afresh."
                )
            if not isinstance(data, Iterable):
                raise DataError(f"{name} must be an iterable of batches; got {type(data).__name__}.")
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise UsageError(
                f"metric must be an espalier Metric; got {type(self.metric).__name__}. See espalier.tasks."
            )

    def data(self, split: Split) -> Iterable[Batch]:
        """The batches of a split. Raises ``NeedError`` where it is not given."""
        data = getattr(self, split)
        if data is None:
            raise NeedError(f"this needs {split} data, which the task does not have. Give Task(..., {split}=loader).")
        return data  # type: ignore[no-any-return]

    def has(self, need: str) -> bool:
        """Whether the task offers ``train``, ``val``, ``test``, ``labels`` or ``loss``."""
        if need == "labels":
            return self.labelled
        return getattr(self, need, None) is not None

    @property
    def labelled(self) -> bool:
        """Whether a batch of the first split given carries a target."""
        for split in ("val", "train", "test"):
            for batch in getattr(self, split) or ():
                return self.target(batch) is not None
        return False

    def example(self) -> Batch:
        """The first batch of the first split given."""
        for split in ("val", "train", "test"):
            for batch in getattr(self, split) or ():
                return batch
        raise DataError("the task holds no batch; give at least one of train, val, test with at least one batch.")

    def scorer(self) -> Metric:
        """The metric that decides: the given one, accuracy for labelled data, else agreement with the original."""
        return self.metric or (Accuracy() if self.labelled else Agreement())

    def measure(
        self,
        model: nn.Module,
        split: Split,
        original: nn.Module | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Score:
        """The metric of ``model`` on a split, in eval mode and without gradients; modes are restored.

        ``original`` supplies the targets of an unlabelled task; ``progress(done, total)`` is told after each batch,
        total 0 where the loader does not know its length.
        """
        metric = self.scorer()
        running = metric.fresh()
        device = device_of(model)
        against = isinstance(metric, Agreement)
        if against and original is None:
            raise NeedError("without labels the metric is agreement with the original model, which is not named here.")
        data = self.data(split)
        total = len(data) if isinstance(data, Sized) else 0
        with evaluating(model):
            for done, batch in enumerate(data, 1):
                moved = to_device(batch, device)
                output = self.predict(model, moved)
                if against and original is not None:
                    with evaluating(original):
                        target = self.predict(original, moved)
                else:
                    target = self.target(moved)
                running.update(output, target)
                if progress is not None:
                    progress(done, total)
        return running.score()

    def training_loss(self, output: Any, batch: Batch, original_output: Any = None) -> Tensor:
        """The scalar to minimise on one batch; unlabelled tasks follow the original's output (squared error)."""
        target = self.target(batch)
        if self.loss is F.cross_entropy or (self.loss is None and target is not None):
            return _cross_entropy(output, target)
        if self.loss is not None:
            return self.loss(output, target)
        if original_output is None:
            raise NeedError("training without labels or a loss follows the original model, which is not named here.")
        return F.mse_loss(first_tensor(output), first_tensor(original_output))


def _cross_entropy(output: Any, target: Any) -> Tensor:
    """The default loss; shapes that do not fit are said in the words of the data, not of torch."""
    probabilities = isinstance(output, Tensor) and isinstance(target, Tensor) and output.shape == target.shape
    if not probabilities:
        check_classes(output, target, "the cross-entropy loss", "or give another loss: Task(loss=function).")
    return F.cross_entropy(output, target)


def capture_call(task: Task, model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which ``task.predict`` calls the model on ``batch``."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with evaluating(model):
            task.predict(model, to_device(batch, device_of(model)))
    except EspalierError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model does not run on the task's first batch ({type(error).__name__}: {error}). Check that the data "
            "has the shape the model takes; give Task(predict=...) where it is not called as model(inputs)."
        ) from error
    finally:
        handle.remove()
    if not calls:
        raise UsageError("task.predict did not call the model it was given; it must run model(...) on the batch.")
    return calls[0]


def classification(
    train: Iterable[Batch] | None = None,
    val: Iterable[Batch] | None = None,
    test: Iterable[Batch] | None = None,
    *,
    top: int = 1,
) -> Task:
    """The short form: batches ``(x, y)``, cross-entropy, top-``top`` accuracy in percent."""
    return Task(train=train, val=val, test=test, loss=F.cross_entropy, metric=Accuracy(top))
