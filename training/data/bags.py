"""Load and check the bags of a data set, for multiple-instance learning."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from modeling_uhop.bag_arrays import as_arrays, channels_first

from ..errors import RecipeError
from .bag_files import FoundBags, find_bags
from .labels import as_classes


@dataclass
class BagData:
    """The data section of a bag recipe: where the bags come from and how they are preprocessed.

    Attributes:
        dataset: "digits" (bags of scikit-learn's digits; a bag is positive if it contains a 9), a
            Hub id, or a local file or folder: a table with one row per bag or one row per instance
            (.parquet, .json, .jsonl, .arrow, .csv), a CSV file of labels that names a feature file
            (.npy, .pt, .h5) in each row, or a folder of class folders with one folder of images, or
            one feature file, for each bag. A folder may hold such a CSV file.
        instances_column: Name of the column of instances. With one row per bag: a list for each
            bag, of lists of numbers or of the channels of an image. In CSV files, it is the text of
            such lists. With one row per instance: a list of numbers.
        label_column: Name of the column of classes. A class is a whole number, text, or true or
            false.
        bag_column: Name of the column that says to which bag a row belongs, or which file has its
            instances. `None` means the first that there is of "bag_id", "bag", "slide_id", "slide",
            "file_name", "filename", "file" and "path".
        feature_columns: With one row per instance: the columns of features, or patterns such as
            "f*". `None` means the only column of lists, or else all other columns.
        feature_folder: Folder of the feature files and its folders; `None` means the folder of the
            table. A name in the table may lack the suffix.
        group_column: Name of the column of groups. Bags of one group are never divided between
            training and test. `None` means a column "case_id", "patient_id" or "patient", if there
            is one.
        split: Name of the split that cross-validation divides into folds.
        subset: Name of the subset (configuration) of a data set on the Hub that has several.
        standardize, clip, num_components: Arguments of `UHopMILFeatureExtractor`, which is fitted
            on training bags.
        max_instances: Training bags with more instances are subsampled to this number, with a new
            sample each time they are used; `None` for no limit.
    """

    dataset: str
    instances_column: str = "instances"
    label_column: str = "label"
    bag_column: str | None = None
    feature_columns: list[str] | None = None
    feature_folder: str | None = None
    group_column: str | None = None
    split: str = "train"
    subset: str | None = None
    standardize: bool = True
    clip: float | None = 5.0
    num_components: int | None = None
    max_instances: int | None = None


@dataclass
class Bags:
    """Bags with their classes.

    Attributes:
        instances: One array per bag: (instances, features), or (instances, channels, height,
            width).
        labels: Class of each bag, from 0.
        names: Names of the classes.
        instance_labels: For each bag, which instances make it positive; `None` if unknown.
        groups: Group of each bag. Bags of one group are never divided between training and test.
            `None` if every bag is a group.
        image_shape: Channels, height and width, if an instance is a flattened image; otherwise
            `None`.
    """

    instances: list[np.ndarray]
    labels: np.ndarray
    names: list[str]
    instance_labels: list[np.ndarray] | None = None
    groups: np.ndarray | None = None
    image_shape: tuple[int, ...] | None = None

    def pictures(self, index: int) -> np.ndarray | None:
        """The instances of a bag as images (N, channels, height, width); `None` if they are
        vectors."""
        bag = self.instances[index]
        if bag.ndim == 4:
            return bag
        return None if self.image_shape is None else bag.reshape(-1, *self.image_shape)


def load_instances(data: BagData) -> list[np.ndarray]:
    """Load and check the bags of a recipe without their labels; see `load_bags`."""
    if data.dataset == "digits" and data.split != "train":
        raise RecipeError(f"digits has no split {data.split!r}; it has ['train']")
    return digit_bags().instances if data.dataset == "digits" else _instances_of(find_bags(data, labelled=False), data)


def load_bags(data: BagData) -> Bags:
    """Load and check the bags of a recipe.

    Images are returned channels first, as the feature extractor arranges them. Bags that are all
    saved as (1, instances, features) are read as vectors if they differ in their number of
    instances. If they do not, each could also be one image, and an error is raised.

    Raises:
        RecipeError: If the data set, a column or a label is missing, a label is not a class, or the
            instances of a bag are not finite numbers of one shape. The message names the bag.
    """
    if data.dataset == "digits":
        return digit_bags()
    found = find_bags(data)
    names = found.names

    def place(index: int) -> str:
        return f"bag {index} of {data.dataset}" if names is None else f"bag {index} ({names[index]}) of {data.dataset}"

    classes = as_classes(found.labels or [], place)
    values = sorted(set(classes))
    if found.classes is not None and values[0] < 0:
        raise RecipeError(f"{place(classes.index(values[0]))} has the label {values[0]}, which means no label; remove the bag")
    groups = None if found.groups is None else as_classes(found.groups, lambda index: f"the group of {place(index)}")
    return Bags(
        instances=_instances_of(found, data),
        labels=np.array([values.index(label) for label in classes]),
        names=[str(value) if found.classes is None else found.classes.int2str(value) for value in values],
        groups=None if groups is None else np.unique(groups, return_inverse=True)[1],
    )


def _instances_of(found: FoundBags, data: BagData) -> list[np.ndarray]:
    """The instances of each bag; at least one bag has some."""
    names = found.names
    try:
        instances = _as_instances(found.bags)
    except ValueError as error:
        told = str(error) if names is None else re.sub(r"\bbag (\d+)", lambda bag: f"{bag[0]} ({names[int(bag[1])]})", str(error))
        raise RecipeError(f"{data.dataset}: {told}") from error
    if not any(len(bag) > 0 for bag in instances):
        raise RecipeError(f"every bag of {data.dataset} is empty; at least one must have instances")
    return instances


def _as_instances(bags: Sequence[Any]) -> list[np.ndarray]:
    """The arrays of a column of bags, with images channels first; see `load_bags`."""
    shapes: list[tuple[int, ...]] = []

    def arranged(array: np.ndarray) -> np.ndarray:
        shapes.append(array.shape)
        return array[0] if array.ndim == 3 and len(array) == 1 else channels_first(array)

    instances = as_arrays(bags, arrange=arranged)
    # Because all lists of a column have the same depth, either all non-empty bags have the extra
    # axis or none has.
    wrapped = [index for index, shape in enumerate(shapes) if len(shape) == 3]
    if wrapped and len({shapes[index][1] for index in wrapped}) == 1:
        shape = shapes[wrapped[0]]
        raise ValueError(
            f"bag {wrapped[0]} and all others have shape {shape}, which may mean {shape[1]} vectors or one image; "
            "save vectors as (instances, features) and images as (instances, channels, height, width)"
        )
    return instances


def digit_bags(target: int = 9, num_bags: int = 300, smallest: int = 6, largest: int = 14, num_groups: int = 20, seed: int = 0) -> Bags:
    """Generate bags of scikit-learn's digits; every second bag is positive and contains `target`
    once or twice.

    The images are divided into groups. Each bag samples from one group, so that bags of different
    groups share no image."""
    random = np.random.default_rng(seed)
    digits = load_digits()
    images, group_of_image = digits.data / 16.0, random.permutation(len(digits.target)) % num_groups
    instances, instance_labels, groups = [], [], []
    for index in range(num_bags):
        group = index // 2 % num_groups
        positive = int(random.integers(1, 3)) if index % 2 == 0 else 0
        negative = int(random.integers(smallest, largest + 1)) - positive
        there, others = (np.flatnonzero((group_of_image == group) & mask) for mask in (digits.target == target, digits.target != target))
        drawn = np.concatenate([random.choice(there, positive, replace=False), random.choice(others, negative, replace=False)])
        chosen = random.permutation(drawn)
        instances.append(images[chosen])
        instance_labels.append((digits.target[chosen] == target).astype(np.int64))
        groups.append(group)
    labels = np.array([marks.max() for marks in instance_labels])
    return Bags(instances, labels, ["without a 9", "with a 9"], instance_labels, np.array(groups), (1, 8, 8))
