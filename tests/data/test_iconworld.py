"""IconWorld's drawings: what is bundled, from whom, and that no concept is both trained on and tested on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustft import data as rooms
from robustft.data import duplicates, iconworld
from robustft.data.iconworld import build, emoji, packages, rendering, world
from robustft.data.iconworld.__main__ import main
from robustft.data.table import Columns

SVG = Path(__file__).parents[1] / "drawings" / "iconworld.json"
DIGEST = "28566245ece4f2ff31e51beb7cb2a580eb793124bdcd3222efe6c185056f6cb9"


@pytest.fixture(scope="module")
def sets():
    return iconworld.sets()


@pytest.fixture
def few(monkeypatch):
    """Every fortieth image of the kinds, and one of each class: thousands of files take seconds."""
    every = world.rows()
    kept = {*every[::40], *{row.label: row for row in every}.values()}
    rows = [row for row in every if row in kept]
    monkeypatch.setattr(world, "rows", lambda task="kinds": rows)


def test_the_bundled_drawings_are_the_built_ones():
    content = (world.ASSETS / world.DRAWINGS).read_bytes()
    assert hashlib.sha256(content).hexdigest() == DIGEST
    assert len(content) < 3_000_000


def test_no_concept_is_trained_on_and_tested_on():
    bundled, concepts = world.drawings(), {}
    for row in world.rows():
        place = "test" if row.split.startswith("shift:") else row.split
        concepts.setdefault(place, set()).add(bundled.rows[row.drawing].concept)
    known = [concepts["train"], concepts["val"], concepts["test"], concepts[f"ood:{world.NEAR}"]]
    assert sum(map(len, known)) == len(set.union(*known)) > 1100


def test_no_drawing_that_is_tested_or_validated_on_copies_one_that_is_trained_on(sets):
    parts = [part.images[: len(part) // 2] for part in (sets.train, sets.validation, sets.test)]  # noto's half
    looks = [duplicates.look(Image.fromarray(image)) for images in parts for image in images]
    place = np.repeat(range(3), [len(images) for images in parts])
    assert not [(i, j) for i, j in duplicates.pairs(looks) if place[i] != place[j]]


def test_every_class_has_drawings_of_both_studios_to_train_validate_and_test_on(sets):
    assert len(sets.classes) == 46 and sets.classes == iconworld.CLASS_NAMES
    for part in (sets.train, sets.validation, sets.test):
        counts = torch.bincount(part.labels, minlength=46)
        assert counts.min() >= 2
        assert not (counts % 2).any()  # each concept by either studio
        assert len(part.groups.unique()) == 92


def test_shifts_show_test_concepts_by_other_studios(sets):
    bundled = world.drawings()
    tested = {bundled.rows[row.drawing].concept for row in world.rows() if row.split == "test"}
    assert set(sets.shifts) == set(iconworld.SHIFTS)
    for row in world.rows():
        if row.split.startswith("shift:"):
            drawing = bundled.rows[row.drawing]
            assert drawing.studio == row.split.removeprefix("shift:") and drawing.studio not in iconworld.ID_STUDIOS
            assert drawing.concept in tested


def test_what_is_out_of_distribution_has_no_class_of_the_kinds(sets):
    assert tuple(sets.ood) == iconworld.OOD or set(sets.ood) == set(iconworld.OOD)
    assert not set(sets.ood[world.NEAR].classes) & set(sets.classes)
    assert all(len(part) >= 100 for part in sets.ood.values())


def test_concepts_are_400_classes_with_a_shot_a_studio():
    one, four = iconworld.concepts(shots=1), iconworld.concepts()
    assert len(four.classes) == 400 == len(set(four.classes))
    for data, shots in ((one, 1), (four, 4)):
        assert torch.equal(torch.bincount(data.train.labels), torch.full((400,), shots))
    for part in (four.validation, four.test, *four.shifts.values()):
        assert torch.equal(part.labels.sort().values, torch.arange(400))
    with pytest.raises(ValueError, match="shots must be 1 to 4, a studio each, got 5"):
        iconworld.concepts(shots=5)


def test_a_frame_s_colour_goes_with_the_class_until_it_misleads():
    train, aligned = iconworld.spurious("train"), iconworld.spurious("test")
    opposed = iconworld.spurious("test", conflicting=True)
    assert (train.groups == train.labels % 5).double().mean() == pytest.approx(0.95, abs=1e-3)
    assert torch.equal(aligned.groups, aligned.labels % 5) and not (opposed.groups == opposed.labels % 5).any()
    colours = np.array(list(iconworld.FRAME_COLOURS.values()))
    for part in (train, opposed):
        assert np.array_equal(part.images[:, 0, 0], colours[part.groups])
    inside = slice(world.FRAME, -world.FRAME)
    assert np.array_equal(aligned.images[:, inside, inside], opposed.images[:, inside, inside])
    for arguments, message in ((("tests",), "split: expected one of train"), (("train",), "conflicting: only")):
        with pytest.raises(ValueError, match=message):
            iconworld.spurious(*arguments, conflicting=True)


def test_every_bundled_drawing_has_a_licence_that_asks_for_a_notice_at_most_and_stands_in_it():
    sources = packages.STUDIOS | packages.OTHERS
    drawn = Counter(drawing.studio for drawing in world.drawings().rows)
    assert set(drawn) == set(sources)
    notice = (world.ASSETS / world.NOTICE).read_text(encoding="utf-8")
    for source in sources.values():
        assert source.licence in packages.BUNDLED_LICENCES
        assert all(text in notice for text in (source.title, source.author, source.licence, source.url))
    assert notice == build.notice()
    assert "Apache License" in (world.ASSETS / "iconworld_apache_2.0.txt").read_text(encoding="utf-8")


def test_descriptions_tell_every_class():
    assert set(iconworld.DESCRIPTIONS) == set(iconworld.CLASS_NAMES)
    words = {studio for studio in packages.STUDIOS}
    assert all(not words & set(text.split()) for texts in iconworld.DESCRIPTIONS.values() for text in texts)


def test_what_is_unpacked_opens_as_own_data_with_the_same_images(few, tmp_path):
    folder, sets = iconworld.unpack(tmp_path / "kinds"), iconworld.sets()
    opened = rooms.open(folder, columns=Columns(groups=("studio", "kind")))
    assert opened.classes == sets.classes
    for name, part in sets.sets().items():
        found = opened.sets()[name]
        assert len(found) == len(part)
        if name in ("test", "shifts/fluent-emoji"):
            assert [label for _, label in found.samples] == part.labels.tolist()
            images = [np.asarray(found[i]["image"]) for i in range(0, len(part), 9)]
            assert np.array_equal(np.stack(images), part.images[::9])
    assert (folder / world.NOTICE).is_file()
    with pytest.raises(FileExistsError, match="unpack into a new folder"):
        iconworld.unpack(folder)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="robustft.data.iconworld.build makes it"):
        world.drawings(tmp_path / "none.xz")
    content = (world.ASSETS / world.DRAWINGS).read_bytes()
    for name, damaged in (
        ("cut", content[:-500]),
        ("other", b"text"),
        ("flipped", content[:9000] + b"?" + content[9001:]),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: damaged, or no file of robustft.data.iconworld.build"):
            world.drawings(tmp_path / name)


SVG_SET = {
    "width": 16,
    "icons": {
        "square": {"body": '<path fill="#f00" d="M0 0h8v8H0z"/>', "width": 8, "height": 4},
        "grey": {"body": '<path fill="currentColor" opacity=".5" d="M0 0h16v16H0z"/>', "height": 16},
    },
}


def test_a_drawing_is_centred_in_a_square_over_white():
    pytest.importorskip("resvg_py")
    wide = rendering.rendered(rendering.svg(SVG_SET, "square", 8), 8)
    assert (wide[2:, :, 3] == 255).all() and not wide[:2, :, 3].any()  # 8 x 4 units, its body 8 high, moved down by 2
    grey = rendering.on_white(rendering.rendered(rendering.svg(SVG_SET, "grey", 4), 4))
    assert np.abs(grey.astype(int) - 127).max() <= 1
    palette, pixels = build.quantized(np.asarray([[[255, 0, 0], [0, 0, 255]]] * 2, np.uint8))
    assert np.array_equal(palette[pixels], [[[255, 0, 0], [0, 0, 255]]] * 2)


def test_what_is_bundled_is_what_the_build_renders():
    pytest.importorskip("resvg_py")
    bundled = world.drawings()
    for studio, icons in json.loads(SVG.read_text()).items():
        (name,) = icons["icons"]
        palette, pixels = build.quantized(rendering.on_white(rendering.rendered(rendering.svg(icons, name, 40), 40)))
        assert np.array_equal(palette[pixels], bundled.images([bundled.rows_of(studio)[icons["concept"]]])[0]), studio


def test_names_of_other_sets_lead_to_the_same_emoji():
    eagle = emoji.Emoji("1F985", "eagle", ("bird",), "animal-bird")
    names = emoji.Names({"1F985": eagle}, {"eagle": "1F985", "baldeagle": "1F985"})
    icons = {"icons": {"bald-eagle": {}, "other": {}}}
    assert names.drawn(icons, {}) == {"1F985": "bald-eagle"}
    assert names.drawn({"icons": {"x": {}}}, {"1f985-fe0f": "x"}) == {"1F985": "x"}
    assert (
        names.drawn({"icons": {"eagle": {}, "x": {}}}, {"1f9ff": "x"}) == {}
    )  # where codes are told, names are not read


def test_a_package_with_another_content_is_refused(tmp_path):
    package = packages.EMOJIBASE
    with pytest.raises(FileNotFoundError, match=r"npm pack emojibase-data@17.0.0` there, or --download"):
        packages.check(tmp_path, package)
    (tmp_path / package.file).write_bytes(b"another")
    with pytest.raises(ValueError, match="its SHA-256 is .*, not d01d"):
        packages.check(tmp_path, package)


def test_packing_and_reading_agree(tmp_path):
    pixels = np.arange(1600, dtype=np.uint8).reshape(1, 40, 40) % 32
    palettes = np.arange(96, dtype=np.uint8).reshape(1, 32, 3)
    about = {"concepts": {"1F985": ["eagle", "bird", "test"]}, "classes": ["1F985"]}
    content = build.packed([build.Drawing("noto", "eagle", "1F985")], about, palettes, pixels)
    (tmp_path / "drawings.xz").write_bytes(content)
    found = world.drawings(tmp_path / "drawings.xz")
    assert found.rows == (world.Drawing("noto", "eagle", "bird"),) and found.concepts == ("eagle",)
    assert found.splits == {"eagle": "test"}
    assert np.array_equal(found.images([0])[0], palettes[0][pixels[0]])


def test_the_bundled_model_is_that_of_its_card_and_both_files_are_small():
    from robustft.data.iconworld import model

    data = model.BUNDLED.read_bytes()
    assert hashlib.sha256(data).hexdigest() in model.BUNDLED.with_suffix(".md").read_text(encoding="utf-8")
    assert len(data) + (world.ASSETS / world.DRAWINGS).stat().st_size < 8_000_000


def test_the_bundled_model_is_far_above_chance_on_the_id_studios_which_it_never_saw(sets):
    from robustft import clip

    bundle = iconworld.load_clip()
    head = clip.class_embeddings(bundle.model, bundle.tokenizer, sets.classes, iconworld.TEMPLATES[:2])
    images, labels = sets.test.tensors((0.5,) * 3, (0.25,) * 3)
    prediction = (clip.encode_images(bundle.model, images[::4]) @ head.T).argmax(1)
    assert (prediction == labels[::4]).double().mean() > 0.1  # chance: 0.022


def test_a_set_whose_licence_has_changed_is_not_bundled(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "read", lambda *_: [{"license": {"spdx": "CC-BY-SA-4.0"}}])
    with pytest.raises(ValueError, match="@iconify-json/noto 1.2.9: its licence is CC-BY-SA-4.0; expected Apache-2.0"):
        build.build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_unpacks_into_a_new_folder_alone(few, tmp_path, capsys):
    main([str(tmp_path / "icons")])
    assert (tmp_path / "icons" / "metadata.csv").is_file()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "icons")])
    assert "unpack into a new folder" in capsys.readouterr().err
