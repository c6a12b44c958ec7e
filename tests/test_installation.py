"""Tests of the installed package: what an import loads and registers, what a wheel holds, and what the commands list."""

import ast
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

import modeling_uhop
from modeling_uhop.training import demo, info
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.recipes import CONFIGS, find_recipe, recipe_names, summary
from modeling_uhop.training.recipes import main as list_recipes
from tests.support.forks import run_forked


ROOT = Path(modeling_uhop.__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
HEAVY = ("torch", "transformers", "numpy", "sklearn", "scipy", "matplotlib", "pandas", "datasets")


def bare(code: str) -> str:
    """Run code in a new process that has imported nothing, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fresh(code: str) -> str:
    """Run code in a process that has not imported transformers or the package, and return what it prints."""
    done = run_forked(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.process
def test_the_import_loads_no_library():
    assert bare(f"import sys, modeling_uhop; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_every_public_name_is_imported_from_its_file():
    """Type checkers read the imports, and Python reads the dictionary: they agree, also with `__all__`."""
    tree = ast.parse(Path(modeling_uhop.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {node.module: [each.name for each in node.names] for node in block.body if isinstance(node, ast.ImportFrom)}
    assert imports == modeling_uhop._FILES
    # Because `from modeling_uhop import *` must work without PEFT, `__all__` lacks what needs it.
    assert sorted(["__version__", *modeling_uhop._FILE_OF.keys() - {"UHopAdapterConfig"}]) == sorted(modeling_uhop.__all__)
    for name, file in modeling_uhop._FILE_OF.items():
        if file.startswith("attach.") and find_spec("peft") is None:
            continue
        assert getattr(modeling_uhop, name) is getattr(sys.modules[f"modeling_uhop.{file}"], name)


def test_the_package_lists_and_pickles_its_names():
    assert set(modeling_uhop.__all__) <= set(dir(modeling_uhop))
    for each in (modeling_uhop.mask_patterns, modeling_uhop.UHopViTConfig):
        assert pickle.loads(pickle.dumps(each)) is each


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(AttributeError, match="module 'modeling_uhop' has no attribute 'UHopVit'"):
        _ = modeling_uhop.UHopVit  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'UHopVit' from 'modeling_uhop'"):
        exec("from modeling_uhop import UHopVit")


@pytest.mark.process
def test_a_file_does_not_hide_the_function_of_its_name():
    """The file energy.py is loaded by others before anybody asks for the function `energy`."""
    code = "import modeling_uhop; from modeling_uhop.energy import retrieve; from modeling_uhop import energy, simplex"
    assert fresh(f"{code}; print(type(energy).__name__, type(simplex).__name__, modeling_uhop.energy is energy)") == "function module True"


@pytest.mark.process
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


@pytest.mark.process
def test_the_bare_import_makes_the_attention_known_to_every_model():
    sizes = "hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9"
    code = f"""
import modeling_uhop
from transformers import BertConfig, BertModel
print(BertModel(BertConfig({sizes}, attn_implementation="hopfield")).config._attn_implementation)
"""
    assert fresh(code) == "hopfield"


@pytest.mark.process
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
print(type(model).__name__, "multiple-instance-classification" in pipelines.PIPELINE_REGISTRY.get_supported_tasks())
print(sorted(registration._waiting.keys() - {{"peft.mapping"}}))
"""
    assert fresh(code) == "UHopMILForBagClassification True\n[]"


@pytest.mark.process
def test_a_class_from_its_own_file_is_saved_with_its_code(tmp_path):
    code = f"""
from modeling_uhop.configuration_uhop_memory import UHopMemoryConfig
from modeling_uhop.modeling_uhop_memory import UHopMemoryModel
UHopMemoryModel(UHopMemoryConfig(pattern_dim=4)).save_pretrained({str(tmp_path)!r})
"""
    fresh(code)
    assert {"modeling_uhop_memory.py", "configuration_uhop_memory.py", "config.json"} <= {path.name for path in tmp_path.iterdir()}


def test_each_model_names_the_auto_class_that_its_folder_names():
    models = [
        each for each in map(modeling_uhop.__getattr__, modeling_uhop._FILE_OF) if isinstance(getattr(each, "_auto_classes", None), dict)
    ]
    assert len(models) == 7
    for model in models:
        assert model._auto_classes[model._auto_class] == f"{model.__module__.rpartition('.')[2]}.{model.__name__}"
        assert model.config_class._auto_class == "AutoConfig"


BUILD = """
import os, sys
from pathlib import Path
from setuptools import build_meta
folder = Path(sys.argv[1])
os.chdir(folder / "checkout")
sdist = build_meta.build_sdist(str(folder))
import tarfile
with tarfile.open(folder / sdist) as archive:
    archive.extractall(folder / "unpacked", filter="data")
os.chdir(next((folder / "unpacked").iterdir()))
build_meta.build_wheel(str(folder))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel that is built from a source distribution, which is built from a copy of this checkout."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    folder = tmp_path_factory.mktemp("built")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    wanted = [name for name in listed if name and not name.startswith(("benchmarks/", "docs/")) and (ROOT / name).exists()]
    if not wanted:
        pytest.skip("git does not know the files of this checkout")
    for name in wanted:
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "checkout" / name, follow_symlinks=False)
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.process
def test_the_wheel_holds_what_the_commands_need_and_no_tests(built):
    with zipfile.ZipFile(built[1]) as archive:
        files = archive.namelist()
        entry = archive.read(f"modeling_uhop-{modeling_uhop.__version__}.dist-info/entry_points.txt").decode()
        metadata = archive.read(f"modeling_uhop-{modeling_uhop.__version__}.dist-info/METADATA").decode()
    assert len(files) == len(set(files))
    for path in (*ROOT.glob("modeling_uhop/*.py"), *ROOT.glob("modeling_uhop/trainer/*.py"), ROOT / "modeling_uhop" / "py.typed"):
        assert path.relative_to(ROOT).as_posix() in files
    for source in ("training/**/*.py", "configs/**/*.yaml", "model_cards/template.md", "space/*.py", "space/models/**/*.safetensors"):
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(source)]
        assert found
        assert {f"modeling_uhop/{name}" for name in found} <= set(files)
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"modeling_uhop", f"modeling_uhop-{modeling_uhop.__version__}.dist-info"}
    assert not [name for name in files if {"tests", "golden", "screenshots"} & set(name.split("/"))]
    assert entry.splitlines() == ["[console_scripts]", "modeling-uhop = modeling_uhop.training.cli:main"]
    assert {"train", "gpu", "faiss", "deepspeed", "peft", "demo", "docs", "dev", "bench"} == set(
        re.findall("^Provides-Extra: (.*)$", metadata, re.M)
    )


@pytest.mark.process
def test_the_source_distribution_holds_every_file_once(built):
    with tarfile.open(built[0]) as archive:
        files = [member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()]
    assert len(files) == len(set(files))
    assert {"training/cli.py", "configs/vit_digits.yaml", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= set(files)
    assert not [name for name in files if name.startswith(("modeling_uhop/training", "tests"))]


def test_the_release_has_one_version():
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M) == [modeling_uhop.__version__]
    assert re.findall(r"^## (\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == modeling_uhop.__version__


def test_the_workflows_test_every_python_of_the_metadata():
    folder = ROOT / ".github"
    files = {path.name: yaml.safe_load(path.read_text()) for path in folder.rglob("*.yml")}
    assert files.keys() == {"ci.yml", "release.yml", "bug.yml", "feature.yml"}
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert files["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"] == declared
    assert any("modeling-uhop info" in field["attributes"]["label"] for field in files["bug.yml"]["body"])


def test_every_recipe_says_its_task_purpose_and_cost():
    names = recipe_names()
    assert "vit_digits" in names
    assert not [name for name in names if name.startswith("accelerate")]
    for each in map(summary, names):
        assert each.purpose[-1] in ".?"
        assert each.purpose[0].isupper() or each.purpose.startswith("vit_")
        assert each.cost
        assert each.task in ("images", "bags", "series", "attach", "retrieval", "geometry", "sweeps")


def test_a_summary_is_read_from_the_header(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "# Error (Fig. 6 of U-Hop) at\n# alpha = 1.5. A second sentence.\n# Command: train\n# Cost:    two\n#   minutes\n"
        "task: bags\n# Not: this\n"
    )
    (tmp_path / "bare.yaml").write_text("data: {}\n")
    assert summary("one", tmp_path) == ("one", "bags", "Error (Fig. 6 of U-Hop) at alpha = 1.5.", "two minutes")
    assert summary("bare", tmp_path) == ("bare", "bare", "", "")


def test_the_list_of_recipes_can_be_narrowed(capsys):
    list_recipes(["musk"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["mil_musk1  [bags]", "mil_musk2  [bags]"]
    with pytest.raises(RecipeError, match="no recipe has 'nothing' in its name or task"):
        list_recipes(["nothing"])


@pytest.mark.parametrize("given", ["vit_digits", "vit_digits.yaml", "configs/vit_digits.yaml"])
def test_a_recipe_is_found_by_its_name_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(given) == CONFIGS / "vit_digits.yaml"
    # A folder of this name is no recipe; a file is.
    (tmp_path / given).mkdir(parents=True)
    assert find_recipe(given) == CONFIGS / "vit_digits.yaml"


def test_a_path_is_found_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_digits").write_text("")
    assert find_recipe("vit_digits") == Path("vit_digits")
    assert find_recipe("mil_choice") == CONFIGS / "sweeps" / "mil_choice.yaml"
    assert find_recipe("sweeps/vit_digits") == CONFIGS / "sweeps" / "vit_digits.yaml"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("vit-digit", r"no file and no recipe 'vit-digit'; did you mean vit_digits or .*\? `modeling-uhop recipes` lists"),
        ("no/such/mil_tigre.yaml", r"no recipe 'no/such/mil_tigre.yaml'; did you mean mil_tiger"),
        ("zzzz", r"no file and no recipe 'zzzz'; `modeling-uhop recipes` lists the recipes"),
        (
            "memory_size_digits",
            r"several recipes are called 'memory_size_digits'; give one of retrieval/memory_size_digits, retrieval/choice/",
        ),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused_with_close_names(given, message):
    with pytest.raises(RecipeError, match=message):
        find_recipe(given)


@pytest.mark.process
def test_the_list_of_recipes_loads_no_library():
    loaded = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    code = f"from modeling_uhop.training.recipes import main; main(['vit_digits']); {loaded}"
    assert bare(code).splitlines()[-1] == "[]"


def test_info_names_versions_devices_and_kernels(capsys, monkeypatch):
    monkeypatch.setattr(info, "OPTIONAL", ("a-package-that-does-not-exist",))
    info.main([])
    facts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["transformers"] == version("transformers")
    assert facts["a-package-that-does-not-exist"] == "not installed"
    assert facts["attention at alpha = 1 on cpu"] == "softmax_attention"
    assert facts["attention at alpha = 1.5 on cpu"] == "chunked_hopfield_attention"
    assert {"platform", "python", "machine", "accelerator", "hopfield_triton", "hopfield_entmax"} <= facts.keys()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(info, "TRAIN_PACKAGES", ("yaml", "no_such_package"))
    for check in (info.check_installed, lambda: demo.main([])):
        with pytest.raises(RecipeError, match=r"^no_such_package cannot be imported, .*: pip install 'modeling-uhop\[train\]'$"):
            check()
