from __future__ import annotations

import copy
from functools import partial

import open_clip
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import robustft
from robustft.methods import FLYP, CaRot
from robustft.training import AdamW, NonFiniteError, whole_tables

ROWS, WIDTH = 5000, 12
BETAS, EPS = (0.8, 0.95), 1e-6


class Reader(nn.Module):
    """A table of embeddings, a matrix and a bias."""

    def __init__(self, rows=ROWS, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(rows, WIDTH, **options)
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        return self.layer(self.table(tokens)).square().sum()


def torchs(module, lr, weight_decay):
    """torch's AdamW with the groups of ours."""
    trained = list(module.parameters())
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)


def both(weight_decay=0.3, lr=0.05):
    ours, theirs = Reader(), Reader()
    return (
        (ours, AdamW(ours, lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)),
        (theirs, torchs(theirs, lr, weight_decay)),
    )


def tokens(step, tokens=7, among=40):
    chance = torch.Generator().manual_seed(step)
    return torch.randint(among * (step + 1), (tokens,), generator=chance) % ROWS


def train(module, optimizer, steps, loss=None, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        given = tokens(step)
        (module(given) if loss is None else loss(module, given, step)).backward()
        optimizer.step()


def assert_equal(ours, theirs):
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), (name, (mine - other).abs().max())


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_weights_are_those_of_torch(weight_decay):
    (ours, mine), (theirs, other) = both(weight_decay)
    train(ours, mine, 30)
    train(theirs, other, 30)
    assert_equal(ours, theirs)
    assert 0 < len(mine.state[ours.table.weight]["rows"]) <= 30 * 7
    assert "rows" not in mine.state[ours.layer.weight]


@pytest.mark.parametrize("tokens_a_step", [1, 400, 4000])
def test_few_rows_and_most_of_them(tokens_a_step):
    def loss(module, given, step):
        return module(tokens(step, tokens_a_step, ROWS))

    (ours, mine), (theirs, other) = both()
    train(ours, mine, 8, loss)
    train(theirs, other, 8, loss)
    assert_equal(ours, theirs)
    assert ("rows" in mine.state[ours.table.weight]) == (tokens_a_step == 1)  # 8 times 400 is more than a quarter


def test_a_gradient_in_one_piece_now_and_then():
    def loss(module, given, step):
        value = module(given)
        return value + module.table.weight.square().sum() if step == 3 else value

    (ours, mine), (theirs, other) = both()
    train(ours, mine, 3, loss)
    assert "rows" in mine.state[ours.table.weight]
    train(ours, mine, 4, loss, start=3)
    train(theirs, other, 7, loss)
    assert_equal(ours, theirs)
    assert "rows" not in mine.state[ours.table.weight]


def test_a_table_without_a_gradient_stands_still():
    def loss(module, given, step):
        return module.layer(torch.ones(2, WIDTH)).sum() if step == 2 else module(given)

    (ours, mine), (theirs, other) = both()
    train(ours, mine, 5, loss)
    train(theirs, other, 5, loss)
    assert_equal(ours, theirs)


def test_gradients_of_several_backwards_are_summed():
    def loss(module, given, step):
        module(tokens(step + 100)).backward()
        return module(given)

    (ours, mine), (theirs, other) = both()
    train(ours, mine, 5, loss)
    train(theirs, other, 5, loss)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_states_are_exchanged_with_torch():
    (ours, mine), (theirs, other) = both()
    train(ours, mine, 5)
    train(theirs, other, 5)
    state, torchs_state = mine.state_dict()["state"], other.state_dict()["state"]
    assert state.keys() == torchs_state.keys()
    for index, values in state.items():
        assert values.keys() == torchs_state[index].keys()
        for name, value in values.items():
            assert torch.equal(value, torchs_state[index][name]), (index, name)
    assert "rows" in mine.state[ours.table.weight]  # a state that was asked for changes nothing
    given, taken = copy.deepcopy(other.state_dict()), copy.deepcopy(mine.state_dict())
    other.load_state_dict(taken)
    mine.load_state_dict(given)
    assert len(mine.state[ours.table.weight]["rows"]) < ROWS / 4
    train(ours, mine, 5, start=5)
    train(theirs, other, 5, start=5)
    assert_equal(ours, theirs)


