"""LiNeS scales updates by depth; Model Stock weighs fine-tunings by their angles."""

import copy

import pytest
import torch
import torch.nn.functional as F

from robustft import clip
from robustft.ensembles import LiNeS, WiSEFT, model_stock, uniform_soup
from robustft.predictors.base import Classifier


@pytest.fixture(params=["vit", "resnet"])
def ends(request, clip_model, resnet_model, batches, resnet_batches):
    """A zero-shot classifier, three others with weights of their own around it, and images."""
    model, given = (clip_model, batches) if request.param == "vit" else (resnet_model, resnet_batches)
    torch.manual_seed(0)

    def moved(by: float) -> Classifier:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for value in other.parameters():
                value.add_(by * torch.randn_like(value))
        width = clip.feature_width(model)
        return Classifier(other, F.normalize(torch.randn(3, width, dtype=torch.float64), dim=1), ["a", "b", "c"])

    return [moved(0.0), *(moved(0.05) for _ in range(3))], given[0][0]


def test_depths_count_blocks_from_the_images_and_from_the_texts(clip_model, resnet_model):
    depths = clip.depths(clip_model)
    assert set(depths) == set(clip_model.state_dict())
    blocks = len(clip_model.visual.transformer.resblocks)
    assert depths["visual.conv1.weight"] == depths["visual.class_embedding"] == (1, blocks)
    assert depths["visual.transformer.resblocks.0.mlp.c_fc.weight"] == (1, blocks)
    assert depths["visual.proj"] == depths["visual.ln_post.weight"] == (blocks, blocks)
    texts = len(clip_model.transformer.resblocks)
    assert depths["token_embedding.weight"].number == depths["positional_embedding"].number == 1
    assert depths[f"transformer.resblocks.{texts - 1}.ln_1.weight"] == depths["text_projection"] == (texts, texts)
    assert depths["logit_scale"].share == 1.0
    depths = clip.depths(resnet_model)
    of_images = [depths[name] for name in resnet_model.visual.state_dict(prefix="visual.")]
    assert depths["visual.conv1.weight"].number == 1 and depths["visual.attnpool.c_proj.weight"].share == 1.0
    assert {depth.number for depth in of_images} == set(range(1, of_images[0].blocks + 1))


def test_lines_is_the_update_scaled_by_depth(ends):
    (zero_shot, fine_tuned, *_), images = ends
    lines, depths = LiNeS(zero_shot, fine_tuned), clip.depths(zero_shot.model)
    found = lines.at(0.2, 0.5)
    before, after = zero_shot.model.state_dict(), fine_tuned.model.state_dict()
    for name, value in found.model.state_dict().items():
        if value.is_floating_point():
            number, blocks = depths[name]
            scale = 0.2 + 0.5 * ((number - 1) / (blocks - 1) if blocks > 1 else 1.0)
            torch.testing.assert_close(value, before[name] + scale * (after[name] - before[name]))
    heads = [c.logit_scale * c.class_embeddings for c in (zero_shot, fine_tuned, found)]
    torch.testing.assert_close(heads[2], heads[0] + 0.7 * (heads[1] - heads[0]))
    wise = WiSEFT(zero_shot, fine_tuned).at(0.3)
    torch.testing.assert_close(lines.at(0.3, 0.0).logits(images), wise.logits(images))
    torch.testing.assert_close(lines.at(1.0, 0.0).logits(images), fine_tuned.logits(images))


