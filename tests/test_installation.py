"""Tests of the installed package: what an import loads and registers."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_uhop


ROOT = Path(modeling_uhop.__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
HEAVY = ("torch", "transformers", "numpy", "sklearn", "scipy", "matplotlib", "pandas", "datasets")


def fresh(code: str) -> str:
    """Run code in a fresh process and return what it prints."""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_no_library():
    assert fresh(f"import sys, modeling_uhop; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_every_public_name_is_imported_from_its_file():
    """Type checkers read the imports, and Python reads the dictionary: they agree, also with `__all__`."""
    tree = ast.parse(Path(modeling_uhop.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {node.module: [each.name for each in node.names] for node in block.body if isinstance(node, ast.ImportFrom)}
    assert imports == modeling_uhop._FILES
    assert sorted(["__version__", *modeling_uhop._FILE_OF]) == sorted(modeling_uhop.__all__)
    for name, file in modeling_uhop._FILE_OF.items():
        assert getattr(modeling_uhop, name) is getattr(sys.modules[f"modeling_uhop.{file}"], name)


def test_the_package_lists_and_pickles_its_names():
    assert set(modeling_uhop.__all__) <= set(dir(modeling_uhop))
    for each in (modeling_uhop.mask_patterns, modeling_uhop.UHopViTConfig):
        assert pickle.loads(pickle.dumps(each)) is each


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(AttributeError, match="module 'modeling_uhop' has no attribute 'UHopVit'"):
        _ = modeling_uhop.UHopVit
    with pytest.raises(ImportError, match="cannot import name 'UHopVit' from 'modeling_uhop'"):
        exec("from modeling_uhop import UHopVit")


def test_a_file_does_not_hide_the_function_of_its_name():
    """The file energy.py is loaded by others before anybody asks for the function `energy`."""
    code = "import modeling_uhop; from modeling_uhop.energy import retrieve; from modeling_uhop import energy, simplex"
    assert fresh(f"{code}; print(type(energy).__name__, type(simplex).__name__, modeling_uhop.energy is energy)") == "function module True"


def test_the_bare_import_registers_with_every_auto_class():
    """No name of the package is used: transformers finds the classes by itself."""
    code = f"""
import modeling_uhop
from transformers import AutoConfig
print([AutoConfig.for_model(name).__class__.__name__ for name in ("stanhop", "uhop_memory", "uhop_mil", "uhop_vit")])
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForImageClassification, AutoModelForTimeSeriesPrediction, pipeline
print([AutoModel.from_config(AutoConfig.for_model(name)).__class__.__name__ for name in ("stanhop", "uhop_memory", "uhop_mil")])
print(AutoModelForImageClassification.from_pretrained({str(GOLDEN / "vit")!r}).__class__)
print(AutoModelForTimeSeriesPrediction.from_pretrained({str(GOLDEN / "stanhop")!r}).__class__)
bags = pipeline("multiple-instance-classification", model={str(GOLDEN / "mil")!r})
print(bags.__class__.__name__, bags.model.__class__.__name__, bags.feature_extractor.__class__.__name__)
"""
    assert fresh(code).splitlines() == [
        "['STanHopConfig', 'UHopMemoryConfig', 'UHopMILConfig', 'UHopViTConfig']",
        "['STanHopModel', 'UHopMemoryModel', 'UHopMILModel']",
        "<class 'modeling_uhop.modeling_uhop_vit.UHopViTForImageClassification'>",
        "<class 'modeling_uhop.modeling_stanhop.STanHopForPrediction'>",
        "MultipleInstanceClassificationPipeline UHopMILForBagClassification UHopMILFeatureExtractor",
    ]


def test_the_bare_import_makes_the_attention_known_to_every_model():
    sizes = "hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9"
    code = f"import modeling_uhop; from transformers import BertConfig, BertModel\nconfig = BertConfig({sizes}, attn_implementation='hopfield')"
    assert fresh(f"{code}\nprint(BertModel(config).config._attn_implementation)") == "hopfield"


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel, pipeline; import modeling_uhop",
        "import modeling_uhop.configuration_uhop_mil",
        "import modeling_uhop.modeling_uhop_vit",
        "from modeling_uhop import SeparationCallback",
    ],
)
def test_classes_are_registered_whatever_is_imported_first(first):
    """Files of the package import auto classes while they are half loaded: registration waits for their end."""
    code = f"""{first}
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForSequenceClassification, pipelines
from modeling_uhop import registration
model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("uhop_mil", instance_dim=2))
print(type(model).__name__, "multiple-instance-classification" in pipelines.PIPELINE_REGISTRY.get_supported_tasks(), registration._waiting)
"""
    assert fresh(code) == "UHopMILForBagClassification True {}"


def test_a_class_from_its_own_file_is_saved_with_its_code(tmp_path):
    code = f"""
from modeling_uhop.configuration_uhop_memory import UHopMemoryConfig
from modeling_uhop.modeling_uhop_memory import UHopMemoryModel
UHopMemoryModel(UHopMemoryConfig(pattern_dim=4)).save_pretrained({str(tmp_path)!r})
"""
    fresh(code)
    assert {"modeling_uhop_memory.py", "configuration_uhop_memory.py", "config.json"} <= {path.name for path in tmp_path.iterdir()}


def test_each_model_names_the_auto_class_that_its_folder_names():
    models = [each for each in map(modeling_uhop.__getattr__, modeling_uhop._FILE_OF) if isinstance(getattr(each, "_auto_classes", None), dict)]
    assert len(models) == 7
    for model in models:
        assert model._auto_classes[model._auto_class] == f"{model.__module__.rpartition('.')[2]}.{model.__name__}"
        assert model.config_class._auto_class == "AutoConfig"
