"""A CLIP of two thousand weights in float64, and a tokenizer of single letters for it."""

import copy

import pytest
import torch

NAMES = ("ant", "bee", "cow")
TEMPLATES = ("a {}", "the {}", "{} here")


def letters(texts):
    """Token 1 + letter's number, closed by the largest token, where CLIP's text tower pools."""
    rows = [[1 + (ord(c) - 97) % 27 for c in text[:14]] + [29] for text in texts]
    return torch.tensor([row + [0] * (15 - len(row)) for row in rows])


VISION = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
TEXT = {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 1}
CONFIG = {"model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": {}}


@pytest.fixture
def clip_model():
    import open_clip

    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"])).double()


@pytest.fixture
def resnet_model():
    """A CLIP with a ModifiedResNet tower (BatchNorm, attention pooling), which needs images of 32 x 32."""
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}
    text = {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).double()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():  # running statistics as after pre-training, without which all features are nearly one
        model.train().encode_image(torch.randn(32, 3, 32, 32, dtype=torch.float64))
    for norm in norms:
        norm.momentum = 0.1
    return model


@pytest.fixture
def prompts():
    return {"tokenizer": letters, "class_names": NAMES, "templates": TEMPLATES}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(9)
    ]


@pytest.fixture
def resnet_batches(batches):
    """The same batches at the size of the ResNet tower."""
    return [(torch.nn.functional.interpolate(images, size=32), labels) for images, labels in batches]


@pytest.fixture
def validation():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(40, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (40,), generator=generator)