def test_the_state_of_an_adamw_that_is_not_fused():
    (ours, mine), (theirs, other) = both()
    for group in other.param_groups:
        group["fused"] = False
    train(theirs, other, 2)
    ours.load_state_dict(theirs.state_dict())
    mine.load_state_dict(copy.deepcopy(other.state_dict()))
    assert all(group["fused"] for group in mine.param_groups)
    for group in other.param_groups:
        group["fused"] = True
    for module, optimizer in ((ours, mine), (theirs, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # a scale that a fused update alone takes out
        optimizer.zero_grad()
        scaler.scale(module(tokens(2))).backward()
        scaler.step(optimizer)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_the_state_of_another_adamw_is_refused(option):
    (_, mine), (theirs, _) = both()
    given = torch.optim.AdamW(theirs.parameters(), **{option: True})
    with pytest.raises(ValueError, match=f"state_dict is of an AdamW with {option}=True; expected one without"):
        mine.load_state_dict(given.state_dict())


def test_a_closure_and_a_schedule():
    (ours, mine), (theirs, other) = both()
    for module, optimizer in ((ours, mine), (theirs, other)):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        told = []
        optimizer.register_step_post_hook(lambda *_, told=told: told.append(1))

        def closure(module=module, optimizer=optimizer):
            optimizer.zero_grad()
            loss = module(tokens(0))
            loss.backward()
            return loss

        for _ in range(4):
            assert optimizer.step(closure).item() > 0
            schedule.step()
        assert len(told) == 4
    assert_equal(ours, theirs)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_loss_scale(overflow):
    (ours, mine), (theirs, other) = both()
    before = copy.deepcopy(ours)
    for module, optimizer in ((ours, mine), (theirs, other)):
        train(module, optimizer, 2)
        before = copy.deepcopy(module) if module is ours else before
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer.zero_grad()
        scaler.scale(module(tokens(9)) * (torch.inf if overflow else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_equal(ours, theirs)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), before.parameters(), strict=True)) == overflow
    train(ours, mine, 2, start=2)
    train(theirs, other, 2, start=2)
    assert_equal(ours, theirs)


def test_torchs_clipping_of_the_gradient():
    (ours, mine), (theirs, other) = both()
    for module in (ours, theirs):
        module(torch.tensor([3, 4, 3, 8])).backward()
    norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3) for module in (ours, theirs)]
    assert norms[0].item() == pytest.approx(norms[1].item())
    mine.step()
    other.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("table", ["frozen", "small", "normed", "scaled"])
def test_tables_that_stay_in_one_piece(table):
    options = {"normed": {"max_norm": 1.0}, "scaled": {"scale_grad_by_freq": True}}.get(table, {})
    module = Reader(4095 if table == "small" else ROWS, **options)
    module.table.weight.requires_grad_(table != "frozen")
    AdamW(module, 0.1)
    assert not module.table.sparse


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_an_optimiser_made_after_the_wrapper_of_a_group_of_one(group_of_one):
    ours, (theirs, other) = Reader(), both()[1]
    wrapped = DistributedDataParallel(ours)
    mine = AdamW(wrapped, 0.05, betas=BETAS, eps=EPS, weight_decay=0.3)
    train(wrapped, mine, 3)
    train(theirs, other, 3)
    assert_equal(ours, theirs)
    assert not ours.table.sparse


def test_the_state_of_weights_that_fsdp_has_divided(group_of_one):
    def begun():
        module = fully_shard(Reader())
        return module, AdamW(module, 0.05, betas=BETAS, eps=EPS, weight_decay=0.3)

    (ours, mine), (theirs, other) = begun(), both()[1]
    train(ours, mine, 2)
    weights, moments = copy.deepcopy((ours.state_dict(), mine.state_dict()))
    ours, mine = begun()
    ours.load_state_dict(weights)
    mine.load_state_dict(moments)
    train(ours, mine, 2, start=2)
    train(theirs, other, 4)
    for p, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_table_that_is_computed_stays_in_one_piece():
    ours, theirs = Reader(), Reader()
    for module in (ours, theirs):
        torch.nn.utils.weight_norm(module.table)
    train(ours, AdamW(ours, 0.05, betas=BETAS, eps=EPS, weight_decay=0.3), 3)
    train(theirs, torchs(theirs, 0.05, 0.3), 3)
    assert_equal(ours, theirs)


def test_a_device_without_a_fused_update_is_not_waited_for():
    module = Reader().to("meta")
    optimizer = AdamW(module, 0.1)
    for _ in range(2):
        module(torch.zeros(3, dtype=torch.int64, device="meta")).backward()
        optimizer.step()  # "meta" has no numbers to wait for
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


def test_a_table_is_taken_back():
    module = Reader()
    AdamW(module, 0.1)
    module(tokens(0)).backward()
    assert module.table.sparse and module.table.weight.grad.is_sparse
    whole_tables(module)
    assert not module.table.sparse and module.table.weight.grad is None
    module(tokens(0)).backward()
    assert not module.table.weight.grad.is_sparse


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("lr", -1.0, ValueError),
        ("lr", float("nan"), ValueError),
        ("eps", float("inf"), ValueError),
        ("betas", (0.9, 1.0), ValueError),
        ("betas", (0.9,), TypeError),
        ("weight_decay", -0.1, ValueError),
        ("lr", "fast", TypeError),
    ],
)
def test_arguments_out_of_range(argument, value, error):
    with pytest.raises(error, match=argument):
        AdamW(Reader(), **{"lr": 0.1, argument: value})


