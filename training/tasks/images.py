"""Train and evaluate a Hopfield vision transformer from a recipe.

The separation step runs during or before training. The test split is evaluated once, at the end.
The model folder is then reloaded in a new process as a check.

python training/train_vit.py configs/vit_digits.yaml
torchrun --standalone --nproc_per_node 2 training/train_vit.py configs/vit_digits.yaml --set training.use_cpu=true
accelerate launch --config_file configs/accelerate/gpus.yaml training/train_vit.py configs/vit_cifar10.yaml --dataset path/to/cifar10

The second command trains in two processes on a CPU; `accelerate launch` needs MPI for this.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, DatasetDict
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from modeling_uhop import SeparationCallback, UHopViTConfig, UHopViTForImageClassification
from modeling_uhop.feature_map import unit_norm
from modeling_uhop.images import as_rgb

from ..checkpoints import SealingCallback, remove_unfinished
from ..cli import command_line
from ..data.images import ImageData, load_images, make_image_processor, unlabelled_images, with_dataset, with_pixels
from ..errors import RecipeError, errors_in_one_line
from ..metrics import classification_metrics
from ..processes import leave_process_group
from ..recipe import load_recipe
from ..reload import check_reload
from ..report.cards import write_card
from ..report.figures import training_figure
from ..results import write_results
from ..run_folder import clear_output_dir, write_recipe
from ..stage_one import separation_callback
from ..stages import begin, load_weights, restore_state, train
from ..tasks.images import ImagesRecipe


NUM_PROBES = 64
# Because `with_transform` needs the raw columns, the Trainer must not remove them. Two checkpoints
# are kept, because a process that is killed while it writes one must be able to resume from the
# other.
TRAINING_DEFAULTS = {"remove_unused_columns": False, "report_to": "none", "eval_strategy": "epoch", "save_total_limit": 2}


class GramRecorder(TrainerCallback):
    """Records the `feature_grams` of some images at one event of the Trainer, such as
    "on_train_end"."""

    def __init__(self, event: str, pixel_values: torch.Tensor):
        self.pixel_values = pixel_values
        self.grams: list[np.ndarray] = []
        setattr(self, event, self._record)

    def _record(self, args, state, control, model=None, **kwargs):
        self.grams = feature_grams(model, self.pixel_values)


@torch.no_grad()
def feature_grams(model: Any, pixel_values: torch.Tensor) -> list[np.ndarray]:
    """For each layer, the cosine similarities (patches, patches) of patch features, averaged over
    images."""
    training = model.training
    # Because dropout would change the random state of the training that follows, we switch it off.
    features = [unit_norm(each.features().float()) for each in model.eval().memory_sets(pixel_values.to(model.device))]
    model.train(training)
    return [(feature @ feature.mT).mean(0).cpu().numpy() for feature in features]


def as_lists(matrices: list[np.ndarray]) -> list[list[list[float]]]:
    """Matrices as nested lists for JSON, rounded to four digits, which is enough for a figure."""
    return [matrix.round(4).tolist() for matrix in matrices]


def main() -> None:
    args = command_line(__doc__.splitlines()[0]).parse_args()
    with errors_in_one_line():
        recipe = load_recipe(args.recipe, args.set, ImagesRecipe)
        recipe.data = with_dataset(recipe.data, args.dataset)
        recipe.seed = recipe.seed if args.seed is None else args.seed
        run(recipe, Path(args.output_dir or f"runs/{recipe.name}"), overwrite=args.overwrite, resume=args.resume)
    leave_process_group()


def run(recipe: ImagesRecipe, folder: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run a recipe, save its outputs in `folder` and return the metrics.

    With `overwrite`, an earlier run is deleted only after the recipe and the data have been
    checked. If a step after the training fails, `resume` repeats only the steps after the training.
    """
    trained, checkpoint = begin(recipe, folder, overwrite, resume)
    set_seed(recipe.seed)
    images = load_images(recipe.data)
    names = images["train"].features["label"].names
    model = build_model(recipe, names)
    load_weights(model, folder, trained, checkpoint)
    processor = make_image_processor(recipe.data, model.config.image_size)

    def unlabelled(dataset: str | None, split: str | None) -> Dataset:
        return with_pixels(unlabelled_images(recipe.data, dataset, split), processor, augment=recipe.data)

    separation = separation_callback(recipe.separation, unlabelled)
    # Because one process changes the folder below, we wait until every process has checked it.
    PartialState().wait_for_everyone()
    trainer = build_trainer(recipe, folder, model, processor, images, separation)
    is_main = trainer.is_world_process_zero()
    if is_main and resume:
        remove_unfinished(folder)
    elif is_main:
        clear_output_dir(folder)
        write_recipe(recipe, folder)
    if is_main:
        print(describe(recipe, model, images))

    before: list[np.ndarray] = []
    recorder = None
    if separation is not None and not resume:
        probe = images["validation"].select(range(min(NUM_PROBES, len(images["validation"]))))
        pixel_values = torch.stack(with_pixels(probe, processor)[:]["pixel_values"])
        before = feature_grams(trainer.model, pixel_values)
        recorder = GramRecorder("on_train_begin" if separation.schedule == "train_begin" else "on_train_end", pixel_values)
        trainer.add_callback(recorder)

    def details() -> dict[str, Any]:
        return {
            "history": [] if separation is None else separation.history,
            "grams": {} if recorder is None else {"before": as_lists(before), "after": as_lists(recorder.grams)},
        }

    if trained is None:
        trained = train(trainer, folder, recipe, checkpoint, details)
    else:
        restore_state(trainer, trained)
    validation = trainer.evaluate(with_pixels(images["validation"], processor), metric_key_prefix="validation")
    test = trainer.evaluate(with_pixels(images["test"], processor), metric_key_prefix="test")
    if not is_main:
        return {}

    metrics = {
        "test_accuracy": test["test_accuracy"],
        "test_loss": test["test_loss"],
        "validation_accuracy": validation["validation_accuracy"],
        "validation_loss": validation["validation_loss"],
        "last_step": trainer.state.global_step,
    }
    if trained["seconds"] is not None:
        metrics["train_seconds"] = trained["seconds"]
    if trainer.state.best_global_step is not None:
        metrics["best_step"] = trainer.state.best_global_step
    log_history = trainer.state.log_history
    train_accuracies = [entry["eval_train_accuracy"] for entry in log_history if "eval_train_accuracy" in entry]
    if train_accuracies:
        metrics["max_train_accuracy"] = max(train_accuracies)
    measured = [entry for entry in log_history if "separation_loss" in entry]
    if measured:
        metrics["separation_loss_before"] = measured[0]["separation_loss_before"]
        metrics["separation_loss"] = measured[-1]["separation_loss"]
    write_recipe(recipe, folder)
    write_results(folder / "results.json", recipe, metrics, num_parameters=model.num_parameters(), log_history=log_history)
    grams = {moment: [np.array(gram) for gram in layers] for moment, layers in trained["grams"].items()}
    training_figure(folder / "training.png", log_history, trained["history"], grams)
    if recipe.architecture == "uhop_vit":
        write_card(folder)
    print(summary(metrics, folder))
    shown = [as_rgb(image) for image in images["test"][:NUM_PROBES]["image"]]
    with torch.no_grad():
        pixel_values = processor(shown, return_tensors="pt")["pixel_values"]
        logits = unwrapped_model(trainer, folder).eval().cpu().float()(pixel_values).logits.numpy()
    check_reload(folder, "image-classification", [np.asarray(image) for image in shown], logits)
    return metrics


