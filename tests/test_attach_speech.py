"""The memories of speech models with an adapter: padded samples and frames do not count."""

from typing import Any

import pytest
import torch
from peft import get_peft_model

from modeling_uhop import StageOne, UHopAdapterConfig
from modeling_uhop.memories import logger, memory_sets_of
from tests.conftest import assert_close
from tests.test_attention_models import BOTH_SIDES, SPEECH, _model


# peft 0.21 reads an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SAMPLES = (400, 250)
WHISPER: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
}


def _attach(name: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return get_peft_model(_model(name, fields), UHopAdapterConfig()).eval()


def _sound() -> dict[str, torch.Tensor]:
    """Two examples; the second is padded, with values that are not zero."""
    mask = torch.ones(2, SAMPLES[0], dtype=torch.long)
    mask[1, SAMPLES[1] :] = 0
    return {"input_values": torch.randn(2, SAMPLES[0]), "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Wav2Vec2Model", {}),
        ("Wav2Vec2Model", {"add_adapter": True}),
        ("Wav2Vec2ForCTC", {}),
        ("HubertModel", {}),
        ("UniSpeechSatModel", {}),
    ],
    ids=["wav2vec2", "wav2vec2 with strides after its layers", "ctc", "hubert", "unispeech-sat"],
)
def test_a_padded_example_has_the_memories_and_the_loss_of_the_example_alone(name, fields):
    model, batch = _attach(name, {**SPEECH, **fields}), _sound()
    examples = [{"input_values": batch["input_values"][[row], :size]} for row, size in enumerate(SAMPLES)]
    sets, alone = memory_sets_of(model, batch), [memory_sets_of(model, each) for each in examples]
    for layer, together in enumerate(sets):
        assert together.mask.sum(1).tolist() == [25, 15]
        for row in range(2):
            single = alone[row][layer]
            assert single.mask is None
            assert_close(together.memories[row][together.mask[row]], single.memories[0], scale=4)
    losses = [StageOne(model, parameters="feature_maps").losses(each, None, 0) for each in (batch, *examples)]
    assert_close(losses[0], (losses[1] + losses[2]) / 2, scale=4)


def test_a_step_on_a_padded_example_is_that_on_the_example_alone():
    batch = {name: values[1:] for name, values in _sound().items()}
    weights = []
    for inputs in (batch, {"input_values": batch["input_values"][:, : SAMPLES[1]]}):
        stage = StageOne(_attach("Wav2Vec2Model", SPEECH), parameters="feature_maps", lr=0.5)
        stage.step(inputs)
        weights.append(torch.stack([phi.weight.detach() for phi in stage.maps]))
    assert (weights[0] - torch.eye(32)).abs().max() > 0.01
    assert_close(weights[0], weights[1], scale=4)


SIDES: dict[str, Any] = {
    f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("attention_heads", 4))
}
FRAMES = {"d_model": 32, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 40, "max_target_positions": 20}
MOONSHINE: dict[str, Any] = {
    f"{side}_num_{name}": size for side in ("encoder", "decoder") for name, size in (("hidden_layers", 1), ("attention_heads", 4))
}
TOKENS: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


@pytest.mark.parametrize(
    ("name", "fields", "size", "alone", "frames"),
    [
        ("Data2VecAudioModel", SPEECH, (400,), 250, [25, 15]),
        ("SpeechT5ForSpeechToText", {**SPEECH, **SIDES, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}, (400,), 250, [25, 15]),
        ("Speech2TextForConditionalGeneration", {**TOKENS, **FRAMES, **SIDES}, (40, 8), 25, [10, 7]),
        ("MoonshineForConditionalGeneration", {**TOKENS, **MOONSHINE, "hidden_size": 32, "intermediate_size": 40}, (4000,), 2500, [9, 5]),
    ],
    ids=["data2vec", "speecht5", "speech2text", "moonshine"],
)
def test_the_frames_that_count_are_as_many_as_the_example_alone_has(name, fields, size, alone, frames):
    model = _attach(name, fields)
    mask = torch.ones(2, size[0], dtype=torch.long)
    mask[1, alone:] = 0
    batch = {model.main_input_name: torch.randn(2, *size), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 60, (2, 5))
    without_mask = {key: values[1:] for key, values in batch.items() if key != "attention_mask"}
    without_mask[model.main_input_name] = without_mask[model.main_input_name][:, :alone]
    together, single = memory_sets_of(model, batch)[0], memory_sets_of(model, without_mask)[0]
    assert together.mask.sum(1).tolist() == frames
    assert single.memories.shape[1] == frames[1]


def test_frames_of_whisper_count_as_the_mask_of_its_mel_frames_says():
    """Whisper attends to the frames of a padded example, so they are computed, and only left out of the loss."""
    model = _attach("WhisperForConditionalGeneration", {**WHISPER, **BOTH_SIDES})
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    batch = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 60, (2, 5))}
    assert [each.mask for each in memory_sets_of(model, batch)] == [None] * 6
    masks = [each.mask for each in memory_sets_of(model, {**batch, "attention_mask": mask})]
    counts = [None if each is None else each.sum(1).tolist() for each in masks]
    # Two layers of the encoder; in each of the decoder, its own states and what the encoder wrote.
    assert counts == [[20, 13]] * 2 + [None, [20, 13]] * 2


def test_a_model_that_does_not_tell_how_it_shortens_warns(monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(logger, "warning_once", warnings.append)
    model, batch = _attach("SEWModel", {**SPEECH, "squeeze_factor": 2}), _sound()
    sets = memory_sets_of(model, {**batch, "attention_mask": torch.ones(2, 400, dtype=torch.long)})
    assert warnings == []
    assert [each.mask for each in sets] == [None, None]
    assert [each.mask for each in memory_sets_of(model, batch)] == [None, None]
    assert len(warnings) == 2
    assert "padded frames count as memories: SEWModel does not tell which of its 12 memories an attention_mask of 400" in warnings[0]


def test_attention_that_reads_the_weights_of_its_projections_is_refused():
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.attention \(WavLMAttention\) reads the weights of its projections"):
        _attach("WavLMModel", SPEECH)