def test_nothing_to_train():
    with pytest.raises(ValueError, match="Reader has no parameter that requires a gradient"):
        AdamW(Reader().requires_grad_(False), 0.1)


# ------------------------------------------------------------------------------------------------ in fit


def letters(texts):
    rows = [[1000 + 37 * (ord(c) - 97) for c in text[:6]] + [ROWS - 1] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def method(kind=FLYP, rows=ROWS, **options):
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
    text = {"context_length": 8, "vocab_size": rows, "width": 8, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    return kind(model, tokenizer=letters, class_names=("ant", "bee", "cow"), templates=("a{}", "the{}"), **options)


def images():
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


fit = partial(robustft.fit, epochs=2, batch_size=8, lr=1e-2, progress=False)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_a_training_is_that_of_tables_in_one_piece(options, monkeypatch):
    by_row = method()
    fit(by_row, images(), **options)
    assert not by_row.model.token_embedding.sparse
    monkeypatch.setattr("robustft.training.adamw.SMALLEST_TABLE", ROWS + 1)
    whole = method()
    before = copy.deepcopy(whole.state_dict())
    fit(whole, images(), **options)
    got, expected = by_row.state_dict(), whole.state_dict()
    for state in (got, expected):  # without the biases of keys, on which no loss depends: their gradient is rounding
        for name in [name for name in state if name.endswith("in_proj_bias")]:
            state[name] = torch.cat([state[name].chunk(3)[0], state[name].chunk(3)[2]])
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)
    assert not torch.equal(expected["model.token_embedding.weight"], before["model.token_embedding.weight"])


def test_the_gradient_of_a_training_is_by_row(monkeypatch):
    seen = []
    update = AdamW.step

    def step(self, closure=None):
        seen.extend(p.grad.is_coalesced() for group in self.param_groups for p in group["params"] if p.grad.is_sparse)
        return update(self, closure)

    monkeypatch.setattr(AdamW, "step", step)
    fit(method(), images())
    assert seen == [True] * 6


class Late(FLYP):
    """Begins to learn after its first step."""

    def step(self, batch):
        out = super().step(batch)
        return out if self.steps_done else out._replace(loss=out.loss.detach())


def test_a_step_whose_loss_depends_on_no_weight():
    trained = method(Late)
    start = copy.deepcopy(trained.state_dict())
    history = fit(trained, images(), log_every=1)
    assert history.records[0]["gradient_norm"] == 0 < history.records[1]["gradient_norm"]
    assert not torch.equal(trained.model.token_embedding.weight, start["model.token_embedding.weight"])


def test_a_teachers_table_is_left_as_any():
    trained = method(CaRot, total_steps=6, ema_interval=1)
    fit(trained, images())
    assert not any(part.sparse for part in trained.modules() if isinstance(part, nn.Embedding))
    assert sum(isinstance(part, nn.Embedding) for part in trained.modules()) == 2


def test_a_batch_without_tokens():
    (ours, mine), (theirs, other) = both()
    for module, optimizer in ((ours, mine), (theirs, other)):
        for step in range(3):
            optimizer.zero_grad()
            given = torch.empty(0, dtype=torch.int64) if step in (0, 2) else tokens(step)
            (module(given) + module.layer.bias.sum()).backward()
            optimizer.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_table_that_was_sparse_before_stays_so(frozen):
    trained = method()
    trained.model.token_embedding.sparse = True
    trained.model.token_embedding.requires_grad_(not frozen)
    fit(trained, images())
    assert trained.model.token_embedding.sparse


def test_a_table_beside_one_that_was_sparse_before_is_not_left_so():
    trained = method()
    trained.other = nn.Embedding(ROWS, 2, sparse=True)
    fit(trained, images())
    assert trained.other.sparse and not trained.model.token_embedding.sparse


def test_a_broken_gradient_of_the_table_is_named():
    trained = method()
    trained.model.token_embedding.register_forward_hook(lambda *given: _broken(given[2]))
    with pytest.raises(NonFiniteError) as caught:
        fit(trained, images())
    assert caught.value.names == ["model.token_embedding.weight"]
    assert not trained.model.token_embedding.sparse


def _broken(embeddings):
    embeddings.register_hook(lambda gradient: gradient * torch.nan)


def test_a_resumed_training_has_the_bits_of_a_whole_one(tmp_path):
    whole, resumed = method(), method()
    fit(whole, images(), output=tmp_path / "whole", schedule="constant", warmup=0.0)
    fit(resumed, images(), output=tmp_path / "parts", schedule="constant", warmup=0.0, epochs=1)
    resumed = method()
    fit(resumed, images(), output=tmp_path / "parts", schedule="constant", warmup=0.0, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_memory_is_that_of_the_rows():
    module = Reader(200_000)
    optimizer = AdamW(module, 0.1)
    train(module, optimizer, 3)
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert held < 1000 < module.table.weight.numel() / 1000