def test_lines_are_chosen_on_validation_data_and_read_it_once(ends):
    (zero_shot, fine_tuned, *_), images = ends
    labels = LiNeS(zero_shot, fine_tuned).at(0.0, 0.6).logits(images).argmax(1)
    lines = LiNeS(zero_shot, fine_tuned).fit((images, labels), scales=(0.0, 0.6, 1.0))
    assert lines.pairs_ == ((0.0, 0.0), (0.0, 0.6), (0.0, 1.0), (0.6, 0.0), (0.6, 0.4), (1.0, 0.0))
    expected = []
    for pair in lines.pairs_:
        z = lines.at(*pair).logits(images)
        expected.append(((z.argmax(1) == labels).double().mean().item(), F.cross_entropy(z, labels).item()))
    torch.testing.assert_close(list(zip(lines.accuracies_, lines.nlls_, strict=True)), expected)
    best = min(range(6), key=lambda i: (-expected[i][0], expected[i][1]))
    assert (lines.alpha_, lines.beta_) == lines.pairs_[best] and expected[best][0] == 1.0
    assert torch.equal(lines.classifier().logits(images), lines.at(*lines.pairs_[best]).logits(images))


def test_lines_outside_of_its_range_or_before_its_fit_is_an_error(ends):
    (zero_shot, fine_tuned, *_), images = ends
    lines = LiNeS(zero_shot, fine_tuned)
    for pair, message in (((0.5, 0.6), "alpha \\+ beta at most 1"), ((0.5, -0.1), "beta"), ((1.5, 0.0), "alpha")):
        with pytest.raises(ValueError, match=message):
            lines.at(*pair)
    with pytest.raises(ValueError, match="call fit"):
        lines.classifier()
    with pytest.raises(TypeError, match="fine_tuned must be a Classifier"):
        LiNeS(zero_shot, WiSEFT(zero_shot, fine_tuned))


def stock(start, moves):
    """The paper's closed form for one layer."""
    pairs = [(a, b) for i, a in enumerate(moves) for b in moves[i + 1 :]]
    cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]
    cosine, k = max(0.0, sum(cosines) / len(cosines)), len(moves)
    return start + k * cosine / ((k - 1) * cosine + 1) * sum(moves) / k


def test_model_stock_is_its_closed_form_layer_by_layer(ends):
    (zero_shot, *tuned), _ = ends
    with torch.no_grad():  # runs that share a part of their way
        for classifier in tuned:
            for value, shared in zip(classifier.model.parameters(), tuned[0].model.parameters(), strict=True):
                value.lerp_(shared, 0.4)
    found = model_stock(zero_shot, tuned)
    start, states = zero_shot.model.state_dict(), [c.model.state_dict() for c in tuned]
    for name, value in found.model.state_dict().items():
        if value.is_floating_point():
            moves = [state[name] - start[name] for state in states]
            expected = stock(start[name], moves) if all(move.any() for move in moves) else start[name]
            torch.testing.assert_close(value, expected, msg=name)
    heads = [c.logit_scale * c.class_embeddings for c in (zero_shot, *tuned)]
    expected = stock(heads[0], [head - heads[0] for head in heads[1:]])
    torch.testing.assert_close(found.logit_scale * found.class_embeddings, expected)


def test_model_stock_of_equals_is_their_mean_and_of_right_angles_the_start():
    start = {"w": torch.zeros(2), "n": torch.tensor(3)}
    equal = [{"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(4)}] * 3
    assert torch.equal(clip.stock_state(start, equal)["w"], equal[0]["w"]) and clip.stock_state(start, equal)["n"] == 4
    for other in ([-2.0, 1.0], [-1.0, -2.0], [0.0, 0.0]):
        apart = [equal[0], {"w": torch.tensor(other), "n": torch.tensor(4)}]
        assert torch.equal(clip.stock_state(start, apart)["w"], start["w"])
    with pytest.raises(ValueError, match="at least two"):
        clip.stock_state(start, equal[:1])


def test_model_stock_lies_between_the_start_and_the_soup(ends):
    (zero_shot, *tuned), images = ends
    alike = [tuned[0]] * 2
    torch.testing.assert_close(model_stock(zero_shot, alike).logits(images), uniform_soup(alike).logits(images))
    with pytest.raises(ValueError, match="classifiers: expected at least two fine-tunings, got 1"):
        model_stock(zero_shot, tuned[:1])