def unwrapped_model(trainer: Trainer, folder: Path) -> PreTrainedModel:
    """The trained model without the wrappers of accelerate.

    Because FSDP and DeepSpeed keep only a part of the weights in each process, we load the saved
    model instead if one of them is used."""
    model = cast(PreTrainedModel, trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return type(model).from_pretrained(folder)
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


def build_model(recipe: ImagesRecipe, names: list[str]) -> PreTrainedModel:
    """A new model for a recipe and its classes: a U-Hop ViT, or the ViT of transformers if the
    recipe is for the baseline.

    Raises:
        RecipeError: For an unknown architecture, or a baseline with a separation step.
    """
    config = UHopViTConfig(**recipe.model, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    if recipe.architecture == "uhop_vit":
        return UHopViTForImageClassification(config)
    if recipe.architecture != "vit" or recipe.separation is not None:
        raise RecipeError(
            "architecture must be 'uhop_vit', or 'vit' without a separation step, "
            f"got {recipe.architecture!r} with separation {recipe.separation}"
        )
    return ViTForImageClassification(cast(ViTConfig, UHopViTForImageClassification(config).to_vit().config))


def build_trainer(
    recipe: ImagesRecipe,
    folder: Path,
    model: PreTrainedModel,
    processor: ViTImageProcessorPil,
    images: DatasetDict,
    separation: SeparationCallback | None,
) -> Trainer:
    """The Trainer of transformers with the separation step as a callback."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=recipe.seed,
        **{**TRAINING_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available(), **recipe.training},
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=with_pixels(images["train"], processor, recipe.data),
        eval_dataset={split: with_pixels(evaluated_part(images, split, recipe.data), processor) for split in ("validation", "train")},
        processing_class=processor,
        compute_metrics=classification_metrics,
        callbacks=[*([] if separation is None else [separation]), SealingCallback()],
    )


def evaluated_part(images: DatasetDict, split: str, data: ImageData) -> Dataset:
    """The part of a split that is evaluated after each epoch.

    It has the same number of images for training and validation, and at most `max_eval_samples`.
    """
    sizes = [len(images["validation"]), len(images["train"]), data.max_eval_samples]
    return images[split].select(range(min(size for size in sizes if size is not None)))


def describe(recipe: ImagesRecipe, model: PreTrainedModel, images: DatasetDict) -> str:
    """One line about a run: parameters, images, separation step and seed."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in images.items())
    stage_one = "no separation step" if recipe.separation is None else f"separation {recipe.separation}"
    return f"{recipe.name}: {model.num_parameters():,} parameters; images: {sizes}; {stage_one}; seed {recipe.seed}"


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """The metrics of a run as lines of text, after the paths of its results file and figure."""

    lines = [f"  {name:<24} {value:.4f}" if isinstance(value, float) else f"  {name:<24} {value}" for name, value in metrics.items()]
    return "\n".join(["", f"Results ({folder / 'results.json'}, {folder / 'training.png'}):", *lines])


if __name__ == "__main__":
    main()
