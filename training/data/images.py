"""Load and check the splits of an image data set, and transform images into pixel values."""

import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn.datasets import load_digits
from transformers import ViTImageProcessorPil

from modeling_uhop.images import as_rgb

from ..errors import RecipeError
from .image_files import find_splits, image_column, names_of_splits
from .labels import as_classes
from .source import same_data


@dataclass
class ImageData:
    """The data section of an image recipe: where the images come from and how they are split.

    Attributes:
        dataset: "digits" (scikit-learn's), a Hub id, or a local folder or file: class folders
            (SPLIT/CLASS/IMAGE or CLASS/IMAGE), Parquet files of images or of paths, a CSV file of
            paths and classes, or any other layout that `datasets.load_dataset` reads. Paths start
            at the folder of their file.
        image_column: Name of the column of images or paths. Every image mode is accepted (see
            `modeling_uhop.images.as_rgb`). If there is no column "image", the only column of
            images is used, or a column with a usual name of paths such as "file_name".
        label_column: Name of the column of classes. A class is a whole number, text, or true or
            false.
        train_split: Name of the training split. Files and folders without the name of a split are
            the training split.
        test_split: Name of the test split. `None` holds out `test_fraction` of the training split.
            If the data set has no split "test", its validation split is the test split; without
            one, `test_fraction` is held out. A warning says so.
        validation_split: Name of the validation split; `None` means a split "validation", "valid",
            "val" or "dev" that is not the test split. Without such a split, `validation_fraction`
            is held out.
        validation_fraction: Fraction of the training split that is held out for validation,
            stratified by label.
        test_fraction: Fraction of "digits", or of a training split, that is held out for the test,
            stratified by label. 0 holds out nothing, which only runs with `evaluation.split:
            validation` accept.
        subset: Name of the subset (configuration) of a data set on the Hub that has several.
        split_seed: Seed of these splits. It is separate from the training seed, so that all
            training seeds are evaluated on the same images.
        max_train_samples: Number of training images to keep, drawn with `split_seed`; `None` for
            all.
        max_eval_samples: Number of validation images, and of training images, to evaluate after
            each epoch; `None` for all validation images. The final evaluation uses all images.
        skip_unreadable: Whether to skip images that cannot be decoded, with a warning for each. All
            images are then read once before training. If false, the first unreadable image ends the
            run.
        random_crop_padding: Zero padding in pixels for random crops of training images; 0 for no
            crops.
        random_flip: Whether training images are mirrored at random.
        image_mean, image_std: Normalisation of each of the three channels, after scaling to [0, 1].
    """

    dataset: str
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str | None = "test"
    validation_split: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    subset: str | None = None
    split_seed: int = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    skip_unreadable: bool = False
    random_crop_padding: int = 0
    random_flip: bool = False
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])


def load_images(data: ImageData, test: bool = True) -> DatasetDict:
    """Load and check the images of a recipe.

    Returns the splits "train", "validation" and, if `test`, "test". Their columns are `image`,
    `label` (a `ClassLabel`) and `row`, a text that names the row of the image in the data set.

    Args:
        data: The data section of the recipe.
        test: Whether the test split is loaded. If not, it is not read, and images that are held out
            for the test are not returned, so that "train" and "validation" are the same.

    Raises:
        RecipeError: If the data set, a split or a column is missing, a class has too few images to
            hold some out, or a label is missing, is not a class or is outside its range. The
            message names the row.
    """
    found = _digits(data) if data.dataset == "digits" else find_splits(data)
    names = {"train": "train", "test": "test"} if data.dataset == "digits" else names_of_splits(data, sorted(found))
    read = {role: name for role, name in names.items() if test or role != "test"}
    splits = _encode_labels({role: _select_columns(found[name](), data, name) for role, name in read.items()}, read, data.dataset)
    if data.skip_unreadable:
        splits = {role: _readable(split) for role, split in splits.items()}
    if "test" not in names and data.test_fraction > 0:
        splits["train"], splits["test"] = _divided(splits["train"], data, "test_fraction")
    elif "test" not in names and test:
        raise RecipeError(f"data.test_fraction=0 leaves no test images of {data.dataset}; set evaluation.split=validation or a fraction")
    if "validation" not in names:
        splits["train"], splits["validation"] = _divided(splits["train"], data, "validation_fraction")
    if data.max_train_samples is not None and data.max_train_samples < len(splits["train"]):
        splits["train"], _ = _divided(splits["train"], data, "max_train_samples")
    return DatasetDict({role: splits[role] for role in ("train", "validation", *(["test"] if test else []))})


