"""The classes of a classifier: their names, and which of them each label of the data stands for."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_igpt.modules.resume import own_data, trainer_of
from lightning_igpt.weights.checkpoint import STAMP

log = logging.getLogger(__name__)


def check_class_names(names: Any, num_classes: int | None) -> None:
    """Raise ValueError unless names are a list of different texts, one per class."""
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names is {names!r}; it must be a list of texts")
    if not len(set(names)) == len(names) == (num_classes or len(names)):
        raise ValueError(
            f"class_names has {len(names)} names, {len(set(names))} of them different; there are "
            f"{num_classes or 'as many'} classes, and each needs a name of its own"
        )


def classes_of_data(trainer: Trainer) -> tuple[int | None, list[str] | None]:
    """(number, names) of the classes of the data module that is in use now, if it is one of this package's."""
    data = own_data(trainer)
    if data is None:
        return None, None
    check_class_names(data.class_names, data.num_classes)  # a subclass may set anything
    return data.num_classes, data.class_names


def adopt_class_names(module: Any) -> None:
    """Take the data's class names where training has set none; ValueError where the data has more classes."""
    count, names = classes_of_data(module.trainer)
    count = module.num_classes if count is None or module.trainer.predicting else count
    if count > module.num_classes:
        raise ValueError(f"num_classes is {module.num_classes} but the data has {count}; set num_classes={count}")
    if count < module.num_classes:
        log.warning("num_classes is %d but the data has only %d classes", module.num_classes, count)
    if names is not None and not (module.names_given or module.trained_classes):
        rest = (f"LABEL_{number}" for number in range(len(names), module.num_classes))  # classes that the data lacks
        module.class_names = module.hparams["class_names"] = [*names, *rest][: module.num_classes]


def match_classes(module: Any) -> None:
    """Match the data's classes with those that a module was trained on, by name; for each start of training and test.

    ``label_places`` becomes the class of each of the data's labels, None where they are the same.

    Raises:
        ValueError: The data has a class that the module was not trained on.
    """
    trainer, module.label_places = trainer_of(module), None
    if trainer is None or trainer.predicting or (names := classes_of_data(trainer)[1]) is None:
        return
    known = module.trained_classes or module.class_names or names
    if set(names) <= set(known):
        places = [known.index(name) for name in names]
        if places != list(range(len(names))):
            module.label_places = torch.tensor(places, device=module.device)
    elif module.trained_classes is not None:
        raise ValueError(
            f"the network was trained on the classes {known}, but the data has {list(names)}: give the classes the "
            "names of training, or start a new run from the weights with pretrained="
        )
    else:
        log.warning("class_names are %s, the data's %s: the former name the latter, in this order", known, names)
        known = list(names)
    if trainer.training:
        module.trained_classes = list(known)


def load_classes(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Name the classes as in training, whatever the data at hand calls its own."""
    module.trained_classes = checkpoint[STAMP].get("classes")
    saved = checkpoint.get("hyper_parameters", {}).get("class_names")
    if module.names_given or saved is None or module.class_names == saved:
        return
    if module.class_names is not None and module.trained_classes is None:  # else match_classes compares them
        log.warning("the checkpoint's classes are %s, the data's %s: keeping the former", saved, module.class_names)
    module.class_names, module.names_given = saved, True
    module.hparams["class_names"] = saved
