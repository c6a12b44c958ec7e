"""Tests of Hopfield attention inside tiny models of transformers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, BertPreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from modeling_uhop import UHopViTConfig, UHopViTModel, plain_hopfield_attention, use_hopfield_attention
from modeling_uhop.attention_interface import KERNELS, entmax_attention_forward, hopfield_attention_forward
from tests.conftest import assert_close


Case = tuple[str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]
WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT: dict[str, Any] = {**WIDTHS, "vocab_size": 60, "max_position_embeddings": 70, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE: dict[str, Any] = {**WIDTHS, "image_size": 16, "patch_size": 4, "num_channels": 3}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
NARROW: dict[str, Any] = {**GROUPED, "head_dim": 8, "sliding_window": 4}
T5: dict[str, Any] = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
SPEECH: dict[str, Any] = {
    **{name: value for name, value in TEXT.items() if name != "max_position_embeddings"},
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
FLORENCE: dict[str, Any] = {
    "embed_dim": [8],
    "depths": [1],
    "num_heads": [2],
    "num_groups": [2],
    "patch_size": [4],
    "patch_stride": [4],
} | {
    "patch_padding": [0],
    "patch_prenorm": [False],
    "window_size": 4,
    "projection_dim": 8,
}
BOTH_SIDES = {
    f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))
}


def _ids(count: int = 9) -> torch.Tensor:
    return torch.randint(3, 60, (2, count))


def _tokens() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _translation() -> dict[str, torch.Tensor]:
    return {**_tokens(), "decoder_input_ids": _ids(5)}


def _images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 400)}


# Name of the model class, fields of its configuration, inputs.
ENCODERS: list[Case] = [
    ("BertModel", TEXT, _tokens),
    ("RobertaModel", TEXT, _tokens),
    ("DistilBertModel", {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}, _tokens),
    ("ElectraModel", TEXT, _tokens),
    ("AlbertModel", TEXT, _tokens),
    ("ModernBertModel", {**TEXT, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, _tokens),
]
DECODERS: list[Case] = [
    ("LlamaForCausalLM", TEXT, _tokens),
    ("Qwen2ForCausalLM", {**TEXT, "num_key_value_heads": 1}, _tokens),
    ("Qwen3ForCausalLM", {**TEXT, **GROUPED, "head_dim": 8}, _tokens),
    ("MistralForCausalLM", {**TEXT, **GROUPED, "sliding_window": 4}, _tokens),
    ("Gemma2ForCausalLM", {**TEXT, **NARROW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}, _tokens),
    ("Gemma3ForCausalLM", {**TEXT, **NARROW}, _tokens),
    ("GptOssForCausalLM", {**TEXT, **NARROW, "num_local_experts": 2, "num_experts_per_tok": 1}, _tokens),
    ("MixtralForCausalLM", {**TEXT, **GROUPED, "num_local_experts": 2}, _tokens),
    ("GPT2LMHeadModel", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, _tokens),
    ("GPTNeoXForCausalLM", TEXT, _tokens),
    ("OPTForCausalLM", {**TEXT, "ffn_dim": 40, "word_embed_proj_dim": 32}, _tokens),
]
OTHERS: list[Case] = [
    ("T5ForConditionalGeneration", T5, _translation),
    ("UMT5ForConditionalGeneration", T5, _translation),
    ("BartForConditionalGeneration", {"vocab_size": 60, "d_model": 32, "max_position_embeddings": 64, **BOTH_SIDES}, _translation),
    ("ViTModel", IMAGE, _images),
    ("DeiTModel", IMAGE, _images),
    ("Dinov2Model", IMAGE, _images),
    ("DINOv3ViTModel", IMAGE, _images),
    ("BeitModel", IMAGE, _images),
    ("SwinModel", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}, _images),
    ("CLIPModel", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}, lambda: {**_tokens(), **_images()}),
    ("SiglipModel", {"text_config": TEXT, "vision_config": IMAGE}, lambda: {"input_ids": _ids(), **_images()}),
    ("Wav2Vec2Model", SPEECH, _sound),
    ("HubertModel", SPEECH, _sound),
    (
        "WhisperForConditionalGeneration",
        {"vocab_size": 60, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0}
        | BOTH_SIDES,
        lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": _ids(5)},
    ),
    (
        "PatchTSTForPrediction",
        {"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4, "d_model": 32, "prediction_length": 8}
        | {"num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 40},
        lambda: {"past_values": torch.randn(2, 32, 2)},
    ),
]
ALL = ENCODERS + DECODERS + OTHERS


def _model(name: str, fields: dict[str, Any], grow: float = 0.25) -> Any:
    """A tiny model with enlarged weights, because with small ones attention is uniform and equal at
    every alpha."""
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**copy.deepcopy(fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=grow)
    return model


def _answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    names = ("logits", "logits_per_image", "prediction_outputs", "mean_predictions", "last_hidden_state")
    answer = next(value for value in (getattr(output, name, None) for name in names) if value is not None)
    mask = inputs.get("attention_mask")
    return answer[mask.bool()] if mask is not None and answer.shape[:2] == mask.shape else answer


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize(("name", "fields", "make"), ALL, ids=[case[0] for case in ALL])
def test_a_model_is_continuous_in_alpha(name: str, fields: dict[str, Any], make: Callable[[], dict[str, torch.Tensor]]):
    model, inputs = _model(name, fields), make()
    model.set_attn_implementation("eager")
    softmax = _answer(model, inputs)
    answers = {alpha: _answer(use_hopfield_attention(model, alpha), inputs) for alpha in (1.0, 1.002, 2.0)}
    assert _relative(answers[1.0], softmax) < 1e-4
    assert 1e-5 < _relative(answers[1.002], softmax) < 0.03
    assert _relative(answers[2.0], softmax) > 0.05
    library = _answer(use_hopfield_attention(model, 2.0, kernel="hopfield_entmax"), inputs)
    assert _relative(library, answers[2.0]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("name", "fields", "make"), DECODERS[::2], ids=[case[0] for case in DECODERS[::2]])
def test_step_by_step_decoding_and_padding_do_not_change_outputs(name, fields, make):
    model = use_hopfield_attention(_model(name, fields), 1.5)
    ids = _ids(12)
    whole = model(ids).logits
    cache, steps = None, []
    for step in range(12):
        output = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    assert _relative(torch.cat(steps, 1), whole) < 1e-4
    for padding in (slice(0, 4), slice(8, 12)):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, padding] = 0
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        where = {} if name.startswith("OPT") else {"position_ids": position_ids}
        padded = model(ids, attention_mask=mask, **where).logits
        assert padded.isfinite().all()
        assert _relative(padded[0, mask[0].bool()], model(ids[:1, mask[0].bool()]).logits[0]) < 1e-4
        assert _relative(padded[1], whole[1]) < 1e-4


@torch.no_grad()
def test_generation_uses_alpha_with_and_without_a_cache():
    model = use_hopfield_attention(_model(*DECODERS[3][:2]), 1.5)
    ids, settings = _ids(6), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = model.generate(ids, **settings)
    for step in range(6):
        assert torch.equal(generated[:, 6 + step], model(generated[:, : 6 + step]).logits[:, -1].argmax(-1))
    assert torch.equal(model.generate(ids, use_cache=False, **settings), generated)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), generated)
    assert not torch.equal(use_hopfield_attention(model, 1.0).generate(ids, **settings), generated)


@pytest.fixture
def warned(caplog):
    """The messages of the warnings."""
    logger = transformers.utils.logging.get_logger("modeling_uhop.attention_models")
    logger.propagate = True
    yield caplog
    logger.propagate = False


@torch.no_grad()
@pytest.mark.parametrize(("name", "fields", "make"), [DECODERS[0], OTHERS[0], OTHERS[9]], ids=["Llama", "T5", "CLIP"])
def test_a_saved_model_is_the_same_model(name, fields, make, tmp_path, warned):
    model, inputs = use_hopfield_attention(_model(name, fields), 1.5), make()
    expected = _answer(model, inputs)
    loaded = model
    for number in range(2):
        loaded.save_pretrained(tmp_path / str(number))
        loaded = type(model).from_pretrained(tmp_path / str(number), attn_implementation="hopfield").eval()
        assert_close(_answer(loaded, inputs), expected)
    assert warned.text == ""
    softmax = type(model).from_pretrained(tmp_path / "1").eval()
    assert "hopfield_alpha=1.5 in the configuration of" in warned.text
    assert "pass attn_implementation='hopfield'" in warned.text
    model.set_attn_implementation("sdpa")
    assert_close(_answer(softmax, inputs), _answer(model, inputs), scale=20)
    assert_close(_answer(use_hopfield_attention(softmax), inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "fields", "make"), [DECODERS[0], OTHERS[0], OTHERS[9]], ids=["Llama", "T5", "CLIP"])
def test_an_edit_of_alpha_takes_effect_in_every_part_and_is_saved(name, fields, make, tmp_path):
    """Parts of T5 have copies of its configuration; parts of CLIP have their own configurations."""
    model, inputs = use_hopfield_attention(_model(name, fields), 1.5), make()
    twin = use_hopfield_attention(copy.deepcopy(model), 2.0)
    before = _answer(model, inputs)
    for number, edited in enumerate((model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        edited.save_pretrained(tmp_path / str(number))
        loaded = type(model).from_pretrained(tmp_path / str(number), attn_implementation="hopfield").eval()
        for each in (edited, loaded):
            assert_close(_answer(each, inputs), before)
            each.config.hopfield_alpha = 2.0
            assert_close(_answer(each, inputs), _answer(twin, inputs))
        loaded.save_pretrained(tmp_path / "again")
        again = type(model).from_pretrained(tmp_path / "again", attn_implementation="hopfield").eval()
        assert_close(_answer(again, inputs), _answer(twin, inputs))
    model.config.hopfield_alpha = 2.5
    with pytest.raises(ValueError, match=r"alpha must lie in \[1, 2\], got 2.5"):
        _answer(model, inputs)


@torch.no_grad()
def test_one_of_two_towers_can_be_converted(tmp_path):
    model, inputs = _model(*OTHERS[9][:2]), OTHERS[9][2]()
    use_hopfield_attention(model.vision_model, 2.0)
    assert not hasattr(model.config, "hopfield_alpha")
    assert model.config.vision_config.hopfield_alpha == 2.0
    text = model.get_text_features(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="hopfield").eval()
    assert_close(_answer(loaded, inputs), _answer(model, inputs))
    model.set_attn_implementation("eager")
    again = model.get_text_features(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    for first, second in zip(text[:1], again[:1], strict=True):
        assert_close(first, second, scale=20)


@torch.no_grad()
def test_towers_may_differ_or_share_one_alpha(tmp_path):
    model, inputs = _model(*OTHERS[9][:2]), OTHERS[9][2]()
    use_hopfield_attention(model.vision_model, 2.0)
    use_hopfield_attention(model.text_model, 1.3)
    model.save_pretrained(tmp_path / "two")
    loaded = type(model).from_pretrained(tmp_path / "two", attn_implementation="hopfield").eval()
    assert_close(_answer(loaded, inputs), _answer(model, inputs))
    use_hopfield_attention(model, 1.6)
    assert model.config.text_config.hopfield_alpha == model.config.vision_config.hopfield_alpha == model.config.hopfield_alpha == 1.6
    with pytest.raises(ValueError, match="is a part of a model that has one hopfield_alpha for all"):
        use_hopfield_attention(model.vision_model, 2.0)
    model.save_pretrained(tmp_path / "one")
    tower = type(model.vision_model).from_pretrained(tmp_path / "one", attn_implementation="hopfield").eval()
    assert_close(tower(inputs["pixel_values"])[0], model.vision_model(inputs["pixel_values"])[0])
    translator = _model(*OTHERS[0][:2])
    use_hopfield_attention(translator.encoder, 2.0)
    use_hopfield_attention(translator, 1.5)
    with pytest.raises(ValueError, match="T5Stack is a part of a model"):
        use_hopfield_attention(translator.encoder, 2.0)


@pytest.mark.parametrize(("name", "fields", "make"), [ENCODERS[0], DECODERS[2], OTHERS[0], OTHERS[3]], ids=["Bert", "Qwen3", "T5", "ViT"])
def test_every_head_may_learn_its_alpha(name, fields, make, tmp_path):
    model, inputs = use_hopfield_attention(_model(name, fields), 1.5, learnable=True), make()
    fixed = _answer(use_hopfield_attention(copy.deepcopy(model), 1.5), inputs)
    answer = _answer(model, inputs)
    assert_close(answer, fixed, scale=20)
    logits = {name: parameter for name, parameter in model.named_parameters() if name.endswith("hopfield_alpha_logit")}
    assert {parameter.shape for parameter in logits.values()} == {(4,)}
    direction = torch.randn_like(answer)
    (answer * direction).sum().backward()
    step = 3e-2
    for parameter in list(logits.values())[:2]:
        assert parameter.grad is not None
        head = parameter.grad.abs().argmax()
        assert parameter.grad[head].abs() > 0.1
        with torch.no_grad():
            losses = []
            for sign in (1.0, -1.0):
                parameter[head] += sign * step
                losses.append((_answer(model, inputs) * direction).sum().item())
                parameter[head] -= sign * step
        assert parameter.grad[head].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05)
    with torch.no_grad():
        for number, parameter in enumerate(logits.values()):
            parameter.copy_(torch.linspace(-2.0, 2.0, 4) + 0.1 * number)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="hopfield").eval()
    assert_close(_answer(loaded, inputs), _answer(model, inputs))
    model.config.hopfield_learnable_alpha = False
    assert_close(_answer(model, inputs), fixed, scale=20)


def test_the_trainer_trains_it(tmp_path):
    model = _model("BertForSequenceClassification", {**TEXT, "num_labels": 2})
    use_hopfield_attention(model, 1.5, learnable=True)
    before = {name: value.clone() for name, value in model.state_dict().items() if "alpha" in name or "query" in name}
    examples = [{"input_ids": _ids()[0], "labels": index % 2} for index in range(8)]
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=3)
    Trainer(model, arguments, train_dataset=examples).train()
    assert all(not torch.equal(model.state_dict()[name], value) for name, value in before.items())
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-3", attn_implementation="hopfield").eval()
    ids = _ids()
    assert_close(loaded(ids).logits, model.eval()(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "fields", "make"), [ENCODERS[0], DECODERS[4], OTHERS[0], OTHERS[3]], ids=["Bert", "Gemma2", "T5", "ViT"])
def test_half_precision_is_supported(name, fields, make, dtype):
    model, inputs = use_hopfield_attention(_model(name, fields, grow=0.1), 1.5), make()
    expected = _answer(model, inputs)
    halves = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    answer = _answer(model.to(dtype), halves)
    assert answer.dtype == dtype
    assert _relative(answer.float(), expected) < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("given", [{}, {"softcap": 50.0}, {"s_aux": True}, {"position_bias": True}], ids=["plain", "cap", "sinks", "bias"])
def test_large_scores_and_rows_without_keys(given, alpha, dtype):
    """With scores of 1e4 outputs are finite, and a query without keys gives zeros."""
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 7, 16)
    query *= 1e4 / (query @ key.repeat_interleave(2, 1).mT).abs().max()
    query, key, value = query.to(dtype).requires_grad_(), key.to(dtype), torch.randn(1, 2, 7, 16).to(dtype)
    mask = torch.ones(1, 1, 3, 7, dtype=torch.bool)
    mask[..., 1, :] = False
    given = {
        name: (torch.zeros(4) if name == "s_aux" else torch.zeros(1, 4, 3, 7)).to(dtype) if extra is True else extra
        for name, extra in given.items()
    }
    for kernel in KERNELS.values():
        output, _ = kernel(torch.nn.Module().eval(), query, key, value, mask, alpha=alpha, scaling=1.0, **given)
        assert torch.equal(output[:, 1], torch.zeros_like(output[:, 1]))
        assert output.isfinite().all()
        (gradient,) = torch.autograd.grad(output.float().sum(), query)
        assert gradient.isfinite().all()
        assert torch.equal(gradient[:, :, 1], torch.zeros_like(gradient[:, :, 1]))


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_bias_a_mask_and_causality_are_applied_together(kernel):
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = plain_hopfield_attention(
        query, key, value, alpha=1.5, scaling=1.0, attention_mask=bias.masked_fill(~causal, -torch.inf).expand(2, 4, 5, 5)
    )
    lowest = torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(~causal, torch.finfo(torch.float64).min)
    module, attend = torch.nn.Module().eval(), ALL_ATTENTION_FUNCTIONS[kernel]
    tolerance = 1e3 if kernel == "hopfield_entmax" else 3  # bisection ends there
    for mask, is_causal in ((None, True), (causal[None, None], None), (lowest, None)):
        output, _ = attend(module, query, key, value, mask, alpha=1.5, scaling=1.0, position_bias=bias, is_causal=is_causal)
        assert_close(output.transpose(1, 2), expected, scale=tolerance)
    expected = plain_hopfield_attention(query, key, value, alpha=1.5, scaling=1.0)
    harmless: list[dict[str, Any]] = [{"is_causal": False}, {"sliding_window": 5}, {"indices": None, "num_items_in_batch": 3}]
    for given in harmless:
        output, _ = attend(module, query, key, value, None, alpha=1.5, scaling=1.0, **given)
        assert_close(output.transpose(1, 2), expected, scale=tolerance)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"indices": torch.zeros(1)}, TypeError, "Module passes the keyword 'indices', which Hopfield attention does not know"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, ValueError, "'cu_seq_lens_q', for packed sequences"),
        ({"cache": object()}, ValueError, "'cache', for packed sequences or a paged cache"),
        ({"sliding_window": 3}, ValueError, "sliding_window=3 without a mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("attend", [hopfield_attention_forward, entmax_attention_forward])
def test_unsupported_arguments_are_refused(attend, given, error, message):
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(error, match=message):
        attend(torch.nn.Module().eval(), query, key, value, None, **given)


def test_an_unknown_keyword_of_a_model_is_refused():
    model = use_hopfield_attention(_model(*DECODERS[0][:2]), 1.5)
    with pytest.raises(TypeError, match="LlamaAttention passes the keyword 'temperature'"):
        model(_ids(), temperature=2.0)


@pytest.mark.parametrize(
    ("name", "fields", "layer"),
    [
        ("MPNetModel", TEXT, "MPNetSelfAttention"),
        ("FalconModel", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "FalconAttention"),
        ("LongT5Model", T5, "LongT5LocalAttention"),
        ("BigBirdModel", TEXT, "BigBirdBlockSparseAttention"),
        ("WavLMModel", SPEECH, "WavLMAttention"),
        ("ViltModel", {**TEXT, **IMAGE}, "ViltSelfAttention"),
    ],
)
def test_attention_outside_the_interface_is_refused_by_name(name, fields, layer):
    model = _model(name, fields)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"{name} has attention that does not go through .*{layer}"):
        use_hopfield_attention(model, 1.5)
    assert not hasattr(model.config, "hopfield_alpha")
    assert model.config._attn_implementation == before


class _Calls(torch.nn.Module):
    """An attention implementation with another name that uses the kernel of PyTorch."""

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)


class _OwnAttention(LlamaAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 2.0 * output, weights


class _Classifier(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()

    def forward(self, **inputs):
        return self.bert(**inputs)


@torch.no_grad()
def test_user_defined_classes_are_converted_or_refused():
    inputs = _tokens()
    model = _Classifier(BertConfig(**TEXT)).eval()
    model.set_attn_implementation("eager")
    softmax = _answer(model, inputs)
    assert _relative(_answer(use_hopfield_attention(model, 1.0), inputs), softmax) < 1e-4
    changed = _answer(use_hopfield_attention(model, 2.0), inputs)
    assert not torch.allclose(changed, softmax)
    model.more = _Calls()
    with pytest.raises(ValueError, match=r"would stay at softmax: more \(_Calls\)"):
        use_hopfield_attention(model, 1.5)
    llama = _model(*DECODERS[0][:2])
    for index, layer in enumerate(llama.model.layers):
        own = _OwnAttention(llama.config, index)
        own.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = own
    softmax = _answer(llama.eval(), inputs)
    assert _relative(_answer(use_hopfield_attention(llama, 1.0), inputs), softmax) < 1e-4
    assert _relative(_answer(use_hopfield_attention(llama, 2.0), inputs), softmax) > 0.05


def test_a_pooling_layer_that_keeps_softmax_is_named(warned):
    model = _model(*OTHERS[10][:2])
    use_hopfield_attention(model, 1.5)
    assert "the pooling of SiglipModel stays at softmax: vision_model.head.attention" in warned.text


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        ("bert", {"alpha": 2.5}, ValueError, r"alpha must be a number in \[1, 2\], got 2.5"),
        ("bert", {"alpha": "1.5"}, ValueError, r"alpha must be a number in \[1, 2\], got '1.5'"),
        ("bert", {"alpha": 1.0, "learnable": True}, ValueError, "must begin strictly between 1 and 2, got 1.0"),
        ("bert", {"kernel": "sdpa"}, ValueError, "kernel must be one of .*, got 'sdpa'"),
        ("linear", {}, TypeError, "needs a model of transformers, got Linear"),
        ("config", {}, TypeError, "needs a model of transformers, got BertConfig"),
        ("florence", {"learnable": True}, ValueError, "Florence2VisionChannelAttention does not say how many heads it has"),
        ("uhop", {}, ValueError, "UHopViTModel has Hopfield attention already"),
        ("convnext", {}, ValueError, "ConvNextModel has no attention"),
    ],
)
def test_wrong_arguments_are_refused(model, settings, error, message):
    made = {
        "bert": lambda: _model(*ENCODERS[0][:2]),
        "linear": lambda: torch.nn.Linear(2, 2),
        "config": lambda: BertConfig(**TEXT),
        "florence": lambda: transformers.Florence2VisionBackbone(transformers.Florence2VisionConfig(**FLORENCE)),
        "uhop": lambda: UHopViTModel(UHopViTConfig(**IMAGE)),
        "convnext": lambda: _model("ConvNextModel", {"hidden_sizes": [4, 4], "depths": [1, 1], "num_stages": 2}),
    }[model]()
    with pytest.raises(error, match=message):
        use_hopfield_attention(made, **settings)
    assert not hasattr(getattr(made, "config", None), "hopfield_alpha")


def test_alpha_1_5_is_the_model_that_from_vit_makes():
    vit = _model(*OTHERS[3][:2])
    expected = UHopViTModel.from_vit(vit, alpha=1.5)(**(inputs := _images())).last_hidden_state
    assert_close(use_hopfield_attention(vit, 1.5)(**inputs).last_hidden_state, expected, scale=10)


def test_weights_are_returned_on_request():
    model = use_hopfield_attention(_model(*DECODERS[2][:2]), 2.0)
    ids = _ids()
    output = model(ids, output_attentions=True)
    assert_close(output.logits, model(ids).logits, scale=20)
    assert_close(output.attentions[1].sum(-1), torch.ones(2, 4, 9))
    assert (output.attentions[1] == 0).float().mean() > 0.5


@pytest.mark.trains
def test_a_model_compiles():
    model = use_hopfield_attention(_model("Qwen3Model", {**DECODERS[2][1], "num_hidden_layers": 1}), 1.5)
    ids = _ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(ids).last_hidden_state, model(ids).last_hidden_state, scale=20)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft 0.21 reads
def test_peft_models_are_supported():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(_model(*DECODERS[0][:2]), peft.LoraConfig(target_modules=["q_proj"]))
    ids = _ids()
    expected = use_hopfield_attention(copy.deepcopy(model).get_base_model(), 2.0)(ids).logits
    assert_close(use_hopfield_attention(model, 2.0)(ids).logits, expected)
    with pytest.raises(ValueError, match="learnable alpha cannot be saved with an adapter of PEFT"):
        use_hopfield_attention(model, 1.5, learnable=True)


def test_the_auto_classes_load_it(tmp_path):
    model = use_hopfield_attention(_model(*DECODERS[0][:2]), 1.5)
    model.save_pretrained(tmp_path)
    ids = _ids()
    for auto_class, expected in ((AutoModelForCausalLM, model(ids).logits), (AutoModel, model.model(ids).last_hidden_state)):
        assert_close(auto_class.from_pretrained(tmp_path, attn_implementation="hopfield")(ids)[0], expected)