def _divided(split: Dataset, data: ImageData, setting: str) -> tuple[Dataset, Dataset]:
    """Divide a split into two, stratified by label.

    The setting is the size of the second part, or for "max_train_samples" that of the first."""
    counts = np.bincount(split["label"])
    scarce = min(np.flatnonzero(counts), key=lambda index: counts[index])
    names, size = split.features["label"].names, getattr(data, setting)
    if counts[scarce] < 2:
        raise RecipeError(
            f"class {names[scarce]!r} of {data.dataset} has one image, too few to divide by data.{setting}={size}; "
            "add images, or remove the class"
        )
    try:
        sizes = {"train_size" if setting == "max_train_samples" else "test_size": size}
        parts = split.train_test_split(**sizes, stratify_by_column="label", seed=data.split_seed)
    except ValueError as error:
        raise RecipeError(
            f"data.{setting}={size} cannot divide {len(split)} images of {len(names)} classes so that each part has every class: "
            f"{' '.join(str(error).split())}"
        ) from error
    return parts["train"], parts["test"]


def unlabelled_images(data: ImageData, dataset: str | None = None, split: str | None = None) -> Dataset:
    """Load and check images for the separation step, which needs no labels.

    The columns are `image` and `row`. The training split of the recipe's own data set is returned
    without its validation and test images, but with the images that `max_train_samples` leaves out.

    Args:
        data: The data section of the recipe, whose columns and other settings hold here too.
        dataset: As `data.dataset`, but a folder of images needs no class folders; `None` means that
            of the recipe.
        split: Name of the split; `None` means `data.train_split`.

    Raises:
        RecipeError: If the data set, the split or the image column is missing.
    """
    dataset, split = dataset or data.dataset, split or data.train_split
    if same_data(dataset, data.dataset) and split == data.train_split:
        return load_images(replace(data, max_train_samples=None), test=False)["train"].remove_columns("label")
    given = replace(data, dataset=dataset, test_split=split)
    found = _digits(data) if dataset == "digits" else find_splits(given, labelled=False)
    if split not in found:
        raise RecipeError(f"{dataset} has no split {split!r}; it has {sorted(found)}")
    images = _select_columns(found[split](), given, split, labelled=False)
    return _readable(images) if data.skip_unreadable else images


def _digits(data: ImageData) -> dict[str, Callable[[], Dataset]]:
    digits = load_digits()
    images = [PILImage.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images]
    features = Features({data.image_column: Image(), data.label_column: ClassLabel(names=[str(name) for name in digits.target_names])})
    everything = Dataset.from_dict({data.image_column: images, data.label_column: digits.target}, features=features)
    parts = everything.train_test_split(data.test_fraction, stratify_by_column=data.label_column, seed=data.split_seed)
    return {"train": lambda: parts["train"], "test": lambda: parts["test"]}


def _select_columns(split: Dataset, data: ImageData, name: str, labelled: bool = True) -> Dataset:
    images, classes = image_column(split, data) or data.image_column, data.label_column
    if classes == "label" and "label" not in split.column_names:
        typed = [column for column, feature in split.features.items() if isinstance(feature, ClassLabel)]
        classes = typed[0] if len(typed) == 1 else classes
    columns = {images: "image", **({classes: "label"} if labelled else {})}
    for column, renamed in columns.items():
        if column not in split.column_names:
            raise RecipeError(f"{data.dataset} has no column {column!r}; it has {split.column_names}; set data.{renamed}_column")
    split = split.select_columns([*columns])
    for column, renamed in columns.items():
        if column != renamed:
            split = split.rename_column(column, renamed)
    if not isinstance(split.features["image"], Image):
        split = split.cast_column("image", Image())
    return split.add_column("row", [f"row {row} of {name}" for row in range(len(split))])


def _encode_labels(splits: dict[str, Dataset], names: dict[str, str], dataset: str) -> dict[str, Dataset]:
    """Encode the labels of every split as class indices; the training split defines the classes.

    Args:
        splits: The splits by role: "train", "validation", "test".
        names: The name of each of these in the data set.
    """
    label = splits["train"].features["label"]
    places = {role: partial(_place, rows["row"], dataset) for role, rows in splits.items()}
    for role, rows in splits.items():
        if isinstance(label, ClassLabel) and rows.features["label"] != label:
            other = rows.features["label"]
            raise RecipeError(f"the splits disagree on the classes: {names['train']} has {label.names}, {names[role]} has {other}")
    classes = {role: as_classes(rows["label"], places[role]) for role, rows in splits.items()}
    if isinstance(label, ClassLabel):
        for role, given in classes.items():
            for index, value in enumerate(given):
                if not 0 <= value < label.num_classes:
                    raise RecipeError(f"labels must lie in [0, {label.num_classes}), got {value} in {places[role](index)}")
        return splits
    indices = {value: index for index, value in enumerate(sorted(set(classes["train"])))}
    for role, given in classes.items():
        for index, value in enumerate(given):
            if value not in indices:
                raise RecipeError(f"labels must be among those of the training split, {[*indices]}, got {value!r} in {places[role](index)}")
    named = ClassLabel(names=[str(value) for value in indices])
    return {
        role: rows.remove_columns("label").add_column("label", [indices[value] for value in classes[role]], feature=named)
        for role, rows in splits.items()
    }


