"""One process of test_distributed: train a small model with Stage I and save the result."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import EvalPrediction, TrainerCallback

from modeling_uhop import SeparationCallback
from tests.support.training import Images, image_model, image_trainer
from tests.support.workers import run_worker


class Killed(TrainerCallback):
    """Kills its process after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "cross_entropy": torch.nn.functional.cross_entropy(logits, labels).item(),
        "count": len(labels),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    callback = SeparationCallback(**options["separation"])
    trainer = image_trainer(
        folder,
        callback,
        model=image_model(hidden_dropout_prob=0.0),
        dataset=Images(augment=False),
        per_device_train_batch_size=options["batch_size"],
        per_device_eval_batch_size=4,
        # Because one process and two would see different batches with shuffling, we switch it off.
        train_sampling_strategy="sequential",
        # Because the true gradient of a key bias is 0, and AdamW would turn its rounding errors into
        # steps, we use SGD.
        optim="sgd",
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=4,
    )
    if options.get("killed") == trainer.args.process_index:
        trainer.add_callback(Killed())
    trainer.train(resume_from_checkpoint=options.get("resume"))
    trainer.compute_metrics = metrics
    # With 29 images, neither all batches nor all shards have the same size.
    evaluated = trainer.evaluate(Images(29, augment=False))
    logged = [entry for entry in trainer.state.log_history if "separation_loss" in entry]
    result = {"weights": dict(trainer.model.named_parameters()), "logged": logged, "history": callback.history, "evaluated": evaluated}
    torch.save(result, folder / f"rank_{trainer.args.process_index}_of_{trainer.args.world_size}.pt")


if __name__ == "__main__":
    run_worker(main)
