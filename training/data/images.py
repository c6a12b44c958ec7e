"""Load and check the splits of an image data set, and transform images into pixel values."""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn.datasets import load_digits
from transformers import ViTImageProcessorPil

from modeling_uhop.images import as_rgb

from ..errors import RecipeError
from .labels import as_classes
from .source import same_data


@dataclass
class ImageData:
    """The data section of an image recipe: where the images come from and how they are split.

    Attributes:
        dataset: "digits" (scikit-learn's), a Hub id, or a local folder in any layout that
            `datasets.load_dataset` reads.
        image_column: Name of the column of images. Every image mode is accepted (see
            `modeling_uhop.images.as_rgb`).
        label_column: Name of the column of classes. A class is a whole number, text, or true or
            false.
        train_split, test_split: Names of the splits. "digits" has no splits; `test_fraction`
            divides it.
        validation_fraction: Fraction of the training split that is held out for validation,
            stratified by label.
        test_fraction: Fraction of "digits" that is the test split.
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
    test_split: str = "test"
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
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

    Returns the splits "train", "validation" and "test". Their columns are `image`, `label` (a
    `ClassLabel`) and `row`, a text that names the row of the image in the data set.

    Raises:
        RecipeError: If the data set, a split or a column is missing, or a label is missing, is not
            a class or is outside its range. The message names the row.
    """
    splits = _digits(data) if data.dataset == "digits" else _from_hub_or_folder(data)
    splits = _encode_labels(DatasetDict({name: _select_columns(split, data, name) for name, split in splits.items()}), data.dataset)
    if data.skip_unreadable:
        splits = DatasetDict({name: _readable(split) for name, split in splits.items()})
    held_out = splits["train"].train_test_split(data.validation_fraction, stratify_by_column="label", seed=data.split_seed)
    train = held_out["train"]
    if data.max_train_samples is not None and data.max_train_samples < len(train):
        train = train.train_test_split(train_size=data.max_train_samples, stratify_by_column="label", seed=data.split_seed)["train"]
    return DatasetDict(train=train, validation=held_out["test"], test=splits["test"])


def unlabelled_images(data: ImageData, dataset: str | None = None, split: str | None = None) -> Dataset:
    """Load and check images for the separation step, which needs no labels.

    The columns are `image` and `row`. The training split of the recipe's own data set is returned
    without its validation images, but with the images that `max_train_samples` leaves out.

    Args:
        data: The data section of the recipe, whose columns and other settings hold here too.
        dataset: As `data.dataset`; `None` means that of the recipe.
        split: Name of the split; `None` means `data.train_split`.

    Raises:
        RecipeError: If the data set, the split or the image column is missing.
    """
    dataset, split = dataset or data.dataset, split or data.train_split
    if same_data(dataset, data.dataset) and split == data.train_split:
        return load_images(replace(data, max_train_samples=None))["train"].remove_columns("label")
    given = replace(data, dataset=dataset, train_split=split, test_split=split)
    if dataset == "digits" and split not in ("train", "test"):
        raise RecipeError(f"digits has no split {split!r}; it has ['test', 'train']")
    loaded = _digits(data)[split] if dataset == "digits" else _from_hub_or_folder(given)["train"]
    images = _select_columns(loaded, given, split, labelled=False)
    return _readable(images) if data.skip_unreadable else images


def _digits(data: ImageData) -> DatasetDict:
    digits = load_digits()
    images = [PILImage.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images]
    features = Features({data.image_column: Image(), data.label_column: ClassLabel(names=[str(name) for name in digits.target_names])})
    everything = Dataset.from_dict({data.image_column: images, data.label_column: digits.target}, features=features)
    return everything.train_test_split(data.test_fraction, stratify_by_column=data.label_column, seed=data.split_seed)


def _from_hub_or_folder(data: ImageData) -> DatasetDict:
    folder = Path(data.dataset)
    if folder.is_dir():
        # Because `datasets` renames the split of a file valid.parquet to "validation", we read each
        # split by its name on the Hub.
        files = {split: sorted(str(file) for file in folder.glob(f"**/{split}*.parquet")) for split in (data.train_split, data.test_split)}
        loaded = _from_parquet(files) if all(files.values()) else load_dataset(str(folder))
    elif data.dataset.startswith((".", "/", "~")):
        raise RecipeError(f"there is no folder {data.dataset}; check data.dataset or --dataset")
    else:
        loaded = load_dataset(data.dataset)
    for split in (data.train_split, data.test_split):
        if split not in loaded:
            raise RecipeError(f"{data.dataset} has no split {split!r}; it has {sorted(loaded)}")
    return DatasetDict(train=loaded[data.train_split], test=loaded[data.test_split])


def _from_parquet(files: dict[str, list[str]]) -> DatasetDict:
    """Load each split separately.

    If they were loaded together, every split would silently get the features and the class names of
    the first one."""
    return DatasetDict({split: load_dataset("parquet", data_files=paths, split="train") for split, paths in files.items()})


def _select_columns(split: Dataset, data: ImageData, name: str, labelled: bool = True) -> Dataset:
    columns = {data.image_column: "image", **({data.label_column: "label"} if labelled else {})}
    for column in columns:
        if column not in split.column_names:
            raise RecipeError(f"{data.dataset} has no column {column!r}; it has {split.column_names}")
    split = split.select_columns([*columns])
    for column, renamed in columns.items():
        if column != renamed:
            split = split.rename_column(column, renamed)
    if not isinstance(split.features["image"], Image):
        split = split.cast_column("image", Image())
    return split.add_column("row", [f"row {row} of {name}" for row in range(len(split))])


def _encode_labels(splits: DatasetDict, name: str) -> DatasetDict:
    """Encode the labels of every split as class indices; the training split defines the classes."""
    label = splits["train"].features["label"]
    if isinstance(label, ClassLabel) and splits["test"].features["label"] != label:
        raise RecipeError(f"the splits disagree on the classes: train has {label.names}, test has {splits['test'].features['label']}")
    places = {split: partial(_place, rows["row"], name) for split, rows in splits.items()}
    classes = {split: as_classes(rows["label"], places[split]) for split, rows in splits.items()}
    if isinstance(label, ClassLabel):
        for split, given in classes.items():
            for index, value in enumerate(given):
                if not 0 <= value < label.num_classes:
                    raise RecipeError(f"labels must lie in [0, {label.num_classes}), got {value} in {places[split](index)}")
        return splits
    indices = {value: index for index, value in enumerate(sorted(set(classes["train"])))}
    for index, value in enumerate(classes["test"]):
        if value not in indices:
            raise RecipeError(f"labels must be among those of the training split, {[*indices]}, got {value!r} in {places['test'](index)}")
    names = ClassLabel(names=[str(value) for value in indices])
    encoded = {
        split: rows.remove_columns("label").add_column("label", [indices[value] for value in classes[split]], feature=names)
        for split, rows in splits.items()
    }
    return DatasetDict(encoded)


def _place(rows: Sequence[str], name: str, index: int) -> str:
    return f"{rows[index]} in {name}"


def make_image_processor(data: ImageData, image_size: Any) -> ViTImageProcessorPil:
    """The image processor that is saved with a model: RGB, the image size of the model, the
    normalisation of the recipe."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": height, "width": width},
        image_mean=data.image_mean,
        image_std=data.image_std,
    )


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