def _place(rows: Sequence[str], name: str, index: int) -> str:
    return f"{rows[index]} in {name}"


def make_image_processor(data: ImageData, image_size: Any, images: Dataset | None = None) -> ViTImageProcessorPil:
    """The image processor that is saved with a model: RGB, the image size of the model, the
    normalisation of the recipe.

    Args:
        image_size: The side of an image in pixels, or its height and width.
        images: The training images. A warning is given if they are much larger than `image_size`,
            which loses what they show.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if images is not None:
        sizes = median_size(images)
        # Because 224 pixels are enough for most photos, larger images count as 224 here.
        if min(min(size, 224) / side for size, side in zip(sizes, (height, width), strict=True)) >= 4:
            warnings.warn(
                f"images of {data.dataset} are about {sizes[0]} x {sizes[1]} pixels, and are reduced to {height} x {width}; "
                "set a larger model.image_size (with model.patch_size)",
                stacklevel=2,
            )
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": height, "width": width},
        image_mean=data.image_mean,
        image_std=data.image_std,
    )


def median_size(images: Dataset, count: int = 64) -> tuple[int, int]:
    """The median height and width of `count` images, spread over a split; images that cannot be
    read are left out.

    Raises:
        RecipeError: If none of these images can be read.
    """
    chosen = images.select(np.unique(np.linspace(0, len(images) - 1, count).astype(int))).cast_column("image", Image(decode=False))
    sizes = []
    for encoded in chosen["image"]:
        # Because only the header of the file is needed, the pixels are not decoded.
        with (
            suppress(OSError, SyntaxError, ValueError, TypeError),
            PILImage.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"])) as image,
        ):
            sizes.append(image.size[::-1])
    if not sizes:
        raise RecipeError(f"none of {len(chosen)} images can be read; check the files")
    height, width = np.median(sizes, axis=0).astype(int).tolist()
    return height, width


def with_pixels(split: Dataset, processor: ViTImageProcessorPil, augment: ImageData | None = None) -> Dataset:
    """A split whose items have `pixel_values`, and `labels` if it is labelled.

    When an item is read, its image is decoded, converted to RGB by `as_rgb`, augmented as `augment`
    says, and processed.

    Raises:
        RecipeError: When an item is read whose image cannot be decoded. The message names the
            image.
    """
    return split.cast_column("image", Image(decode=False)).with_transform(make_transform(processor, augment))


def make_transform(processor: ViTImageProcessorPil, augment: ImageData | None = None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that transforms the encoded images of a batch into `pixel_values`; see
    `with_pixels`."""

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        images = [_decoded(image, row) for image, row in zip(batch["image"], batch["row"], strict=True)]
        images = images if augment is None else [_augmented(image, augment) for image in images]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        if not torch.isfinite(pixel_values).all():
            raise ValueError("an image has pixels that are not finite; check the image, data.image_mean and data.image_std")
        labels = {"labels": batch["label"]} if "label" in batch else {}
        return {"pixel_values": list(pixel_values), **labels}

    return transform


def _decoded(encoded: dict[str, Any] | None, row: str) -> PILImage.Image:
    if encoded is None:
        raise RecipeError(f"the image in {row} is missing; set data.skip_unreadable=true to skip such images")
    try:
        return as_rgb(Image().decode_example(encoded))
    except (OSError, SyntaxError, ValueError) as error:
        path = f" ({encoded['path']})" if encoded.get("path") else ""
        raise RecipeError(f"the image in {row}{path} cannot be read: {error}; set data.skip_unreadable=true to skip such images") from error


def _readable(split: Dataset) -> Dataset:
    """The split without images that cannot be decoded; a warning names each of them."""

    def reads(encoded: dict[str, Any] | None, row: str) -> bool:
        try:
            _decoded(encoded, row)
        except RecipeError as error:
            warnings.warn(str(error).partition(";")[0] + ", and is skipped", stacklevel=2)
            return False
        return True

    undecoded = split.cast_column("image", Image(decode=False))
    return undecoded.filter(reads, input_columns=["image", "row"], desc="reading images").cast_column("image", Image())


def _augmented(image: PILImage.Image, data: ImageData) -> PILImage.Image:
    """Standard augmentation of small images: a random crop of the zero-padded image, and random
    mirroring."""
    if data.random_crop_padding > 0:
        padding = data.random_crop_padding
        left, top = random.randint(-padding, padding), random.randint(-padding, padding)
        image = image.crop((left, top, left + image.width, top + image.height))
    return ImageOps.mirror(image) if data.random_flip and random.random() < 0.5 else image


def with_dataset(data: ImageData, dataset: str | None) -> ImageData:
    """The data section of a recipe with another data set (Hub id or folder) that has the same
    columns and splits."""
    return data if dataset is None else replace(data, dataset=dataset)
