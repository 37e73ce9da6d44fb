"""Compiled towers train as they are, whatever a method does with them; what cannot be compiled is said before."""

from __future__ import annotations

import copy
from functools import partial

import open_clip
import pytest
import torch
from targets import exhaustive
from test_fit import Stop, assert_same, before_update, data, letters, make, run, stop
from test_validation import held_out, same, state

from robustft.clip import encoding
from robustft.methods import FLYP, CaRot, FineTune, LipsumFT, LoCoOp, MaPLe
from robustft.training import CompiledTowers, compiling, loop

VISION = {"image_size": 32, "layers": [2, 2, 1, 1], "width": 4, "head_width": 16}
TEXT = {"context_length": 9, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2}


@pytest.fixture
def traced(monkeypatch):
    """`fit(compile=True)` traces and does not compile: the same code, without a C++ compiler's minutes; a function that
    tells how many graphs there were so far."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(loop, "CompiledTowers", partial(CompiledTowers, backend="eager"))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of attentions in evaluation mode, which a graph does not take
    monkeypatch.setattr(encoding, "for_class_token", lambda model: model)  # nor does it leave out a last block's tokens
    yield lambda: counters["stats"]["unique_graphs"]
    torch.backends.mha.set_fastpath_enabled(fast)


def made(kind, **options):
    return make(kind, **({} if kind is CaRot else {"total_steps": None}) | options)


PROMPTED = {"context": 2}
OPTIONS = {
    "plain": {},
    "recomputed, fp16": {"grad_checkpointing": True, "precision": "fp16"},
    "in parts": {"accumulate": 3},
    "validated": {"validation": held_out()},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "kind, given, options, graphs",
    [
        (FLYP, {"tune": "lora", "lora": {"rank": 2}}, "recomputed, fp16", 2),
        (FLYP, {}, "in parts", 4),
        (FineTune, {}, "validated", 1),
        (LipsumFT, {}, "plain", 3),
        (MaPLe, PROMPTED, "plain", 2),
        (LoCoOp, PROMPTED, "plain", 3),
    ],
)
def test_compiled_towers_train_alike_from_few_graphs(traced, kind, given, options, graphs):
    # Each step has other captions, and the data leave a part of a batch at the end of each epoch.
    plain, compiled = made(kind, **given), made(kind, **given)
    run(plain, epochs=2, **OPTIONS[options])
    run(compiled, epochs=2, **OPTIONS[options], compile=True)
    assert same(state(compiled), state(plain))
    assert 0 < traced() <= graphs
    assert not [module for module in compiled.modules() if "forward" in vars(module)]


@pytest.mark.exhaustive
def test_a_compiled_run_writes_the_files_of_any_and_resumes_in_every_bit(traced, tmp_path):
    reference, method = make(), make()
    run(reference, tmp_path / "whole")
    with pytest.raises(Stop):
        run(before_update(make(), 5, stop), tmp_path / "broken", compile=True)
    run(method, tmp_path / "broken", compile=True, resume=True)
    assert_same(method, tmp_path / "broken", reference, tmp_path / "whole")
    assert 0 < traced() <= 4  # of the student and of its teacher


@pytest.mark.exhaustive
def test_a_hook_inside_a_block_is_called_although_the_block_was_compiled_without_it(traced):
    method, seen = made(FineTune), []
    images, labels = data()
    towers = CompiledTowers(method, backend="eager")
    with towers:
        method.step((images[:8], labels[:8]))
    handle = method.model.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda *_: seen.append(True))
    with towers:
        method.step((images[:8], labels[:8]))
    handle.remove()
    with towers:
        method.step((images[:8], labels[:8]))
    assert seen == [True] and traced() == 1


@pytest.mark.exhaustive
def test_a_failure_to_compile_names_itself_and_leaves_the_towers_as_they_were(traced, monkeypatch):
    def failing(graph, inputs):
        raise ArithmeticError("no code for this")

    torch._dynamo.register_backend(failing, name="failing")
    monkeypatch.setattr(loop, "CompiledTowers", partial(CompiledTowers, backend="failing"))
    method = made(FineTune)
    before = copy.deepcopy(dict(method.named_parameters()))  # a state has the run's length, too
    with pytest.raises(RuntimeError, match=r"torch\.compile could not .*no code for this.*compile=False"):
        run(method, compile=True)
    assert same(dict(method.named_parameters()), before)
    assert not [module for module in method.modules() if "forward" in vars(module)]


def units(method, whole=False):
    return [(type(unit.module).__name__, unit.of_texts) for unit in compiling._units(method, whole=whole)]


def test_blocks_are_compiled_of_every_model_that_a_method_holds():
    block = "ResidualAttentionBlock"
    assert units(made(FLYP)) == [(block, False), (block, True)]
    assert units(made(CaRot)) == 2 * [(block, False), (block, True)]  # a teacher
    assert units(made(LipsumFT)) == 2 * [(block, False), (block, True)]  # a model beside the state
    assert units(made(FLYP), whole=True) == [("Transformer", False), (block, True)]


def test_a_tower_whose_blocks_are_of_many_kinds_is_compiled_whole():
    names = {"tokenizer": letters, "class_names": ("ant", "bee", "cow"), "templates": ("a {}",)}
    resnet = FLYP(open_clip.CLIP(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT), **names)
    assert units(resnet) == [("ModifiedResNet", False), *2 * [("ResidualAttentionBlock", True)]]


@pytest.mark.parametrize(
    "compile, error, told",
    [
        ("fast", ValueError, "compile"),
        ("reduce-overhead", ValueError, "compile='reduce-overhead' records CUDA graphs, and the method is on cpu"),
        (True, RuntimeError, r"compile needs a C\+\+ compiler"),
        ("max-autotune", RuntimeError, r"compile needs a C\+\+ compiler"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_anything_is_written(monkeypatch, tmp_path, compile, error, told):
    monkeypatch.setattr(compiling, "compiler_found", lambda: False)
    with pytest.raises(error, match=told):
        run(make(), tmp_path / "run", compile=compile)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", exhaustive("default", "reduce-overhead"))
def test_a_gpu_without_triton_is_named(monkeypatch, mode):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="compile needs Triton"):
        compiling.check_compiler(mode, torch.device("cuda"))
