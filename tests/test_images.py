"""Tests of images in every PIL mode, as read by recipes, the demo and the pipeline."""

import base64
import importlib.util
import io
import sys
import warnings

import demo_classifier
import numpy as np
import pytest
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline

from modeling_uhop import UHopViTConfig, UHopViTForImageClassification, image_pipeline
from modeling_uhop.image_pipeline import UHopImageClassificationPipeline
from modeling_uhop.images import as_rgb
from modeling_uhop.training.data import images as data
from modeling_uhop.training.data.images import ImageData
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.tasks.retrieval import pixels


RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (8, 8)).astype(np.uint8)
COLOUR = RANDOM.integers(0, 256, (8, 8, 3)).astype(np.uint8)
OPACITY = RANDOM.integers(0, 256, (8, 8)).astype(np.uint8)
WIDE = RANDOM.integers(0, 65536, (8, 8)).astype(np.uint16)
AS_COLOUR = np.repeat(GREY[..., None], 3, -1)


def _over_white(colour: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    share = opacity[..., None] / 255.0
    return colour * share + 255.0 * (1.0 - share)


def _palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(GREY % 4).convert("L")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30], "RGB")
    if transparent:
        image.info["transparency"] = 2
    return image


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]])[GREY % 4]
SEE_THROUGH = np.where((GREY % 4 == 2)[..., None], 255, PALETTE)
PICTURES = {
    "L": (Image.fromarray(GREY), AS_COLOUR),
    "RGB": (Image.fromarray(COLOUR), COLOUR),
    "1": (Image.fromarray(GREY > 127), np.where(AS_COLOUR > 127, 255, 0)),
    "RGBA": (Image.fromarray(np.dstack([COLOUR, OPACITY])), _over_white(COLOUR, OPACITY)),
    "LA": (Image.fromarray(np.dstack([GREY, OPACITY])), _over_white(AS_COLOUR, OPACITY)),
    "P": (_palette(False), PALETTE),
    "P, transparent": (_palette(True), SEE_THROUGH),
    "CMYK": (Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)]), "CMYK"), 255 - COLOUR),
    "I;16": (Image.fromarray(WIDE), np.repeat(WIDE[..., None] // 257, 3, -1)),
    "I;16B": (Image.frombytes("I;16B", (8, 8), WIDE.astype(">u2").tobytes()), np.repeat(WIDE[..., None] // 257, 3, -1)),
    "I, 16 bit": (Image.fromarray(WIDE.astype(np.int32)), np.repeat(WIDE[..., None] // 257, 3, -1)),
    "I, 8 bit": (Image.fromarray(GREY.astype(np.int32)), AS_COLOUR),
    "F in [0, 1]": (Image.fromarray((GREY / 255).astype(np.float32)), AS_COLOUR),
    "F in [0, 255]": (Image.fromarray(GREY.astype(np.float32)), AS_COLOUR),
}


def _equal(image: Image.Image, expected: np.ndarray) -> None:
    """Assert that images are equal, except for the rounding of opacity."""
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).astype(float), expected, atol=1.0)


@pytest.mark.parametrize("mode", PICTURES)
def test_every_image_mode_is_converted_to_the_intended_image(mode):
    image, expected = PICTURES[mode]
    assert image.mode == mode.partition(",")[0].partition(" ")[0]
    _equal(as_rgb(image), expected)


def test_all_16_bit_values_are_converted():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert np.array_equal(np.asarray(as_rgb(image).getchannel(0)), values // 257)


def test_a_dark_16_bit_image_stays_dark():
    file = io.BytesIO(b"P5 2 1 65535 " + np.array([200, 257], ">u2").tobytes())
    image = Image.open(file)
    assert image.mode == "I"
    assert np.asarray(as_rgb(image).getchannel(0)).tolist() == [[0, 1]]
    dark = Image.open(io.BytesIO(b"P5 2 1 65535 " + np.array([0, 200], ">u2").tobytes()))
    assert np.asarray(as_rgb(dark).getchannel(0)).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.array([[-1, 3]], np.int32)), r"mode 'I' must have values in \[0, 255\] or \[0, 65535\], got -1 to 3"),
        (Image.fromarray(np.array([[0, 65536]], np.int32)), "got 0 to 65536"),
        (Image.fromarray(np.array([[-0.5, 0.5]], np.float32)), r"mode 'F' must have values in \[0, 1\] or \[0, 255\], got -0.5 to 0.5"),
        (Image.fromarray(np.array([[0.0, 300.0]], np.float32)), "got 0.0 to 300.0"),
        (Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "got nan to nan"),
        (Image.fromarray(np.array([[0.0, np.inf]], np.float32)), "got 0.0 to inf"),
    ],
)
def test_pixel_values_of_unknown_range_are_refused(image, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        as_rgb(image)
    image.save(tmp_path / "a.tiff")
    transform = data.make_transform(data.make_image_processor(ImageData(""), 2))
    batch = {"image": [{"path": str(tmp_path / "a.tiff"), "bytes": None}], "row": ["row 7 of train"], "label": [0]}
    with pytest.raises(RecipeError, match=f"the image in row 7 of train .*a.tiff.* cannot be read: .*{message}"):
        transform(batch)
    with pytest.raises(demo_classifier.DemoError, match=rf"a\.tiff.* cannot be read as an image: .*{message}"):
        demo_classifier.read_image(tmp_path / "a.tiff")


def _file(image: Image.Image) -> bytes:
    """An image as a lossless file: PNG, or TIFF for modes that PNG does not have."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if image.mode in ("L", "RGB", "1", "RGBA", "LA", "P", "I;16") else "TIFF")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A small U-Hop ViT and a ViT of transformers, with the same processor."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    models = {"ours": UHopViTForImageClassification(UHopViTConfig(**sizes)), "theirs": ViTForImageClassification(ViTConfig(**sizes))}
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}, do_convert_rgb=True).save_pretrained(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {name: pipeline("image-classification", model=str(folder / name), device="cpu") for name in models}


@pytest.mark.parametrize("mode", [mode for mode in PICTURES if mode != "I;16B"])
def test_recipes_demo_and_pipeline_read_the_same_image(mode, tmp_path, classifiers):
    image, expected = PICTURES[mode]
    encoded = _file(image)
    (tmp_path / "picture").write_bytes(encoded)
    _equal(demo_classifier.read_image(tmp_path / "picture"), expected)
    processor = data.make_image_processor(ImageData(""), 8)
    batch = {"image": [{"bytes": encoded, "path": None}], "row": ["row 0"], "label": [0]}
    pixel_values = data.make_transform(processor)(batch)["pixel_values"][0]
    np.testing.assert_allclose((pixel_values.permute(1, 2, 0) + 1) / 2 * 255, expected, atol=1.001)
    classify = classifiers["ours"]
    assert isinstance(classify, UHopImageClassificationPipeline)
    for given in (image, str(tmp_path / "picture"), base64.b64encode(encoded).decode()):
        seen = classify.preprocess(given)["pixel_values"][0]
        np.testing.assert_allclose((seen.permute(1, 2, 0) + 1) / 2 * 255, expected, atol=1.001)


def test_the_pipeline_does_not_change_arrays_or_other_models(classifiers, tmp_path):
    image = PICTURES["I;16"][0]
    clipped = np.asarray(image.convert("RGB"))
    seen = classifiers["theirs"].preprocess(image)["pixel_values"][0]
    np.testing.assert_allclose((seen.permute(1, 2, 0) + 1) / 2 * 255, clipped, atol=1e-3)
    seen = classifiers["ours"].preprocess(COLOUR)["pixel_values"][0]
    np.testing.assert_allclose((seen.permute(1, 2, 0) + 1) / 2 * 255, COLOUR, atol=1e-3)
    for wrong in ("no file and no base64", str(tmp_path)):
        with pytest.raises(ValueError, match="Incorrect image source"):
            classifiers["ours"](wrong)
    with pytest.raises(TypeError, match="Incorrect format used for image"):
        classifiers["ours"](3)
    answers = classifiers["ours"]([image, Image.fromarray((WIDE // 257).astype(np.uint8))])
    assert answers[0] == answers[1]


def test_the_pipeline_reads_an_image_from_a_url(classifiers, monkeypatch):
    class Answer:
        content = _file(PICTURES["I;16"][0])

    monkeypatch.setattr("modeling_uhop.image_pipeline.httpx.get", lambda url, **options: Answer)
    seen = classifiers["ours"].preprocess("https://somewhere/picture.png")["pixel_values"][0]
    np.testing.assert_allclose((seen.permute(1, 2, 0) + 1) / 2 * 255, PICTURES["I;16"][1], atol=1e-3)


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_orientation_is_applied_once(mode, tmp_path, classifiers):
    image, expected = PICTURES[mode]
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(expected, -1)
    _equal(as_rgb(Image.open(tmp_path / "turned.png")), upright)
    _equal(demo_classifier.read_image(tmp_path / "turned.png"), upright)
    encoded = ImageFeature().encode_example(str(tmp_path / "turned.png"))
    _equal(data._decoded(encoded, "row 0"), upright)
    seen = classifiers["ours"].preprocess(str(tmp_path / "turned.png"))["pixel_values"][0]
    np.testing.assert_allclose((seen.permute(1, 2, 0) + 1) / 2 * 255, upright, atol=1e-3)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "RGBA"])
def test_an_image_with_broken_exif_is_read_as_stored(mode, tmp_path, classifiers):
    image, expected = PICTURES[mode]
    image.save(tmp_path / "broken.png", exif=b"Exif\0\0garbage")
    for given in (Image.open(tmp_path / "broken.png"), str(tmp_path / "broken.png")):
        with pytest.warns(UserWarning, match="the EXIF data of the image cannot be read .*; the image is used as it is stored"):
            seen = classifiers["ours"].preprocess(given)["pixel_values"][0]
        np.testing.assert_allclose((seen.permute(1, 2, 0) + 1) / 2 * 255, expected, atol=1.001)
    with pytest.warns(UserWarning, match="EXIF"):
        _equal(demo_classifier.read_image(tmp_path / "broken.png"), expected)
    encoded = ImageFeature().encode_example(str(tmp_path / "broken.png"))
    with pytest.raises(RecipeError, match=r"the image in row 0 \(.*broken.png\) cannot be read: not a TIFF file"):
        data._decoded(encoded, "row 0")


def test_a_truncated_image_is_not_treated_as_broken_exif(tmp_path):
    whole = _file(Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3)).astype(np.uint8)))
    with pytest.raises(OSError, match="truncated"):
        as_rgb(Image.open(io.BytesIO(whole[: len(whole) // 2])))


def test_patterns_of_a_memory_have_a_channel_for_grey_and_three_for_colour():
    assert np.array_equal(pixels([PICTURES["L"][0], PICTURES["I, 8 bit"][0]]), np.stack([GREY.reshape(-1)] * 2))
    assert np.array_equal(pixels([PICTURES["I;16"][0]]), (WIDE // 257).reshape(1, -1))
    assert np.array_equal(pixels([PICTURES["P"][0]]), PALETTE.reshape(1, -1))
    with pytest.raises(RecipeError, match=r"of one size, all grey or all in colour, got \(8, 8\) and \(8, 8, 3\)"):
        pixels([PICTURES["L"][0], PICTURES["RGB"][0]])


def test_the_package_is_imported_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    spec = importlib.util.spec_from_file_location("modeling_uhop.copied", image_pipeline.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with pytest.raises(ImportError):
        importlib.import_module("PIL")


def test_a_16_bit_image_that_becomes_black_is_named():
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))
    with pytest.warns(UserWarning, match="mode 'I;16' becomes black: its largest value is 200 of 65535"):
        assert np.asarray(as_rgb(dark)).max() == 0
    assert np.asarray(as_rgb(Image.fromarray(np.full((4, 4), 257, dtype=np.uint16)))).max() == 1
