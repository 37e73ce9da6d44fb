"""A batch in parts has the loss and the gradients of the batch in one pass, whatever the loss is."""

from __future__ import annotations

import every_loss
import pytest
import torch
from every_loss import OPTIONS, gradients, make

from robustft.clip import spread
from robustft.methods import FLYP

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "MaPLe, of a batch"])
def test_parts_equal_the_whole(name):
    method, batch = make(name), every_loss.data()
    whole = method(batch)
    expected = gradients(method, whole.loss)
    parts = method(batch, parts=4)  # of 4, 4, 4 and 1 rows
    torch.testing.assert_close(parts.loss, whole.loss, **EXACT)
    torch.testing.assert_close(parts.terms, whole.terms, **EXACT)
    torch.testing.assert_close(gradients(method, parts.loss), expected, **EXACT)


@pytest.mark.parametrize("name", ["FLYP", "CaRot", "FineTune", "WorstCaseFineTune"])
def test_dropout_is_the_same_when_a_part_is_encoded_again(name, monkeypatch):
    # The oracle keeps the graphs of all parts: nothing is encoded again.
    method, batch = make(name, dropout=0.5), every_loss.data()

    def found():
        torch.manual_seed(5)
        out = method(batch, parts=3)
        torch.manual_seed(6)
        return gradients(method, out.loss)

    again = found()
    for module in ("robustft.clip.spread.checkpoint", "robustft.methods.base.checkpoint"):
        monkeypatch.setattr(module, lambda function, *arguments, **_: function(*arguments))
    torch.testing.assert_close(again, found(), **EXACT)


def test_parts_draw_other_dropout_than_each_other():
    method, batch = make("FLYP", dropout=0.5), every_loss.data()
    batch["image"][:] = batch["image"][0]
    seen = []
    original = method.model.encode_image
    method.model.encode_image = lambda images: seen.append(original(images)) or seen[-1]
    with torch.no_grad():
        method(batch, parts=every_loss.N)
    assert not torch.allclose(seen[0], seen[1])


def test_a_part_at_a_time_is_in_memory():
    method, batch = make("FLYP"), every_loss.data()
    rows = []
    method.model.visual.transformer.register_forward_hook(lambda _module, inputs, _out: rows.append(len(inputs[0])))
    gradients(method, method(batch, parts=4).loss)
    assert rows == [4, 4, 4, 1] + [1, 4, 4, 4]

    def kept(parts):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            method(batch, parts=parts)
        return sum(sizes)

    assert kept(4) < 0.5 * kept(1)


def test_images_wait_on_the_cpu_for_their_turn():
    method, batch = make("FineTune, of a batch").to("meta"), {"image": every_loss.data()["image"], "text": ["a"] * 13}
    with spread.spread(spread.Spread(2)):
        assert method._own(batch).images.device.type == "cpu"
    with pytest.raises(ValueError, match="images are on cpu, the model is on meta"):
        method._own(batch)


def test_what_parts_would_change_is_refused(resnet_model, prompts, resnet_batches):
    with pytest.raises(ValueError, match=r"model.visual.bn1 of FLYP is a BatchNorm in training mode: in 2 parts on 1"):
        FLYP(resnet_model, **prompts).train()(resnet_batches[0], parts=2)
    frozen = FLYP(resnet_model, **prompts).eval()
    expected = gradients(frozen, frozen(resnet_batches[0]).loss)
    torch.testing.assert_close(gradients(frozen, frozen(resnet_batches[0], parts=2).loss), expected, **EXACT)
    with pytest.raises(ValueError, match="parts must be 1 for MaPLe with this objective, got 2"):
        make("MaPLe, of a batch")(every_loss.data(), parts=2)
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        make("FLYP")(every_loss.data(), parts=0)


def test_weights_that_moved_without_after_step_are_noticed():
    method, batch = make("CaRot"), every_loss.data()
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3)
    for _ in range(2):  # two passes for one step are no sign of it
        method(batch).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"weights of CaRot moved .* and CaRot.after_step\(\) was not called"):
        method(batch)
    hook = optimizer.register_step_post_hook(lambda *_: method.after_step())
    method(batch).loss.backward()
    optimizer.step()
    assert int(method.steps) == 2 and hook
