"""Adapters: what they compute, what is trained and kept of them, and what becomes of a model that has some."""

import copy
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import open_clip
import peft
import pytest
import torch
from targets import case, exhaustive

import robustft
from benchmarks.architectures import small, stepped
from robustft import clip, methods
from robustft.clip import LoRA, adapters
from robustft.methods import CaRot, CoOp, FineTune, LinearProbe, WiSEFT, load_predictor, uniform_soup
from robustft.testing import check_method, tiny_world

SMALL = {"tune": "lora", "lora": LoRA(rank=2)}


@pytest.fixture(scope="module")
def world():
    return tiny_world()


@pytest.fixture
def tokens():
    return torch.randint(1, 29, (5, 15), generator=torch.Generator().manual_seed(3))


def moved(model):
    """The model, whose trained parameters are somewhere else."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


def adapted(world, **options):
    return moved(clip.adapt(copy.deepcopy(world.model), LoRA(rank=2, **options)).eval())


def wrapped(world, **options):
    """What the owner of a model wraps himself."""
    config = peft.LoraConfig(r=2, target_modules=["attn", "c_fc"], init_lora_weights=False, **options)
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(world.model), config).eval()


def tuned(world, kind=FineTune, model=None, **options):
    """A method some steps further."""
    method = kind(world.model if model is None else model, **world.prompts, **options)
    moved(method.model)
    return method


def features(model, world, tokens):
    with torch.no_grad():
        return clip.encode_images(model, world.data["image"]), clip.encode_texts(model, tokens)


def near(found, expected, tolerance=1e-6):
    return all(torch.allclose(x, y, atol=tolerance, rtol=0) for x, y in zip(found, expected, strict=True))


def changed(method, world):
    """Names of parameters that training moves."""
    before = {name: p.detach().clone() for name, p in method.model.named_parameters()}
    options = {"epochs": 1, "batch_size": 6, "lr": 1e-2, "progress": False, "warmup": 0.0}
    robustft.fit(method, (world.data["image"], world.data["label"]), **options)
    return {name for name, p in method.model.named_parameters() if not torch.equal(p, before[name])}


def held(method):
    """Bytes of all that a method keeps, shared ones once."""
    parts = [*method.parameters(), *method.buffers()]
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in parts}.values())


def test_adapters_change_nothing_at_first_and_are_a_function_of_the_seed(world, tokens):
    before = torch.get_rng_state()
    first, same, other = (clip.adapt(copy.deepcopy(world.model), LoRA(), seed=seed).eval() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert near(features(first, world, tokens), features(world.model.eval(), world, tokens))
    states = [model.state_dict() for model in (first, same, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_the_merged_model_computes_what_the_adapted_one_does(world, tokens):
    model = adapted(world)
    merged = clip.merged(model)
    assert merged.state_dict().keys() == world.model.state_dict().keys() and all(
        p.requires_grad for p in merged.parameters()
    )
    assert near(features(merged, world, tokens), features(model, world, tokens))
    assert not near(features(merged, world, tokens), features(world.model, world, tokens), 1e-3)
    assert clip.merged(world.model) is world.model


def test_an_attention_computes_as_pefts_does_and_leaves_frozen_weights_as_they_are(world, tokens):
    theirs, ours = wrapped(world), adapters.adopted(copy.deepcopy(wrapped(world)))
    assert near(features(ours, world, tokens), features(theirs, world, tokens))
    frozen = {name: (p, p.clone()) for name, p in ours.named_parameters() if not p.requires_grad}
    clip.encode_images(ours, world.data["image"]).square().sum().backward()
    for name, p in ours.named_parameters():
        if name in frozen:
            assert p is frozen[name][0] and torch.equal(p, frozen[name][1])


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_takes_every_argument_of_torchs(batch_first):
    torch.manual_seed(0)
    plain = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=True)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(plain), config).eval()
    layer = adapters.adopted(copy.deepcopy(model))[0]
    merged = adapters._without_layers(model.get_base_model(), merge=True)[0]
    q, k, v = torch.randn(3, 5, 4, 8).unbind()
    masks = torch.rand(4 if batch_first else 5, 4 if batch_first else 5) > 0.8
    for arguments, options in (
        ((q, q, q), {}),
        ((q, k, v), {"average_attn_weights": False}),
        ((q, k, k), {"need_weights": False, "attn_mask": masks}),
    ):
        for found, expected in zip(layer(*arguments, **options), merged(*arguments, **options), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.allclose(found, expected, atol=1e-5)


def test_threads_may_use_one_adapted_model_at_a_time(world, tokens):
    model = adapted(world)
    expected = features(model, world, tokens)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: features(model, world, tokens), range(16)):
            assert near(found, expected)


def test_every_adapter_gets_a_gradient(world, tokens):
    model = adapted(world)
    (clip.encode_images(model, world.data["image"])[:5] * clip.encode_texts(model, tokens)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, ("visual.transformer", "transformer")),
        ({"towers": "visual"}, ("visual.transformer",)),
        ({"towers": "text"}, ("transformer",)),
        ({"targets": ["mlp.c_fc"]}, ("visual.transformer", "transformer")),
        ({"targets": ["*.resblocks.1.attn"], "towers": "visual"}, ("visual.transformer.resblocks.1.attn",)),
        ({"targets": ["visual.conv1"]}, ("visual.conv1",)),
    ],
)
def test_targets_and_towers_say_where_adapters_are(world, options, trained):
    model = clip.adapt(copy.deepcopy(world.model), LoRA(rank=1, **options))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith(trained) and ".lora_" in name for name in names)
    assert all(any(name.startswith(part) for name in names) for part in trained)


def test_targets_that_match_nothing_are_an_error_with_those_there_are(world):
    with pytest.raises(ValueError, match=r"\['q_proj'\] match no layer .*transformer.resblocks.\*.attn, .*mlp.c_proj"):
        clip.adapt(copy.deepcopy(world.model), LoRA(targets=["attn", "q_proj"]))
    # The out-projection's own forward is not called: an adapter there would do nothing.
    with pytest.raises(ValueError, match=r"\['attn.out_proj'\] match no layer"):
        clip.adapt(copy.deepcopy(world.model), LoRA(targets=["attn.out_proj"]))
    with pytest.raises(ValueError, match=r"\['visual.conv1'\] match no layer that the text tower"):
        clip.adapt(copy.deepcopy(world.model), LoRA(targets=["visual.conv1"], towers="text"))


@pytest.mark.parametrize("name", exhaustive("ViT-B-16-SigLIP", "convnext_base", "RN50", "coca_ViT-B-32"))
def test_adapters_go_into_every_kind_of_tower(name):
    config = open_clip.get_model_config(name)
    torch.manual_seed(0)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        small = {"vit_base_patch16_siglip_224": "vit_tiny_patch16_224", "convnext_base": "convnext_atto"}
        vision["timm_model_name"] = small[vision["timm_model_name"]]
    size = 224 if "SigLIP" in name else 64  # timm's ViT has one size
    vision |= {"image_size": size, "layers": [1, 1, 1, 1] if name == "RN50" else 1}
    vision["timm_model_pretrained"] = False
    for part in ("text_cfg", "multimodal_cfg"):
        if part in config:
            config[part] |= {"layers": 1, "vocab_size": 64}
    config["text_cfg"].pop("hf_tokenizer_name", None)
    kind = (
        open_clip.CoCa
        if "multimodal_cfg" in config
        else open_clip.CustomTextCLIP
        if "SigLIP" in name
        else open_clip.CLIP
    )
    config.pop("custom_text", None)
    model = kind(**config).eval()
    images = torch.randn(2, 3, size, size)
    before = clip.encode_images(model, images)
    model = moved(clip.adapt(model, LoRA(rank=2, towers="visual")))
    after = clip.encode_images(model, images)
    assert not torch.allclose(after, before, atol=1e-4)
    torch.testing.assert_close(clip.encode_images(clip.merged(model), images), after, atol=1e-5, rtol=0)


def test_carots_penalty_is_of_the_last_map_with_its_adapter(tmp_path):
    world = small("convnext_base", tmp_path)  # which ends in timm's head.proj
    lora = LoRA(rank=2, targets=["head.proj"], towers="visual")
    carot = CaRot(world.model, **world.prompts, total_steps=4, tune="lora", lora=lora)
    frozen = world.model.visual.head.proj.weight
    for _ in range(2):  # at the first, B is 0
        stepped(carot, world.data)
        w = clip.visual_projection(carot.model)
        merged = clip.merged(carot.model).visual.head.proj.weight.T
        assert torch.equal(w, merged) and not torch.equal(w, frozen.T)
        expected = (merged.T @ merged - torch.eye(16)).norm()
        torch.testing.assert_close(carot.step(world.data).terms["orthogonality"], expected.detach())
    ends = [p for p in carot.model.parameters() if p.requires_grad]
    assert all(g.any() for g in torch.autograd.grad(clip.visual_projection(carot.model).square().sum(), ends))
    carot.model.visual.head.proj.enable_adapters(False)
    assert torch.equal(clip.visual_projection(carot.model), frozen.T)


def test_a_last_map_that_peft_wraps_otherwise_is_taken_as_it_is_or_refused(tmp_path):
    world = small("convnext_base", tmp_path)
    for options, found in (
        ({"target_modules": ["fc1"], "modules_to_save": ["head.proj"]}, True),
        ({"target_modules": ["head.proj"], "use_dora": True}, False),
    ):
        model = peft.get_peft_model(copy.deepcopy(world.model), peft.LoraConfig(r=2, **options))
        if found:
            (trained,) = (
                p for name, p in model.named_parameters() if name.endswith("proj.modules_to_save.default.weight")
            )
            assert clip.visual_projection(model).data_ptr() == trained.data_ptr() and trained.requires_grad
        else:
            with pytest.raises(ValueError, match="adapted otherwise than by adding a matrix"):
                clip.visual_projection(model)
        assert clip.feature_width(model) == 16


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"alpha": -1.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": "attn"}, "targets"),
        ({"towers": "image"}, "towers"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=f"^{word} "):
        LoRA(**arguments)


def test_a_missing_peft_names_its_extra(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"robustft\[lora\]"):
        FineTune(world.model, **world.prompts, tune="lora")


@pytest.mark.parametrize("kind", exhaustive("FLYP", "FineTune", "LPFT", "CaRot", "DRM", "WorstCaseFineTune"))
def test_every_method_with_adapters_fulfils_what_plug_ins_must(world, kind):
    described = {"ant": "six legs", "bee": ["striped", "it flies"], "cow": "horns"}
    own = {
        "CaRot": {"ema_interval": 2},
        "DRM": {"descriptions": described},
        "LPFT": {"probe": LinearProbe(world.model, **world.prompts).classifier()},
        "WorstCaseFineTune": {"risk": methods.GroupDRO(2, 0.1)},
    }.get(kind, {})

    def make(model, **options):
        method = getattr(methods, kind)(model, **SMALL, **own, **options)
        if kind == "DRM":
            dtype = next(model.parameters()).dtype
            method.prepare((world.data["image"].to(dtype), world.data["label"]))
        return method

    term = "contrastive" if kind == "CaRot" else None
    check_method(make, world, lr=5e-3 if kind != "DRM" else 1e-3, term=term, mixes=kind == "DRM")


@pytest.mark.parametrize(
    ("tune", "kind", "trained"),
    [
        (
            "full",
            "FLYP",
            ("visual", "transformer", "ln_final", "positional", "token", "text_projection", "logit_scale"),
        ),
        ("visual", "FLYP", ("visual",)),
        ("text", "FLYP", ("transformer", "ln_final", "positional", "token", "text_projection")),
        ("projection", "FLYP", ("visual.proj", "text_projection")),
        ("projection", "FineTune", ("visual.proj",)),
        ("lora", "FLYP", ("visual.transformer", "transformer")),
        ("lora", "FineTune", ("visual.transformer",)),
    ],
)
def test_tune_says_which_parameters_are_trained(world, tune, kind, trained):
    method = getattr(methods, kind)(world.model, **world.prompts, tune=tune)
    names = changed(method, world)
    assert all(name.startswith(trained) for name in names)
    assert all(any(name.startswith(part) for name in names) for part in trained)
    assert tune != "lora" or all(".lora_" in name for name in names)


def test_what_tune_cannot_be_is_refused_with_a_way_out(world):
    for options, words in (
        ({"tune": "prompts"}, "FineTune learns none: CoOp, "),
        ({"tune": "head"}, "tune must be one of full, visual, text, projection, lora"),
        ({"lora": LoRA()}, 'lora describes the adapters of tune="lora"'),
        ({"tune": "text"}, "FineTune trains the visual tower alone"),
        ({"tune": "lora", "lora": {"r": 4}}, "lora: .*'r'"),
        ({"tune": "lora", "lora": LoRA(towers="text")}, "lora.towers is 'text'"),
    ):
        with pytest.raises(ValueError, match=words):
            FineTune(world.model, **world.prompts, **options)
    for kind in (LinearProbe, CoOp):
        with pytest.raises(ValueError, match="trains nothing of the model"):
            kind(world.model, **world.prompts, tune="lora")
    with pytest.raises(ValueError, match="has adapters already"):
        FineTune(wrapped(world), **world.prompts, tune="lora")
    frozen = copy.deepcopy(world.model)
    frozen.visual.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        FineTune(frozen, **world.prompts, tune="projection")


@pytest.mark.parametrize("teacher", ["ema", *exhaustive("beta")])
def test_carots_teacher_is_an_average_of_the_adapters_alone_and_shares_the_rest(world, teacher):
    shape = copy.deepcopy(world.config["model_cfg"])
    shape["vision_cfg"] |= {"width": 256, "head_width": 64}
    shape["text_cfg"] |= {"width": 256, "vocab_size": 512}
    model = open_clip.CLIP(**shape)
    lora = LoRA(rank=1)
    carot = CaRot(model, **world.prompts, total_steps=4, ema_interval=1, teacher=teacher, tune="lora", lora=lora)
    flyp = methods.FLYP(model, **world.prompts, total_steps=4, tune="lora", lora=lora)
    assert held(flyp) < held(carot) <= 1.05 * held(flyp)
    moved(carot.model)
    carot.after_step()
    for (name, kept), p in zip(carot.teacher.named_parameters(), carot.model.parameters(), strict=True):
        assert (kept is p) == (".lora_" not in name)
        assert kept is p or not torch.equal(kept, p)
    assert all(".lora_" in name or not name.startswith(("model.", "teacher.")) or name.endswith("attn_mask")
               for name in carot.state_dict())  # fmt: skip


def test_wise_ft_of_adapters_is_the_interpolation_of_merged_weights(world, tokens):
    zero_shot = methods.zero_shot_classifier(world.model, **world.prompts)
    classifier = tuned(world, **SMALL).classifier()
    mixed, merged = WiSEFT(zero_shot, classifier).at(0.4).model, clip.merged(classifier.model)
    expected = clip.interpolate_state(world.model.state_dict(), merged.state_dict(), 0.4)
    assert all(torch.equal(value, expected[name]) for name, value in mixed.state_dict().items())
    (along,) = WiSEFT(zero_shot, classifier).along([0.4])
    assert near(along.outputs(world.data["image"]), WiSEFT(zero_shot, classifier).at(0.4).outputs(world.data["image"]))
    soup = uniform_soup([classifier, zero_shot]).model.state_dict()
    halfway = clip.interpolate_state(world.model.state_dict(), merged.state_dict(), 0.5)
    assert all(torch.allclose(value, halfway[name], atol=1e-7) for name, value in soup.items())


def test_a_classifier_with_adapters_comes_back_and_peft_reads_its_folder(world, tokens, tmp_path):
    classifier = tuned(world, **SMALL).classifier()
    folder = classifier.save(tmp_path / "m", world.config)
    found = load_predictor(folder)
    assert torch.equal(found.logits(world.data["image"]), classifier.logits(world.data["image"]))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(world.model), folder).eval()
    assert near(features(theirs, world, tokens), features(classifier.model, world, tokens))
    assert not near(features(theirs, world, tokens), features(world.model, world, tokens), 1e-3)
    folder = classifier.merged().save(tmp_path / "m", world.config)  # replaces the other
    merged, *_ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    state = clip.merged(classifier.model).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merged.state_dict().items())


def test_weights_that_can_be_loaded_again_are_not_written_below_adapters(world, tmp_path):
    base = clip.export(world.model, tmp_path / "base", world.config)
    bundle = clip.load(f"local-dir:{base}")
    classifier = tuned(world, model=bundle.model, **SMALL).classifier()
    folder = classifier.save(tmp_path / "m", bundle.config)
    assert not (folder / clip.WEIGHTS_FILE).exists()
    assert json.loads((folder / "base.json").read_text())["source"] == bundle.config["source"]
    assert torch.equal(load_predictor(folder).logits(world.data["image"]), classifier.logits(world.data["image"]))
    again = load_predictor(load_predictor(folder).save(tmp_path / "n", clip.load(f"local-dir:{folder}").config))
    assert torch.equal(again.logits(world.data["image"]), classifier.logits(world.data["image"]))
    assert (classifier.save(base, bundle.config) / clip.WEIGHTS_FILE).exists()  # which is the base's own place
    clip.export(moved(copy.deepcopy(world.model)), base, world.config)
    with pytest.raises(ValueError, match=r"base.json: the adapters were trained on other weights"):
        load_predictor(folder)
    (base / clip.WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"base.json: the weights below the adapters are not found"):
        load_predictor(folder)


@pytest.mark.exhaustive
@torch.no_grad()
def test_adapters_go_with_images_of_another_size(tmp_path):
    for name in ("ViT-B-16", "PE-Core-B-16"):
        with case(name):
            world, images = small(name, tmp_path), torch.randn(2, 3, 16, 16)
            base = clip.export(world.model, tmp_path / name, world.config)
            bundle = clip.load(f"local-dir:{base}")
            model = moved(clip.adapt(bundle.model, LoRA(rank=2)))
            folder = clip.export(model, tmp_path / f"{name}-lora", bundle.config)
            large = clip.load(f"local-dir:{base}", image_size=16).model
            found = clip.load(f"local-dir:{folder}", image_size=16)
            assert found.config["preprocess_cfg"]["size"] == [16, 16]
            expected = clip.encode_images(peft.PeftModel.from_pretrained(copy.deepcopy(large), folder).eval(), images)
            torch.testing.assert_close(clip.encode_images(found.model, images), expected)
            assert not torch.allclose(expected, clip.encode_images(large, images), atol=1e-3)
            clip.export(moved(world.model), base, world.config)
            with pytest.raises(ValueError, match=r"base.json: the adapters were trained on other weights"):
                clip.load(f"local-dir:{folder}", image_size=16)


def test_a_model_that_its_owner_wrapped_trains_and_comes_back(world, tmp_path):
    model = wrapped(world, modules_to_save=["ln_final"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = FineTune(model, **world.prompts)
    assert changed(method, world) and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    classifier = method.classifier()
    found = load_predictor(classifier.save(tmp_path / "m", world.config))
    assert torch.equal(found.logits(world.data["image"]), classifier.logits(world.data["image"]))
    zero_shot = methods.zero_shot_classifier(model, **world.prompts)
    found = load_predictor(zero_shot.save(tmp_path / "z", world.config))
    assert near(found.outputs(world.data["image"]), zero_shot.outputs(world.data["image"]), 1e-4)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "base.json"])
def test_a_damaged_file_of_adapters_is_named(world, tmp_path, name):
    folder = clip.export(adapted(world), tmp_path / "m", world.config)
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(ValueError, match=name.partition(".")[0] if name == "base.json" else "adapter_model"):
        clip.load(f"local-dir:{folder}")


def test_adapters_of_another_peft_that_computes_otherwise_are_refused(world, tmp_path):
    folder = clip.export(adapted(world), tmp_path / "m", world.config)
    about = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(about | {"out_updates": 7}))
    with pytest.raises(ValueError, match="out-projection 7 times"):
        clip.load(f"local-dir:{folder}")


@pytest.mark.exhaustive
def test_activations_can_be_computed_again_under_adapters(world):
    losses = []
    for again in (False, True):
        method = methods.FLYP(world.model, **world.prompts, **SMALL)
        options = {"epochs": 2, "batch_size": 6, "lr": 1e-2, "progress": False, "grad_checkpointing": again}
        robustft.fit(method, (world.data["image"], world.data["label"]), **options)
        losses.append(method.state_dict())
    assert all(torch.allclose(value, losses[1][name], atol=1e-6) for name, value in losses[0].items())
