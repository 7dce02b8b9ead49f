"""Tiny random-weight architectures of torchvision, timm and transformers, and a few by hand, in float32 and eval mode.

`ARCHITECTURES[name]()` gives (model, inputs of 7 rows, number of outputs); it skips the test if the library is missing.
"""

import importlib

import pytest
import torch
from torch import nn

ROWS, CLASSES = 7, 3
ARCHITECTURES = {}


def architecture(make):
    """Register a maker, with weights and inputs from a seed of its own."""

    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(make.__name__))
            model, inputs = make()
        return model.eval(), inputs

    ARCHITECTURES[make.__name__.replace("_", "-")] = made
    return make


def _images(side):
    return torch.randn(ROWS, 3, side, side)


def _vision():
    return pytest.importorskip("torchvision").models


def _timm(name, **options):
    timm = pytest.importorskip("timm", reason="needs the extra: pip install bdl-bench[test]")
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


@architecture
def resnet():
    block = _vision().resnet.BasicBlock
    return _vision().ResNet(block, [1, 1, 1, 1], num_classes=CLASSES), _images(16)


@architecture
def resnext():
    block = _vision().resnet.Bottleneck
    return _vision().ResNet(block, [1, 1, 1, 1], CLASSES, groups=2, width_per_group=4), _images(16)


@architecture
def densenet():
    model = _vision().DenseNet(4, (2, 2), num_init_features=8, bn_size=2, num_classes=CLASSES)
    return model, _images(32)


@architecture
def mobilenet_v2():
    settings = [[1, 8, 1, 1], [2, 8, 2, 2]]
    model = _vision().MobileNetV2(num_classes=CLASSES, width_mult=0.5, inverted_residual_setting=settings)
    return model, _images(16)


@architecture
def mobilenet_v3():
    """Hardswish, and squeeze-and-excitation."""
    return _vision().mobilenet_v3_small(num_classes=CLASSES, width_mult=0.25), _images(32)


@architecture
def efficientnet():
    config = _vision().efficientnet.MBConvConfig
    settings = [config(1, 3, 1, 8, 8, 1), config(2, 3, 2, 8, 16, 2)]
    return _vision().EfficientNet(settings, dropout=0.1, num_classes=CLASSES), _images(16)


@architecture
def regnet():
    make = _vision().regnet.BlockParams.from_init_params
    stages = make(depth=4, w_0=8, w_a=4.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return _vision().RegNet(stages, num_classes=CLASSES, stem_width=8), _images(32)


@architecture
def convnext():
    setting = _vision().convnext.CNBlockConfig
    return _vision().ConvNeXt([setting(8, 16, 1), setting(16, None, 1)], num_classes=CLASSES), _images(32)


@architecture
def swin():
    model = _vision().SwinTransformer([2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=CLASSES)
    return model, _images(16)


@architecture
def swin_v2():
    swin = _vision().swin_transformer
    model = _vision().SwinTransformer(
        [2, 2],
        8,
        [2, 1],
        [1, 2],
        [2, 2],
        num_classes=CLASSES,
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )
    return model, _images(16)


@architecture
def vision_transformer():
    model = _vision().VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # zero at first: nothing below it would have a slope
    return model, _images(16)


@architecture
def shufflenet():
    return _vision().ShuffleNetV2([1, 1, 1], [8, 16, 24, 32, 32], num_classes=CLASSES), _images(32)


@architecture
def squeezenet():
    return _vision().SqueezeNet("1_1", num_classes=CLASSES), _images(32)


@architecture
def mlp_mixer():
    pytest.importorskip("timm", reason="needs the extra: pip install bdl-bench[test]")
    mixer = importlib.import_module("timm.models.mlp_mixer").MlpMixer
    return mixer(CLASSES, img_size=16, patch_size=8, num_blocks=1, embed_dim=8), _images(16)


@architecture
def timm_vision_transformer():
    return _timm("test_vit", img_size=32), _images(32)


@architecture
def timm_convnext():
    return _timm("test_convnext"), _images(32)


@architecture
def timm_efficientnet():
    return _timm("test_efficientnet"), _images(32)


@architecture
def normalizer_free_net():
    """Standardised convolution weights."""
    return _timm("test_nfnet"), _images(32)


def _sequences(vocabulary=40):
    ids = torch.randint(3, vocabulary, (ROWS, 6))
    mask = torch.ones_like(ids)
    mask[3, 4:] = mask[5, 2:] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _transformer(kind, config, **options):
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install bdl-bench[text]")
    made = getattr(transformers, config)(vocab_size=40, num_labels=CLASSES, pad_token_id=0, **options)
    return getattr(transformers, kind)(made), _sequences()


_BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@architecture
def bert():
    return _transformer("BertForSequenceClassification", "BertConfig", **_BERT)


@architecture
def roberta():
    return _transformer(
        "RobertaForSequenceClassification", "RobertaConfig", **_BERT, max_position_embeddings=16, type_vocab_size=1
    )


@architecture
def distilbert():
    options = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    return _transformer("DistilBertForSequenceClassification", "DistilBertConfig", **options)


@architecture
def gpt2():
    options = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return _transformer("GPT2ForSequenceClassification", "GPT2Config", **options)


@architecture
def llama():
    return _transformer("LlamaForSequenceClassification", "LlamaConfig", **_BERT, num_key_value_heads=1)


@architecture
def t5_encoder():
    options = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    encoder, inputs = _transformer("T5EncoderModel", "T5Config", **options)
    return _Pooled(encoder, 8), inputs


class _Pooled(nn.Module):
    """The mean over tokens that are there, and a linear layer."""

    def __init__(self, encoder, width):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, CLASSES)

    def forward(self, input_ids, attention_mask):
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(h.dtype)
        return self.head((h * mask).sum(1) / mask.sum(1))


class _Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(3, 6, 2, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@architecture
def lstm():
    return _Recurrent(nn.LSTM), torch.randn(ROWS, 5, 3)


@architecture
def gru():
    return _Recurrent(nn.GRU), torch.randn(ROWS, 5, 3)


class _UNet(nn.Module):
    """One level down and up again, with a skip connection; one map of outputs."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.bottom = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, x):
        skip = self.down(x)
        h = self.up(self.bottom(nn.functional.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, h], 1))


@architecture
def unet():
    return _UNet(), _images(4)
