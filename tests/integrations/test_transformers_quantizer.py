"""transformers loads, quantizes and stores models with this package's schemes; PEFT trains adapters on them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptkernels as ptk
from ptkernels.nn import QuantizedLinear

transformers = pytest.importorskip("transformers", minversion="5.0")
safetensors = pytest.importorskip("safetensors")

from ptkernels.integrations import transformers as attention  # noqa: E402
from ptkernels.integrations.transformers_quantizer import PtKernelsConfig  # noqa: E402

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SCHEMES = (
    "int8_dynamic", "int8_weight_only", "int4_weight_only", "int4_int8", "int2_weight_only", "nf4", "mxfp4", "fp8",
)  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with biases, in float32, as from_pretrained finds it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, attention_bias=True, tie_word_embeddings=False)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def ids() -> torch.Tensor:
    return torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


def load(path: Path, **options: Any) -> Any:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    return (loaded[0].eval(), loaded[1]) if options.get("output_loading_info") else loaded.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loaded_stored_and_loaded_again(scheme: str, stored: Path, tmp_path: Path) -> None:
    """What from_pretrained makes is what quantize_ makes; what save_pretrained stores is it, bit for bit."""
    plain = load(stored)
    ptk.nn.quantize_(plain, scheme, lambda name, _: name != "lm_head", group_size=32)
    model = load(stored, quantization_config=PtKernelsConfig(scheme, group_size=32))
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2 * 7
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        marker = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    assert "model.layers.0.self_attn.q_proj.codes" in names
    assert marker.shape == (1,)
    again, found = load(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.quantization_config.scheme == scheme
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    assert torch.equal(logits(again), logits(model))


def test_halves_stay_halves_and_scales_single(stored: Path, tmp_path: Path) -> None:
    config = PtKernelsConfig("int4_weight_only", group_size=32, symmetric=False)
    model = load(stored, dtype=torch.bfloat16, quantization_config=config)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.bias.dtype, layer.scales.dtype, layer.zeros.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    assert again.model.layers[0].self_attn.q_proj.scales.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


def test_other_heads_load_the_same_layers(stored: Path, tmp_path: Path) -> None:
    """Which layers were left alone is stored: it would come out differently for a model that ends elsewhere."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        stored, quantization_config=PtKernelsConfig("int8_dynamic", modules_to_not_convert=["score", "o_proj"])
    )
    model.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(body.layers[1].self_attn.o_proj) is nn.Linear
    assert isinstance(body.layers[1].self_attn.q_proj, QuantizedLinear)
    with torch.no_grad():
        expected = model.eval().model(ids()).last_hidden_state
        assert torch.equal(body.eval()(ids()).last_hidden_state, expected)


@pytest.mark.parametrize("scheme", ["int8_weight_only", "nf4"])  # codes of the weight's shape, and of another
def test_without_the_module_loading_is_an_error(
    scheme: str, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a model with random weights. What a process that has not imported it knows is what is left without us."""
    from transformers.quantizers import auto

    load(stored, quantization_config=PtKernelsConfig(scheme, group_size=32)).save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "ptkernels")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "ptkernels")
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.add_handler(handler)
    try:
        with pytest.raises(RuntimeError, match="You set `ignore_mismatched_sizes` to `False`, thus raising an error"):
            load(tmp_path)
    finally:
        transformers.utils.logging.remove_handler(handler)
    assert any(text.startswith("Unknown quantization type, got ptkernels") for text in records)
    assert any("self_attn.q_proj.weight" in text and "MISMATCH" in text for text in records)


def test_a_body_and_a_head_load_without_a_word(stored: Path, tmp_path: Path) -> None:
    """The markers are no unexpected keys, whichever of body and head was stored and is loaded."""
    whole, body = tmp_path / "whole", tmp_path / "body"
    model = load(stored, quantization_config=PtKernelsConfig("nf4", group_size=32))
    model.save_pretrained(whole)
    only, found = transformers.AutoModel.from_pretrained(whole, output_loading_info=True)
    assert found["unexpected_keys"] == {"lm_head.weight"}
    assert not found["missing_keys"]
    only.save_pretrained(body)
    _, found = load(body, output_loading_info=True)
    assert not found["unexpected_keys"]
    assert found["missing_keys"] == {"lm_head.weight"}


def test_greedy_generation_and_dequantize(stored: Path) -> None:
    attention.register()
    model = load(stored, quantization_config=PtKernelsConfig("int8_weight_only"))
    tokens = {}
    for implementation in ("eager", attention.NAME):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(ids(), max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens["eager"], tokens[attention.NAME])
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scheme": "int1"}, "PtKernelsConfig: scheme: got 'int1'"),
        ({"scheme": "int8_static"}, "PtKernelsConfig: scheme: got 'int8_static'"),
        ({"scheme": "nf4", "group_size": 7}, "group_size: got 7"),
    ],
)
def test_bad_configurations(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PtKernelsConfig(**options)


class TestPeft:
    """QLoRA through PEFT."""

    @pytest.fixture
    def base(self, stored: Path) -> Any:
        pytest.importorskip("peft")
        return load(stored, quantization_config=PtKernelsConfig("nf4", group_size=32))

    def adapted(self, base: Any, **options: Any) -> Any:
        import peft

        from ptkernels.integrations.peft import on_quantized

        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], **options)
        return peft.get_peft_model(base, on_quantized(config))

    def test_trains_only_adapters(self, base: Any) -> None:
        codes = {name: t.clone() for name, t in base.state_dict().items()}
        start = logits(base)
        model = self.adapted(base)
        assert torch.equal(logits(model), start)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.02)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        trained = [name for name, p in model.named_parameters() if p.grad is not None]
        assert trained
        assert all("lora_" in name for name in trained)
        base_layer = model.base_model.model.model.layers[0].mlp.down_proj.base_layer
        assert torch.equal(base_layer.codes, codes["model.layers.0.mlp.down_proj.codes"])

    def test_stored_adapters_load(self, base: Any, stored: Path, tmp_path: Path) -> None:
        import peft

        from ptkernels.integrations.peft import QuantizedLoraLinear, on_quantized

        model = self.adapted(base, init_lora_weights="gaussian")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        fresh = load(stored, quantization_config=PtKernelsConfig("nf4", group_size=32))
        config = on_quantized(peft.LoraConfig.from_pretrained(tmp_path))
        again = peft.PeftModel.from_pretrained(fresh, tmp_path, config=config)
        assert isinstance(again.base_model.model.model.layers[1].mlp.down_proj, QuantizedLoraLinear)
        assert torch.equal(logits(again), expected)

    def test_merging_and_back(self, base: Any) -> None:
        model = self.adapted(base, init_lora_weights=False)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        codes = layer.base_layer.codes.clone()
        expected = layer.base_layer.weight.dequantize() + layer.get_delta_weight("default")
        model.merge_adapter(safe_merge=True)
        step = layer.base_layer.scales.max() * 0.17  # half of nf4's widest gap
        assert (layer.base_layer.weight.dequantize() - expected).abs().max().item() <= step.item()
        assert not torch.equal(layer.base_layer.codes, codes)
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.codes, codes)
        merged = model.merge_and_unload()
        assert isinstance(merged.model.layers[0].mlp.down_proj, QuantizedLinear)

    @pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
    def test_what_needs_a_float_weight_is_refused(self, base: Any, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"init_lora_weights: got 'pissa'|variant"):
            self.adapted(base, **options)
