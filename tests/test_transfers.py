"""The comparison of adapters: its examples, its variants and its results."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import entmax.losses
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, PreTrainedModel

from modeling_uhop.training import train_command, transfers
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.results import read_result
from modeling_uhop.training.tasks import attach
from modeling_uhop.training.transfers import Examples, Images, Rows, Series, Text, Transfer


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:'pin_memory' argument")
RECIPE = """
task: attach
transfer: toy
source: a
target: b
count: 8
source_steps: 2
source_batch: 4
steps: 3
batch: 4
rates: [1.0e-3, 1.0e-2]
separation_rates: [1.0e-4, 1.0e-3]
seeds: [0, 1]
variants:
  head alone: {}
  Phi: {uhop: {}}
  "Phi, separation": {uhop: {}, separation: {optimizer: adam, steps: 2}}
  LoRA: {lora: {r: 4, lora_alpha: 4}}
  all: {everything: true}
pairs: [["Phi, separation", Phi]]
"""


class Toy(Transfer):
    """Texts of two classes that their first token tells apart."""

    head, score, larger_is_better, lora = "classifier", "test_accuracy", True, ["query", "key"]
    made: ClassVar[list[str]] = []

    def source_examples(self) -> Dataset:
        self.made.append("source")
        return self.rows(0, 16)

    def source_model(self) -> PreTrainedModel:
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return BertForSequenceClassification(BertConfig(**sizes, vocab_size=20))

    def examples(self, seed: int) -> Examples:
        return Examples(self.rows(seed, self.count), self.rows(50, 8), self.rows(51, 8))

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return lambda outputs: {"accuracy": float((np.argmax(outputs.predictions, -1) == outputs.label_ids).mean())}

    def measure(self, logged: dict[str, float]) -> float:
        return logged["eval_accuracy"]

    @staticmethod
    def rows(seed: int, count: int) -> Rows:
        ids = torch.randint(20, (count, 5), generator=torch.Generator().manual_seed(seed))
        return Rows({"input_ids": ids, "labels": ids[:, 0] % 2})


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(transfers.TRANSFERS, "toy", Toy)
    monkeypatch.setattr(Toy, "made", [])
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE)
    return path


def test_the_command_writes_a_result_of_every_variant(recipe, tmp_path, capsys):
    options = ["--output_dir", str(tmp_path), "--work_dir", str(tmp_path / "work")]
    attach.run_command(recipe, options)
    first = read_result(tmp_path / "attach_toy.json", "seeds")
    attach.run_command(recipe, options)
    second = read_result(tmp_path / "attach_toy.json", "seeds")
    assert first["variants"] == second["variants"]
    assert Toy.made == ["source"]
    recipe.write_text(recipe.read_text().replace("source_steps: 2", "source_steps: 1").replace("target: b", "target: c"))
    attach.Comparison(attach.load(recipe), Toy("a", "c", 8), tmp_path / "work" / "toy")
    assert Toy.made == ["source"] * 2
    width, head = 16, 16 * 2 + 2
    sizes = {name: variant["num_parameters"] for name, variant in first["variants"].items()}
    assert sizes.pop("all") == sum(each.numel() for each in Toy("a", "b", 8).source_model().parameters())
    assert sizes == {"head alone": head, "Phi": head + width**2, "Phi, separation": head + width**2, "LoRA": head + width**2}
    assert all(len(variant["metrics"]["test_accuracy"]["values"]) == 2 for variant in first["variants"].values())
    ours, other = (first["variants"][name]["metrics"]["test_accuracy"]["values"] for name in ("Phi, separation", "Phi"))
    assert first["paired"][0]["difference"] == pytest.approx(np.mean(np.subtract(ours, other)))
    assert set(first["sweep"]["rates"]["Phi, separation"]) == {"training", "separation"}


def test_steps_of_the_separation_are_taken_from_those_of_the_training(recipe, tmp_path, monkeypatch):
    taken: list[tuple[str, int]] = []
    comparison = attach.Comparison(attach.load(recipe), Toy("a", "b", 8), tmp_path / "work")
    train = attach.Trainer.train

    def counted(self):
        steps = [
            callback.separation.steps for callback in self.callback_handler.callbacks if isinstance(callback, attach.SeparationCallback)
        ]
        taken.append((str(sum(steps)), self.args.max_steps))
        return train(self)

    monkeypatch.setattr(attach.Trainer, "train", counted)
    for name in ("Phi", "Phi, separation"):
        comparison.run(name, {"training": 1e-3, "separation": 1e-3}, 0, "validation")
    assert taken == [("0", 3), ("2", 1)]


def test_rates_are_chosen_on_validation_examples(recipe, tmp_path, monkeypatch):
    comparison = attach.Comparison(attach.load(recipe), Toy("a", "b", 8), tmp_path / "work")
    asked: list[tuple[str, int, str]] = []

    def run(self, name, rates, seed, split):
        asked.append((name, seed, split))
        self.sizes[name] = 1
        return rates["training"] * (1 if split == "validation" else -1) - rates.get("separation", 0.0)

    monkeypatch.setattr(attach.Comparison, "run", run)
    results = comparison.results()
    assert results["sweep"]["rates"]["Phi"] == {"training": 1e-2}
    assert results["sweep"]["rates"]["Phi, separation"] == {"training": 1e-2, "separation": 1e-4}
    assert {(seed, split) for _, seed, split in asked} == {(100, "validation"), (0, "test"), (1, "test")}
    assert len(asked) == 4 * (2 + 2) + (4 + 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("transfer: toy", "transfer: sounds", "transfer must be among .*, got 'sounds'"),
        ("steps: 3", "steps: 2", "'Phi, separation' has 2 steps of separation, which must be fewer than steps=2"),
        ("everything: true", "everthing: true", "unknown key 'everthing'"),
        ('"Phi, separation", Phi]]', '"Phi, separation", Psi]]', "pairs must consist of variants, .*, got 'Psi'"),
        ("count: 8\n", "", "count"),
    ],
)
def test_wrong_recipes_are_refused(recipe, old, new, message):
    recipe.write_text(
        recipe.read_text().replace(f"\n{old}" if old.startswith("steps") else old, f"\n{new}" if old.startswith("steps") else new)
    )
    with pytest.raises(RecipeError, match=message):
        attach.load(recipe)


def test_adapters_train_themselves_and_the_head_alone():
    toy = Toy("a", "b", 8)
    for variant, word in ((attach.Variant(uhop={}), "uhop_phi"), (attach.Variant(lora={"r": 2}), "lora_")):
        model = attach.adapted(toy.source_model(), variant, toy)
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        assert {name for name in trained if word not in name} == {
            f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
        }
        assert any(word in name for name in trained)


def test_images_of_the_test_are_not_in_the_training_pool(monkeypatch):
    labels = torch.arange(20).repeat_interleave(60)
    everything = {"pixel_values": torch.arange(1200.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), "labels": labels}
    images = Images("cifar10", "tiny-imagenet", 7)
    images.__dict__["_splits"] = {"train": everything, "validation": everything}
    drawn = set()
    for seed in range(3):
        examples: Any = images.examples(seed)
        assert torch.equal(examples.train.columns["labels"].bincount(), torch.full((20,), 7))
        assert torch.equal(examples.test.columns["labels"].bincount(), torch.full((20,), 10))
        numbers = [{int(each) for each in part.columns["pixel_values"][:, 0, 0, 0]} for part in (examples.train, examples.test)]
        assert not numbers[0] & numbers[1]
        drawn |= numbers[0]
    assert len(drawn) > 20 * 7


SOURCE = Path(entmax.losses.__file__)


def _documented(node: ast.AST) -> bool:
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and bool(ast.get_docstring(node))


def test_text_is_the_docstrings_of_a_package(monkeypatch):
    monkeypatch.setattr(Text, "HELD_OUT", 3)
    text = Text("entmax", "entmax", 4)
    source: Any = text.source_examples()
    whole = bytes(source.columns["input_ids"].flatten().tolist()).decode(errors="ignore")
    assert "\n\n".join(ast.get_docstring(node) for node in ast.walk(ast.parse(SOURCE.read_bytes())) if _documented(node)) in whole
    assert source.columns["input_ids"].shape[1] == Text.LENGTH
    examples: Any = text.examples(0)
    assert [len(part) for part in (examples.train, examples.validation, examples.test)] == [4, 3, 3]
    rows = [{tuple(row.tolist()) for row in part.columns["input_ids"]} for part in (examples.train, examples.validation, examples.test)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not rows[first] & rows[second]
    assert text.measure({"eval_loss": float(np.log(2))}) == pytest.approx(1.0)


def test_windows_of_series_come_from_their_own_rows(tmp_path):
    import pandas

    frame = pandas.DataFrame(np.random.default_rng(0).standard_normal((14400, 7)), columns=list("abcdefg"))
    frame.insert(0, "date", pandas.date_range("2020-01-01", periods=len(frame), freq="h"))
    frame.to_csv(tmp_path / "series.csv", index=False)
    series = Series(str(tmp_path / "series.csv"), str(tmp_path / "series.csv"), 9)
    examples: Any = series.examples(0)
    assert isinstance(examples.train, Subset)
    assert len(examples.train) == len(set(examples.train.indices)) == 9
    assert len(examples.test) == 2880 - 96 + 1
    assert series.examples(1).train.indices != examples.train.indices  # type: ignore[attr-defined]


def test_options_of_a_measurement_reach_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_command.main(["configs/attach/text.yaml", "--work_dir", "/nowhere", "--sauce", "x"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --sauce x" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="and its options after it"):
        train_command.main(["--seed", "1", "configs/attach/text.yaml"])


def test_a_damaged_file_of_scores_is_named(tmp_path):
    (tmp_path / "scores.json").write_text('{"half": ')
    with pytest.raises(RecipeError, match=r"scores\.json is damaged"):
        attach._read_json(tmp_path / "scores.json")
